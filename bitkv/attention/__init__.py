"""Attention over a packed cache: `attend` picks a backend that takes the request and runs it."""

import logging

import torch
from torch import Tensor

from bitkv.attention import cpu, reference, triton
from bitkv.attention.base import AttentionRequest, Backend
from bitkv.view import CacheView

__all__ = ["BACKENDS", "AttentionRequest", "Backend", "attend", "choose", "last_backend"]

BACKENDS: dict[str, Backend] = {b.name: b for b in (cpu.BACKEND, triton.BACKEND, reference.BACKEND)}
"""Every backend, in the order in which "auto" tries them."""

_log = logging.getLogger("bitkv")
_last: list[str] = []


def attend(
    q: Tensor,
    view: CacheView,
    *,
    scale: float | None = None,
    causal: bool = True,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of queries over a layer's packed cache, which already holds their own tokens.

    Args:
        q: `[B, Hq, Tq, D]`; Hq is a multiple of the cache's Hkv.
        view: `PagedLayer.view()`.
        scale: factor on the scores; `D ** -0.5` by default.
        causal: query i of Tq sees the tokens up to its own, the queries being the newest ones.
            False: every query sees every token.
        positions: int `[B, Tq]`, the last token each query sees (-1: none), instead of `causal`.
        window: each query sees the newest `window` tokens up to its own only.
        softcap: scores become `softcap * tanh(score / softcap)`.
        backend: "auto", or a key of `BACKENDS`, which then runs or raises; or what `choose` gave for
            such a request, for compiled code, where nobody can be asked.

    Returns:
        The output `[B, Hq, Tq, D]` in q's dtype, and the log-sum-exp of the scores, float32
        `[B, Hq, Tq]`. A query that sees nothing gets 0 and minus infinity.

    Raises:
        ValueError: arguments that do not fit, or every backend asked refused.
    """
    _check(q, view)
    _check_visibility(q, positions, window, softcap)
    if positions is None and not causal:
        positions = (view.lengths - 1).unsqueeze(1).expand(-1, q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    request = AttentionRequest(q, view, positions, scale, window, softcap)
    chosen = choose(request, backend) if isinstance(backend, str) else backend
    if not torch.compiler.is_compiling():
        _last[:] = [chosen.name]
    return chosen.run(request)


def choose(request: AttentionRequest, name: str = "auto") -> Backend:
    """The named backend, or with "auto" the first that does not refuse.

    Raises:
        ValueError: no such backend, or each one asked refused, with its sentence.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; choose from auto, {', '.join(BACKENDS)}")
    reasons: list[str] = []
    for backend in BACKENDS.values() if name == "auto" else (BACKENDS[name],):
        reason = backend.refuse(request)
        if reason is None:
            if name == "auto" and _last != [backend.name]:
                _log.info("attention backend: %s %s", backend.name, " ".join(reasons))
            return backend
        reasons.append(f"backend {backend.name!r} refused: {reason}")
    raise ValueError("; ".join(reasons))


def last_backend() -> str | None:
    """The name of the backend that ran last; compiled code does not count."""
    return _last[0] if _last else None


def _check(q: Tensor, view: CacheView) -> None:
    batch, (_, kv_heads, _, head_dim) = view.block_table.shape[0], view.hot_k.shape
    if q.dim() != 4 or q.shape[0] != batch or q.shape[3] != head_dim or q.shape[1] % kv_heads:
        raise ValueError(
            f"queries {tuple(q.shape)} do not fit a cache of batch {batch}, {kv_heads} KV heads and "
            f"head_dim {head_dim}; pass [B, Hq, Tq, D] with Hq a multiple of {kv_heads}"
        )
    if q.device != view.hot_k.device:
        raise ValueError(
            f"queries are on {q.device}, the cache on {view.hot_k.device}; move them to one device"
        )


def _check_visibility(
    q: Tensor, positions: Tensor | None, window: int | None, softcap: float | None
) -> None:
    if positions is not None and positions.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"positions {tuple(positions.shape)} do not fit queries {tuple(q.shape)}; pass [B, Tq]"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window} hides every token; pass 1 or more, or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap} does not bound scores; pass a positive number, or None")
