"""The engine of `bitkv bench`: what it counts and writes; never how fast this machine is."""

import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitkv import Recipe, attend, native, parse
from bitkv.attention import BACKENDS, Backend
from bitkv.benchmark import (
    DecodeReport,
    DecodeRow,
    Environment,
    Report,
    Row,
    attention,
    decode,
    packing,
    plot,
    plot_decode,
    read_json,
    render,
    render_decode,
    request,
    rivals,
    run_attention,
    run_decode,
    run_packing,
    vllm,
    write_json,
)
from bitkv.benchmark.environment import processor_name
from bitkv.benchmark.packing import FLUSHES, append_times
from bitkv.benchmark.rivals import rival_calls, sdpa_calls
from bitkv.benchmark.synthetic import Shape, new_layer, spread_lengths, synthetic_layer
from bitkv.benchmark.timing import WARM_UP, Effort, cold_copies, durations, last_level_cache
from bitkv.files import replacing
from bitkv.snapshot import state

SMALL = Shape(batch=2, heads=4, kv_heads=2, head_dim=64, dtype="float32")
ENVIRONMENT = Environment(20.0, 2, "cpu", "2.13", "bitkv bench", None, "2026-01-01T00:00:00+00:00")


def make_row(recipe: str, context: int, ms: float, backend: str = "reference") -> Row:
    nbytes = 512 * context
    return Row(
        operation="attend",
        backend=backend,
        recipe=recipe,
        context=context,
        batch=1,
        heads=32,
        kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
        ms=ms,
        bytes=nbytes,
        gbps=nbytes / ms / 1e6,
        bits_per_element=3.0,
        fraction_of_bandwidth=0.1,
        vs_sdpa=0.5,
        environment=ENVIRONMENT,
    )


ROWS = [
    make_row(recipe, context, ms * context / 1024, backend)
    for context in (1024, 4096, 16384)
    for recipe, ms, backend in (
        ("bfloat16", 1.0, "sdpa-grouped"),
        ("bfloat16", 0.9, "vllm"),
        ("float32", 2.0, "sdpa-grouped"),
        ("kivi2", 3.0, "reference"),
        ("quick1", 2.9, "reference"),
    )
]


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Few repeats and small buffers: nothing here depends on what the clock says."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, packing, decode):
            patch.setattr(module, "QUICK", Effort(repeats=2, seconds=0))
        for module in (attention, packing, rivals):
            patch.setattr(module, "cold_copies", lambda nbytes: 2)
        patch.setattr(packing, "evict", lambda: None)
        patch.setattr(request, "read_bandwidth", lambda effort, **_: 10.0 * torch.get_num_threads())
        yield


@pytest.fixture(scope="module")
def report() -> Report:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128}
    return run_attention(["kivi2", Recipe(*parse("int8").codecs(0))], [100, 1024], quick=True, **shape)


# --- synthetic caches ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["fp16", "kivi2", "quick1"])
def test_synthetic_cache_equals_an_appended_one(text: str) -> None:
    recipe, context = parse(text), 19 * 128 + 37
    torch.manual_seed(0)
    layer = synthetic_layer(recipe, SMALL, [context] * 2, spare_pages=2)
    assert layer.lengths == [context, context]

    torch.manual_seed(0)  # the same tokens, their pages repeated by hand
    num_pages, sinks = int(layer.packed_len[0]) // 128, recipe.num_sink_tokens
    tokens = context - (num_pages - 8) * 128
    place = torch.arange(context)
    body = (place >= sinks) & (place < sinks + num_pages * 128)
    place[body] = sinks + (place[body] - sinks) % (8 * 128)
    place[sinks + num_pages * 128 :] -= context - tokens
    k, v = (SMALL.random(SMALL.kv_heads, tokens)[:, :, place] for _ in range(2))
    appended = new_layer(recipe)
    appended.append(k, v)

    ours, theirs = (x["pages"][x["block_table"].long()] for x in map(state, (layer, appended)))
    assert torch.equal(ours, theirs)
    q = torch.randn(2, 4, 1, 64)
    for got, expected in zip(attend(q, layer.view()), attend(q, appended.view()), strict=True):
        assert torch.equal(got, expected)


