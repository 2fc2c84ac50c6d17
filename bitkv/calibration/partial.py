"""Layers that a calibration has finished, so that it can be taken up again."""

from pathlib import Path

from safetensors.torch import save_file

from bitkv.codecs import Codec
from bitkv.digests import digest_of
from bitkv.files import replacing
from bitkv.recipe import Recipe
from bitkv.recipe.file import open_tensors, with_learned


class Partial:
    """Layers that a calibration has finished, kept in a folder so that it can be taken up again.

    Args:
        folder: where; None keeps them in memory.
        origin: says what they were made from; files of another origin, or damaged, are removed.
    """

    def __init__(self, folder: Path | None, recipe: Recipe, origin: str) -> None:
        self.folder, self.origin = folder, f"{recipe!r} {origin}"
        self._pairs: dict[int, tuple[Codec, Codec]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                metadata, tensors = open_tensors(path)
            except ValueError:  # damaged
                metadata, tensors = {}, {}
            if metadata != {"origin": self.origin, "digest": digest_of(tensors)}:
                path.unlink()
                continue
            layer_idx = int(path.stem)
            self._pairs[layer_idx] = with_learned(tensors, layer_idx, recipe.codecs(layer_idx))

    def __contains__(self, layer_idx: int) -> bool:
        return layer_idx in self._pairs

    def codecs(self, layer_idx: int) -> tuple[Codec, Codec]:
        """The codecs of a layer that is done."""
        return self._pairs[layer_idx]

    def add(self, layer_idx: int, pair: tuple[Codec, Codec]) -> None:
        """A layer is done."""
        self._pairs[layer_idx] = pair
        if self.folder is not None:
            tensors = {
                f"{layer_idx}.{site}.{name}": x
                for site, codec in zip(("key", "value"), pair, strict=True)
                for name, x in codec.learned.items()
            }
            with replacing(self.folder / f"{layer_idx}.safetensors") as temporary:
                save_file(tensors, temporary, {"origin": self.origin, "digest": digest_of(tensors)})
