"""A model's cache: layers move together, bits are measured from bytes, files are whole or refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bitkv.attention import attend
from bitkv.cache import PagedCache
from bitkv.pages import LAYOUTS
from bitkv.recipe import parse

RECIPES = ("fp16", "int8", "kivi4", "kivi2", "asymkv(1, 0)", "quick2", "quick1")
MODEL = "tiny model, 2 layers"


def tokens(batch: int, count: int, head_dim: int = 64) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, batch, 2, count, head_dim).half()
    return k, v


def filled(recipe: str = "kivi2", lengths=(400, 250, 10), layers: int = 2) -> PagedCache:
    cache = PagedCache(recipe, layers)
    longest = max(lengths)
    real = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    for i in range(layers):
        cache.append(i, *tokens(len(lengths), longest), real)
    return cache


def outputs(cache: PagedCache, seed: int = 1) -> list[Tensor]:
    """What attention makes of each layer, for queries that depend on the seed only."""
    batch = len(cache.layers[0].lengths)
    q = torch.randn(batch, 4, 3, 64, generator=torch.Generator().manual_seed(seed)).half()
    return [attend(q, layer.view())[0] for layer in cache.layers]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert all(x.norm() > 0 for x in a)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_layer_has_the_codecs_and_the_window_that_the_recipe_gives_it():
    cache = PagedCache("asymkv(lk=1, lv=0)", 2)
    assert [(layer.key.bits, layer.value.bits) for layer in cache.layers] == [(2, 1), (1, 1)]
    layer = PagedCache("quick2", 1).layers[0]
    recipe = parse("quick2")
    assert layer.num_sink_tokens == recipe.num_sink_tokens
    assert layer.recent_tokens == recipe.recent_tokens
    assert layer.page_size == recipe.page_size


def test_reorder_repeat_select_and_crop_move_all_layers_together():
    cache = filled()
    address = [layer.pool.data.data_ptr() for layer in cache.layers]
    cache.reorder(torch.tensor([2, 0, 1]))
    cache.repeat(2)
    assert [layer.lengths for layer in cache.layers] == [[10, 10, 400, 400, 250, 250]] * 2
    cache.select(torch.tensor([2, 4]))
    cache.crop([390, 200])
    assert [layer.lengths for layer in cache.layers] == [[390, 200]] * 2
    assert [layer.pool.data.data_ptr() for layer in cache.layers] == address


def test_a_layer_that_never_gets_tokens_costs_nothing():
    cache = PagedCache("kivi2", 3)
    cache.append(1, *tokens(1, 300))
    cache.repeat(2)
    assert [layer.nbytes > 0 for layer in cache.layers] == [False, True, False]
    assert cache.nbytes == cache.layers[1].nbytes


def test_reset_forgets_all_tokens():
    cache = filled()
    cache.reset()
    assert cache.nbytes == 0
    assert cache.bits_per_element == 0
    cache.append(0, *tokens(1, 7))
    assert cache.layers[0].lengths == [7]


@pytest.mark.parametrize(
    ("recipe", "packed_bits"),
    [
        ("fp16", 16.0),
        ("int8", 8.25),
        ("kivi4", 5.0),
        ("kivi2", 3.0),
        ("quick2", 2.625),
        ("quick1", 1.75),
    ],
)
def test_bits_per_element_are_measured_from_bytes_hot_window_included(recipe, packed_bits):
    cache = PagedCache(recipe, 2)
    for i in range(2):
        cache.append(i, *tokens(1, 1000, head_dim=128))
    settings = parse(recipe)
    hot_before_pages = settings.num_sink_tokens + settings.recent_tokens
    packed = (1000 - hot_before_pages) // 128 * 128
    assert packed == 896
    assert cache.packed_bits_per_element == packed_bits
    assert cache.bits_per_element == (packed * packed_bits + (1000 - packed) * 16) / 1000


def test_a_page_shared_by_beams_is_paid_once():
    cache = filled("kivi2", lengths=(400,))
    pages = cache.usage.page_bytes
    cache.repeat(4)
    assert cache.usage.page_bytes == pages
    assert cache.layers[0].lengths == [400] * 4


def test_nbytes_is_far_below_16_bits_and_counts_free_pages_too():
    cache = PagedCache("kivi2", 1)
    cache.append(0, *tokens(1, 8192))
    layer = cache.layers[0]
    assert cache.nbytes >= cache.usage.page_bytes + cache.usage.hot_bytes
    assert cache.nbytes == layer.pool.nbytes + layer.block_table.nbytes + 8 + 2 * layer.hot_k.nbytes
    assert cache.nbytes < 0.3 * 8192 * 2 * 64 * 2 * 2


# --- files --------------------------------------------------------------------------------------


def shared_and_cropped() -> PagedCache:
    cache = filled()
    cache.reorder(torch.tensor([0, 0, 1]))
    cache.crop([400, 200, 130])
    for i in range(2):
        cache.append(i, *tokens(3, 90))
    return cache


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_loaded_cache_attends_and_grows_as_the_saved_one(recipe, tmp_path):
    cache, loaded = filled(recipe), PagedCache(recipe, 2)
    cache.save(tmp_path / "cache", model=MODEL, extra={"positions": torch.arange(5)})
    extra = loaded.load(tmp_path / "cache", model=MODEL)
    assert extra["positions"].tolist() == [0, 1, 2, 3, 4]
    assert loaded.layers[0].lengths == [400, 250, 10]
    assert_equal(outputs(cache), outputs(loaded))
    for i in range(2):
        k, v = tokens(3, 200)
        cache.append(i, k, v)
        loaded.append(i, k, v)
    assert_equal(outputs(cache), outputs(loaded))
    assert cache.usage == loaded.usage


def test_sharing_and_cropping_survive_a_file_and_only_used_pages_are_written(tmp_path):
    cache, loaded = shared_and_cropped(), PagedCache("kivi2", 2)
    cache.save(tmp_path / "cache", model=MODEL)
    loaded.load(tmp_path / "cache", model=MODEL)
    assert_equal(outputs(cache), outputs(loaded))
    assert loaded.usage == cache.usage
    assert len(loaded.layers[0].pool.data) == loaded.layers[0].pool.num_used
    for each in (cache, loaded):
        each.crop([0, 290, 0])
    assert loaded.usage == cache.usage
    assert_equal(outputs(cache), outputs(loaded))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_is_the_same_whatever_the_layout_of_pages_in_memory(recipe, tmp_path):
    cache = PagedCache(recipe, 1, layout="strided")
    cache.append(0, *tokens(2, 300))
    cache.save(tmp_path / "strided", model=MODEL)
    pages = cache.layers[0].pool.data
    for layout in LAYOUTS:
        loaded = PagedCache(recipe, 1, layout=layout)
        loaded.load(tmp_path / "strided", model=MODEL)
        assert loaded.layers[0].format.key.layout == layout
        assert torch.equal(loaded.layers[0].pool.data, pages) == (layout == "strided")
        assert_equal(outputs_by_reference(cache), outputs_by_reference(loaded))
        loaded.save(tmp_path / "again", model=MODEL)
        first, second = (split_header((tmp_path / name).read_bytes()) for name in ("strided", "again"))
        assert first == second


def split_header(data: bytes) -> tuple[dict, bytes]:
    """A safetensors file's header, whose metadata have no fixed order, and the bytes of its tensors."""
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def outputs_by_reference(cache: PagedCache) -> list[Tensor]:
    q = torch.ones(2, 4, 3, 64).half()
    return [attend(q, layer.view(), backend="reference")[0] for layer in cache.layers]


