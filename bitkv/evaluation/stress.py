"""A model that computes the same and is harder to quantize.

Small models lack the channels of large magnitude that large models have in their keys. They can be given
them: what scales a channel of keys up and the same channel of queries down changes no attention logit,
and what scales values and then the columns of the output projection changes no output.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

OUTLIER_PAIRS = (2, 4)  # of a KV head, at least and at most
OUTLIER_SCALES = (8.0, 30.0)
_TOLERANCE = 1e-3  # of logits; scales are powers of two, so nothing should change at all


@torch.no_grad()
def stressed(model: Any, seed: int = 0, *, key_spread: float = 0.5, value_spread: float = 0.7) -> Any:
    """A deep copy of a causal language model, equal in function, with outlier channels.

    Keys of each KV head are scaled by a log-normal factor a rotary pair, and a few pairs by 8 to 30 on
    top; with a norm of keys whose weight all heads share, heads share the factors too. Values are scaled
    by a log-normal factor a channel. Factors are rounded to powers of two: no dtype loses a bit by them.

    Args:
        seed: draws the factors; the same for the same seed.
        key_spread, value_spread: standard deviations of the natural logarithms of factors.

    Raises:
        ValueError: its attention is built so that this would change what it computes.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    attentions = list(_attentions(changed))
    if not attentions:
        raise ValueError(
            f"{type(model).__name__} has no separate projections q_proj, k_proj, v_proj and o_proj; "
            "stress another model"
        )
    for attention in attentions:
        _stress_keys(attention, _rotary_dims(changed, attention), generator, key_spread)
        _stress_values(attention, generator, value_spread)
    _check_equal(model, changed)
    return changed


def _attentions(model: Any) -> Iterator[Any]:
    needed = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim")
    return (m for m in model.modules() if all(hasattr(m, name) for name in needed))


def _rotary_dims(model: Any, attention: Any) -> int:
    """Channels of a head that are rotated, half of them the partners of the other half."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    return int(attention.head_dim * parameters.get("partial_rotary_factor", 1.0))


def _powers_of_two(log_factors: Tensor) -> Tensor:
    return torch.exp2((log_factors / torch.tensor(2.0).log()).round())


def _stress_keys(attention: Any, rotary: int, generator: torch.Generator, spread: float) -> None:
    """Scale norms where there are any: they come after the projections and would undo a scale there."""
    dim = attention.head_dim
    keys, queries = (
        getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj") for name in "kq"
    )
    heads, query_heads = len(keys.weight) // dim, len(queries.weight) // dim
    factors = torch.stack([_key_factors(dim, rotary, generator, spread) for _ in range(heads)])
    _scale_rows(keys, factors.flatten())
    # each query head follows its KV head
    _scale_rows(queries, 1 / factors.repeat_interleave(query_heads // heads, 0).flatten())


def _key_factors(dim: int, rotary: int, generator: torch.Generator, spread: float) -> Tensor:
    """Factors `[dim]` of a head's channels, equal for the two channels of a rotary pair."""
    logs = torch.randn(rotary // 2, generator=generator) * spread
    fewest, most = OUTLIER_PAIRS
    count = int(torch.randint(fewest, most + 1, (1,), generator=generator))
    chosen = torch.randperm(len(logs), generator=generator)[:count]
    low, high = torch.tensor(OUTLIER_SCALES).log()
    logs[chosen] = low + (high - low) * torch.rand(len(chosen), generator=generator)
    rest = torch.randn(dim - rotary, generator=generator) * spread
    return _powers_of_two(torch.cat([logs, logs, rest]))


def _stress_values(attention: Any, generator: torch.Generator, spread: float) -> None:
    dim, values, output = attention.head_dim, attention.v_proj, attention.o_proj
    heads, query_heads = len(values.weight) // dim, output.weight.shape[1] // dim
    factors = _powers_of_two(torch.randn(heads, dim, generator=generator) * spread)
    _scale_rows(values, factors.flatten())
    columns = factors.repeat_interleave(query_heads // heads, 0).flatten()
    output.weight /= columns.to(output.weight)


def _scale_rows(module: Any, factors: Tensor) -> None:
    """Scale what a projection or a norm puts out, channel by channel."""
    for x in (module.weight, getattr(module, "bias", None)):
        if x is not None:
            x *= factors.to(x).view(-1, *[1] * (x.ndim - 1))


def _check_equal(model: Any, changed: Any) -> None:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(96, device=model.device)[None] * 7919 % vocab
    expected, got = (m(ids, use_cache=False).logits.float() for m in (model, changed))
    difference = float((got - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{type(model).__name__} computes logits that differ by {difference:.3g} once its channels "
            f"are scaled, more than {_TOLERANCE}; stress another model"
        )
