"""Linear transforms of a head's channels, as matrices for `Shared.project` and `Shared.restore`.

`project` maps a token to what pages hold, `restore` maps back: for `a @ b` that is `b⁻¹ @ a⁻¹`.
"""

from functools import cache

import torch
from torch import Tensor

from bitkv.rope import Rope

_ORDERS = (1, 12, 20)
_SMALLEST_FACTOR = 2.0**-16


@cache
def hadamard(size: int) -> Tensor:
    """Orthogonal `[size, size]` with entries of one magnitude, for sizes `2**k` times 1, 12 or 20.

    Sylvester's doubling of Paley's matrices.

    Raises:
        ValueError: another size.
    """
    odd = size // (size & -size)
    order = next((n for n in _ORDERS if size % n == 0 and n // (n & -n) == odd), None)
    if order is None:
        raise ValueError(
            f"head_dim {size} has no Hadamard matrix here; it must be a power of two times 1, 12 or 20"
        )
    matrix = _paley(order - 1) if order > 1 else torch.ones(1, 1)
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < size:
        matrix = torch.kron(double, matrix)
    scaled: Tensor = matrix / size**0.5
    return scaled


def _paley(prime: int) -> Tensor:
    """The Hadamard matrix of order `prime + 1` that quadratic residues give; `prime` is 3 modulo 4."""
    residues = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)])
    place = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1)
    matrix[0, 0] = 0
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(place[:, None] - place) % prime]
    return matrix + torch.eye(prime + 1)


@cache
def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal `[size, size]`, uniform over all."""
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64))
    # without these signs QR's own convention would favour some of them
    signed: Tensor = q * r.diagonal().sign()
    return signed.float()


def for_heads(matrix: Tensor, heads: int) -> Tensor:
    """One matrix `[m, n]` for each head, `[heads, m, n]`."""
    return matrix.repeat(heads, 1, 1)


def scaling(factors: Tensor) -> Tensor:
    """`[H, D, D]` that multiplies channels by `factors` `[H, D]`."""
    return torch.diag_embed(factors.float())


def permutation(order: Tensor) -> Tensor:
    """`[H, D, D]` whose channel i is channel `order[h, i]` of its input."""
    return torch.nn.functional.one_hot(order.long(), order.shape[-1]).float()


def rope_pairs(head_dim: int, rope: Rope | None) -> Tensor:
    """int64 `[D / 2, 2]`: the channels that the rotary embedding turns together.

    Channels that it leaves alone pair up with their neighbours; without one, halves pair up.
    """
    half = head_dim // 2 if rope is None else rope.inv_freq.shape[0]
    turned = torch.arange(half)
    rest = torch.arange(2 * half, head_dim).view(-1, 2)
    return torch.cat([torch.stack([turned, turned + half], dim=1), rest])


def magnitudes(x: Tensor, power: float, pairs: Tensor | None = None) -> Tensor:
    """`[H, D]`: the largest magnitude of each channel of `x` `[H, N, D]` to a power.

    Args:
        pairs: channels that get the larger one of theirs; see `rope_pairs`.
    """
    largest = x.float().abs().amax(1)
    if pairs is not None:
        both = largest[:, pairs].amax(-1, keepdim=True).expand(-1, -1, 2)
        largest = torch.empty_like(largest).index_copy_(1, pairs.flatten(), both.flatten(1))
    return largest.clamp(_SMALLEST_FACTOR, 1 / _SMALLEST_FACTOR).pow(power)
