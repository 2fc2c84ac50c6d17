"""What a codec learns from: keys or values of one layer, gathered over calibration text."""

from dataclasses import dataclass

from torch import Tensor

from bitkv.pages.base import Site
from bitkv.rope import Rope


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one layer for keys or for values.

    Args:
        site: "key" or "value".
        x: `[Hkv, N, D]`; keys as they are in the cache, after the rotary embedding.
        positions: int64 `[N]`, the places of the tokens in their texts.
        gradient: `[Hkv, N, D]`, of the text's loss with respect to `x`.
        queries: `[Hq, N, D]` of the same tokens, after the rotary embedding; for keys only.
        rope: the model's rotary embedding, where it has one that is known.
        seed: of whatever is drawn at random.
        late: `[Hkv, N, D]`, the gradient through the queries alone that come so much later that they
            find the token in a page; None where that is not known.
    """

    site: Site
    x: Tensor
    positions: Tensor
    gradient: Tensor
    queries: Tensor | None
    rope: Rope | None
    seed: int = 0
    late: Tensor | None = None

    def at(self, where: str, *, late: bool = False) -> tuple[Tensor, Tensor]:
        """`x` and `gradient` in float32, for keys "before" or "after" the rotary embedding.

        Args:
            late: take the late gradient, unless it is not known or no query of the text is late.

        Raises:
            ValueError: before it, and the model has none that is known.
        """
        chosen = self.late if late and self.late is not None and self.late.any() else self.gradient
        x, gradient = self.x.float(), chosen.float()
        if self.site == "value" or where == "after":
            return x, gradient
        if self.rope is None:
            raise ValueError(
                "this model has no rotary embedding that bitkv knows (default, linear, llama3 or yarn); "
                "use rope='after'"
            )
        # a rotation's transpose is its inverse; its factor does not matter to relative weights
        return self.rope.undo(x, self.positions), self.rope.undo(gradient, self.positions)