def test_synthetic_pages_do_not_share_memory_and_fit() -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, [40 * 128] * 2)
    table = layer.block_table.flatten().tolist()
    assert len(set(table)) == len(table) == layer.pool.num_used == len(layer.pool.data)


@pytest.mark.parametrize("context", [1, 191, 192, 193, 1024])
def test_synthetic_lengths(context: int) -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, [context] * 2)
    assert layer.lengths == [context] * 2
    assert int(layer.hot_len[0]) < layer.hot_capacity


@pytest.mark.parametrize("context", [300, 5000])
def test_ragged_lengths(context: int) -> None:
    lengths = spread_lengths(context, 4, ragged=True)
    assert lengths[0] == -(-context // 8)
    assert lengths[-1] == context
    assert lengths == sorted(set(lengths))
    layer = synthetic_layer(parse("quick2"), Shape(4, 4, 2, 64, "float32"), lengths)
    assert layer.lengths == lengths
    pages = [page for row in layer.page_lists() for page in row]
    assert len(set(pages)) == len(pages) == len(layer.pool.data)
    out, _ = attend(torch.randn(4, 4, 1, 64), layer.view())
    assert out.isfinite().all()
    assert spread_lengths(context, 3, ragged=False) == [context] * 3


def test_append_times_pages_apart() -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, [1000] * 2, spare_pages=FLUSHES)
    before, memory = int(layer.packed_len[0]), layer.pool.nbytes
    times = append_times(layer, SMALL, "auto")
    assert times["step"] > times["append"] > 0
    assert times["flush-step"] > times["flush"] > 0
    assert layer.lengths == [1000 + 128 * FLUSHES] * 2
    assert int(layer.packed_len[0]) == before + 128 * FLUSHES
    assert layer.pool.nbytes == memory


def test_sdpa_arrangements_agree() -> None:
    torch.manual_seed(0)
    for lengths in ([300, 300], [100, 300]):
        outputs = [calls[-1]() for _, calls in sdpa_calls(SMALL, lengths, "float32")]
        gqa, grouped = (x for x in outputs if isinstance(x, torch.Tensor))
        assert gqa.shape == (2, 4, 1, 64)
        torch.testing.assert_close(gqa, grouped.view_as(gqa))


def test_rivals_read_no_padding() -> None:
    read = {(name, dtype): nbytes for name, dtype, nbytes, _ in rival_calls(SMALL, [100, 300])}
    assert read["sdpa-gqa", "float32"] == 400 * 2 * 2 * 64 * 4
    assert read["sdpa-grouped", "bfloat16"] == 400 * 2 * 2 * 64 * 2


@pytest.mark.skipif(vllm.why_not() is not None, reason="vLLM is not installed")
@pytest.mark.parametrize("lengths", [[256, 256], [100, 300]])
def test_vllm_attends_to_every_sequence(lengths: list[int]) -> None:
    shape = Shape(2, 4, 2, 64, "bfloat16")
    for isa in vllm.variants(shape).values():
        for call in vllm.attend_calls(shape, lengths, 2, isa):
            assert isinstance(call, partial)
            out = call.args[3]
            assert out.isnan().all()  # poisoned
            call()
            assert out.isfinite().all()


def test_a_missing_vllm_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.why_not.cache_clear()
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    assert "is not installed" in str(vllm.why_not())
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "import_module", lambda name: importlib.import_module(f"no_{name}"))
    vllm.why_not.cache_clear()
    assert "does not load (No module named 'no_vllm')" in str(vllm.why_not())
    vllm.why_not.cache_clear()


# --- timing ----------------------------------------------------------------------------------------


