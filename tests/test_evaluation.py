"""Measurements on a tiny random model, where what must come out is known."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitkv import evaluation
from bitkv.attention import BACKENDS
from bitkv.evaluation import report
from bitkv.evaluation.agreement import agreement, kl_divergence
from bitkv.evaluation.fidelity import capture, fidelity
from bitkv.evaluation.perplexity import perplexity
from bitkv.evaluation.prompts import RECALL, prompts, split_question
from bitkv.evaluation.protocols import CHUNK, Subject, cut, next_token_logits, prefilled, resumed
from bitkv.evaluation.recall import answers, recall
from bitkv.integrations.transformers import PackedCache
from bitkv.recipe import parse

MINMAX1 = 'Recipe(Affine(1, "channel"), Affine(1, "token"), num_sink_tokens=4)'
TEXT = "\n".join(f"Line {i} holds {i * i} and {i % 97}." for i in range(1000))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, BOS first in windows."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<bos>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


@pytest.fixture(scope="module")
def windows(tokenizer):
    return cut(tokenizer, TEXT, tokens=800, window=400)


@pytest.fixture(scope="module")
def stock(model):
    return Subject(model)


@pytest.fixture(scope="module")
def subjects(model):
    return [Subject(model, parse(text), text) for text in ("fp16", "quick2", MINMAX1)]


def test_windows_are_spread_over_the_text(tokenizer):
    windows = cut(tokenizer, "".join(map(chr, range(33, 123))), tokens=20, window=10)
    assert [tokenizer.decode(ids) for ids in windows.ids] == ["<bos>!\"#$%&'()", "<bos>NOPQRSTUV"]
    assert windows.num_predicted == windows.num_bytes == 18
    assert len(cut(tokenizer, "ab" * 100, tokens=8, window=64).ids) == 1
    assert len(cut(tokenizer, "ab" * 100, tokens=10**6, window=64).ids) == 3


def test_bytes_are_not_characters(tokenizer):
    assert cut(tokenizer, "ä€" * 9, tokens=46, window=46).num_bytes == 45


def test_a_text_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(ValueError, match="the text has 5 tokens, less than one window of 64"):
        cut(tokenizer, "short", tokens=64, window=64)


@pytest.mark.parametrize("protocol", ["packed", "streamed"])
def test_unquantized_pages_cost_nothing(stock, subjects, windows, protocol):
    rows = perplexity(stock, subjects[:1], windows, protocol=protocol)
    assert [row.recipe for row in rows] == ["stock", "fp16"]
    assert abs(rows[1].result.delta_nats) < 1e-5
    (row,) = agreement(stock, subjects[:1], windows, protocol=protocol)
    assert row.result.kl_mean < 1e-7
    assert row.result.top1 == 1
    assert row.protocol == protocol


@pytest.mark.parametrize("protocol", ["packed", "streamed"])
def test_one_bit_minmax_is_worse_than_two_searched_bits(stock, subjects, windows, protocol):
    _, quick2, minmax1 = (row.result for row in agreement(stock, subjects, windows, protocol=protocol))
    assert 1e-4 < quick2.kl_mean < minmax1.kl_mean / 3
    assert quick2.kl_mean < quick2.kl_p99 < minmax1.kl_p99
    assert minmax1.top1 < quick2.top1 < 1
    assert len(quick2.kl_windows) == len(windows.ids)
    assert sum(quick2.kl_windows) / len(windows.ids) == pytest.approx(quick2.kl_mean)
    assert all(a < b for a, b in zip(quick2.kl_windows, minmax1.kl_windows, strict=True))


def test_packed_attention_differs_where_an_exact_prefill_hides_the_recipe(model, stock, windows):
    subject, ids = Subject(model, parse(MINMAX1)), windows.ids[0]
    expected, _ = next_token_logits(stock, ids, "packed")
    packed, _ = next_token_logits(subject, ids, "packed")
    cache = PackedCache(model.config, MINMAX1, exact_prefill=True)
    with torch.inference_mode():
        exact = model(ids[None], past_key_values=cache).logits[0, :-1]
    torch.testing.assert_close(exact, expected)
    assert float(kl_divergence(expected, packed).mean()) > 0.01


def test_streaming_is_exact_while_the_hot_window_holds_everything(model, stock, windows):
    subject, ids = Subject(model, parse(MINMAX1)), windows.ids[0]
    expected, _ = next_token_logits(stock, ids, "streamed")
    streamed, _ = next_token_logits(subject, ids, "streamed")
    divergence = kl_divergence(expected, streamed)
    assert float(divergence[:196].max()) < 1e-6
    assert float(divergence[260:].mean()) > 0.01
    assert str(CHUNK) in report.PROTOCOLS["streamed"]


def test_kl_divergence_of_known_distributions():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([0.14384104, 0.0]))


def test_bits_are_measured(stock, subjects, windows):
    rows = perplexity(stock, subjects, windows)
    assert rows[0].packed_bits_per_element == 32
    assert [row.packed_bits_per_element for row in rows[1:]] == [32, 2.75, 2.0]
    assert all(row.bits_per_element >= row.packed_bits_per_element for row in rows)
    byte = rows[0].result.nats_per_token / 0.693147 * windows.num_predicted / windows.num_bytes
    assert rows[0].result.bits_per_byte == pytest.approx(byte, rel=1e-5)


def test_fidelity_orders_recipes_and_parts(stock, subjects, windows):
    exact, quick2, minmax1 = (row.result for row in fidelity(stock, subjects, windows))
    assert (exact.key_nmse, exact.value_nmse, exact.both_error) == (0, 0, 0)
    assert 0.03 < quick2.key_nmse < 0.12 < 0.9 < minmax1.key_nmse
    assert quick2.value_nmse < minmax1.value_nmse
    for result in (quick2, minmax1):
        assert result.both_error > 0.9 * max(result.key_error, result.value_error)
        assert result.both_error < 1.5 * (result.key_error + result.value_error)
        assert len(result.layers) == 2
        mean = sum(layer.both_error for layer in result.layers) / 2
        assert result.both_error == pytest.approx(mean)


def test_capture_keeps_what_the_model_attended_with(model, stock, windows):
    ids = windows.ids[0]
    first, second = capture(stock, ids)
    with torch.inference_mode():
        cache = model(ids[None], use_cache=True).past_key_values
    torch.testing.assert_close(second.k, cache.layers[1].keys)
    torch.testing.assert_close(first.v, cache.layers[0].values)
    assert second.out.shape == (1, 4, 64, 64)
    assert "recorder" not in BACKENDS


@pytest.mark.parametrize("task", RECALL)
def test_the_question_is_what_follows_the_document(tokenizer, task):
    (prompt,) = prompts(tokenizer, TEXT, task=task, length=900, samples=1, seed=3, keys=4)
    document, question = tokenizer.decode(prompt.document), tokenizer.decode(prompt.question)
    assert document.startswith("<bos>")
    assert document.endswith("\n")
    assert len(question) < len(document) / 2
    assert len(prompt.document) + len(prompt.question) + len(prompt.answer) <= 900
    if task == "needle":
        assert f"{question} {prompt.answer}." in document
    assert split_question(task, document + question) == (document, question)


class Parrot:
    """A model that says one text whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text):
        self.script = tokenizer(text, add_special_tokens=False)["input_ids"]

    def __call__(self, ids, past_key_values, **_):
        said = past_key_values or 0
        logits = torch.nn.functional.one_hot(torch.tensor([[self.script[said]]]), 257).float()
        return SimpleNamespace(logits=logits, past_key_values=said + 1)


