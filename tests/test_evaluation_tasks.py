"""Prompts of the recall tasks, and what is measured by following a text."""

import json
import random
import statistics

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitkv import evaluation
from bitkv.evaluation import tasks
from bitkv.evaluation.divergence import divergence, starts
from bitkv.evaluation.prompts import lessons, prompts
from bitkv.evaluation.protocols import Subject, prefilled, resumed, right_until
from bitkv.evaluation.recall import recall, table_copy
from bitkv.generation.checkpoint import ASSETS
from bitkv.recipe import Calibration, parse

TEXT = "\n".join(f"Line {i} holds {i * i} and {i % 97}." for i in range(2000))
MINMAX1 = 'Recipe(Affine(1, "channel"), Affine(1, "token"), num_sink_tokens=4)'


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS)


@pytest.fixture(scope="module")
def stock(model):
    return Subject(model)


@pytest.fixture(scope="module")
def subjects(model):
    return [Subject(model, parse(text), text) for text in ("fp16", MINMAX1)]


@pytest.mark.parametrize("task", ["needle", "needle_similar"])
def test_the_asked_fact_lies_at_the_depth_that_is_asked_for(tokenizer, task):
    drawn = list(prompts(tokenizer, TEXT, task=task, length=1500, samples=8, seed=1, depths=4))
    assert [prompt.depth_bin for prompt in drawn] == [0, 1, 2, 3] * 2
    for prompt in drawn:
        document, question = tokenizer.decode(prompt.document), tokenizer.decode(prompt.question)
        assert document.count(f"{question} {prompt.answer}.\n") == 1
        place = document.index(f"{question} {prompt.answer}") / len(document)
        assert abs(place - (prompt.depth_bin + 0.5) / 4) < 0.125 + 0.15  # other facts shift it


def test_similar_needles_are_near_duplicates():
    keys = tasks.similar_keys(random.Random(0), 32)
    assert len(set(keys)) == 32
    assert len({key.split()[0] for key in keys}) <= 8
    values = tasks.similar_values(random.Random(0), 32)
    assert len({value[0] for value in values}) < 11
    assert len({value[:2] for value in values}) < 30


def test_prompts_of_one_seed_are_the_same_and_of_another_are_not(tokenizer):
    def draw(seed):
        options = {"task": "needle_similar", "length": 900, "samples": 2, "keys": 9}
        return [x.document.tolist() for x in prompts(tokenizer, TEXT, seed=seed, **options)]

    assert draw(0) == draw(0) != draw(1)


def test_a_table_is_told_again_with_its_values_marked(tokenizer):
    (lesson,) = lessons(tokenizer, TEXT, length=900, samples=1, seed=0, keys=5)
    told = tokenizer.decode(lesson.text)
    assert tokenizer.decode(lesson.document).startswith(f"<|bos|>{told}\n")
    assert len(lesson.document) + len(lesson.text) <= 900
    assert int(lesson.scored.sum()) == 5 * tasks.VALUE_DIGITS
    assert all(text.strip().isdigit() for text in map(tokenizer.decode, lesson.text[lesson.scored]))
    assert "".join(tokenizer.decode(lesson.text[lesson.scored]).split()).isdigit()