def test_durations_rotate_between_buffers_after_warming_up() -> None:
    calls: list[int] = []
    times = durations([lambda i=i: calls.append(i) for i in range(3)], Effort(repeats=5, seconds=0))
    assert len(times) == 5
    assert calls == [0, 1, 2, 0, 1, 2, 0][: WARM_UP + 5]


def test_durations_stop_at_the_limit() -> None:
    assert len(durations([lambda: None], Effort(repeats=5, seconds=1, limit=0))) == 1


def test_cold_copies_fill_the_cache_twice() -> None:
    cache = last_level_cache()
    assert cold_copies(cache // 4) == 8
    assert cold_copies(4 * cache) == 1
    assert cold_copies(1) == 128


# --- rows ------------------------------------------------------------------------------------------


AUTO = "reference" if native.why_not() else "cpu"
OPERATIONS = ("attend", "append", "step", "flush", "flush-step")


def test_bytes_by_hand(report: Report) -> None:
    (row,) = (r for r in report.rows if key(r) == ("attend", AUTO, "kivi2", 1024))
    # 1024 tokens: 7 pages and 128 hot; a page of a head: K and V with 4096 bytes of 2-bit codes and
    # 512 groups of 4 bytes each
    pages, hot = 7 * 2 * 2 * (4096 + 512 * 4), 128 * 2 * 2 * 128 * 2
    assert row.bytes == pages + hot
    assert row.bits_per_element == pytest.approx(8 * row.bytes / (1024 * 2 * 2 * 128))
    (sdpa,) = (r for r in report.rows if key(r) == ("attend", "sdpa-gqa", "float32", 1024))
    assert (sdpa.bytes, sdpa.bits_per_element) == (1024 * 2 * 2 * 128 * 4, 32)


def key(row: Row) -> tuple[str, str, str, int]:
    return row.operation, row.backend, row.recipe, row.context


def test_a_row_for_each_combination(report: Report) -> None:
    recipes = ["kivi2", str(Recipe(*parse("int8").codecs(0)))]
    expected = {("attend", f"sdpa-{h}", d) for h in ("gqa", "grouped") for d in ("bfloat16", "float32")}
    expected |= {(op, AUTO, recipe) for op in OPERATIONS for recipe in recipes}
    found = {key(r) for r in report.rows if r.backend != "vllm"}
    assert found == {(*e, c) for e in expected for c in (100, 1024)}
    assert report.refused == ()


def test_rates_are_consistent(report: Report) -> None:
    for row in report.rows:
        assert row.gbps == pytest.approx(row.bytes / row.ms / 1e6)
        assert row.fraction_of_bandwidth == pytest.approx(row.gbps / row.environment.bandwidth_gbps)
        assert row.isa == (native.isa() if row.backend == "cpu" else None)
        rivals = [r.ms for r in report.rows if r.is_sdpa and r.context == row.context]
        expected = min(rivals) / row.ms if row.operation == "attend" else None
        assert row.vs_sdpa == pytest.approx(expected)
        assert row.environment.threads == torch.get_num_threads()


def test_codecs_that_cannot_learn_heads_of_this_width_are_refused_with_a_sentence() -> None:
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64}
    report = run_attention(["cq(7, 8)"], [64], backend="reference", quick=True, **shape)
    assert all(row.is_rival for row in report.rows)
    assert list(report.refused) == [
        "cq(7, 8): 64 channels of a head are not a multiple of 7 coupled ones; "
        "couple a number that divides 64"
    ]


