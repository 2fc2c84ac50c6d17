"""Calibration: what is gathered, recipe files, rotary embeddings, and bits where they count."""

import re
import warnings
from itertools import product

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitkv.calibration import Reading, TooLittleText, calibrate, read, write
from bitkv.calibration.allocation import allocated
from bitkv.calibration.sensitivity import SITES, Sensitivity, alone_in, of_pairs, sensitivities
from bitkv.calibration.tune import frontier, within
from bitkv.cli import main
from bitkv.codecs import Affine, Coupled, Sample, Spectral, Unquantized
from bitkv.evaluation.protocols import Subject, cut
from bitkv.integrations.transformers import PackedCache
from bitkv.integrations.transformers.fingerprint import weights_digest
from bitkv.integrations.transformers.gather import Recorded, gather, late_gradients
from bitkv.integrations.transformers.rope import rope_of
from bitkv.integrations.transformers.stock import stock_attention
from bitkv.recipe import Allocated, Recipe, as_recipe
from bitkv.rope import Rope

TEXT = "".join(f"{i}: the key of room {i} is {i * i % 97}.\n" for i in range(40))
READING = Reading(text=TEXT, tokens=256, window=64, name="rooms")
CQ = Recipe(Coupled(4, 3), Coupled(8, 3), page_size=64)
ENOUGH = Recipe(Coupled(4, 3), Affine(2, "token", 32), page_size=64)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(saved_model):
    return load(saved_model)


@pytest.fixture(scope="module")
def tokenizer(saved_model):
    return AutoTokenizer.from_pretrained(saved_model)


@pytest.fixture(scope="module")
def fitted(model, tokenizer):
    [recipe] = calibrate(model, tokenizer, [CQ], READING)
    return recipe


@pytest.fixture
def file(fitted, tmp_path):
    path = tmp_path / "cq.safetensors"
    write(fitted, path)
    return path


def digests(recipes):
    return [recipe.calibration.digest for recipe in recipes]


def one_sentence(text: str) -> bool:
    return text == " ".join(text.split()) and not re.search(r"\. |Traceback", text)


# --- gathering ---------------------------------------------------------------------------------


def windows(count: int = 2, length: int = 16):
    return torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(3))


def by_hooks(model, ids, layer_idx):
    """Values of a layer `[Hkv, T, D]` and their gradients, the plain way."""
    kept = []
    projection = model.model.layers[layer_idx].self_attn.v_proj
    handle = projection.register_forward_hook(lambda _, __, out: kept.append(out) or out.retain_grad())
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    heads = model.config.num_key_value_heads
    return [x[0].unflatten(-1, (heads, -1)).transpose(0, 1) for x in (kept[0].detach(), kept[0].grad)]


def test_gathered_gradients_are_those_of_the_loss_of_every_next_token(model):
    ids = windows()
    found = gather(model, ids, [0, 1])
    for i, x in found.items():
        value, gradient = (
            torch.cat(y, 1) for y in zip(*(by_hooks(model, r, i) for r in ids), strict=True)
        )
        torch.testing.assert_close(x.v, value)
        assert x.v_gradient.dtype == torch.bfloat16
        torch.testing.assert_close(x.v_gradient.float(), gradient, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_late_gradients_are_those_through_late_queries_alone(softcap):
    draw = torch.Generator().manual_seed(5)
    q, k, v, slope = (torch.randn(1, h, 9, 8, generator=draw) for h in (4, 2, 2, 4))
    k.requires_grad_()
    v.requires_grad_()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out = stock_attention(module, q, k, v, None, softcap=softcap, is_causal=True).transpose(1, 2)
    for late in (0, 1, 4, 9):
        expected = torch.zeros_like(k), torch.zeros_like(v)
        for row in range(9):  # a query at a time: its tokens of that age
            loss = (out[:, :, row] * slope[:, :, row]).sum()
            by_row = torch.autograd.grad(loss, (k, v), retain_graph=True)
            for total, part in zip(expected, by_row, strict=True):
                total[:, :, : max(row + 1 - late, 0)] += part[:, :, : max(row + 1 - late, 0)]
        turned = out.detach().transpose(1, 2)
        turned.grad = slope.transpose(1, 2)
        found = late_gradients(Recorded(q, k, v, turned, None, 8**-0.5, softcap), late)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y[0])