def test_an_empty_cache_can_be_saved_and_loaded(tmp_path):
    PagedCache("kivi2", 2).save(tmp_path / "cache", model=MODEL)
    loaded = filled()
    loaded.load(tmp_path / "cache", model=MODEL)
    assert loaded.nbytes == 0


def assert_refused(
    path, sentence: str, recipe: str = "kivi2", layers: int = 2, model: str = MODEL
) -> None:
    """Loading fails with one sentence, and the cache goes on as if nothing had been asked."""
    cache = filled(recipe, lengths=(150, 70), layers=layers)
    before, nbytes = outputs(cache), cache.nbytes
    with pytest.raises(ValueError, match=sentence) as error:
        cache.load(path, model=model)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None
    assert cache.nbytes == nbytes
    assert_equal(before, outputs(cache))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"model": "other model"},
            "was saved with model tiny model, 2 layers, this cache has other model; load",
        ),
        (
            {"recipe": "kivi4"},
            r"was saved with recipe Recipe\(.*, this cache has Recipe\(.*; load it into a cache",
        ),
        (
            {"layers": 3},
            "was saved with num_layers 2, this cache has 3; load it into a cache with the same",
        ),
    ],
)
def test_a_file_of_another_model_or_recipe_is_refused(other, sentence, tmp_path):
    filled().save(tmp_path / "cache", model=MODEL)
    assert_refused(tmp_path / "cache", sentence, **other)


@pytest.mark.parametrize("end", [0, 1, 7, 8, 9, 200, 2000, 50_000, -5000, -1])
def test_a_truncated_file_is_refused(end, tmp_path):
    filled(lengths=(300, 20)).save(tmp_path / "cache", model=MODEL)
    (tmp_path / "cut").write_bytes((tmp_path / "cache").read_bytes()[:end])
    assert_refused(tmp_path / "cut", "is damaged or not a cache file")


def test_a_file_with_any_flipped_byte_is_refused(tmp_path):
    filled(lengths=(200, 20), layers=1).save(tmp_path / "cache", model=MODEL)
    data = (tmp_path / "cache").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    cache = PagedCache("kivi2", 1)
    for position in [*range(0, header, 3), *range(header, len(data), len(data) // 40), len(data) - 1]:
        for flip in (0x01, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|not a bitkv|was saved with"):
                cache.load(tmp_path / "damaged", model=MODEL)
            assert cache.nbytes == 0


def test_a_file_that_is_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    assert_refused(tmp_path / "weights", "is not a bitkv cache file; pass one that `save` wrote")
    (tmp_path / "text").write_text("not tensors at all")
    assert_refused(tmp_path / "text", "is damaged or not a cache file")


def test_a_file_that_does_not_exist_is_named(tmp_path):
    cache = PagedCache("kivi2", 1)
    with pytest.raises(FileNotFoundError, match=r"^no cache file .*missing; save one first$"):
        cache.load(tmp_path / "missing", model=MODEL)


@pytest.mark.parametrize("step", ["cache.save_file", "files.os.replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    path = tmp_path / "cache"
    filled().save(path, model=MODEL)
    old = path.read_bytes()

    def fail(source, target, *_):
        if step == "cache.save_file":
            target.write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(f"bitkv.{step}", fail)
    with pytest.raises(OSError, match="no space left"):
        filled("kivi2", lengths=(500,)).save(path, model=MODEL)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^no folder .*missing for cache.*; create it first$"):
        filled().save(tmp_path / "missing" / "cache", model=MODEL)


def test_an_unknown_recipe_is_refused_where_the_cache_is_made():
    with pytest.raises(ValueError, match=r"^recipe 'kivi3': no 'kivi3'; choose from "):
        PagedCache("kivi3", 1)
