"""A layer of fixed size against the one that grows: the same bytes, and nothing asked of the device."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitkv.cache import PagedCache
from bitkv.codecs import Affine, Codec, Unquantized
from bitkv.layer import PagedLayer
from bitkv.static import StaticLayer
from bitkv.static.operator import why_not

pytest.importorskip("triton", reason="kernels for GPUs need Triton")

HEADS, HEAD_DIM, PAGE, SINKS, RECENT = 2, 64, 64, 4, 32
CAPACITY = SINKS + RECENT + PAGE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton packs the one, torch the other
LAYOUTS = ["strided"] if DEVICE == "cuda" else ["strided", "lanes"]
FIXED = ("block_table", "packed_len", "hot_len", "hot_k", "hot_v", "tickets")
KEY, VALUE = Affine(2, "channel", 32), Affine(1, "token", 32)


def layers(
    key: Codec = KEY,
    value: Codec = VALUE,
    *,
    sinks: int = SINKS,
    recent: int = RECENT,
    max_tokens: int = 600,
    step_tokens: int = 1,
    layout: str = "strided",
) -> tuple[PagedLayer, StaticLayer]:
    """A layer that grows and one that does not."""
    common = {"num_sink_tokens": sinks, "recent_tokens": recent, "page_size": PAGE, "layout": layout}
    fixed = StaticLayer(key, value, max_tokens=max_tokens, step_tokens=step_tokens, **common)
    return PagedLayer(key, value, **common), fixed


def tokens(batch: int, count: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, HEADS, count, HEAD_DIM).to(dtype).to(DEVICE)
    return k, v


def ragged(counts: tuple[int, ...]) -> Tensor:
    return (torch.arange(max(counts)) < torch.tensor(counts)[:, None]).to(DEVICE)


def addresses(layer: StaticLayer) -> list[int]:
    return [layer.pool.data.data_ptr(), *(getattr(layer, name).data_ptr() for name in FIXED)]


def assert_same_view(a: PagedLayer, b: PagedLayer) -> None:
    """What attention would read is the same, byte for byte."""
    x, y = a.view(), b.view()
    assert torch.equal(x.packed_len, y.packed_len)
    assert torch.equal(x.hot_len, y.hot_len)
    for i, (packed, hot) in enumerate(zip(x.packed_len.tolist(), x.hot_len.tolist(), strict=True)):
        pages = packed // PAGE
        assert torch.equal(x.hot_k[i, :, :hot], y.hot_k[i, :, :hot])
        assert torch.equal(x.hot_v[i, :, :hot], y.hot_v[i, :, :hot])
        mine, theirs = (z.pages[z.block_table[i, :pages].long()] for z in (x, y))
        assert torch.equal(mine, theirs)


# --- the same cache ---------------------------------------------------------------------------------


@given(
    sinks=st.sampled_from([0, 4, 70]),
    recent=st.sampled_from([0, 32, 200]),
    before=st.integers(1, 3),
    layout=st.sampled_from(LAYOUTS),
    codecs=st.sampled_from(
        [
            (KEY, VALUE),
            (Affine(4, "token", "page"), Affine(8, "token", "page")),
            (Unquantized(), Affine(2, "token", 32)),
            (Affine(1, "channel", "page", "unbiased"), Affine(2, "token", "page", "mse")),
        ]
    ),
)
@settings(max_examples=20)
def test_steps_across_a_page_leave_what_stage_and_commit_leave(sinks, recent, before, layout, codecs):
    grows, fixed = layers(*codecs, sinks=sinks, recent=recent, layout=layout)
    capacity = sinks + recent + PAGE
    counts = (capacity - before, capacity - 1, 3, 0)  # a page falls due at different steps, or never
    k, v = tokens(4, max(counts))
    for layer in (grows, fixed):
        layer.append(k, v, ragged(counts))
    before_steps = addresses(fixed)
    for _ in range(before + 2):
        k, v = tokens(4, 1)
        grows.stage(k, v)
        fixed.step(k, v)
        assert_same_view(grows, fixed)
        grows.commit()
    assert addresses(fixed) == before_steps
    assert fixed.lengths == grows.lengths
    fixed.commit()
    assert_same_view(grows, fixed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_steps_of_several_tokens(dtype, layout):
    grows, fixed = layers(step_tokens=7, layout=layout)
    for layer in (grows, fixed):
        torch.manual_seed(1)
        layer.append(*tokens(2, CAPACITY - 10, dtype))
    for count in (7, 2, 7, 5):
        k, v = tokens(2, count, dtype)
        grows.stage(k, v)
        fixed.step(k, v)
        assert_same_view(grows, fixed)
        grows.commit()


def test_a_model_gives_its_tokens_side_by_side():
    grows, fixed = layers()
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(2, 1))
    grows.append(k, v)
    fixed.step(k, v)
    assert_same_view(grows, fixed)


def test_a_sequence_without_a_token_starts_with_a_step():
    _, fixed = layers()
    k, v = tokens(3, 1)
    fixed.step(k, v)
    assert fixed.lengths == [1, 1, 1]
    assert torch.equal(fixed.materialize()[0], k)


# --- operations of the host between steps -----------------------------------------------------------


def test_crop_gather_and_a_second_prompt_go_on_from_what_steps_have_left():
    grows, fixed = layers()
    torch.manual_seed(1)
    prompt, more, steps = tokens(2, CAPACITY - 2), tokens(2, 150), [tokens(2, 1) for _ in range(6)]
    for layer in (grows, fixed):
        layer.append(*prompt)
    before = addresses(fixed)
    for i, (k, v) in enumerate(steps):
        grows.append(k, v)
        fixed.step(k, v)
        if i == 3:
            for layer in (grows, fixed):
                layer.crop([n - 3 for n in layer.lengths])
                layer.gather(torch.tensor([1, 0]))
                layer.append(*more)
    fixed.commit()
    assert_same_view(grows, fixed)
    assert addresses(fixed) == before
    assert (fixed.usage, fixed.num_pages) == (grows.usage, grows.pool.num_used)


def test_another_batch_gets_tensors_of_its_own():
    grows, fixed = layers()
    prompt = tokens(2, CAPACITY + 70)
    more = tokens(4, 1)
    for layer in (grows, fixed):
        layer.append(*prompt)
        layer.gather(torch.tensor([0, 0, 1, 1]))
    grows.append(*more)
    fixed.step(*more)
    assert_same_view(grows, fixed)
    assert fixed.pool.num_used == 2 * 2 + sum(map(len, fixed._spare))


def test_a_cache_of_fixed_size_saves_and_loads(tmp_path):
    caches = [PagedCache("kivi2", 1, layout="strided", max_tokens=600) for _ in range(2)]
    caches[0].append(0, *tokens(2, 300))
    caches[0].step(0, *tokens(2, 1))
    caches[0].save(tmp_path / "cache", model="m")
    caches[1].load(tmp_path / "cache", model="m", device=DEVICE)
    k, v = tokens(2, 1)
    for cache in caches:
        cache.step(0, k, v)
    assert [cache.layers[0].materialize()[0].shape[2] for cache in caches] == [302, 302]
    mine, theirs = (cache.layers[0].materialize() for cache in caches)
    assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_beyond_the_room_change_nothing_and_are_reported(layout):
    _, fixed = layers(max_tokens=CAPACITY + PAGE, layout=layout)
    k, v = tokens(1, CAPACITY + PAGE)
    fixed.append(k, v)
    fixed.step(*tokens(1, 1))  # the window still has room: PAGE - 1 tokens of it
    for _ in range(PAGE):
        fixed.step(*tokens(1, 1))
    assert fixed.hot_len.tolist() == [CAPACITY]
    with pytest.raises(ValueError, match=r"^steps went 1 tokens beyond the room for 164, and those are"):
        _ = fixed.lengths


def test_what_cannot_fit_is_refused_beforehand():
    _, fixed = layers(max_tokens=200)
    with pytest.raises(ValueError, match=r"^a sequence of 201 tokens is longer than max_tokens 200"):
        fixed.append(*tokens(1, 201))
    with pytest.raises(ValueError, match=r"^a step of 2 tokens is longer than step_tokens 1"):
        fixed.step(*tokens(1, 2))
    with pytest.raises(ValueError, match=r"^max_tokens 0 leaves no room"):
        layers(max_tokens=0)
    with pytest.raises(ValueError, match=r"^this cache grows; make it with max_tokens to step"):
        PagedCache("kivi2", 1).step(0, *tokens(1, 1))


def test_a_gpu_gets_no_layout_that_its_kernels_do_not_write():
    packing = layers(layout="lanes")[1]._packing_of(torch.empty(1, 2, 0, HEAD_DIM))
    reason = why_not(torch.device("cuda"), packing, (0, 0))
    assert reason is not None
    assert "holds pages of the layout 'strided', not 'lanes'" in reason
    assert why_not(torch.device("cpu"), packing, (0, 0)) is None


# --- nothing is asked of the device -----------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails where a value goes from a tensor to Python, or a tensor to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), name
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back():
    """With fake tensors, which have no values to read."""
    _, fixed = layers()
    fixed.append(*tokens(2, CAPACITY - 1))
    with FakeTensorMode() as fake:
        fixed._homes.clear()
        for name in FIXED:
            setattr(fixed, name, fake.from_tensor(getattr(fixed, name)))
        fixed.pool.data = fake.from_tensor(fixed.pool.data)
        with NoHostReads():
            fixed.step(*(fake.from_tensor(x) for x in tokens(2, 1)))
            assert fixed.view().lengths.shape == (2,)


def test_a_decode_step_of_a_growing_layer_reads_nothing_back():
    """Its lists say how long sequences are; ragged ones too, and while a page is packed."""
    grows, _ = layers()
    counts = (CAPACITY - 2, 40, CAPACITY - 1)
    grows.append(*tokens(3, max(counts)), ragged(counts))
    with NoHostReads():
        for _ in range(3):
            grows.stage(*tokens(3, 1))
            assert grows.view().lengths.shape == (3,)
            grows.commit()
    assert grows.lengths == [n + 3 for n in counts]
    assert grows.packed_len.tolist() == [PAGE, 0, PAGE]


def test_ragged_sequences_get_their_tokens_in_one_go_on_a_gpu():
    looped, scattered = layers()[0], layers()[0]
    counts = (CAPACITY - 9, 40, 0)
    k, v = tokens(3, max(counts))
    more = tokens(3, 5)
    for layer in (looped, scattered):
        layer.append(k, v, ragged(counts))
    looped.stage(*more)
    scattered._put_ragged(*more)
    assert_same_view(looped, scattered)


def test_a_compiled_step_serves_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    grows, fixed = layers()
    prompt = tokens(2, CAPACITY - 2)
    for layer in (grows, fixed):
        layer.append(*prompt)

    def step(k: Tensor, v: Tensor) -> Tensor:
        fixed.step(k, v)
        return fixed.view().lengths

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(4):
        k, v = tokens(2, 1)
        grows.append(k, v)
        assert compiled(k, v).tolist() == [CAPACITY - 1 + i] * 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    fixed.commit()
    assert_same_view(grows, fixed)


# --- what the kernels compile to --------------------------------------------------------------------

COMPILE = """
import json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bitkv.codecs import Affine, Unquantized
from bitkv.codecs.triton import encode_pages, tiling
from bitkv.static.operator import NUM_WARPS
from bitkv.static.triton_kernels import append_kernel

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
# as a launch finds them: addresses and strides of tensors, multiples of 16
DIVISIBLE = "x words page_stride head_stride token_stride out_page_stride out_head_stride".split()
DIVISIBLE += "k v hot_k hot_v key_words value_words".split()
SHAPE = {"head_dim": 128, "page_size": 128, "dtype": torch.float16}