def test_a_refusal_is_a_sentence_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Backend("picky", BACKENDS["reference"].run, lambda request: "head_dim 16; it takes 128")
    monkeypatch.setitem(BACKENDS, "picky", picky)
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16}
    report = run_attention(["int8", "kivi2"], [64, 200], backend="all", quick=True, **shape)
    packed = {(row.backend, row.recipe) for row in report.rows if not row.is_rival}
    assert packed == {(AUTO, "int8"), ("reference", "int8")}
    on_gpus = [sentence for sentence in report.refused if "backend 'triton' refused" in sentence]
    assert len(on_gpus) == 1
    assert [sentence for sentence in report.refused if sentence not in on_gpus] == [
        "int8: backend 'picky' refused: head_dim 16; it takes 128",
        "kivi2: head_dim 16 is not a multiple of group_size 32; "
        "pass a group_size that divides 16, or 'page' for one group",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "cuda"}, "no backend 'cuda'; choose from auto, all"),
        ({"recipes": ["kivi3"]}, "no 'kivi3'"),
        ({"contexts": [0]}, "a context of 0 tokens"),
        ({"heads": 30}, "30 query heads do not share 8 KV heads"),
        ({"dtype": "int4"}, "no dtype 'int4'"),
        ({"batches": [1, 0]}, "batch 0 is too small"),
    ],
)
def test_bad_requests_fail_before_measuring(changes: dict[str, object], sentence: str) -> None:
    def measured(label: str, done: int, total: int) -> None:
        pytest.fail(f"measured {label}")

    arguments = {"recipes": ["kivi2"], "contexts": [64], "progress": measured, **changes}
    with pytest.raises(ValueError, match=sentence):
        run_attention(**arguments)  # type: ignore[arg-type]


