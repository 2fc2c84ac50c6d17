"""What the GPU kernels cost in instructions, found by compiling them: `python -m benchmarks.gpu_model`.

No GPU is needed. The attention kernel is compiled for each format, its main loop (one page a turn) is
found in the machine code, and its instructions are counted: all but those of the mask, past which a
branch leads where a page is seen entirely. A streaming multiprocessor has four schedulers, each of which
issues one instruction of a warp a cycle; beside that stands the time in which its share of the memory
delivers a page. Below 1, memory is the limit if enough loads are in flight: latencies are not modelled.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitkv.attention import triton as backend
from bitkv.attention import triton_kernels, triton_merge
from bitkv.pages import AffineFormat, CodebookFormat, PageFormat

RESULT = Path(os.path.relpath(Path(__file__).parent / "results" / "gpu_model.json"))
PROCESSORS, SCHEDULERS = 132, 4  # of an H200
BYTES_PER_S = 4.3e12  # what reading its memory may reach
CLOCKS = {"boost": 1.98e9, "sustained": 1.755e9}
MMA_CYCLES = 1.6  # of a processor, for one mma.sync.m16n8k16 at 0.62 of the peak of wgmma: an assumption
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)([^;]*);")
_IN_ASSEMBLY = re.compile(r"// begin inline asm\n(?:\s*\.loc.*\n)?\s*(?:and\.b32|shr\.u32)")


@dataclass(frozen=True)
class Format:
    """A page format, and what the kernel is compiled for."""

    bits: int
    group: int
    target: str = "sm_90"
    heads: int = 4  # query heads of a KV head
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "float16"
    channels: int = 0  # that share an index into a codebook; 0 for scales and zero points
    shared: str = "plain"  # keys "turned" by the rotary embedding, or numbers "mapped" linearly

    @property
    def given(self) -> backend.Given:
        """Tensors that pages share, of which nothing but their shapes is looked at."""
        if not self.channels:
            return backend.Given()
        shapes = {
            "book": (8, self.head_dim // self.channels, 2**self.bits, self.channels),
            "map": (8, self.head_dim, self.head_dim),
        }
        book, linear = (torch.empty(shape, device="meta") for shape in shapes.values())
        given = backend.Given(key_codebook=book, value_codebook=book)
        if self.shared == "turned":
            return given._replace(inv_freq=book)
        return given._replace(key_map=linear, value_map=linear) if self.shared == "mapped" else given

    @property
    def page(self) -> PageFormat:
        if self.channels:
            sizes = (self.bits, self.channels, self.head_dim, self.page_size, self.head_dim)
            return PageFormat(CodebookFormat("key", *sizes), CodebookFormat("value", *sizes))
        shape = (self.head_dim, self.page_size, self.dtype)
        return PageFormat(
            AffineFormat("key", self.bits, "channel", min(self.group, self.page_size), *shape),
            AffineFormat("value", self.bits, "token", min(self.group, self.head_dim), *shape),
        )


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Args:
        assembly: the machine's own, empty without a disassembler.
        registers, stack: of a thread: registers, and bytes of those that did not fit.
        shared: bytes of a block.
    """

    ptx: str
    assembly: str
    warps: int
    registers: int
    stack: int
    shared: int