def stack(kernel, signature, constants, arch, num_warps):
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature.get(n, "i32") for n in names},
        constexprs={(names.index(n),): x for n, x in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in DIVISIBLE},
    )
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        text = subprocess.check_output([TOOL, "--dump-resource-usage", file.name], text=True)
    return int(re.search(r"STACK:([0-9]+)", text).group(1))

found = {}
for arch in (80, 90):
    for key, value in (
        (Affine(4, "channel", "page"), Affine(4, "token", "page")),
        (Affine(2, "channel", 32), Affine(1, "token", 32)),
        (Affine(2, "channel", "page", "unbiased"), Affine(2, "token", "page", "mse")),
        (Unquantized(), Unquantized()),
    ):
        parts = [c.part_format(s, **SHAPE) for c, s in ((key, "key"), (value, "value"))]
        levels = key.native_levels, value.native_levels
        for part, level in zip(parts, levels):
            tiles = tiling(part, level)
            signature = {"x": "*fp16", "words": "*i16"}
            found[f"{arch} encode {tiles}"] = stack(
                encode_pages, signature, {"TILES": tiles}, arch, tiles.num_warps
            )
        k, v = (tiling(part, level) for part, level in zip(parts, levels))
        signature = {x: "*fp16" for x in ("k", "v", "hot_k", "hot_v")}
        signature |= {"key_words": "*i16", "value_words": "*i16"}
        signature |= {x: "*i32" for x in ("table", "packed_len", "hot_len", "tickets")}
        signature |= {x: ("i32",) * 3 for x in ("k_strides", "v_strides")}
        signature |= {x: ("i32",) * 2 for x in ("hot_strides", "key_strides", "value_strides")}
        constants = {"HEAD_DIM": 128, "PAGE": 128, "KEY": k, "VALUE": v}
        found[f"{arch} append {key} {value}"] = stack(
            append_kernel, signature, constants, arch, NUM_WARPS
        )
print(json.dumps(found))
"""


def test_kernels_compile_without_spills():
    """For sm_80 and sm_90, in a process without the interpreter; no GPU is needed."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    if re.search(r"cuobjdump|ptxas", done.stderr) and "FileNotFoundError" in done.stderr:
        pytest.skip("this Triton has no assembler for NVIDIA GPUs")
    assert done.returncode == 0, done.stderr
    stacks = json.loads(done.stdout.splitlines()[-1])
    assert len(stacks) >= 16
    # the assembler may set a few words aside to make room for another block; a spill is hundreds
    assert not {name: n for name, n in stacks.items() if n > 16}