def test_bandwidth_is_the_faster_around_a_measurement(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = iter([21.0, "measured", 23.0])
    monkeypatch.setattr(request, "read_bandwidth", lambda effort: next(events))
    before = report.rows[0].environment
    around, measured = request.measure_beside_bandwidth(before, lambda: next(events))
    assert measured == "measured"
    assert around == replace(before, bandwidth_gbps=23)


def test_batches_and_threads_have_their_own_rows() -> None:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    report = run_attention(
        ["kivi2"], [400], batches=[1, 3], ragged=True, threads=[1, 2], quick=True, **shape
    )
    attends = [row for row in report.rows if row.operation == "attend" and not row.is_rival]
    assert [(r.batch, r.environment.threads, r.ragged) for r in attends] == [
        (1, 1, False),
        (1, 2, False),
        (3, 1, True),
        (3, 2, True),
    ]
    assert [row.environment.bandwidth_gbps for row in attends] == [10, 20, 10, 20]
    for row in attends:
        rivals = [
            r.ms
            for r in report.rows
            if r.is_sdpa and (r.batch, r.environment) == (row.batch, row.environment)
        ]
        assert len(rivals) == 4
        assert row.vs_sdpa == pytest.approx(min(rivals) / row.ms)
    assert torch.get_num_threads() == 1
    elements = sum(spread_lengths(400, 3, ragged=True)) * 2 * 2 * 64
    assert attends[-1].bytes == pytest.approx(attends[-1].bits_per_element * elements / 8)


# --- packing ---------------------------------------------------------------------------------------


def test_packing_rows_count_the_input() -> None:
    report = run_packing(
        ["kivi2", "quick1"], [512], kv_heads=2, head_dim=64, dtype="float16", quick=True
    )
    rows = {(row.operation, row.recipe): row for row in report.rows}
    assert set(rows) == {(op, name) for op in ("pack", "prompt") for name in ("kivi2", "quick1")}
    per_token = 2 * 2 * 64 * 2  # bytes of K and V of two heads
    # 512 tokens: kivi2 packs 3 pages and keeps 128 tokens
    assert rows["pack", "kivi2"].bytes == 384 * per_token
    assert rows["prompt", "kivi2"].bytes == 512 * per_token
    for row in report.rows:
        assert row.backend == ("cpu" if AUTO == "cpu" else "torch")
        assert row.gbps == pytest.approx(row.bytes / row.ms / 1e6)
        assert row.vs_sdpa is row.vs_vllm is None


def test_packing_writes_the_pages_that_appending_makes() -> None:
    prompt = packing._Prompt(parse("quick2"), SMALL, 600)
    k, v = prompt.pairs[0]
    pages = prompt.layer.pool.data.clone()
    prompt.layer.pool.data.zero_()
    prompt.calls()["pack"][0]()
    assert torch.equal(prompt.layer.pool.data, pages)


def test_packing_refusals() -> None:
    report = run_packing(["kivi2", "int8"], [100, 512], kv_heads=1, head_dim=16, quick=True)
    assert {(row.recipe, row.context) for row in report.rows} == {("int8", 512)}
    assert report.refused == (
        "kivi2: head_dim 16 is not a multiple of group_size 32; "
        "pass a group_size that divides 16, or 'page' for one group",
        "int8: a prompt of 100 tokens packs no page; pass 196 or more",
    )


# --- decode ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decode_report() -> DecodeReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_HEADS", 4)
        patch.setattr(decode, "_KV_HEADS", 2)
        patch.setattr(decode, "_HEAD_DIM", 64)
        patch.setattr(decode, "_INTERMEDIATE", 128)
        patch.setattr(decode, "find_spec", lambda name: None)
        return run_decode(["kivi2", "fp16"], [100, 1200], batch=2, quick=True)


def test_decode_rows(decode_report: DecodeReport) -> None:
    names = ("dynamic", "kivi2", "fp16")
    assert [(r.context, r.recipe) for r in decode_report.rows] == [
        (context, name) for context in (100, 1200) for name in names
    ]
    stock = {row.context: row for row in decode_report.rows if row.recipe == "dynamic"}
    for row in decode_report.rows:
        assert row.backend == ("sdpa" if row.recipe == "dynamic" else AUTO)
        assert row.vs_dynamic == pytest.approx(stock[row.context].ms / row.ms)
        assert row.worst_ms >= row.ms > row.cache_ms
        assert row.layers == 2
    steps = (WARM_UP + 2 * 2) // 2  # of six calls every other one has an empty cache
    assert stock[1200].bytes == (1200 + steps) * 2 * 2 * 2 * 64 * 2 * 2
    assert [row.bits_per_element for row in decode_report.rows if row.recipe != "kivi2"] == [16] * 4
    assert "pip install optimum-quanto" in decode_report.notes[0]


def test_a_packed_cache_decodes_as_a_stock_one_with_the_same_tokens() -> None:
    shape = Shape(1, 32, 8, 128, "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_HEADS", 4)
        patch.setattr(decode, "_KV_HEADS", 2)
        patch.setattr(decode, "_INTERMEDIATE", 128)
        model, shape = decode.random_model(1), Shape(1, 4, 2, 128, "bfloat16")
    packed = decode.packed_cache(model.config, shape, parse("fp16"), "auto", 700)
    k, v = packed.paged.layers[0].materialize()
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        ours = model(ids, past_key_values=packed).logits
        stock = decode.dynamic_cache(model.config, shape, 1)
        stock.layers[0].keys, stock.layers[0].values = k, v
        theirs = model(ids, past_key_values=stock).logits
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)
    assert packed.get_seq_length() == 701


