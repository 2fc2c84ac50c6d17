"""The engine of `bitkv bench`: what it counts and writes; never how fast this machine is."""

import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bitkv import PagedLayer, Recipe, attend, native, parse
from bitkv.attention import BACKENDS, Backend
from bitkv.benchmark import (
    Environment,
    Report,
    Row,
    attention,
    plot,
    read_json,
    render,
    run,
    write_json,
)
from bitkv.benchmark.attention import append_call, sdpa_calls
from bitkv.benchmark.synthetic import Shape, synthetic_layer
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
        ("float32", 2.0, "sdpa-grouped"),
        ("kivi2", 3.0, "reference"),
        ("best1", 2.9, "reference"),
    )
]


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Few repeats and small buffers: nothing here depends on what the clock says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUICK", Effort(repeats=2, seconds=0))
        patch.setattr(attention, "BUFFER_BYTES", 4 << 20)
        patch.setattr(attention, "cold_copies", lambda nbytes: 2)
        yield


@pytest.fixture(scope="module")
def report() -> Report:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128}
    return run(["kivi2", Recipe(*parse("int8").codecs(0))], [100, 1024], quick=True, **shape)


# --- synthetic caches ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["fp16", "kivi2", "best1"])
def test_synthetic_cache_equals_an_appended_one(text: str) -> None:
    recipe, context = parse(text), 19 * 128 + 37
    torch.manual_seed(0)
    layer = synthetic_layer(recipe, SMALL, context, spare_pages=2)
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


def new_layer(recipe: Recipe) -> PagedLayer:
    return PagedLayer(
        *recipe.codecs(0),
        num_sink_tokens=recipe.num_sink_tokens,
        recent_tokens=recipe.recent_tokens,
        page_size=recipe.page_size,
    )


def test_synthetic_pages_do_not_share_memory_and_fit() -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, 40 * 128)
    table = layer.block_table.flatten().tolist()
    assert len(set(table)) == len(table) == layer.pool.num_used == len(layer.pool.data)


@pytest.mark.parametrize("context", [1, 191, 192, 193, 1024])
def test_synthetic_lengths(context: int) -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, context)
    assert layer.lengths == [context] * 2
    assert int(layer.hot_len[0]) < layer.hot_capacity


def test_append_packs_one_page_a_call() -> None:
    layer = synthetic_layer(parse("kivi2"), SMALL, 1000, spare_pages=1)
    before, memory = int(layer.packed_len[0]), layer.pool.nbytes
    append_call(layer, SMALL)()
    assert layer.lengths == [1128, 1128]
    assert int(layer.packed_len[0]) == before + 128
    assert layer.pool.nbytes == memory


def test_sdpa_arrangements_agree() -> None:
    torch.manual_seed(0)
    outputs = [calls[-1]() for _, calls in sdpa_calls(SMALL, 300, "float32")]
    gqa, grouped = (x for x in outputs if isinstance(x, torch.Tensor))
    torch.testing.assert_close(gqa, grouped.view_as(gqa))


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
    expected |= {(op, AUTO, recipe) for op in ("attend", "append") for recipe in recipes}
    assert {key(r) for r in report.rows} == {(*e, c) for e in expected for c in (100, 1024)}
    assert len(report.rows) == 2 * len(expected)
    assert report.refused == ()


def test_rates_are_consistent(report: Report) -> None:
    for row in report.rows:
        assert row.gbps == pytest.approx(row.bytes / row.ms / 1e6)
        assert row.fraction_of_bandwidth == pytest.approx(row.gbps / report.bandwidth_gbps)
        rivals = [r.ms for r in report.rows if r.is_sdpa and r.context == row.context]
        expected = min(rivals) / row.ms if row.operation == "attend" else None
        assert row.vs_sdpa == pytest.approx(expected)
        assert row.environment.threads == torch.get_num_threads()


def test_a_refusal_is_a_sentence_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = Backend("picky", BACKENDS["reference"].run, lambda request: "head_dim 16; it takes 128")
    monkeypatch.setitem(BACKENDS, "picky", picky)
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16}
    report = run(["int8", "kivi2"], [64, 200], backend="all", quick=True, **shape)
    packed = {(row.backend, row.recipe) for row in report.rows if not row.is_sdpa}
    assert packed == {(AUTO, "int8"), ("reference", "int8")}
    assert report.refused == (
        "int8: backend 'picky' refused: head_dim 16; it takes 128",
        "kivi2: head_dim 16 is not a multiple of group_size 32; "
        "pass a group_size that divides 16, or 'page' for one group",
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "cuda"}, "no backend 'cuda'; choose from auto, all"),
        ({"recipes": ["kivi3"]}, "no 'kivi3'"),
        ({"contexts": [0]}, "a context of 0 tokens"),
        ({"heads": 30}, "30 query heads do not share 8 KV heads"),
        ({"dtype": "int4"}, "no dtype 'int4'"),
        ({"batch": 0}, "batch 0 is too small"),
    ],
)
def test_bad_requests_fail_before_measuring(changes: dict[str, object], sentence: str) -> None:
    def measured(label: str, done: int, total: int) -> None:
        pytest.fail(f"measured {label}")

    arguments = {"recipes": ["kivi2"], "contexts": [64], "progress": measured, **changes}
    with pytest.raises(ValueError, match=sentence):
        run(**arguments)  # type: ignore[arg-type]


# --- output ----------------------------------------------------------------------------------------


def test_json_is_a_list_of_flat_rows(report: Report, tmp_path: Path) -> None:
    write_json(report.rows, tmp_path / "rows.json")
    records = json.loads((tmp_path / "rows.json").read_text())
    assert isinstance(records, list)
    names = {f.name for cls in (Row, Environment) for f in fields(cls)} - {"environment"}
    assert all(set(record) == names for record in records)
    assert {"backend", "recipe", "context", "batch", "ms", "bytes", "gbps", "threads"} <= names
    assert read_json(tmp_path / "rows.json") == list(report.rows)


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
        read_json(tmp_path / "rows.json")


def test_table_fits_eighty_columns(report: Report) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    render([r for r in report.rows if len(r.recipe) < 10], report.bandwidth_gbps, console=console)
    text = console.export_text()
    assert "…" not in text
    (line,) = (line for line in text.splitlines() if "kivi2" in line and "4.62" in line)
    assert len(line.split()) == 9  # the context stands in the group's first line only


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
    for name in ("kivi2", "best1", "fastest SDPA", "SDPA bf16"):
        assert f'"name":"{name}"' in text
    assert [p.name for p in tmp_path.iterdir()] == ["bench.html"]


def test_plot_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cannot plot to 'bench.svg'; use a name that ends in .png"):
        plot(ROWS, tmp_path / "bench.svg")
    with pytest.raises(ValueError, match="no folder"):
        plot(ROWS, tmp_path / "missing" / "bench.png")
    with pytest.raises(ValueError, match="no attention among the rows"):
        plot([], tmp_path / "bench.png")
    module = importlib.import_module("bitkv.benchmark.plot")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run `pip install matplotlib`"):
        plot(ROWS, tmp_path / "bench.png")
    assert not list(tmp_path.iterdir())
