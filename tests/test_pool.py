"""The page pool: geometric growth, pages in ascending order, reference counts."""

import itertools
import mmap

import pytest
import torch

from bitkv.pool import PagePool

CPU = torch.device("cpu")


def pages(count: int, heads: int = 2, page_bytes: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (count, heads, page_bytes), dtype=torch.uint8)


def test_a_new_pool_holds_nothing():
    pool = PagePool(2, 24, CPU)
    assert (pool.num_used, pool.nbytes) == (0, 0)


def test_stored_pages_read_back_and_have_one_reference_each():
    pool = PagePool(2, 24, CPU)
    written = pages(3)
    indices = pool.store(written)
    assert indices == [0, 1, 2]
    assert torch.equal(pool.data[indices], written)
    assert [pool.references(page) for page in indices] == [1, 1, 1]
    assert pool.num_used == 3


def test_a_first_prompt_gets_exactly_its_pages():
    pool = PagePool(2, 24, CPU)
    pool.make_room(54)
    for part in pages(54).split(16):
        pool.store(part)
    assert len(pool.data) == pool.num_used == 54


def test_growth_is_geometric_and_keeps_every_byte():
    pool, written = PagePool(2, 24, CPU), pages(200)
    sizes = []
    for page in written:
        pool.store(page[None])
        sizes.append(len(pool.data))
    assert torch.equal(pool.data[:200], written)
    assert all(size <= max(n + 1, n * 1.25) for n, size in enumerate(sizes, start=1))
    copied = sum(old for old, new in itertools.pairwise(sizes) if old != new)
    assert copied < 6 * 200, "growth copies a bounded number of pages for each one stored"


def test_reserve_makes_room_once_and_never_shrinks():
    pool = PagePool(2, 24, CPU)
    pool.reserve(10)
    before = pool.data.data_ptr()
    assert pool.store(pages(10)) == list(range(10))
    pool.reserve(3)
    assert pool.data.data_ptr() == before
    assert pool.num_used == len(pool.data) == 10


def test_a_page_is_free_when_its_last_reference_goes():
    pool = PagePool(2, 24, CPU)
    first, second = pool.store(pages(2))
    pool.acquire([first, first])
    assert pool.references(first) == 3
    pool.release([first, second, first])
    assert (pool.references(first), pool.references(second)) == (1, 0)
    assert pool.num_used == 1


def test_free_pages_are_used_again_before_the_pool_grows():
    pool = PagePool(2, 24, CPU)
    kept, gone = pool.store(pages(2))
    keeps = pool.data[kept].clone()
    pool.release([gone])
    again = pages(1)
    assert pool.store(again) == [gone]
    assert len(pool.data) == 2
    assert torch.equal(pool.data[[kept, gone]], torch.stack([keeps, again[0]]))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_a_large_pool_begins_at_a_huge_page_and_counts_only_its_own_bytes():
    pool = PagePool(2, 4096, CPU)
    pool.reserve(1000)
    assert pool.nbytes == 1000 * 2 * 4096
    assert pool.data.data_ptr() % 2**21 == 0
    written = pages(1000, page_bytes=4096)
    assert pool.store(written) == list(range(1000))
    pool.reserve(1500)
    assert torch.equal(pool.data[:1000], written)
    assert pool.data[1000:].count_nonzero() == 0


def test_pages_that_are_taken_have_one_reference_and_are_written_in_place():
    pool = PagePool(2, 24, CPU)
    taken = pool.take(3)
    pool.data[taken] = 5
    pool.release(taken[1:2])
    assert pool.take(1) == taken[1:2]
    assert [pool.references(page) for page in taken] == [1, 1, 1]