def test_the_stock_quantized_cache_is_measured_where_quanto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "find_spec", lambda name: object())
    caches, notes = decode._caches(None, SMALL, {}, "auto")
    assert list(caches) == ["dynamic", "quanto4", "quanto2"]
    assert notes == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "all"}, "no backend 'all'; choose from auto, "),
        ({"layers": 0}, "a model of 0 layers is too small"),
        ({"contexts": [0]}, "a context of 0 tokens"),
        ({"batch": 0}, "batch 0 is too small"),
    ],
)
def test_bad_decode_requests(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        run_decode(**{"recipes": ["kivi2"], "contexts": [64], **changes})  # type: ignore[arg-type]


# --- output ----------------------------------------------------------------------------------------


def test_json_is_a_list_of_flat_rows(report: Report, tmp_path: Path) -> None:
    write_json(report.rows, tmp_path / "rows.json")
    records = json.loads((tmp_path / "rows.json").read_text())
    assert isinstance(records, list)
    names = {f.name for cls in (Row, Environment) for f in fields(cls)} - {"environment"}
    assert all(set(record) == names for record in records)
    assert {"backend", "recipe", "context", "batch", "ms", "bytes", "gbps", "threads"} <= names
    assert read_json(tmp_path / "rows.json", Row) == list(report.rows)


def test_json_of_decode_rows(decode_report: DecodeReport, tmp_path: Path) -> None:
    write_json(decode_report.rows, tmp_path / "rows.json")
    assert read_json(tmp_path / "rows.json", DecodeRow) == list(decode_report.rows)
    with pytest.raises(ValueError, match="holds no benchmark rows"):
        read_json(tmp_path / "rows.json", Row)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("[{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("content", ["", "[1]", '{"ms": 1}', '[{"ms": 1}]'])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match="holds no benchmark rows"):
        read_json(tmp_path / "rows.json", Row)


def test_rows_name_the_model_of_a_processor_whose_name_is_hidden() -> None:
    one = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 173\nmodel name\t: Intel(R) Xeon(R) Processor\n"
    assert processor_name(f"{one}\n{one.replace('173', '207')}") == (
        "Intel(R) Xeon(R) Processor (family 6, model 173)"
    )
    assert processor_name("model name\t: Cortex\n") == "Cortex"
    assert processor_name("")


def test_table_fits_eighty_columns(report: Report) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    render([r for r in report.rows if len(r.recipe) < 10 and r.backend != "vllm"], console=console)
    text = console.export_text()
    assert "…" not in text
    (line,) = (line for line in text.splitlines() if "kivi2" in line and "4.62" in line)
    assert len(line.split()) == 10  # the context stands in the group's first line only


def test_each_batch_and_number_of_threads_has_its_table(report: Report) -> None:
    wide = [replace(row, batch=8, ragged=True) for row in report.rows]
    console = Console(width=100, record=True, file=io.StringIO())
    render([*report.rows, *wide], console=console)
    text = console.export_text()
    assert text.count("One new token, one layer: batch") == 2
    assert "batch 8 of 12 to 100 tokens" in text


def test_decode_table(decode_report: DecodeReport) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    render_decode(decode_report.rows, console=console)
    lines = [line.split() for line in console.export_text().splitlines() if "kivi2" in line]
    assert [len(line) for line in lines] == [7, 7]


def test_png_has_lines_in_it(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    plot(ROWS, tmp_path / "bench.png")
    pixels = image.imread(tmp_path / "bench.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert len({tuple(p) for p in (pixels[::3, ::3, :3] * 255).astype(int).reshape(-1, 3)}) > 20


def test_html_holds_every_line(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    plot(ROWS, tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text(encoding="utf-8")
    for name in ("kivi2", "quick1", "fastest SDPA", "vLLM bf16", "SDPA bf16"):
        assert f'"name":"{name}"' in text
    assert [p.name for p in tmp_path.iterdir()] == ["bench.html"]


def test_plots_of_decode_steps(decode_report: DecodeReport, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    plot_decode(decode_report.rows, tmp_path / "decode.html")
    text = (tmp_path / "decode.html").read_text(encoding="utf-8")
    for name in ("kivi2", "fp16", "stock bf16"):
        assert f'"name":"{name}"' in text
    with pytest.raises(ValueError, match="no decode step among the rows"):
        plot_decode([], tmp_path / "none.html")


def test_plot_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot plot to 'bench.svg'; use a name that ends in .png"):
        plot(ROWS, tmp_path / "bench.svg")
    with pytest.raises(ValueError, match="no folder"):
        plot(ROWS, tmp_path / "missing" / "bench.png")
    with pytest.raises(ValueError, match="no attention among the rows"):
        plot([], tmp_path / "bench.png")
    module = importlib.import_module("bitkv.benchmark.drawing")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run `pip install matplotlib`"):
        plot(ROWS, tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())
