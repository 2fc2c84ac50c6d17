"""The compiled kernels `bitkv._native`: loaded on first use, for one instruction set of this CPU.

The environment variable BITKV_CPU_ISA, read on first use, names another instruction set than the best.
"""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""The numbers of dtypes that kernels take: `DType` in csrc/page.h."""


@cache
def _load() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return import_module("bitkv._native")
    except ModuleNotFoundError:
        reason = "are not built"
    except ImportError as error:
        reason = f"do not load ({error})"
    return (
        f"the native kernels {reason}; install a C++ compiler (Debian: apt install g++) "
        "and reinstall bitkv"
    )


def why_not() -> str | None:
    """Why no kernel can run, with the remedy; None if one can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def module() -> ModuleType:
    """`bitkv._native`, whose functions bitkv/_native.pyi describes.

    Raises:
        ValueError: it is not built.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise ValueError(loaded)
    return loaded


@cache
def isa() -> str:
    """The instruction set in use: the first argument of every kernel.

    Raises:
        ValueError: no kernel can run, or BITKV_CPU_ISA names an instruction set this CPU lacks.
    """
    choices: list[str] = module().isas()
    asked = os.environ.get("BITKV_CPU_ISA", choices[0])
    if asked not in choices:
        raise ValueError(
            f"BITKV_CPU_ISA={asked} is not an instruction set of this CPU; "
            f"choose from {', '.join(choices)}, or unset it"
        )
    return asked