def test_a_text_is_followed_to_its_first_mistake_wherever_chunks_end(model, stock):
    ids = torch.arange(20) * 37 % 1000
    out = model.generate(ids[None], max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    for cut in (None, 1, 7, 15, 16, 17, 31, 32, 33, 40):
        text, scored = out[19:].clone(), torch.ones(41, dtype=torch.bool)
        if cut is not None:
            text[cut] = (text[cut] + 1) % 1000
        expected = 40 if cut is None else cut - 1
        assert right_until(model, prefilled(stock, out[:19]), text, scored) == expected


def test_greedy_text_diverges_where_generation_does(model, tokenizer, stock, subjects):
    rows = divergence(stock, subjects, tokenizer, TEXT, length=420, samples=3, steps=20)
    assert [row.result.mean for row in rows[:2]] == [20, 20]
    assert [row.result.unchanged for row in rows[:2]] == [1, 1]
    common = []
    for ids in starts(tokenizer, TEXT, length=400, samples=3):
        expected = model.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
        past = resumed(subjects[1], ids[:-1], prefilled(stock, ids[:-1]))
        got = model.generate(
            ids[None], past_key_values=past, max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        same = (got[0, 400:] == expected[0, 400:]).tolist()
        common.append([*same, False].index(False))
    assert rows[2].result.mean == statistics.fmean(common)
    assert rows[2].result.median == statistics.median(common)
    assert rows[2].protocol == "followed"


def test_starts_are_spread_over_the_whole_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    first, middle, last = starts(tokenizer, TEXT, length=100, samples=3)
    assert first[0] == middle[0] == last[0] == tokenizer.bos_token_id
    assert first[1:].tolist() == ids[:99]
    assert last[1:].tolist() == ids[-99:]
    with pytest.raises(ValueError, match="less than a prompt of 100"):
        next(starts(tokenizer, "short", length=100, samples=1))


def test_the_bundled_model_copies_tables_and_one_bit_loses_them(tokenizer, stock, subjects):
    text = (ASSETS / "heldout.txt").read_text(encoding="utf-8")
    rows = table_copy(stock, subjects, tokenizer, text, length=600, samples=2, seeds=2)
    exact, same, minmax1 = (row.result for row in rows)
    assert exact.exact_match >= 0.75
    assert exact == same
    assert exact.asked == 80
    assert minmax1.hits == 0
    assert minmax1.right < 40 < exact.right
    assert rows[0].samples == 4


def test_hits_are_pooled_over_seeds_and_counted_by_depth(tokenizer, stock, subjects, monkeypatch):
    calls = []

    def sometimes(*_):
        calls.append(1)
        return len(calls) % 4 == 1  # the stock cache, on the first of two depths

    monkeypatch.setattr("bitkv.evaluation.recall.answers", sometimes)
    rows = recall(
        stock, subjects[:1], tokenizer, TEXT, task="needle", length=600, samples=2, seeds=3, depths=2
    )
    assert [(row.depth, row.samples) for row in rows] == [
        (None, 6), (None, 6), (0.25, 3), (0.25, 3), (0.75, 3), (0.75, 3),
    ]  # fmt: skip
    assert [row.result.hits for row in rows] == [3, 0, 3, 0, 0, 0]
    assert (rows[0].result.seed, rows[0].result.seeds) == (0, 3)
    console = Console(width=160)
    with console.capture() as captured:
        for table in evaluation.tables(rows):
            console.print(table)
    shown = captured.get()
    assert "needle by depth of model" in shown
    assert "at 25%" in shown
    assert "at 75%" in shown


def test_rows_of_another_domain_of_codebooks_and_of_a_stressed_model(model, tokenizer, tmp_path):
    recipe = parse("kivi2")
    learned = Calibration(tuple(recipe.codecs(i) for i in range(4)), "", "", "")
    assert learned.nbytes == 0
    options = evaluation.Options(
        text=TEXT, ood_text="Nothing of the kind. " * 200, tasks=["perplexity", "ood"], tokens=300,
        window=300, stress=True,
    )  # fmt: skip
    rows = evaluation.run(model, tokenizer, [recipe], options, name="m")
    assert [row.task for row in rows] == (
        ["perplexity"] * 2 + ["ood perplexity"] * 2 + ["ood agreement"]
    )
    assert {row.model for row in rows} == {"m+stress"}
    assert rows[0].result != rows[2].result
    evaluation.write_json(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["codebook_bytes"] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": ["ood"]}, "the task ood needs a text of another domain; pass ood_text"),
        ({"depths": 9, "samples": 4}, "depths is 9, with 4 samples a seed; pass 1 to 4"),
        ({"keys": 1}, "keys is 1; pass 2 or more"),
        ({"seeds": 0}, "seeds is 0; pass 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluation.Options(text=TEXT, **options)