def test_every_gradient_is_late_where_nothing_is_kept(model):
    x = gather(model, windows(), [1])[1]
    torch.testing.assert_close(x.k_late, x.k_gradient, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(x.v_late, x.v_gradient, rtol=1e-2, atol=1e-6)
    assert not gather(model, windows(), [1], late=16)[1].k_late.any()


def test_gathered_keys_are_those_of_the_cache(model):
    [ids] = windows(1)
    x = gather(model, ids[None], [1])[1]
    with torch.no_grad():
        layer = model(ids[None], use_cache=True).past_key_values.layers[1]
    torch.testing.assert_close(x.k, layer.keys[0])
    torch.testing.assert_close(x.v, layer.values[0])
    assert x.q.shape == (4, 16, 64)
    assert x.k_gradient.shape == x.k.shape
    assert x.k_gradient.any()


def test_the_first_tokens_of_each_window_are_left_out(model):
    every, some = (gather(model, windows(), [0], skip=skip)[0] for skip in (0, 5))
    assert torch.equal(some.positions, torch.arange(5, 16).repeat(2))
    for name in ("q", "k", "v", "k_gradient", "v_gradient", "k_late", "v_late"):
        parts = getattr(every, name).split(16, dim=1)
        assert torch.equal(getattr(some, name), torch.cat([x[:, 5:] for x in parts], 1))


def test_the_model_is_left_as_it_was_also_after_an_error(model):
    weights = list(model.parameters())
    weights[1].requires_grad_(False)
    flags, attention = [p.requires_grad for p in weights], model.config._attn_implementation

    def interrupt():
        raise KeyboardInterrupt

    gather(model, windows(1), [0])
    with pytest.raises(KeyboardInterrupt):
        gather(model, windows(1), [0], advance=interrupt)
    assert [p.requires_grad for p in weights] == flags
    assert all(p.grad is None for p in weights)
    assert model.config._attn_implementation == attention
    weights[1].requires_grad_(True)


# --- calibrating -------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_recipe_and_another_seed_another(model, tokenizer, fitted):
    again, other = (
        calibrate(model, tokenizer, [CQ], Reading(text=TEXT, tokens=256, window=64, seed=seed))
        for seed in (0, 1)
    )
    assert digests(again) == digests([fitted]) != digests(other)
    assert fitted == CQ
    assert repr(fitted) == repr(CQ)
    assert fitted.identity != CQ.identity


def test_several_passes_and_several_recipes_give_what_one_alone_gives(model, tokenizer, fitted):
    lean = Reading(text=TEXT, tokens=256, window=64, memory=1)
    both = calibrate(model, tokenizer, [ENOUGH, CQ], lean)
    assert digests(both) == digests([*calibrate(model, tokenizer, [ENOUGH], READING), fitted])


def test_the_work_that_is_done_adds_up_to_one(model, tokenizer):
    shares = []
    calibrate(model, tokenizer, [CQ], READING, advance=shares.append)
    assert sum(shares) == pytest.approx(1)


def interrupted(model, tokenizer, recipe, reading, partial):
    """A calibration that stops once a layer is done."""

    def stop(share):
        if list(partial.rglob("*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokenizer, [recipe], reading, partial=partial, advance=stop)
    return sorted(partial.rglob("*.safetensors"))


def shares_of(model, tokenizer, recipe, reading, partial):
    """The result, and how often the work advanced."""
    shares = []
    result = calibrate(
        model, tokenizer, [recipe], reading, partial=partial, advance=lambda x: shares.append(x)
    )
    return result, len(shares)


def test_an_interrupted_calibration_goes_on_and_ends_as_if_it_had_not_been(
    model, tokenizer, fitted, tmp_path
):
    lean = Reading(text=TEXT, tokens=256, window=64, memory=1, name="rooms")
    partial = tmp_path / "cq.partial"
    [done] = interrupted(model, tokenizer, CQ, lean, partial)
    assert done.name == "0.safetensors"
    result, steps = shares_of(model, tokenizer, CQ, lean, partial)
    assert digests(result) == digests([fitted])
    assert steps == 4 + 1, "four windows and a layer: the first layer is done"
    assert not partial.exists()


@pytest.mark.parametrize("change", ["recipe", "reading", "sinks", "weights", "damage"])
def test_layers_of_another_calibration_are_not_taken(change, saved_model, tokenizer, tmp_path):
    model, partial = load(saved_model), tmp_path / "cq.partial"
    recipe, reading = CQ, READING
    [*_, done] = interrupted(model, tokenizer, recipe, reading, partial)
    if change == "recipe":
        recipe = Recipe(Coupled(4, 3), Coupled(4, 3), page_size=64)
    elif change == "reading":
        reading = Reading(text=TEXT[1:], tokens=256, window=64)
    elif change == "sinks":
        recipe = Recipe(CQ.key, CQ.value, 5, page_size=64)
    elif change == "weights":
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(2)
    else:
        done.write_bytes(done.read_bytes()[:-1])
    result, steps = shares_of(model, tokenizer, recipe, reading, partial)
    assert digests(result) == digests(calibrate(model, tokenizer, [recipe], reading))
    assert steps == 4 + 2


def test_a_text_that_is_too_short_is_refused_with_its_numbers(model, tokenizer):
    with pytest.raises(
        ValueError, match=r"^the text has 200 tokens, less than one window of 2048; "
    ) as error:
        calibrate(model, tokenizer, [CQ], Reading(text=TEXT[:200], window=2048))
    with pytest.raises(ValueError, match=r"has 1152 tokens in windows of 64, and 4096 were"):
        calibrate(model, tokenizer, [CQ], Reading(text=TEXT, tokens=4096, window=64))
    assert one_sentence(str(error.value))


def test_windows_longer_than_the_model_can_read_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"^windows of 4096 tokens are longer than the model's 2048; "):
        calibrate(model, tokenizer, [CQ], Reading(text=TEXT, window=4096))


def test_heads_that_a_codec_cannot_serve_are_refused_before_anything_is_read(tokenizer, model):
    with pytest.raises(
        ValueError, match=r"^64 channels of a head are not a multiple of 7 coupled ones; "
    ):
        calibrate(model, tokenizer, ["cq(7, 8)"], READING, advance=pytest.fail)


def test_codebooks_that_would_learn_the_text_by_heart_are_warned_of(model, tokenizer):
    few, enough = Reading(text=TEXT, tokens=128, window=64), READING
    with pytest.warns(TooLittleText, match=r"^128 tokens .* 8 centroids are 16 each; .* 32 \(256 tok"):
        calibrate(model, tokenizer, [CQ], few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [fitted] = calibrate(model, tokenizer, [CQ], enough)
    assert fitted.calibration is not None


def test_the_source_says_what_was_read():
    assert READING.source == "256 tokens of rooms in windows of 64, seed 0"
    assert Reading(text="", tokens=100, window=64).source.startswith(
        "64 tokens of text in windows of 64"
    )
    assert Reading(text="", tokens=10, window=64).source.startswith("64 tokens of text in windows of 64")


def test_what_needs_no_calibration_stays_as_it_is(model, tokenizer):
    [recipe] = calibrate(model, tokenizer, ["kivi2"], READING)
    assert recipe == as_recipe("kivi2")
    assert recipe.calibration.tensors == {}


# --- recipe files ------------------------------------------------------------------------------


def test_a_recipe_file_gives_back_all_that_was_written(fitted, file):
    again = read(file)
    assert again == fitted
    assert again.identity == fitted.identity
    assert again.calibration.tensors.keys() == fitted.calibration.tensors.keys()
    for name, x in fitted.calibration.tensors.items():
        assert torch.equal(again.calibration.tensors[name], x)
    for name in ("source", "model", "weights"):
        assert getattr(again.calibration, name) == getattr(fitted.calibration, name)
    assert as_recipe(str(file)).identity == fitted.identity


def test_every_flipped_byte_of_a_recipe_file_is_noticed(file):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(0, header, 7), *range(header, len(data), 997), len(data) - 1]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|not a recipe file") as error:
            read(file)
        assert one_sentence(str(error.value)), error.value


def test_what_is_no_recipe_file_is_refused_with_one_sentence(file, tmp_path):
    data = file.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is damaged or not a recipe file .*; calibrate again$"):
            read(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(
        ValueError, match=r"is not a recipe file; pass one that `bitkv calibrate` wrote$"
    ):
        read(file)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^no recipe file .*; make one with"):
            read(missing)


def test_nothing_is_left_half_written(fitted, tmp_path, monkeypatch):
    path = tmp_path / "cq.safetensors"
    path.write_text("before")

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("bitkv.recipe.file.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        write(fitted, path)
    with pytest.raises(ValueError, match=r"was not calibrated; its text says everything$"):
        write(CQ, path)
    assert [x.read_text() for x in tmp_path.iterdir()] == ["before"]
    with pytest.raises(ValueError, match=r"^no folder .*; create it first$"):
        write(fitted, tmp_path / "none" / "cq.safetensors")


def test_a_cache_takes_a_recipe_file(model, tokenizer, file):
    ids = cut(tokenizer, TEXT, tokens=256, window=256).ids
    cache = PackedCache(model.config, str(file), exact_prefill=False)
    with torch.no_grad():
        assert model(ids, past_key_values=cache).logits.isfinite().all()
    assert cache.paged.layers[0].pool.num_used > 0


def test_a_recipe_for_another_model_is_refused(saved_model, fitted):
    model = load(saved_model)
    ids = torch.randint(2, 258, (1, 8))
    with torch.no_grad():
        model(ids, past_key_values=PackedCache(model.config, fitted))  # the model it was made for
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
        with pytest.raises(
            ValueError, match=r"^the recipe was calibrated for a model with other weights"
        ):
            model(ids, past_key_values=PackedCache(model.config, fitted))
    model.config.rope_parameters["rope_theta"] = 123.0
    with pytest.raises(
        ValueError, match=r"^the recipe was calibrated for another model than this qwen3"
    ):
        PackedCache(model.config, fitted)


def test_the_weights_of_a_model_are_the_same_in_bfloat16(saved_model, fitted):
    model = load(saved_model).bfloat16()
    assert weights_digest(model, 0) == fitted.calibration.weights != ""
    cache = PackedCache(model.config, fitted)
    with torch.no_grad():
        model(torch.randint(2, 258, (1, 8)), past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_a_saved_cache_is_refused_by_a_recipe_of_equal_text_that_learned_otherwise(
    model, tokenizer, fitted, tmp_path
):
    [other] = calibrate(model, tokenizer, [CQ], Reading(text=TEXT, tokens=256, window=64, seed=1))
    assert other == fitted
    cache, path = PackedCache(model.config, fitted), tmp_path / "saved.kv"
    ids = torch.randint(2, 258, (1, 200))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.save(path)
    PackedCache(model.config, fitted).load(path)
    for wrong in (other, Recipe(Coupled(4, 3, rope="after"), CQ.value, page_size=64)):
        with pytest.raises(ValueError, match=r"was saved with recipe|learned nothing yet"):
            PackedCache(model.config, wrong).load(path)


# --- rotary embeddings -------------------------------------------------------------------------

SCALED = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
}


def llama(kind: str, **parameters):
    parameters = {"rope_type": kind, "rope_theta": 1e4, **parameters}
    shape = {"hidden_size": 64, "num_attention_heads": 1, "max_position_embeddings": 2048}
    return transformers.LlamaConfig(**shape, rope_parameters=parameters)


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_embeddings_are_those_of_the_model(kind):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = llama(kind, **SCALED[kind])
    rope = rope_of(config)
    x, positions = torch.randn(1, 1, 8, 64), torch.randint(0, 2000, (1, 8))
    _, expected = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))
    assert (rope.factor != 1) == (kind == "yarn")
    torch.testing.assert_close(rope.rotate(x, positions[:, None]), expected, rtol=1e-3, atol=1e-3)


def test_rotation_is_undone_and_channels_beyond_it_are_left_alone():
    config = transformers.GPTNeoXConfig(hidden_size=128, num_attention_heads=2)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    rope = rope_of(config)
    x, positions = torch.randn(2, 8, 64), torch.randint(0, 2**20, (8,))
    for each in (rope, Rope(rope.inv_freq, 1.3)):
        turned = each.rotate(x, positions)
        assert torch.equal(turned[..., 16:], x[..., 16:])
        assert not torch.allclose(turned[..., :16], x[..., :16], atol=0.1)
        torch.testing.assert_close(each.undo(turned, positions), x)


@pytest.mark.parametrize(
    "config",
    [
        llama("dynamic", factor=2.0),
        transformers.CohereConfig(hidden_size=64, num_attention_heads=1),
        transformers.GPT2Config(),
        transformers.Gemma3TextConfig(num_hidden_layers=2),
    ],
    ids=["dynamic", "interleaved", "none", "of two kinds"],
)
def test_other_rotary_embeddings_are_not_known_and_codecs_that_need_one_say_so(config):
    assert rope_of(config) is None
    x = torch.randn(1, 64, 32)
    sample = Sample("key", x, torch.arange(64), x, x, None)
    with pytest.raises(ValueError, match=r"^this model has no rotary embedding that bitkv knows"):
        Coupled(4, 3).calibrate(sample)
    codec = Coupled(4, 3, rope="after").calibrate(sample)
    assert codec.shared("key", heads=1, head_dim=32).rope is None
    before = Coupled(4, 3).with_learned(codec.learned)
    with pytest.raises(
        ValueError, match=r"codes keys before the rotary embedding, and this model has no"
    ):
        before.shared("key", heads=1, head_dim=32)


# --- bits where they count ---------------------------------------------------------------------


def random_problem(seed: int) -> list[Sensitivity]:
    draw = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=draw))

    return [
        Sensitivity(
            layer, site, Affine(bits, "token"), 16 * (1 + below(9)), below(50) / 64, below(8) / 8
        )
        for layer in range(1 + below(3))
        for site in SITES
        for bits in (1, 2, 4)[: 1 + below(3)]
    ]


