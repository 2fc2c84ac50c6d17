"""The paged cache of a model: one `PagedLayer` a layer, moved together, saved to one file."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitkv.digests import digest_of
from bitkv.files import replacing
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe
from bitkv.recipe.file import as_recipe
from bitkv.rope import Rope
from bitkv.snapshot import restore, state
from bitkv.static import StaticLayer
from bitkv.view import Usage

_MAGIC = "bitkv cache 1"


class PagedCache:
    """Packed keys and values of `num_layers` layers.

    Args:
        recipe: a `Recipe` or its text.
        num_layers: layers of the model; a layer that never gets tokens costs nothing.
        layout: order of codes inside pages; see `PagedLayer`.
        max_tokens: take room for so many tokens a sequence at once; layers are then `StaticLayer`s,
            whose step can be compiled, or replayed as a CUDA graph. By default layers grow.
        rope: the model's rotary embedding, for recipes that keep keys as they are before it.

    Raises:
        ValueError: a text that names no recipe, or a recipe for another number of layers.
    """

    def __init__(
        self,
        recipe: Recipe | str,
        num_layers: int,
        *,
        layout: str | None = None,
        max_tokens: int | None = None,
        rope: Rope | None = None,
    ) -> None:
        self.recipe = as_recipe(recipe)
        self.recipe.check_layers(num_layers)
        self.max_tokens, self.rope = max_tokens, rope
        self.layers = [self._new_layer(i, layout) for i in range(num_layers)]

    def _new_layer(self, layer_idx: int, layout: str | None) -> PagedLayer:
        new = PagedLayer if self.max_tokens is None else partial(StaticLayer, max_tokens=self.max_tokens)
        return new(
            *self.recipe.codecs(layer_idx),
            num_sink_tokens=self.recipe.num_sink_tokens,
            recent_tokens=self.recipe.recent_tokens,
            page_size=self.recipe.page_size,
            layout=layout,
            rope=self.rope,
        )

    def step(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Add tokens `[B, Hkv, T, D]` to a layer on the device alone; see `StaticLayer.step`.

        Raises:
            ValueError: the cache was made without `max_tokens`, or the tokens do not fit.
        """
        layer = self.layers[layer_idx]
        if not isinstance(layer, StaticLayer):
            raise ValueError("this cache grows; make it with max_tokens to step, or append")
        layer.step(k, v)

    def append(self, layer_idx: int, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Add tokens `[B, Hkv, T, D]` to a layer; see `PagedLayer.append`."""
        self.layers[layer_idx].append(k, v, real)

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first `lengths[b]` tokens of each sequence; see `PagedLayer.crop`."""
        for layer in self.layers:
            layer.crop(lengths)

    def reorder(self, beam_idx: Tensor) -> None:
        """Make sequence b the present `beam_idx[b]`. Tables move, pages stay."""
        for layer in self.layers:
            layer.gather(beam_idx)

    def repeat(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, sharing its pages."""
        for layer in self.layers:
            if not layer.is_empty:
                layer.gather(torch.arange(len(layer.lengths)).repeat_interleave(repeats))

    def select(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self.reorder(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        for layer in self.layers:
            layer.reset()

    @property
    def nbytes(self) -> int:
        """Allocated bytes, free pages and unused window included."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def usage(self) -> Usage:
        """Bytes and elements that tokens occupy, summed over layers."""
        return Usage(*map(sum, zip(*(layer.usage for layer in self.layers), strict=True)))

    @property
    def bits_per_element(self) -> float:
        """Measured bits per element of K and V: codes, scales, zero points and hot window."""
        usage = self.usage
        elements = usage.page_elements + usage.hot_elements
        return 8 * (usage.page_bytes + usage.hot_bytes) / max(elements, 1)

    @property
    def packed_bits_per_element(self) -> float:
        """Measured bits per element beyond the hot window; 0 while no page is full."""
        usage = self.usage
        return 8 * usage.page_bytes / max(usage.page_elements, 1)

    def save(self, path: Path | str, *, model: str, extra: Mapping[str, Tensor] | None = None) -> None:
        """Write everything to a safetensors file, whole or not at all.

        Args:
            model: fingerprint of the model, checked by `load`.
            extra: further tensors to keep in the file, returned by `load`.

        Raises:
            ValueError: there is no folder to write to.
        """
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous()
            for i, layer in enumerate(self.layers)
            for name, tensor in state(layer).items()
        }
        tensors |= {f"extra.{name}": tensor.contiguous() for name, tensor in (extra or {}).items()}
        metadata = {
            "format": _MAGIC,
            "recipe": self.recipe.identity,
            "model": model,
            "num_layers": str(len(self.layers)),
            "checksum": digest_of(tensors),
        }
        with replacing(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    def load(
        self, path: Path | str, *, model: str, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Become the cache in a file that `save` wrote; returns its extra tensors.

        Args:
            model: fingerprint of the model, as given to `save`.
            device: where the tensors shall live.

        Raises:
            ValueError: the file is damaged, or of another model or recipe; nothing is changed.
            FileNotFoundError: there is no such file.
        """
        metadata, tensors = _read(Path(path), str(device))
        expected = {
            "recipe": self.recipe.identity,
            "model": model,
            "num_layers": str(len(self.layers)),
        }
        for name, mine in expected.items():
            if metadata.get(name) != mine:
                raise ValueError(
                    f"{path} was saved with {name} {metadata.get(name)}, this cache has {mine}; "
                    f"load it into a cache with the same {name}"
                )
        fresh = [self._new_layer(i, layer.layout) for i, layer in enumerate(self.layers)]
        for i, layer in enumerate(fresh):
            try:
                restore(layer, _below(tensors, f"layers.{i}."))
            except KeyError as error:
                raise ValueError(f"{path} lacks tensor {error} of layer {i}; save it anew") from None
        self.layers[:] = fresh
        return _below(tensors, "extra.")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read(path: Path, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no cache file {path}; save one first")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a cache file ({error}); save it anew") from None
    if metadata.get("format") != _MAGIC:
        raise ValueError(f"{path} is not a bitkv cache file; pass one that `save` wrote")
    if metadata.get("checksum") != digest_of(tensors):
        raise ValueError(f"{path} is damaged: its checksum does not match; save it anew")
    return metadata, tensors
