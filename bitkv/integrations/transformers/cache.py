"""The cache to pass as `past_key_values`: packed layers, and those that Transformers keeps."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers import PreTrainedConfig as Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from bitkv.cache import PagedCache
from bitkv.integrations.transformers.attention import switch_attention
from bitkv.integrations.transformers.fingerprint import fingerprint
from bitkv.integrations.transformers.layer import PackedLayer
from bitkv.integrations.transformers.masks import MaskReader
from bitkv.integrations.transformers.rope import rope_of
from bitkv.integrations.transformers.static import StaticPackedLayer
from bitkv.layer import PagedLayer
from bitkv.recipe import Recipe
from bitkv.recipe.file import as_recipe


class PackedCache(Cache):  # type: ignore[misc]
    """A Transformers cache that keeps full-attention layers packed; pass it as `past_key_values`.

    Building one sets the model's attention to "bitkv" through its config. Other caches still work under
    that setting: their layers go to SDPA as before.

    Args:
        config: `model.config`.
        recipe: a `Recipe`, its text, such as "kivi2", or a recipe file that `bitkv calibrate` wrote.
        max_cache_len: take room for so many columns (tokens, padding included) with the first tokens;
            decode steps can then be compiled or captured in a CUDA graph, and `generate` compiles them
            on a GPU. By default the cache grows.
        exact_prefill: the first forward attends to exact keys and values and packs them afterwards.
            False: all attention reads the packed cache, as a quantized cache's perplexity needs.
        backend: "auto" or a backend's name; see `bitkv.attend`.

    Raises:
        ValueError: the recipe is wrong or cannot serve this model.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe | str,
        *,
        max_cache_len: int | None = None,
        exact_prefill: bool = True,
        backend: str = "auto",
    ) -> None:
        decoder = decoder_config(config)
        stock = _stock_layers(decoder, max_cache_len)
        self._max_cache_len = max_cache_len
        self.fingerprint = fingerprint(config)
        recipe = as_recipe(recipe)
        if recipe.calibration is not None and recipe.calibration.model != self.fingerprint:
            raise ValueError(
                f"the recipe was calibrated for another model than this {decoder.model_type}; calibrate "
                "it for this one with `bitkv calibrate`"
            )
        rope = rope_of(decoder)
        self.paged = PagedCache(recipe, len(stock), max_tokens=max_cache_len, rope=rope)
        full = [type(layer) in (DynamicLayer, StaticLayer) for layer in stock]
        if not any(isinstance(layer, (DynamicLayer, StaticLayer)) for layer in stock):
            raise ValueError(f"{decoder.model_type} has no KV cache for bitkv to pack")
        if not any(full):
            warnings.warn(
                f"no layer of {decoder.model_type} has full attention and nothing else; bitkv packs "
                "none",
                stacklevel=2,
            )
        _check_head_dims(decoder, {i: self.paged.layers[i] for i, is_full in enumerate(full) if is_full})
        switch_attention(decoder)
        masks = MaskReader()

        def packed(i: int) -> PackedLayer:
            if max_cache_len is None:
                return PackedLayer(self.paged, i, masks, exact_prefill=exact_prefill, backend=backend)
            return StaticPackedLayer(
                self.paged,
                i,
                masks,
                max_cache_len=max_cache_len,
                exact_prefill=exact_prefill,
                backend=backend,
            )

        super().__init__([packed(i) if full[i] else layer for i, layer in enumerate(stock)])

    @property
    def max_cache_len(self) -> int | None:
        """Tokens of a static cache, else None; a property, as Transformers 5.19 has one of that name."""
        return self._max_cache_len

    @property
    def recipe(self) -> Recipe:
        return self.paged.recipe

    @property
    def packed_layers(self) -> list[int]:
        """The layers that bitkv keeps; Transformers keeps the others."""
        return [i for i, layer in enumerate(self.layers) if isinstance(layer, PackedLayer)]

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers, those Transformers keeps included."""
        others = (x for layer in self._other_layers() for x in (layer.keys, layer.values))
        return self.paged.nbytes + sum(int(x.nbytes) for x in others if x is not None)

    @property
    def bits_per_element(self) -> float:
        """Measured bits per element of the packed layers, hot window included."""
        return self.paged.bits_per_element

    def save(self, path: Path | str) -> None:
        """Write the cache to a safetensors file, whole or not at all.

        Raises:
            ValueError: a layer of a kind that cannot be saved.
        """
        extra: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PackedLayer):
                layer._flush()
                extra[f"{i}.length"] = torch.tensor(layer.length)
                if layer.columns is not None:
                    extra[f"{i}.columns"] = layer.columns
            elif type(layer).__name__ == "DummyLayer":  # of layers that share an earlier one's cache
                continue
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise ValueError(f"layer {i} is a {type(layer).__name__}, which bitkv cannot save")
            elif layer.is_initialized:
                extra[f"{i}.length"] = torch.tensor(layer.cumulative_length)
                extra |= {f"{i}.keys": layer.keys, f"{i}.values": layer.values}
        self.paged.save(path, model=self.fingerprint, extra=extra)

    def load(self, path: Path | str, *, device: torch.device | str = "cpu") -> None:
        """Become the cache in a file that `save` wrote.

        Args:
            device: where the model is.

        Raises:
            ValueError: the file is damaged, or of another model or recipe; nothing is changed.
            FileNotFoundError: there is no such file.
        """
        extra = self.paged.load(path, model=self.fingerprint, device=device)
        for i, layer in enumerate(self.layers):
            length = int(extra.get(f"{i}.length", 0))
            if isinstance(layer, PackedLayer):
                layer.restore(length, extra.get(f"{i}.columns"))
            elif length:
                layer.lazy_initialization(extra[f"{i}.keys"], extra[f"{i}.values"])
                layer.keys, layer.values = extra[f"{i}.keys"], extra[f"{i}.values"]
                layer.cumulative_length = length

    def _other_layers(self) -> list[Any]:
        return [layer for layer in self.layers if isinstance(layer, (DynamicLayer, StaticLayer))]


def _stock_layers(decoder: Config, max_cache_len: int | None) -> list[Any]:
    """The layers that Transformers' own cache would have."""
    if max_cache_len is None:
        return list(DynamicCache(config=decoder).layers)
    return list(StaticCache(config=decoder, max_cache_len=max_cache_len).layers)


def decoder_config(config: Config) -> Config:
    """The text decoder's config, if it is one that bitkv can serve."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{config.model_type} is an encoder-decoder model; bitkv serves decoder-only models"
        )
    decoder = config.get_text_config(decoder=True)
    if getattr(decoder, "kv_lora_rank", None):
        raise ValueError(
            f"{decoder.model_type} uses multi-head latent attention (MLA), whose cache is already "
            "compressed; bitkv serves models with keys and values per head"
        )
    return decoder


def layer_config(decoder: Config, layer_idx: int) -> Config:
    """The config of one layer of a decoder: Gemma 4 has heads of several widths."""
    heterogeneous = getattr(decoder, "is_heterogeneous", False)
    return decoder.per_layer_config[layer_idx] if heterogeneous else decoder


def head_dim_of(layer: Config) -> int:
    """Channels of a head of a layer with this config."""
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)


def _check_head_dims(decoder: Config, layers: dict[int, PagedLayer]) -> None:
    """Refuse a recipe that cannot pack this model's heads now, not at the first token."""
    for i, layer in layers.items():
        config = layer_config(decoder, i)
        if getattr(config, "head_dim", None) or getattr(config, "num_attention_heads", None):
            layer.page_format(head_dim_of(config), torch.float16)
