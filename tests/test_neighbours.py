"""Neighbours agree with brute force, votes with an example by hand, ranks with known matrices."""

import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from btpipe import neighbours

GRAM = 1e-6
"""Relative: singular values from eigenvalues in float64, those of the decomposition beside them."""
RANK_CPU_SECONDS = 3.0
"""0.5 alone on two cores; idle threads that spin count as well. The decomposition takes 12."""
ROUNDING = 1e-6
"""float32 sums of up to 48 products of numbers below 1."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_normalized_rows_have_length_one_and_their_direction(rng: np.random.Generator) -> None:
    vectors = rng.normal(size=(20, 8)) * 10.0 ** rng.integers(-8, 8, size=(20, 1))
    unit = neighbours.normalize(vectors)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=ROUNDING)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, directions, atol=ROUNDING)


def test_zeros_tiny_and_huge_rows_are_normalized_without_overflow() -> None:
    vectors = np.array([[0, 0], [3e38, 3e38], [1e-30, 0]], dtype=np.float32)
    expected = [[0, 0], [0.5**0.5, 0.5**0.5], [1, 0]]
    np.testing.assert_allclose(neighbours.normalize(vectors), expected, atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 5, 300])
def test_nearest_equals_brute_force(rng: np.random.Generator, k: int) -> None:
    queries, base = rng.normal(size=(40, 48)), rng.normal(size=(300, 48))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, base)]
    cosines = unit[0] @ unit[1].T
    indices, similarities = neighbours.nearest(queries, base, k)
    np.testing.assert_array_equal(indices, np.argsort(-cosines, axis=1)[:, :k])
    np.testing.assert_allclose(similarities, -np.sort(-cosines, axis=1)[:, :k], atol=ROUNDING)
    assert indices.dtype == np.int64
    assert similarities.dtype == np.float32


def test_equal_similarities_come_by_the_lower_index() -> None:
    base = np.array([[0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    indices, _ = neighbours.nearest(np.array([[1, 0], [0, 2]], dtype=np.float32), base, 3)
    np.testing.assert_array_equal(indices, [[1, 2, 4], [0, 3, 1]])


def test_more_neighbours_than_vectors_gives_all_of_them(rng: np.random.Generator) -> None:
    indices, similarities = neighbours.nearest(rng.normal(size=(2, 4)), rng.normal(size=(3, 4)), 20)
    assert indices.shape == similarities.shape == (2, 3)
    np.testing.assert_array_equal(np.sort(indices), [[0, 1, 2]] * 2)


def test_no_queries_and_no_base_give_empty_answers() -> None:
    some, none = np.ones((3, 4), np.float32), np.empty((0, 4), np.float32)
    assert neighbours.nearest(none, some, 2)[0].shape == (0, 2)
    assert neighbours.nearest(some, none, 2)[0].shape == (3, 0)


def test_memory_does_not_grow_with_the_number_of_queries(rng: np.random.Generator) -> None:
    queries = rng.normal(size=(20_000, 4)).astype(np.float32)
    base = rng.normal(size=(5_000, 4)).astype(np.float32)
    tracemalloc.start()
    indices, _ = neighbours.nearest(queries, base, 3)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert indices.shape == (20_000, 3)
    whole_bytes = 4 * len(queries) * len(base)  # 400 MB, were it made at once
    assert peak_bytes < 0.7 * whole_bytes


def test_a_vote_equals_the_one_counted_by_hand() -> None:
    indices = np.array([[0, 1, 2], [3, 2, 0]])
    similarities = np.array([[0.9, 0.5, 0.5], [0.7, 0.7, 0.0]], dtype=np.float32)
    labels = np.array([2, 0, 0, 1])
    # T = 0.5, weights over the row's largest: exp(0), exp(-0.8), exp(-0.8); 1, 1, exp(-1.4)
    expected = [[2 * np.exp(-0.8), 0, 1], [1, 1, np.exp(-1.4)]]
    scores = neighbours.vote(indices, similarities, labels, 3, temperature=0.5)
    np.testing.assert_allclose(scores, expected, atol=ROUNDING)


def test_a_small_temperature_does_not_overflow() -> None:
    scores = neighbours.vote(
        np.array([[0, 1]]), np.array([[1.0, 0.9]], np.float32), np.array([0, 1]), 2, 1e-4
    )
    np.testing.assert_allclose(scores, [[1, 0]], atol=ROUNDING)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_leaving_one_out_equals_brute_force(rng: np.random.Generator, k: int) -> None:
    vectors = rng.normal(size=(50, 16))
    vectors[30:33] = vectors[10]  # copies are neighbours of each other, but none of itself
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T).astype(np.float32)
    np.fill_diagonal(cosines, -2)
    indices, similarities = neighbours.leave_one_out(vectors, k)
    assert indices.shape == similarities.shape == (50, min(k, 49))
    assert not (indices == np.arange(50)[:, None]).any()
    expected = -np.sort(-cosines, axis=1)[:, : min(k, 49)]
    np.testing.assert_allclose(similarities, expected, atol=ROUNDING)


def test_more_copies_than_neighbours_are_still_no_row_itself() -> None:
    indices, similarities = neighbours.leave_one_out(np.ones((6, 3)), 2)
    assert not (indices == np.arange(6)[:, None]).any()
    np.testing.assert_allclose(similarities, np.ones((6, 2)), atol=ROUNDING)
    assert neighbours.leave_one_out(np.ones((1, 3)), 2)[0].shape == (1, 0)


def decomposed_rank(vectors: NDArray[np.floating]) -> float:
    """RankMe by its definition, from the singular values themselves."""
    singular = np.linalg.svd(np.asarray(vectors, dtype=np.float64), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (64, 64)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_effective_rank_equals_the_decomposition(
    rng: np.random.Generator, shape: tuple[int, int], decay: float
) -> None:
    vectors = rng.normal(size=shape) * np.arange(1, shape[1] + 1) ** -decay
    expected = decomposed_rank(vectors)
    assert neighbours.effective_rank(vectors) == pytest.approx(expected, rel=GRAM)
    assert neighbours.effective_rank(vectors.T) == pytest.approx(expected, rel=GRAM)


def test_noise_of_the_gram_matrix_is_not_counted_as_rank(rng: np.random.Generator) -> None:
    thin = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 400))
    assert neighbours.effective_rank(thin) == pytest.approx(decomposed_rank(thin), rel=GRAM)


def test_the_effective_rank_is_within_a_hundredth_where_the_gram_matrix_is_blind(
    rng: np.random.Generator,
) -> None:
    """All but one singular value just below what float64 squares can tell from noise."""
    count = 256
    turns = [np.linalg.qr(rng.normal(size=(count, count)))[0] for _ in range(2)]
    singular = np.full(count, 0.9 * np.sqrt(count * np.finfo(np.float64).eps))
    singular[0] = 1
    vectors = turns[0] * singular @ turns[1]
    rank, expected = neighbours.effective_rank(vectors), decomposed_rank(vectors)
    assert rank == pytest.approx(expected, rel=0.01)
    assert rank != pytest.approx(expected, rel=GRAM)


def test_the_effective_rank_of_a_wide_batch_takes_seconds_at_most() -> None:
    vectors = np.random.default_rng(0).normal(size=(1024, 8192)).astype(np.float32)
    started = time.process_time()
    assert neighbours.effective_rank(vectors) > 1000
    assert time.process_time() - started < RANK_CPU_SECONDS


def test_the_effective_rank_counts_equal_directions(rng: np.random.Generator) -> None:
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    for rank in (1, 5, 16):
        assert neighbours.effective_rank(turn[:rank] * 3.0) == pytest.approx(rank)
    assert neighbours.effective_rank(np.zeros((4, 3))) == 0


def test_the_effective_rank_weighs_unequal_directions() -> None:
    shares = np.array([0.75, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert neighbours.effective_rank(np.diag([3.0, 1.0])) == pytest.approx(expected)
