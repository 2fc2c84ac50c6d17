"""What a codec is: a frozen dataclass that turns a tensor into codes and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bitkv.codecs.compiled import encode_codes_natively, encode_natively
from bitkv.codecs.sample import Sample
from bitkv.pages import PartFormat, Quantized, Site
from bitkv.rope import Rope
from bitkv.shared import PLAIN, Shared

_PAGES_AT_ONCE = 16  # quantized together: bounds the float32 temporaries of a long prompt


@dataclass(frozen=True)
class Codec(ABC):
    """A quantization method for keys or values. Its `repr` is its text in recipes and results.

    Args:
        learned: what `calibrate` found for one layer, by name; not part of the text.
    """

    learned: Mapping[str, Tensor] = field(
        default_factory=dict, repr=False, compare=False, hash=False, kw_only=True
    )

    learns: ClassVar[bool] = False
    """Whether it does nothing useful before `calibrate`."""

    takes_nearest: ClassVar[bool] = False
    """Whether its codes are the nearest entries of the codebook and nothing else."""

    def __str__(self) -> str:
        """The shortest text that is parsed as this codec: without what is as by default."""
        words: list[str] = []
        for i, f in enumerate(f for f in fields(self) if f.repr):
            value = getattr(self, f.name)
            if value != f.default:
                words.append(repr(value) if len(words) == i else f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(words)})"

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: nobody changes it, nor what it has learned."""
        return self

    @property
    def centroids(self) -> int:
        """Entries of a codebook that it learns, 0 if none."""
        return 0

    @abstractmethod
    def part_format(
        self, site: Site, *, head_dim: int, page_size: int, dtype: torch.dtype, layout: str = "strided"
    ) -> PartFormat:
        """The bytes this codec makes of a page of a model whose tensors are `dtype`.

        Raises:
            ValueError: the codec cannot serve this shape.
        """

    @abstractmethod
    def quantize(self, x: Tensor, shared: Shared = PLAIN) -> Quantized:
        """Codes of `x` `[..., H, page_size, W]`, which is `Shared.to_pages` of tokens."""

    def shared(self, site: Site, *, heads: int, head_dim: int, rope: Rope | None = None) -> Shared:
        """What the pages of a layer with this many KV heads share.

        Args:
            rope: the model's rotary embedding, None where it has none or it is unknown.

        Raises:
            ValueError: nothing was learned that has to be, or for other shapes; or no `rope` where the
                codec keeps keys before it.
        """
        return PLAIN

    def learned_tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """What was learned under a name, whose first dimensions have to be `shape`.

        Raises:
            ValueError: nothing was, or for another model.
        """
        x = self.learned.get(name)
        if x is None:
            raise ValueError(
                f"{self!r} has learned nothing yet; pass a recipe file that `bitkv calibrate` wrote"
            )
        if tuple(x.shape[: len(shape)]) != shape:
            raise ValueError(
                f"{self!r} was calibrated for {name} {tuple(x.shape)}, and this model needs "
                f"{', '.join(map(str, shape))} first; calibrate it for this model"
            )
        return x

    def rope_of(self, site: Site, where: str, rope: Rope | None) -> Rope | None:
        """The embedding that pages lack: the model's for keys coded "before" it, else None.

        Raises:
            ValueError: it is needed and not known.
        """
        if site == "value" or where == "after":
            return None
        if rope is None:
            raise ValueError(
                f"{self!r} codes keys before the rotary embedding, and this model has none that bitkv "
                "knows (default, linear, llama3 or yarn); use rope='after'"
            )
        return rope

    def calibrate(self, sample: Sample) -> Self:
        """This codec fitted to tokens of one layer; itself where there is nothing to learn."""
        return self

    def rates(self, sample: Sample) -> Mapping[Self, float]:
        """This codec at every rate it could have in a layer, and the loss that each is expected to cost.

        Only sums and comparisons of losses mean something, among all layers, keys and values.
        """
        return {self: 0.0}

    def with_learned(self, learned: Mapping[str, Tensor]) -> Self:
        """This codec with what an earlier `calibrate` found."""
        return replace(self, learned=dict(learned))

    def encode(
        self,
        x: Tensor,
        form: Any,
        out: Tensor | None = None,
        *,
        shared: Shared = PLAIN,
        first_token: int = 0,
    ) -> Tensor:
        """Bytes `[n, H, nbytes]` of pages of tokens `x` `[n, H, page_size, head_dim]`.

        Args:
            form: the codec's own `part_format`.
            out: where to write them.
            shared: the codec's own `shared`.
            first_token: the place of the first token in its sequence; the pages follow each other.
        """
        if out is None:
            out = x.new_empty(*x.shape[:2], form.nbytes, dtype=torch.uint8)
        if shared.is_direct and self._encode_natively(x, form, out, shared):
            return out
        positions = torch.arange(first_token, first_token + len(x) * form.page_size, device=x.device)
        positions = positions.view(len(x), 1, form.page_size)
        for i in range(0, len(x), _PAGES_AT_ONCE):
            span = slice(i, i + _PAGES_AT_ONCE)
            y = shared.to_pages(x[span], positions[span])
            if shared.is_direct or not self._encode_natively(y, form, out[span], shared):
                out[span] = form.pack(self.quantize(y, shared))
        return out

    def _encode_natively(self, y: Tensor, form: Any, out: Tensor, shared: Shared) -> bool:
        """Write pages of `Shared.to_pages` by a kernel; False if there is none."""
        if shared.codebook is not None:
            return self.takes_nearest and encode_codes_natively(y, form, shared.codebook, out)
        return encode_natively(y, form, self.native_levels, out)

    @property
    def native_levels(self) -> int | None:
        """Its levels as native kernels count them (`Levels` in csrc/kernels.h); None: they have none."""
        return None

    def dequantize(self, q: Quantized, shared: Shared = PLAIN) -> Tensor:
        """Float32 `[..., H, page_size, W]`, from where `Shared.from_pages` goes on."""
        return q.dequantize(shared.codebook)
