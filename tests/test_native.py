"""The native kernels: which instruction set runs, refusals, threads, torch.compile, the binary."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitkv import native
from bitkv.attention import BACKENDS, AttentionRequest
from bitkv.codecs import Affine, Unquantized
from bitkv.layer import PagedLayer
from bitkv.recipe import parse

ISAS = ("amx", "avx512", "avx512vnni", "avx2", "portable")
BUILT = native.why_not() is None
needs_kernels = pytest.mark.skipif(not BUILT, reason="the native kernels are not built")
REFUSE = BACKENDS["cpu"].refuse


def filled(recipe="kivi2", lengths=(700, 300), head_dim=64, layout=None) -> PagedLayer:
    settings, longest = parse(recipe), max(lengths)
    layer = PagedLayer(
        *settings.codecs(0),
        num_sink_tokens=settings.num_sink_tokens,
        recent_tokens=settings.recent_tokens,
        page_size=settings.page_size,
        layout=layout,
    )
    k, v = torch.randn(2, len(lengths), 2, longest, head_dim).half()
    layer.append(k, v, torch.arange(longest) < torch.tensor(lengths)[:, None])
    return layer


def request(layer: PagedLayer, queries: int = 1) -> AttentionRequest:
    view = layer.view()
    batch, _, _, head_dim = view.hot_k.shape
    q = torch.randn(batch, 4, queries, head_dim).to(view.hot_k.dtype)
    positions = (view.lengths[:, None] - 1).expand(batch, queries)
    return AttentionRequest(q, view, positions, head_dim**-0.5)


def in_fresh_python(code: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: x for name, x in os.environ.items() if name != "BITKV_CPU_ISA"}
    environment |= {} if isa is None else {"BITKV_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


# --- loading ------------------------------------------------------------------------------------


def test_the_kernels_are_built_wherever_there_is_a_compiler():
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    assert BUILT or compiler is None, f"{compiler} is here; install bitkv again"


def test_importing_the_core_does_not_load_the_kernels():
    code = "import bitkv.cache, bitkv.attention, sys; print('bitkv._native' in sys.modules)"
    assert in_fresh_python(code).stdout.strip() == "False"


@needs_kernels
def test_instruction_sets_come_best_first_and_portable_is_always_there():
    found = native.module().isas()
    assert found[-1] == "portable"
    assert found == [isa for isa in ISAS if isa in found]


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_names_the_instruction_set(isa):
    if isa not in native.module().isas():
        pytest.skip(f"this CPU has no {isa}")
    assert in_fresh_python("from bitkv import native; print(native.isa())", isa).stdout == f"{isa}\n"


@needs_kernels
@pytest.mark.parametrize("isa", ["sse9", ""])
def test_an_instruction_set_that_is_not_there_is_an_error_with_the_choices(isa):
    done = in_fresh_python("from bitkv import native; native.isa()", isa)
    choices = ", ".join(native.module().isas())
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: BITKV_CPU_ISA={isa} is not an instruction set of this CPU; "
        f"choose from {choices}, or unset it"
    )


def test_without_the_module_attention_runs_by_the_reference_and_says_what_is_missing():
    code = """
