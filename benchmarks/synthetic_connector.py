"""A KV connector that says every prompt has been read: decode at long contexts without a prefill."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)


class SyntheticConnector(KVConnectorBase_V1):
    """Loads nothing: whoever uses it fills the cache by other means."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """All tokens in whole blocks but the last block's, for prompts of ten blocks and more."""
        size = self._vllm_config.cache_config.block_size
        whole = (len(request.prompt_token_ids) - 1) // size * size
        return (whole - num_computed_tokens if whole >= 10 * size else 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to do."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to do."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def wait_for_save(self) -> None:
        """Nothing to do."""