def all_of(measured, loss):
    """Loss and bytes of every allocation."""
    halves = {(x.layer, x.site): [] for x in measured}
    for x in measured:
        halves[x.layer, x.site].append(x)
    return [(sum(map(loss, xs)), sum(x.nbytes for x in xs)) for xs in product(*halves.values())]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("objective", ["kl", "error"])
def test_the_frontier_is_that_of_all_allocations(seed, objective):
    measured = random_problem(seed)
    every = all_of(measured, lambda x: x.kl if objective == "kl" else x.error**2)
    found = frontier(measured, elements=64, objective=objective)
    halves = len(found[0].choices)
    best = {(loss, size) for loss, size in every if not any(
        a <= loss and b <= size and (a, b) != (loss, size) for a, b in every
    )}  # fmt: skip
    assert [(x.predicted, x.bits_per_element * 64 * halves / 8) for x in found] == sorted(best)[::-1]
    for x in found:
        assert [(y.layer, y.site) for y in x.choices] == list(product(range(halves // 2), SITES))
        assert sum(y.nbytes for y in x.choices) == x.bits_per_element * 64 * halves / 8
    for budget in (x.bits_per_element + 0.01 for x in found):
        affordable = [loss for loss, size in every if size * 8 / 64 / halves <= budget]
        assert within(found, budget).predicted == min(affordable)


def halves_that_cost(*costs: float):
    """Layers of Gaussian keys and values, one pair of costs each: how large their gradients are."""
    draw = torch.Generator().manual_seed(0)
    for layer, pair in enumerate(zip(costs[::2], costs[1::2], strict=True)):
        yield (
            layer,
            *(
                Sample(
                    site,
                    *(torch.randn(1, 600, 32, generator=draw), torch.arange(600)),
                    *(torch.ones(1, 600, 32), None, None),
                    late=cost * torch.randn(1, 600, 32, generator=draw),
                )
                for site, cost in zip(SITES, pair, strict=True)
            ),
        )


def test_bits_go_where_late_gradients_are_large_and_the_budget_is_kept():
    recipe = Recipe(Allocated(Spectral(2)), Allocated(Spectral(1)), recent_tokens=0)
    [made] = allocated([recipe], 2, halves_that_cost(1, 10, 100, 1))
    rates = [codec.bits for pair in zip(made.key, made.value, strict=True) for codec in pair]
    assert sum(rates) == 6
    assert rates[2] > rates[1] > rates[0]
    assert rates[0] == pytest.approx(rates[3], abs=0.25)


def test_one_half_may_be_allocated_and_layers_without_tokens_keep_their_codec():
    recipe = Recipe(Allocated(Spectral(1)), Spectral(2))
    [made] = allocated([recipe], 3, halves_that_cost(1, 1, 100, 1))
    assert made.value == recipe.value
    assert made.key[0].bits + made.key[1].bits == 2
    assert made.key[0].bits < made.key[1].bits
    assert made.key[2] == Spectral(1)


def test_calibration_chooses_rates_and_writes_them_into_the_recipe(model, tokenizer, tmp_path):
    recipe = Recipe(Allocated(Spectral(1)), Allocated(Spectral(1)), 0, 8, 64)
    reading = Reading(text=TEXT, tokens=512, window=64)
    [made] = calibrate(model, tokenizer, [recipe], reading)
    assert not made.learns
    assert sum(codec.bits for codec in (*made.key, *made.value)) <= 2 * len(made.key)
    write(made, tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors") == made


def test_a_budget_below_the_least_is_refused_with_both_numbers():
    allocations = frontier(random_problem(0), elements=64)
    least = allocations[0].bits_per_element
    assert within(allocations, least) == allocations[0]
    with pytest.raises(ValueError, match=rf"^0.1 bits are less than these codecs' least, {least:.3f}; "):
        within(allocations, 0.1)
    with pytest.raises(ValueError, match=r"^nothing to allocate; pass codecs for keys and for values$"):
        frontier([], elements=64)


def test_one_half_alone_keeps_what_it_learned_and_the_rest_is_unquantized(fitted):
    for layer, (place, site) in product((0, 1), enumerate(SITES)):
        alone = alone_in(fitted, layer, site, 2)
        for i, j in product((0, 1), (0, 1)):
            codec = alone.codecs(i)[j]
            mine = fitted.codecs(layer)[place]
            assert codec == (mine if (i, j) == (layer, place) else Unquantized())
        name = f"{layer}.{site}.codebook"
        assert alone.calibration.tensors.keys() == {name}
        assert torch.equal(alone.calibration.tensors[name], fitted.calibration.tensors[name])
        assert alone.page_size == fitted.page_size


def test_recipes_of_pairs_are_written_shortly_and_keep_what_was_learned(fitted, tmp_path):
    same = of_pairs(fitted, [fitted.codecs(i) for i in (0, 1)])
    assert same.identity == fitted.identity
    int2 = Affine(2, "token", 32)
    plain = of_pairs(ENOUGH, [(int2, int2)] * 2)
    assert plain == Recipe(int2, int2, page_size=64)
    assert plain.calibration is None
    mixed = of_pairs(fitted, [(int2, fitted.codecs(0)[1]), (fitted.codecs(1)[0], int2)])
    assert mixed.key == (int2, CQ.key)
    write(mixed, tmp_path / "mixed.safetensors")
    assert read(tmp_path / "mixed.safetensors").identity == mixed.identity


def test_fewer_bits_lose_more_and_none_lost_is_a_choice_too(saved_model, tokenizer):
    model = load(saved_model)
    recipes = [Recipe(Affine(b, "channel", 32), Affine(b, "token", 32), page_size=64) for b in (1, 2, 8)]
    recipes.append(Recipe(Affine(8, "channel", 32), Unquantized(), page_size=64))
    steps = []
    text = cut(tokenizer, TEXT, tokens=256, window=256)
    found = sensitivities(Subject(model), recipes, text, advance=lambda: steps.append(1))
    assert len(found) == len(steps) == 2 * 2 * 3 + 2, "keys in 8 bits are measured once"
    for layer, site in product((0, 1), SITES):
        half = [x for x in found if (x.layer, x.site) == (layer, site)]
        for name in ("kl", "error"):
            losses = [getattr(x, name) for x in half]
            assert losses == sorted(losses, reverse=True), (layer, site, name)
        assert [x.nbytes for x in half] == sorted(x.nbytes for x in half)
    elements = 64 * 64
    best = frontier(found, elements=elements)[-1].recipe(recipes[0], 2)
    assert best.value == Unquantized()
    assert best.page_size == 64


def small(model_type, tokenizer, **sizes):
    """A model with random weights, for texts of this tokenizer."""
    sizes |= {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()


def test_layers_that_are_not_packed_have_no_part_in_an_allocation(tokenizer):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = small("gemma2", tokenizer, num_hidden_layers=3, layer_types=kinds, head_dim=32)
    recipe = Recipe(Affine(1, "channel", 32), Affine(2, "token", 32), page_size=64)
    found = sensitivities(Subject(model), [recipe], cut(tokenizer, TEXT, tokens=256, window=256))
    assert [(x.layer, x.site) for x in found] == [(1, "key"), (1, "value")]
    [best] = frontier(found, elements=64 * 32)
    made = best.recipe(recipe, 3)
    assert made.codecs(0) == made.codecs(2) == (Unquantized(), Unquantized())
    assert made.codecs(1) == recipe.codecs(1)


@pytest.mark.filterwarnings("ignore:gptj computes attention")
def test_what_a_models_own_code_computes_cannot_be_learned_from(tokenizer):
    model = small("gptj", tokenizer, n_embd=64, n_layer=2, n_head=4, n_positions=1024, rotary_dim=8)
    with pytest.raises(
        ValueError, match=r"^gptj computes attention in its own code, .* need not learn$"
    ):
        calibrate(model, tokenizer, [CQ], READING)
    recipe = Recipe(Affine(1, "channel", 32), Affine(2, "token", "page"), page_size=64)
    with pytest.raises(ValueError, match=r"; measure agreement and perplexity instead$"):
        sensitivities(Subject(model), [recipe], cut(tokenizer, TEXT, tokens=256, window=256))


# --- the command line --------------------------------------------------------------------------


def run(capsys, *argv):
    """Exit code, standard output, standard error."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_calibrate_writes_a_recipe_file(capsys, tmp_path):
    path = tmp_path / "cq.safetensors"
    recipe = "Recipe(key=Coupled(4, 4), value=Coupled(4, 4))"
    code, out, err = run(
        capsys, "calibrate", "--recipe", recipe, "--calibration-tokens", 256, "--output", path
    )
    assert code == 0, err
    assert "256 tokens of calibration.txt in windows of 256, seed 0" in out
    assert "bitkv: warning: 256 tokens for codebooks of 16 centroids are 16 each" in err
    assert [x.name for x in tmp_path.iterdir()] == ["cq.safetensors"]
    assert repr(as_recipe(str(path))) == repr(as_recipe(recipe))


def test_generate_takes_a_recipe_file(capsys, saved_model, file):
    code, _, err = run(
        capsys, "generate", saved_model, "--prompt", "x", "--recipe", file, "--max-new-tokens", 1
    )
    assert code == 0, err


SMALL = ("--tokens", 256, "--window", 256, "--calibration-tokens", 256)


def test_tune_writes_a_text_where_nothing_is_learned(capsys, tmp_path):
    keys = ("Affine(1, 'channel', 32)", "Affine(2, 'channel', 32)")
    paths = [tmp_path / name for name in ("mine.txt", "mine.json")]
    code, out, err = run(
        capsys, "tune", *SMALL, "--bits", 2.5, "--key", keys[0], "--key", keys[1],
        "--value", "Affine(1, 'token', 32)", "--output", paths[0], "--json", paths[1],
    )  # fmt: skip
    assert code == 0, err
    assert "bits per element" in out
    command, text = paths[0].read_text().splitlines()
    assert command.startswith("# bitkv tune ")
    assert as_recipe(text).value == Affine(1, "token", 32)
    code, _, err = run(
        capsys, "generate", "--prompt", "x", "--recipe", f"@{paths[0]}", "--max-new-tokens", 1
    )
    assert code == 0, err


def test_tune_writes_a_recipe_file_where_something_is(capsys, tmp_path):
    path = tmp_path / "mine.safetensors"
    code, _, err = run(
        capsys, "tune", *SMALL, "--bits", 1.5, "--key", "Coupled(8, 4)",
        "--key", "Affine(2, 'channel', 32)",
        "--value", "Affine(1, 'token', 'page')", "--output", path,
    )  # fmt: skip
    assert code == 0, err
    assert as_recipe(str(path)).calibration is not None


@pytest.mark.filterwarnings("default:gptj computes attention")
def test_a_warning_is_a_line_that_comes_once(capsys, saved_model, tokenizer, tmp_path):
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 1024, "rotary_dim": 8}
    small("gptj", tokenizer, **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code, _, err = run(
        capsys, "generate", tmp_path, "--prompt", "x", "--recipe", "fp16", "--max-new-tokens", 2
    )
    assert code == 0, err
    lines = [line for line in err.splitlines() if "gptj" in line]
    assert lines == [
        "bitkv: warning: gptj computes attention in its own code: bitkv packs its cache, and unpacks "
        "all of it at every step"
    ]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            "calibrate --recipe kivi2 --output mine.txt",
            "mine.txt does not end in .safetensors; name the recipe file so",
        ),
        (
            "calibrate --recipe kivi2 --output none/mine.safetensors",
            "no folder none for mine.safetensors; create it first",
        ),
        (
            "calibrate {model} --recipe kivi2 --output mine.safetensors",
            "a recipe that learns needs text that is like what the model will read; pass "
            "--calibration-text FILE",
        ),
        (
            "calibrate {model} --recipe kivi2 --calibration-text none.txt --output mine.safetensors",
            "no file none.txt",
        ),
        ("generate --prompt x --recipe none.safetensors", "no recipe file none.safetensors; make one"),
        (
            "tune --bits 2 --output mine.safetensors",
            "mine.safetensors will be a text, as no codec learns",
        ),
        (
            "tune --bits 2 --codecs coupled --output mine.txt",
            "mine.txt will hold what codecs have learned; end its name in .safetensors",
        ),
        ("tune --bits 2 --key Affine(9,'channel') --output mine.txt", "Affine: bits 9"),
        (
            "tune --bits 0.5 --tokens 256 --window 256 --key Affine(1,'channel') "
            "--value Affine(1,'token')",
            "0.5 bits are less than these codecs' least, ",
        ),
        (
            "tune --bits 2 --tokens 64 --window 64 --codecs levels",
            "packs nothing in a context of 64 tokens; pass at least 196",
        ),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch, saved_model, argv, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv.format(model=saved_model).split())
    assert (code, out) == (2, "")
    assert err.startswith("bitkv: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
