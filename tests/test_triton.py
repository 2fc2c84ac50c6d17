"""The backend "triton" in Triton's interpreter (on a GPU, where there is one): every format, every shape.

The rule is that of tests/test_attention.py: twice the error of PyTorch's attention in 16 bits over the
dequantized cache, both against float64.
"""

import itertools

import pytest
import torch
from test_attention import (
    Case,
    assert_rule,
)
from test_cpu import KEYS, SHAPES, VALUES

from bitkv.codecs import Affine
from bitkv.recipe import Recipe

pytest.importorskip("triton")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
RATIOS = (1, 3, 8, 16, 32)


# --- every format ------------------------------------------------------------------------------------

ALL_VALUES = {shape: [v for *of, v in VALUES if tuple(of) == shape] for shape in SHAPES}


def formats() -> list[tuple[int, int, Affine, Affine]]:
    """Every format of keys beside one of values, so that all of those occur too."""
    turns = {shape: itertools.cycle(values) for shape, values in ALL_VALUES.items()}
    return [(page, head_dim, key, next(turns[page, head_dim])) for page, head_dim, key in KEYS]


@pytest.mark.parametrize(("page", "head_dim", "key", "value"), formats(), ids=str)
def test_every_format_of_codes(page, head_dim, key, value):
    number = KEYS.index((page, head_dim, key))
    recipe = Recipe(key, value, num_sink_tokens=0, recent_tokens=0, page_size=page)
    dtype = (HALF, BF16)[number % 2]
    ratio = RATIOS[number % 5]
    case = Case((page + 7,), repr(recipe), ratio, 1, head_dim, queries=-(-8 // ratio), dtype=dtype)
    assert_rule(case, "triton")