@pytest.mark.parametrize(
    ("said", "is_hit"),
    [(" 12345.", True), ("\n 123456", True), ("12354 ", False), (" " * 9, False), ("a 12345", False)],
)
def test_an_answer_counts_if_the_text_begins_with_it(tokenizer, said, is_hit):
    assert answers(Parrot(tokenizer, said), tokenizer, None, torch.tensor([5]), "12345") is is_hit


def test_recall_counts_hits_for_every_cache(stock, subjects, tokenizer, monkeypatch):
    calls = []

    def every_third(*_):
        calls.append(_)
        return len(calls) % 3 == 1

    monkeypatch.setattr("bitkv.evaluation.recall.answers", every_third)
    steps = []
    rows = recall(
        stock,
        subjects[:2],
        tokenizer,
        TEXT,
        task="needle",
        length=512,
        samples=4,
        advance=lambda: steps.append(1),
    )
    assert [row.result.hits for row in rows] == [4, 0, 0]
    assert [row.result.exact_match for row in rows] == [1, 0, 0]
    assert len(steps) == 12
    assert rows[0].tokens == 20
    assert rows[0].protocol == "document first"


@pytest.mark.parametrize("mixed", [False, True])
def test_handing_over_a_prefilled_document_is_prefilling_it(model, windows, mixed):
    model = mixed_model() if mixed else model
    stock, subject = Subject(model), Subject(model, parse("quick1"))
    document, question = windows.ids[0, :350], windows.ids[0, 350:]
    with torch.inference_mode():
        read = prefilled(subject, document, subject.new_cache(exact_prefill=True))
        handed_over = resumed(subject, document, prefilled(stock, document))
        expected, got = (
            model(question[None], past_key_values=cache).logits for cache in (read, handed_over)
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def mixed_model():
    """One layer with a sliding window, which keeps its own cache, and one with full attention."""
    config = Gemma3TextConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def test_wilson_intervals():
    assert report.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert report.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert report.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    with pytest.raises(ValueError, match="11 hits of 10 samples"):
        report.wilson(11, 10)


@pytest.fixture(scope="module")
def run(model, tokenizer):
    def run(recipes, **options):
        progress = options.pop("progress", None)
        options = {"tokens": 400, "window": 400, "samples": 1, "lengths": (600,)} | options
        options = evaluation.Options(text=TEXT, **options)
        return evaluation.run(model, tokenizer, recipes, options, name="tiny", progress=progress)

    return run


def test_run_measures_everything_twice_the_same(model, run):
    before = model.config._attn_implementation
    progress = Progress(disable=True)
    rows = run(["kivi2", MINMAX1], progress=progress)
    assert [row.task for row in rows] == (
        ["perplexity"] * 3 + ["agreement"] * 2 + ["needle"] * 3 + ["fidelity"] * 2
    )
    assert rows[1].recipe == "kivi2"
    assert parse(rows[1].definition) == parse("kivi2")
    assert rows == run(["kivi2", MINMAX1])
    assert all(bar.finished for bar in progress.tasks)
    assert model.config._attn_implementation == before


def test_json_is_a_list_of_flat_rows_written_whole(run, tmp_path):
    rows = run(["kivi2"])
    path = tmp_path / "rows.json"
    evaluation.write_json(rows, path)
    read = json.loads(path.read_text())
    fields = {field.name for field in dataclasses.fields(evaluation.Row)} - {"result"}
    assert [fields <= set(row) for row in read] == [True] * len(rows)
    assert read[0]["nats_per_token"] == rows[0].result.nats_per_token
    assert read[-1]["layers"][0]["key_nmse"] == rows[-1].result.layers[0].key_nmse
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_failed_write_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    path.write_text("old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation.write_json([], path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_tables_show_every_row_and_say_the_protocol(run):
    console = Console(width=160)
    with console.capture() as captured:
        for table in evaluation.tables(run(["kivi2"], tasks=("perplexity", "needle"))):
            console.print(table)
    shown = " ".join(captured.get().split())
    assert shown.count("kivi2") == shown.count("stock │") == 2
    assert "perplexity of tiny (float32): context 400, 1 samples, 399 tokens" in shown
    assert "every query attends to the packed cache" in shown
    assert "then the question reads the packed cache" in shown
    assert "the stock cache itself is right in 0.0%" in shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": ("mmlu",)}, "no task 'mmlu'; choose from perplexity, agreement"),
        ({"perplexity_protocol": "exact"}, "no perplexity protocol 'exact'; choose from packed"),
        ({"window": 128}, "kivi2 packs nothing in a context of 128 tokens; pass at least 192"),
        ({"window": 4096}, "a context of 4096 tokens is longer than the model's 1024"),
        ({"lengths": (2048,)}, "a context of 2048 tokens is longer than the model's 1024"),
        ({"samples": 0}, "samples is 0; pass 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(run, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(["kivi2"], **options)
