"""Neighbours in blocks are the neighbours of all similarities at once."""

import numpy as np
import pytest
from numpy.typing import NDArray

from btpipe import neighbours
from btpipe.explore import blocks

ROUNDED = 1e-6
"""Sums of 16 products in another order."""


def unit(count: int, dimension: int = 16, seed: int = 0) -> NDArray[np.float16]:
    drawn = np.random.default_rng(seed).normal(size=(count, dimension))
    return neighbours.normalize(drawn).astype(np.float16)


def brute(queries: NDArray[np.float32], base: NDArray[np.float16], k: int) -> NDArray[np.float32]:
    cosines = queries @ base.astype(np.float32).T
    return -np.sort(-cosines, axis=1)[:, :k]


def test_every_float16_up_to_one_is_widened_exactly() -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    small = values[np.abs(values) <= 1]
    assert len(small) == 2 * 0x3C01
    wide = blocks.widen(small[:, None])[:, 0]
    assert np.array_equal(wide, small.astype(np.float32))
    assert np.array_equal(np.signbit(wide), np.signbit(small))


@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_over_several_blocks_finds_the_largest_cosines(k: int) -> None:
    base, queries = unit(2 * blocks.SCAN_ROWS + 30), blocks.widen(unit(7, seed=1))
    indices, cosines = blocks.nearest(queries, base, k)
    np.testing.assert_allclose(cosines, brute(queries, base, k), atol=ROUNDED)
    expected = np.einsum("md,mkd->mk", queries, base[indices].astype(np.float32))
    np.testing.assert_allclose(cosines, expected, atol=ROUNDED)


def test_of_equal_rows_the_first_come_first() -> None:
    base = np.repeat(unit(1), 2 * blocks.SCAN_ROWS, axis=0)
    indices, _ = blocks.nearest(blocks.widen(base[:1]), base, 4)
    assert indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("count", [2, 9, blocks.ROWS + 1, 2 * blocks.ROWS + 300])
def test_the_others_of_every_row_are_the_nearest_but_itself(count: int) -> None:
    base = unit(count)
    indices, cosines = blocks.nearest_others(base, 8)
    k = min(8, count - 1)
    assert indices.shape == (count, k)
    wide = base.astype(np.float32)
    matrix = wide @ wide.T
    np.fill_diagonal(matrix, -np.inf)
    np.testing.assert_allclose(cosines, -np.sort(-matrix, axis=1)[:, :k], atol=ROUNDED)
    np.testing.assert_allclose(np.take_along_axis(matrix, indices, 1), cosines, atol=ROUNDED)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_thousands_of_equal_rows_have_other_rows_as_neighbours() -> None:
    base = np.repeat(unit(1), blocks.ROWS + 50, axis=0)
    indices, cosines = blocks.nearest_others(base, 3)
    assert (indices != np.arange(len(base))[:, None]).all()
    assert (cosines > 1 - 1e-3).all()


def test_a_lone_row_has_no_others() -> None:
    indices, cosines = blocks.nearest_others(unit(1), 5)
    assert indices.shape == cosines.shape == (1, 0)
