"""The attention backend that vLLM calls."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from bitkv.integrations.vllm import refusals
from bitkv.integrations.vllm.choice import chosen_recipe, packing_of, page_bytes
from bitkv.integrations.vllm.step import Step, plan
from bitkv.integrations.vllm.store import LayerStore, Scoring
from bitkv.integrations.vllm.tails import Tails

_SPARE_SLOTS = 2


def num_slots(config: VllmConfig) -> int:
    """Blocks that may be unfinished at once."""
    return int(config.scheduler_config.max_num_seqs) + _SPARE_SLOTS


class PackedBackend(AttentionBackend):
    """Blocks are pages of the chosen recipe."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update = True
    # of the layers made last: specs are asked for without one
    config: ClassVar[VllmConfig | None] = None

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's list of backends."""
        from vllm.platforms import current_platform

        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["PackedImpl"]:
        return PackedImpl

    @staticmethod
    def get_builder_cls() -> type["StepBuilder"]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [chosen_recipe().page_size]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a head's part of a block is contiguous: a page

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # steps are planned from the host's lengths

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Bytes of a token and KV head: a page over its tokens, in the layer that takes most."""
        assert cls.config is not None, "vLLM asks for specs once it has made layers"
        size = page_bytes(cls.config, spec.head_size) // chosen_recipe().page_size
        return replace(spec, dtype=torch.uint8, state_content_bytes=size)


class NoLatentBackend(PackedBackend):
    """In the place of backends for latent attention, whose cache has no keys and values to pack."""

    @staticmethod
    def get_impl_cls() -> Any:
        raise ValueError(refusals.LATENT)


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Plans each step once for all layers."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refusals.check_engine(vllm_config, kv_cache_spec.block_size, chosen_recipe())
        self.tails = Tails(num_slots(vllm_config), kv_cache_spec.block_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        of = common_attn_metadata
        starts = of.query_start_loc_cpu[: of.num_reqs + 1].tolist()
        step = plan(starts, of.seq_lens[: of.num_reqs].tolist(), of.block_table_tensor, self.tails)
        self.tails.check()
        return step


class PackedImpl(AttentionImpl[Step]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **other: Any,
    ) -> None:
        refusals.check_layer(
            alibi_slopes=alibi_slopes,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            shared_with=kv_sharing_target_layer_name,
            sinks=sinks,
            other=other,
        )
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
        self.scoring = Scoring(float(scale), logits_soft_cap or None)
        self.config = PackedBackend.config = get_current_vllm_config()
        self.slots = num_slots(self.config)
        refusals.check_recipe(self.config, chosen_recipe())
        self._store: LayerStore | None = None

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of tokens `[N, Hq, D]` into `output`; their keys and values go into the cache."""
        if attn_metadata is None:  # a rehearsal, before there is a cache
            return output
        if self._store is None or self._store.pages.data_ptr() != kv_cache.data_ptr():
            self._store = self._new_store(layer.layer_name, kv_cache, key)
        self._store.run(attn_metadata, query, key, value, output, self.scoring)
        return output

    def _new_store(self, name: str, kv_cache: Tensor, key: Tensor) -> LayerStore:
        rank = get_tensor_model_parallel_rank()
        packing = packing_of(self.config, extract_layer_index(name), key, rank)
        pages = kv_cache.view(*kv_cache.shape[:2], -1)  # never a copy, to which nobody else would write
        return LayerStore(packing, pages, self.slots, key.dtype)
