"""Keys, values and queries of a model's layers on calibration text, with the gradients of its loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitkv.integrations.transformers.cache import decoder_config

NAME = "bitkv-gather"


@dataclass(frozen=True, eq=False)
class Gathered:
    """Tokens of one layer, after the rotary embedding.

    Args:
        q: `[Hq, N, D]`.
        k, v, k_gradient, v_gradient: `[Hkv, N, D]`; gradients in bfloat16, which keeps the small ones.
        positions: int64 `[N]`, in their windows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_gradient: Tensor
    v_gradient: Tensor
    positions: Tensor


def gather(
    model: Any,
    windows: Tensor,
    layers: Sequence[int],
    *,
    skip: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> dict[int, Gathered]:
    """Some layers of a Transformers model on windows of ids `[n, T]`, on the CPU.

    Args:
        skip: first tokens of each window to leave out.
        advance: called after each window.
    """
    parts: dict[int, list[list[Tensor]]] = {layer: [] for layer in layers}
    with _recording(model, set(layers)) as recorded, _frozen(model), torch.enable_grad():
        for ids in windows.to(model.device):
            embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            for layer, (q, k, v) in recorded.items():
                gradients = (x.grad for x in (k, v) if x.grad is not None)
                tensors = (q.detach(), k.detach(), v.detach(), *(x.bfloat16() for x in gradients))
                parts[layer].append([x[0, :, skip:].cpu() for x in tensors])
            recorded.clear()
            advance()
    positions = torch.arange(skip, windows.shape[1]).repeat(len(windows))
    found = {
        i: [torch.cat(x, dim=1) for x in zip(*rows, strict=True)] for i, rows in parts.items() if rows
    }
    return {i: Gathered(*tensors, positions) for i, tensors in found.items()}  # type: ignore[call-arg]


@contextmanager
def _recording(model: Any, layers: set[int]) -> Iterator[dict[int, tuple[Tensor, ...]]]:
    """The queries, keys and values of a forward, by layer."""
    recorded: dict[int, tuple[Tensor, ...]] = {}

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx in layers:
            key.retain_grad()
            value.retain_grad()
            recorded[module.layer_idx] = query, key, value
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder = decoder_config(model.config)
    before = decoder._attn_implementation
    decoder._attn_implementation = NAME
    try:
        yield recorded
    finally:
        decoder._attn_implementation = before


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Weights need no gradients of their own here, which would take as much memory again."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, needed in before.items():
            p.requires_grad_(needed)