import sys; sys.modules["bitkv._native"] = None
import torch
from bitkv.attention import attend, last_backend
from bitkv.codecs import Affine
from bitkv.layer import PagedLayer
sizes = {"num_sink_tokens": 0, "recent_tokens": 0, "page_size": 64}
layer = PagedLayer(Affine(2, "channel"), Affine(2, "token"), **sizes)
k = torch.randn(1, 1, 100, 64)
layer.append(k, k)
attend(k[:, :, :1], layer.view())
print(last_backend(), layer.format.key.layout)
attend(k[:, :, :1], layer.view(), backend="cpu")
"""
    done = in_fresh_python(code)
    assert done.stdout == "reference lanes\n"
    assert done.stderr.splitlines()[-1] == (
        "ValueError: backend 'cpu' refused: the native kernels are not built; "
        "install a C++ compiler (Debian: apt install g++) and reinstall bitkv"
    )


# --- refusals -----------------------------------------------------------------------------------


@needs_kernels
def test_auto_takes_the_kernels_on_a_cpu():
    assert next(iter(BACKENDS)) == "cpu"
    assert REFUSE(request(filled())) is None


@needs_kernels
def test_what_the_kernels_do_not_take_is_refused_with_a_sentence():
    wide = request(filled("fp16", head_dim=272))
    assert REFUSE(wide) == "it got head_dim 272, and takes at most 256"
    strided = request(filled(layout="strided"))
    assert REFUSE(strided) == "it got pages of the layout 'strided', and takes 'lanes'"
    good = request(filled())
    double = replace(good, q=good.q.double())
    assert REFUSE(double) == "it got torch.float64, and takes float16, bfloat16 and float32"
    elsewhere = replace(good, q=good.q.to("meta"))
    assert REFUSE(elsewhere) == "it got tensors on meta, and takes tensors on the CPU"
    form = good.view.format
    narrow = replace(good.view, format=replace(form, key=replace(form.key, group_size=8)))
    assert REFUSE(replace(good, view=narrow)) == "it got groups of 8, and takes multiples of 16"


@needs_kernels
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("packed_len", [6400, 0], "packed_len 6400 of sequence 0 does not fit a block table of 4 pages"),
        ("packed_len", [0, -1], "packed_len -1 of sequence 1 does not fit a block table of 4 pages"),
        ("hot_len", [9, 999], "hot_len 999 of sequence 1 does not fit a hot window of 192 tokens"),
        (
            "block_table",
            [[0, 1, 2, 3], [4, 99, 0, 0]],
            "the block table of sequence 1 names a page outside a pool of 5",
        ),
    ],
)
def test_lengths_and_pages_outside_their_tensors_are_refused(name, value, sentence):
    good = request(filled())
    view = replace(good.view, packed_len=torch.tensor([512, 256]).int())
    view = replace(view, **{name: torch.tensor(value).int()})
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        BACKENDS["cpu"].run(replace(good, view=view))


# --- the operator -------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("positions", [True, False])
def test_the_operator_passes_torchs_own_checks(positions):
    made = request(filled(), queries=3)
    made = made if positions else replace(made, positions=None)
    operands = [list(x) if isinstance(x, tuple) else x for x in made.operands]  # the schema says lists
    torch.library.opcheck(torch.ops.bitkv.cpu_attend, tuple(operands))


@needs_kernels
def test_attention_compiles_into_one_graph():
    made = request(filled(), queries=2)
    expected = BACKENDS["cpu"].run(made)

    def doubled(q: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = BACKENDS["cpu"].run(replace(made, q=q * 1))
        return 2 * out, lse

    out, lse = torch.compile(doubled, fullgraph=True, backend="aot_eager")(made.q)
    assert torch.equal(out, 2 * expected[0])
    assert torch.equal(lse, expected[1])


@needs_kernels
def test_tensors_need_not_be_contiguous():
    made = request(filled(), queries=3)
    expected = BACKENDS["cpu"].run(made)
    view = made.view
    hot_k, hot_v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (view.hot_k, view.hot_v))
    moved = replace(view, hot_k=hot_k, hot_v=hot_v, block_table=view.block_table.long())
    q = made.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (q, hot_k, hot_v, made.positions))
    got = BACKENDS["cpu"].run(replace(made, q=q, view=moved))
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# --- threads ------------------------------------------------------------------------------------


@pytest.fixture
def several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads(several_threads):
    made = request(filled(lengths=(3000, 10)))
    several = BACKENDS["cpu"].run(made)
    torch.set_num_threads(1)
    for x, y in zip(several, BACKENDS["cpu"].run(made), strict=True):
        # partial sums are merged in float32; the output is rounded to float16 once more
        assert torch.allclose(x.float(), y.float(), rtol=2**-10, atol=1e-6)


@needs_kernels
def test_calls_from_several_python_threads_do_not_disturb_one_another(several_threads):
    made = [request(filled(lengths=(900 + i, 50))) for i in range(6)]
    expected = [BACKENDS["cpu"].run(r) for r in made]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(BACKENDS["cpu"].run, made), expected, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def _attend_in_child(made: AttentionRequest, queue) -> None:
    # by value: shared memory would need a server thread in the parent
    queue.put(BACKENDS["cpu"].run(made)[0].tolist())


@needs_kernels
def test_a_forked_child_attends_with_threads_too(several_threads):
    made = request(filled(lengths=(3000, 10)))
    expected = BACKENDS["cpu"].run(made)[0]  # the parent's OpenMP team exists now, the child's does not
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_attend_in_child, args=(made, queue))
    child.start()
    got = torch.tensor(queue.get(timeout=60), dtype=expected.dtype)
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(got, expected)


# --- encoding -----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("site", ["key", "value"])
@pytest.mark.parametrize(
    "codec", [Affine(2, "token"), Affine(1, "token", "page", "mse"), Unquantized()], ids=str
)
def test_codecs_encode_natively_what_they_encode_in_torch(codec, site):
    strided, lanes = (
        codec.part_format(site, head_dim=96, page_size=64, dtype=torch.bfloat16, layout=layout)
        for layout in ("strided", "lanes")
    )
    x = torch.randn(2, 3, 64, 200).bfloat16()[..., :96]  # rows with a gap between them
    slow, fast = (form.unpack(codec.encode(x, form)).dequantize() for form in (strided, lanes))
    # searched levels are sums in another order: a code on an edge may fall to the other side
    assert (slow != fast).float().mean() < (0.02 if "mse" in str(codec) else 1e-9)


@needs_kernels
def test_encoding_writes_its_slice_of_a_pool_and_nothing_beside_it():
    codec = Affine(4, "token")
    form = codec.part_format("value", head_dim=64, page_size=64, dtype=torch.float16, layout="lanes")
    x = torch.randn(3, 2, 64, 64).half()
    pool = torch.full((5, 2, form.nbytes + 100), 7, dtype=torch.uint8)
    out = codec.encode(x, form, pool[1:4, :, 60:-40])
    assert out.data_ptr() == pool[1, 0, 60:].data_ptr()
    assert torch.equal(out, form.pack(codec.quantize(x)))
    assert (pool[[0, 4]] == 7).all()
    assert (pool[:, :, :60] == 7).all()
    assert (pool[:, :, -40:] == 7).all()


# --- the hot window -----------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_of_any_strides_are_put_into_the_window_and_counted(count):
    hot_k, hot_v = torch.zeros(2, 2, 3, 40, 64).half()
    hot_len = torch.tensor([5, 5], dtype=torch.int32)
    k, v = torch.randn(2, 2, count, 3, 64).half().transpose(2, 3)
    assert native.append(k, v, hot_k, hot_v, hot_len, 5)
    assert torch.equal(hot_k[:, :, 5 : 5 + count], k)
    assert torch.equal(hot_v[:, :, 5 : 5 + count], v)
    assert hot_k.count_nonzero() == k.count_nonzero()
    assert hot_len.tolist() == [5 + count] * 2
    if count > 1:  # one token's channels lie side by side either way
        assert not native.append(k, torch.zeros_like(v).mT.contiguous().mT, hot_k, hot_v, hot_len, 5)
    assert not native.append(k.mT, v.mT, hot_k, hot_v, hot_len, 5)


# --- the binary ---------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_wide_instructions_stand_only_in_the_kernels_compiled_for_them():
    """Linkers merge equal inline functions: none compiled for AVX-512 may serve an older CPU."""
    newest = ("avx512", "amx")  # namespaces
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", native.module().__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    wide: dict[str, set[str]] = {"zmm": set(), "ymm": set()}
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1]
        for register, functions in wide.items():
            if f"%{register}" in line:
                functions.add(function)
    assert all(any(isa in name for isa in newest) for name in wide["zmm"])
    assert all(any(isa in name for isa in (*newest, "avx2")) for name in wide["ymm"])
    assert all(map(len, wide.values())) == ("avx512" in listing)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for arm64")
@pytest.mark.parametrize("source", ["isa_portable.cpp", "parallel.cpp", "cpu.cpp"])
def test_what_is_portable_compiles_for_arm64(source, tmp_path):
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-c", "-o", str(tmp_path / "out.o")]
    csrc = Path(__file__).parents[1] / "bitkv" / "csrc"
    subprocess.run(["aarch64-linux-gnu-g++", *flags, str(csrc / source)], check=True)
