"""Recipes: one text form, never evaluated as Python, that reads back as the same object."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitkv.codecs import Affine, Unquantized
from bitkv.recipe import PRESETS, Allocated, Recipe, Split, load, parse
from bitkv.recipe.file import as_recipe

PLAIN = [name for name, preset in PRESETS.items() if not preset.example]
EXAMPLES = {name: preset.example for name, preset in PRESETS.items() if preset.example}
CHOICES = f"choose from {', '.join(PRESETS)} or write Recipe(key=..., value=...)"


def exactly(sentence: str) -> str:
    return f"^{re.escape(sentence)}$"


def affine(*granularities: str) -> st.SearchStrategy:
    return st.builds(
        Affine,
        bits=st.sampled_from([1, 2, 4, 8]),
        granularity=st.sampled_from(granularities),
        group_size=st.sampled_from([32, 64, 128, "page"]),
        levels=st.sampled_from(["minmax", "mse", "unbiased"]),
    )


def codecs(*granularities: str) -> st.SearchStrategy:
    one = affine(*granularities) | st.just(Unquantized())
    split = st.builds(Split, before=one, layer=st.integers(0, 100), after=one)
    return one | split | st.builds(Allocated, one)


RECIPES = st.builds(
    Recipe,
    key=codecs("channel", "token"),
    value=codecs("token"),
    num_sink_tokens=st.integers(0, 64),
    recent_tokens=st.integers(0, 512),
    page_size=st.sampled_from([64, 128]),
)


@given(recipe=RECIPES)
def test_repr_parses_to_the_same_recipe(recipe):
    assert parse(repr(recipe)) == recipe
    assert parse(str(recipe)) == recipe


@pytest.mark.parametrize("name", PLAIN)
def test_a_preset_parses_prints_as_its_name_and_expands_to_its_repr(name):
    recipe = parse(name)
    assert str(recipe) == name
    assert parse(f" {name}() ") == recipe
    assert repr(recipe).startswith("Recipe(key=")
    assert parse(repr(recipe)) == recipe


@pytest.mark.parametrize(("name", "example"), EXAMPLES.items())
def test_a_preset_with_arguments_shows_a_call_that_parses(name, example):
    assert example.startswith(f"{name}(")
    assert parse(repr(parse(example))) == parse(example)


def test_every_preset_says_what_it_is_and_where_it_comes_from():
    assert all(preset.source and preset.summary for preset in PRESETS.values())


def test_affine_gives_keys_per_channel_and_values_per_token():
    assert parse("affine(2, 64, 'mse', sinks=8)") == Recipe(
        key=Affine(2, "channel", 64, "mse"), value=Affine(2, "token", 64, "mse"), num_sink_tokens=8
    )
    assert parse("affine(2)") == parse("kivi2")


def test_kivi2_is_what_the_paper_describes():
    assert parse("kivi2") == Recipe(
        key=Affine(2, "channel", 32, "minmax"), value=Affine(2, "token", 32, "minmax"), num_sink_tokens=0
    )


def test_fp16_quantizes_nothing():
    assert parse("fp16").codecs(0) == (Unquantized(), Unquantized())


def test_asymkv_gives_early_layers_two_bits_keys_and_values_separately():
    recipe = parse("asymkv(lk=3, lv=1)")
    assert recipe == parse("asymkv(3, 1)") == parse(repr(recipe))
    bits = [tuple(codec.bits for codec in recipe.codecs(layer)) for layer in range(5)]
    assert bits == [(2, 2), (2, 1), (2, 1), (1, 1), (1, 1)]
    assert [codec.granularity for codec in recipe.codecs(0)] == ["channel", "token"]


def test_a_recipe_object_passes_where_a_text_does():
    recipe = parse("int8")
    assert as_recipe(recipe) is recipe
    assert as_recipe("int8") == recipe


def test_a_file_holds_a_recipe_and_comments(tmp_path):
    path = tmp_path / "recipe.txt"
    path.write_text(
        "# keys matter more\nRecipe(\n    key=Affine(4, 'channel'),\n    # values less\n"
        "    value=Affine(bits=2, granularity='token'),\n    recent_tokens=32,\n)\n"
    )
    assert load(path) == Recipe(Affine(4, "channel"), Affine(2, "token"), recent_tokens=32)


def test_a_recipe_file_that_does_not_exist_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        load(tmp_path / "missing.txt")


K, V = "key=Affine(2, 'channel')", "value=Affine(2, 'token')"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", f"recipe '' is not a recipe expression; {CHOICES}"),
        ("kivi2 kivi2", f"recipe 'kivi2 kivi2' is not a recipe expression; {CHOICES}"),
        ("kivi2(", f"recipe 'kivi2(' is not a recipe expression; {CHOICES}"),
        ("a\0b", f"recipe 'a\\x00b' is not a recipe expression; {CHOICES}"),
        ("x = kivi2", f"recipe 'x = kivi2' is not a recipe expression; {CHOICES}"),
        ("kivi3", f"recipe 'kivi3': no 'kivi3'; {CHOICES}"),
        ("3", f"recipe '3' is not a recipe; {CHOICES}"),
        ("'kivi2'", f"recipe \"'kivi2'\" is not a recipe; {CHOICES}"),
        ("Unquantized()", "recipe 'Unquantized()' is a codec; write Recipe(key=..., value=...)"),
        ("kivi2(3)", "recipe 'kivi2(3)': kivi2: too many positional arguments"),
        ("asymkv", "recipe 'asymkv': asymkv: missing a required argument: 'lk'"),
        ("asymkv(2, -1)", "asymkv: lv -1 is not a layer count; pass 0 or more"),
        ("asymkv('2', 1)", "asymkv: lk '2' is not a layer count; pass 0 or more"),
        ("kivi2(**{})", "recipe 'kivi2(**{})': write each argument as name=value, once"),
        (
            f"Recipe({K}, {K}, {V})",
            f"recipe {f'Recipe({K}, {K}, {V})'!r}: write each argument as name=value, once",
        ),
        (
            "Recipe(key=Affine(3, 'channel'), value=Unquantized())",
            "Affine: bits 3 is not one of 1, 2, 4, 8",
        ),
        (f"Recipe(key=2, {V})", "Recipe: key 2 is not a codec; see `bitkv recipes`"),
        (
            f"Recipe(value=Affine(2, 'channel'), {K})",
            "Recipe: values are quantized per token; give the value codec granularity='token'",
        ),
        (
            f"Recipe({K}, {V}, num_sink_tokens=-1)",
            "Recipe: num_sink_tokens -1 is not a count; pass 0 or more",
        ),
        (
            f"Recipe({K}, {V}, recent_tokens=1.5)",
            "Recipe: recent_tokens 1.5 is not a count; pass 0 or more",
        ),
        (
            f"Recipe({K}, {V}, recent_tokens=True)",
            "Recipe: recent_tokens True is not a count; pass 0 or more",
        ),
        (f"Recipe({K}, {V}, page_size=32)", "Recipe: page_size 32 is not supported; use 64 or 128"),
        (f"Recipe({K}, {V}, page_size=64.0)", "Recipe: page_size 64.0 is not supported; use 64 or 128"),
        (
            f"Recipe({V}, key=Split(Unquantized(), 'two', Unquantized()))",
            "Split: layer 'two' is not a layer count; pass 0 or more",
        ),
        (
            f"Recipe({V}, key=Split(2, 1, Unquantized()))",
            "Recipe: key 2 is not a codec; see `bitkv recipes`",
        ),
    ],
)
def test_bad_text_is_refused_with_one_sentence_and_no_chained_error(text, sentence):
    with pytest.raises(ValueError, match=exactly(sentence)) as error:
        parse(text)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir(target)",
        "__import__('os')",
        "open(target, 'w')",
        "[kivi2 for _ in open(target, 'w')]",
        "kivi2 if open(target, 'w') else fp16",
        "(lambda: kivi2)()",
        "kivi2.__class__",
        "asymkv(lk=open(target, 'w'), lv=1)",
        "Recipe(key=().__class__, value=Unquantized())",
        "Recipe(key=Affine(bits=1 << 1, granularity='channel'), value=Unquantized())",
    ],
)
def test_nothing_is_evaluated_as_python(text, tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ValueError, match=r"^recipe "):
        parse(text.replace("target", repr(str(target))))
    assert not target.exists()


@pytest.mark.parametrize("text", ["(" * 5000, "-" * 5000 + "1", "asymkv(" * 100 + ")" * 100])
def test_absurdly_nested_text_is_refused_too(text):
    with pytest.raises(ValueError, match=r"^recipe "):
        parse(text)
