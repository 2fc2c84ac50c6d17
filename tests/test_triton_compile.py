"""What the GPU kernels become for each architecture, found by compiling them: no GPU is needed.

They are compiled in a process of their own, since Triton's interpreter may be on in this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
NVIDIA = [
    {"bits": bits, "group": group, "target": target}
    for target in ("sm_80", "sm_90")
    for bits in (4, 2, 1)
    for group in (128, 32)
]
OTHERS = [
    {"bits": 16, "group": 128, "target": "sm_80"},
    {"bits": 16, "group": 128, "target": "sm_90", "dtype": "bfloat16"},
    {"bits": 8, "group": 128, "target": "sm_90"},
    {"bits": 2, "group": 128, "target": "sm_90", "heads": 16},
    {"bits": 4, "group": 128, "target": "sm_100"},
]
LOOKUPS = [
    {"bits": 8, "group": 0, "target": target, "channels": channels, "shared": shared}
    for target in ("sm_80", "sm_90")
    for channels, shared in ((8, "plain"), (2, "plain"), (4, "turned"), (8, "mapped"))
]
AMD = {"bits": 2, "group": 128, "target": "gfx942"}
SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # of a processor
COMPILE = """
import dataclasses, json, sys
from benchmarks import gpu_model
for line in sys.stdin:
    form = gpu_model.Format(**json.loads(line))
    kernel = gpu_model.compiled(form)
    loop = gpu_model.main_loop(kernel.assembly) if form.target[:2] == "sm" and kernel.assembly else []
    share = gpu_model.conversions_per_code(form, kernel)
    print(json.dumps({"loop": loop, "share": share, **dataclasses.asdict(kernel)}))
"""


def name(form: dict) -> str:
    return " ".join(map(str, form.values()))


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict]:
    """Compiled kernels by the name of their format."""
    forms = [*NVIDIA, *OTHERS, *LOOKUPS, AMD]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        input="".join(f"{json.dumps(form)}\n" for form in forms),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return {
        name(form): json.loads(line) for form, line in zip(forms, done.stdout.splitlines(), strict=True)
    }


CODES = pytest.mark.parametrize("form", NVIDIA, ids=name)
ALL = pytest.mark.parametrize("form", [*NVIDIA, *OTHERS, *LOOKUPS], ids=name)


@ALL
def test_the_work_is_done_by_tensor_cores(kernels, form):
    ptx = kernels[name(form)]["ptx"]
    assert "mma.sync" in ptx or "wgmma" in ptx or "tcgen05.mma" in ptx


@ALL
def test_two_blocks_fit_into_the_shared_memory_of_a_processor(kernels, form):
    block = kernels[name(form)]["shared"] + 1024  # which the system takes of each
    assert 2 * block <= SHARED_BYTES[form["target"]]


@CODES
def test_codes_are_masked_and_never_converted(kernels, form):
    kernel = kernels[name(form)]
    assert 0.5 < kernel["share"] <= 0.75
    assert not {"I2F", "I2FP", "F2I"} & {x.split(".")[0] for x in kernel["loop"]}


@pytest.mark.parametrize("form", [*NVIDIA, *LOOKUPS], ids=name)
def test_the_main_loop_spills_no_registers(kernels, form):
    loop = kernels[name(form)]["loop"]
    if not loop:
        pytest.skip("there is no disassembler")
    assert not {"LDL", "STL"} & {x.split(".")[0] for x in loop}


@pytest.mark.parametrize(("bits", "limit"), [(4, 1650), (2, 1600), (1, 1550)])
def test_the_main_loop_is_no_longer_than_it_was(kernels, bits, limit):
    """The share of the memory time that the schedulers need: see benchmarks/gpu_model.py."""
    loop = kernels[f"{bits} 128 sm_90"]["loop"]
    if not loop:
        pytest.skip("there is no disassembler")
    assert 1000 < len(loop) <= limit


GROWING = """
from bitkv.attention import triton_kernels, triton_merge
for kernel in (triton_kernels.attend_kernel, triton_merge.merge_kernel):
    print(*(p.name for p in kernel.params if p.do_not_specialize))
"""


def test_what_grows_with_a_cache_is_no_constant_of_a_kernel():
    """Triton would compile anew where a length becomes a multiple of 16: seconds amid a generation."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", GROWING], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.split() == ["table_width", "splits"], done.stderr


def test_nothing_keeps_amd_out(kernels):
    assert "v_mfma" in kernels[name(AMD)]["assembly"]
