"""Keys, values and queries of a model's layers on calibration text, with the gradients of its loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from bitkv.integrations.transformers.cache import decoder_config
from bitkv.integrations.transformers.stock import asks_by_name, capped, stock_attention

NAME = "bitkv-gather"
_QUERIES_AT_ONCE = 256  # whose scores are held together


@dataclass(frozen=True, eq=False)
class Gathered:
    """Tokens of one layer, after the rotary embedding.

    Args:
        q: `[Hq, N, D]`.
        k, v, k_gradient, v_gradient: `[Hkv, N, D]`; gradients in bfloat16, which keeps the small ones.
        k_late, v_late: gradients through the queries alone that come `late` tokens after or later.
        positions: int64 `[N]`, in their windows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_gradient: Tensor
    v_gradient: Tensor
    k_late: Tensor
    v_late: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Recorded:
    """Attention of one layer: tensors as the model has them, `[1, H, T, D]`; out is `[1, T, Hq, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None = None


def gather(
    model: Any,
    windows: Tensor,
    layers: Sequence[int],
    *,
    skip: int = 0,
    late: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> dict[int, Gathered]:
    """Some layers of a Transformers model on windows of ids `[n, T]`, on the CPU.

    Args:
        skip: first tokens of each window to leave out.
        late: how long a cache keeps a token as it is; queries from then on read it packed.
        advance: called after each window.
    """
    parts: dict[int, list[list[Tensor]]] = {layer: [] for layer in layers}
    with _recording(model, set(layers)) as recorded, _frozen(model), torch.enable_grad():
        for ids in windows.to(model.device):
            embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            for layer, x in recorded.items():
                assert x.k.grad is not None
                assert x.v.grad is not None
                gradients = (x.k.grad[0], x.v.grad[0], *late_gradients(x, late))
                tensors = (*(y.detach()[0] for y in (x.q, x.k, x.v)), *(y.bfloat16() for y in gradients))
                parts[layer].append([y[:, skip:].cpu() for y in tensors])
            recorded.clear()
            advance()
    positions = torch.arange(skip, windows.shape[1]).repeat(len(windows))
    found = {
        i: [torch.cat(x, dim=1) for x in zip(*rows, strict=True)] for i, rows in parts.items() if rows
    }
    return {i: Gathered(*tensors, positions) for i, tensors in found.items()}  # type: ignore[call-arg]


@torch.no_grad()
def late_gradients(x: Recorded, late: int) -> tuple[Tensor, Tensor]:
    """Gradients `[Hkv, T, D]` of the loss by keys and by values, through late queries alone.

    What a token's own neighbourhood reads of it never comes from a page, and it is most of the gradient:
    in layers that look at neighbours only, nearly all. In closed form, with attention computed again,
    since autograd adds up all queries.
    """
    assert x.out.grad is not None
    repeats = x.q.shape[1] // x.k.shape[1]
    q = x.q[0].float()
    k, v = (y[0].float().repeat_interleave(repeats, dim=0) for y in (x.k, x.v))
    out, slope = (y[0].float().transpose(0, 1) for y in (x.out, x.out.grad))
    mean = (out * slope).sum(-1, keepdim=True)
    by_key, by_value = torch.zeros_like(k), torch.zeros_like(v)
    place = torch.arange(k.shape[1], device=k.device)
    for rows in torch.split(place, _QUERIES_AT_ONCE):
        age = rows[:, None] - place
        seen = age >= 0 if x.mask is None else x.mask[0, 0, rows]
        scores = capped(q[:, rows] @ k.mT * x.scale, x.softcap)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) * (age >= late)
        by_value += weights.mT @ slope[:, rows]
        by_score = weights * (slope[:, rows] @ v.mT - mean[:, rows])
        if x.softcap is not None:
            by_score *= 1 - (scores / x.softcap).square()
        by_key += by_score.mT @ q[:, rows] * x.scale
    by_key, by_value = (torch.unflatten(y, 0, (-1, repeats)).sum(1) for y in (by_key, by_value))
    return by_key, by_value


@contextmanager
def _recording(model: Any, layers: set[int]) -> Iterator[dict[int, Recorded]]:
    """The attention of a forward, by layer."""
    recorded: dict[int, Recorded] = {}

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out = stock_attention(module, query, key, value, mask, **kwargs)
        if module.layer_idx in layers:
            for x in (key, value, out):
                x.retain_grad()
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            tensors = query, key, value, out, mask
            recorded[module.layer_idx] = Recorded(*tensors, scale, kwargs.get("softcap"))
        return out, None

    decoder = decoder_config(model.config)
    if not asks_by_name(decoder):
        raise ValueError(
            f"{decoder.model_type} computes attention in its own code, where bitkv cannot look on; use "
            "a recipe that need not learn"
        )
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
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