def compiled(form: Format) -> Kernel:
    """The attention kernel, launched as for a decode step. The merge is compiled with it."""
    amd = form.target.startswith("gfx")
    launch = backend.launch_of(form.page, form.heads, amd=amd)
    variant = backend.variant_of(
        form.page,
        launch,
        form.given,
        causal=True,
        window=False,
        softcap=False,
        assembly=not amd,
        overlaps=not amd and int(form.target[3:]) >= 90,
        interpreted=False,
    )
    x = "*bf16" if form.dtype == "bfloat16" else "*fp16"
    target = GPUTarget("hip", form.target, 64) if amd else GPUTarget("cuda", int(form.target[3:]), 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    x = "*bf16" if form.dtype == "bfloat16" else "*fp16"
    parts = backend.Result("*fp32", "*fp32", "i32")
    signature = {
        "queries": backend.Queries(x, "*i64", *["i32"] * 7),
        "cache": backend.Cache("*u8", "*i32", "*i32", x, x, "*i32", *["i32"] * 4),
        "table_width": "i32",
        "score": backend.Score("fp32", "fp32", "i32"),
        "result": parts,
        "books": backend.Books("*fp16", "*fp16", "*fp32", "*fp32", "*fp16", "*fp32", "i32"),
        "F": "constexpr",
    }
    aligned = [*((0, i) for i in range(5)), *((1, i) for i in (*range(6), 7, 8)), (4, 0), (4, 1)]
    aligned += [(5, i) for i in range(6)]
    source = ASTSource(
        triton_kernels.attend_kernel,
        signature=signature,
        constexprs={(6,): variant},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    kernel = triton.compile(source, target=target, options=options)
    signature = {"parts": parts, "result": parts._replace(out=x), "splits": "i32"}
    merge = ASTSource(
        triton_merge.merge_kernel,
        signature=signature | dict.fromkeys(("CHANNELS", "SPLITS", "F"), "constexpr"),
        constexprs={(3,): 32, (4,): 64, (5,): variant},
    )
    triton.compile(merge, target=target)
    if amd:
        return Kernel("", kernel.asm["amdgcn"], launch.warps, 0, 0, kernel.metadata.shared)
    text, usage = _disassembled(kernel.asm["cubin"])
    return Kernel(kernel.asm["ptx"], text, launch.warps, *usage, kernel.metadata.shared)


def disassembler() -> str | None:
    """Triton's own `cuobjdump`, or one on the path."""
    own = _TOOLS / "cuobjdump"
    return str(own) if own.exists() else shutil.which("cuobjdump")


def _disassembled(cubin: bytes) -> tuple[str, tuple[int, int]]:
    tool = disassembler()
    if tool is None:
        return "", (0, 0)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = re.search(r"attend_kernel:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return text, (int(found[1]), int(found[2]))


def main_loop(sass: str) -> list[str]:
    """Instructions for a page that is seen entirely: of the loop with most work for tensor cores."""
    code = [
        (int(at, 16), bool(guard), name, rest) for at, guard, name, rest in _INSTRUCTION.findall(sass)
    ]
    jumps = {
        at: int(target[1], 16)
        for at, _, name, rest in code
        if name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest))
    }
    loops = [[x for x in code if start <= x[0] <= end] for end, start in jumps.items() if start < end]
    body = max(loops, key=lambda loop: sum("MMA" in name for _, _, name, _ in loop))
    for at, guarded, _, _ in body:
        inside = [name for place, _, name, _ in body if at < place < jumps.get(at, 0)]
        if guarded and 16 <= inside.count("FSEL") >= len(inside) / 4:  # the mask
            return [name for place, _, name, _ in body if not at < place < jumps[at]]
    return [name for _, _, name, _ in body]


def conversions_per_code(form: Format, kernel: Kernel) -> float:
    """Instructions that make a float16 of a code, a thread's counted as a thirty-second of a warp's."""
    found = len(_IN_ASSEMBLY.findall(kernel.ptx))
    return found * 32 * kernel.warps / (2 * form.page_size * form.head_dim)


def row(form: Format) -> dict[str, Any]:
    """Counts and times for one format."""
    kernel = compiled(form)
    loop = Counter(name.split(".")[0] for name in main_loop(kernel.assembly))
    instructions, mma = (n * kernel.warps for n in (loop.total(), loop["HMMA"]))
    memory = form.page.page_bytes * PROCESSORS / BYTES_PER_S
    issue = {name: instructions / SCHEDULERS / clock for name, clock in CLOCKS.items()}
    return {
        **asdict(form),
        "bits_per_element": form.page.bits_per_element,
        "triton": triton.__version__,
        "warps": kernel.warps,
        "registers": kernel.registers,
        "stack_bytes": kernel.stack,
        "shared_bytes": kernel.shared,
        "conversions_per_code": conversions_per_code(form, kernel),
        "instructions": instructions,
        "mma": mma,
        "spills": loop["LDL"] + loop["STL"],
        "memory_ns": 1e9 * memory,
        "issue_ns": {name: 1e9 * seconds for name, seconds in issue.items()},
        "issue_fraction": {name: seconds / memory for name, seconds in issue.items()},
        "tensor_fraction": mma * MMA_CYCLES / CLOCKS["boost"] / memory,
        "loop": dict(loop.most_common()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="where the rows go (%(default)s)")
    target = parser.parse_args(arguments).json
    if disassembler() is None:
        parser.error("there is no cuobjdump; install a Triton that carries one, or the CUDA toolkit")
    forms = [Format(bits, group) for bits, group in product((4, 2, 1), (128, 32))]
    forms += [Format(8, 0, channels=c, shared=s) for s, c in product(("plain", "turned"), (2, 4, 8))]
    rows = [row(form) for form in forms]
    print(
        "bits group channels shared instructions registers stack conversions  memory    issue of memory"
    )
    for r in rows:
        print(
            f"{r['bits']:4} {r['group']:5} {r['channels']:8} {r['shared']:6} {r['instructions']:12}",
            f"{r['registers']:9} {r['stack_bytes']:5} {r['conversions_per_code']:11.3f}",
            f"{r['memory_ns']:4.0f} ns",
            f"{r['issue_ns']['boost']:5.0f} ns {r['issue_fraction']['boost']:9.2f}",
        )
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
