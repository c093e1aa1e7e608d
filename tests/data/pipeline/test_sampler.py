import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from btpipe.data.pipeline import sampler

LEAST_P = 1e-3  # seeds are fixed: passes always or never


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 1_281_167])
def test_every_image_comes_once_an_epoch(count: int) -> None:
    images = sampler.permutation(5, 2, count, 0, count)
    np.testing.assert_array_equal(np.sort(images), np.arange(count))


def test_a_slice_is_the_same_wherever_it_starts() -> None:
    whole = sampler.permutation(5, 2, 1000, 0, 1000)
    pieces = [sampler.permutation(5, 2, 1000, at, min(at + 77, 1000)) for at in range(0, 1000, 77)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_seed_and_epoch_each_change_the_order() -> None:
    first = sampler.permutation(5, 2, 1000, 0, 1000)
    for seed, epoch in [(6, 2), (5 + 2**40, 2), (5, 3)]:
        assert (sampler.permutation(seed, epoch, 1000, 0, 1000) == first).sum() < 10


def test_an_image_is_as_likely_at_every_position() -> None:
    count, epochs = 12, 3000
    orders = np.stack([sampler.permutation(0, epoch, count, 0, count) for epoch in range(epochs)])
    for image in range(count):
        positions = np.bincount(np.argwhere(orders == image)[:, 1], minlength=count)
        assert stats.chisquare(positions).pvalue > LEAST_P / count
    pairs = np.bincount(orders[:, 3] * count + orders[:, 4], minlength=count * count)
    possible = pairs.reshape(count, count)[~np.eye(count, dtype=bool)]
    assert stats.chisquare(possible).pvalue > LEAST_P


def test_neighbours_in_the_folder_are_no_neighbours_in_an_epoch() -> None:
    images = sampler.permutation(0, 0, 50_000, 0, 50_000)
    assert abs(stats.spearmanr(images[:-1], images[1:]).statistic) < 0.02  # four deviations
    assert abs(stats.spearmanr(np.arange(50_000), images).statistic) < 0.02


def test_a_replacement_is_some_image_and_each_attempt_another_draw() -> None:
    drawn = [sampler.replacement(1, 0, 4, attempt, 1000) for attempt in range(2000)]
    assert drawn == [sampler.replacement(1, 0, 4, attempt, 1000) for attempt in range(2000)]
    assert min(drawn) >= 0
    assert max(drawn) < 1000
    assert stats.kstest(np.array(drawn) / 1000, "uniform").pvalue > LEAST_P
    assert sampler.replacement(1, 1, 4, 0, 1000) != sampler.replacement(1, 0, 4, 0, 1000)


def test_a_seed_means_the_same_for_ever() -> None:
    # Numbers of the first version: a change here makes every run in progress another one.
    assert sampler.permutation(7, 3, 20, 0, 10).tolist() == [14, 9, 4, 5, 2, 3, 13, 1, 6, 11]
    late = sampler.permutation(7, 3, 1_281_167, 1_000_000, 1_000_004)
    assert late.tolist() == [535_796, 1_075_965, 749_059, 852_290]
    assert [sampler.replacement(7, 3, 5, attempt, 1000) for attempt in range(3)] == [588, 34, 748]


SHARD = 1000
"""Images in a tar shard, for what follows."""


def mixed(epoch: int, count: int, start: int, stop: int, seed: int = 5) -> NDArray[np.int64]:
    return sampler.blocks(seed, epoch, count, start, stop, block_images=50, mixed_blocks=40)


@pytest.mark.parametrize("count", [1, 2, 49, 50, 51, 1999, 2000, 2001, 2049, 100_003])
@pytest.mark.parametrize("epoch", [0, 1])
def test_in_blocks_too_every_image_comes_once_an_epoch(count: int, epoch: int) -> None:
    np.testing.assert_array_equal(np.sort(mixed(epoch, count, 0, count)), np.arange(count))


def test_in_blocks_too_a_slice_is_the_same_wherever_it_starts() -> None:
    whole = mixed(2, 10_007, 0, 10_007)
    pieces = [mixed(2, 10_007, at, min(at + 777, 10_007)) for at in range(0, 10_007, 777)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for seed, epoch in [(6, 2), (5 + 2**40, 2), (5, 3)]:
        assert (mixed(epoch, 10_007, 0, 10_007, seed) == whole).sum() < 30  # about one by chance


def test_blocks_touch_few_shards_and_neighbours_there_are_hardly_neighbours_here() -> None:
    count, batch = 200_000, 500
    shards = [len(set(mixed(0, count, at, at + batch) // SHARD)) for at in range(0, count, batch)]
    scattered = sampler.permutation(5, 0, count, 0, batch) // SHARD
    assert np.mean(shards) < 40
    assert len(set(scattered)) > 170
    images = mixed(0, count, 0, count)
    assert abs(stats.spearmanr(images[:-1], images[1:]).statistic) < 0.04
    # Within a pool there is no order left, and pools are not in the order of the shards.
    pool = np.argsort(np.argsort(images[:2000]))
    assert abs(stats.spearmanr(np.arange(2000), pool).statistic) < 0.1
    assert abs(stats.spearmanr(np.arange(count), images).statistic) < 0.1


def test_what_fills_no_block_is_another_stretch_in_every_epoch() -> None:
    count = 1049
    last = np.stack(
        [
            sampler.blocks(5, epoch, count, 1000, count, block_images=50, mixed_blocks=4)
            for epoch in range(400)
        ]
    )
    for images in last:
        assert set(np.diff(np.sort(images))) <= {1, count - 48}  # neighbours, maybe over the end
    assert (np.bincount(last.ravel(), minlength=count) > 0).all()


def test_an_order_in_blocks_means_the_same_for_ever() -> None:
    assert mixed(3, 1_281_167, 1_000_000, 1_000_004).tolist() == [
        819_005,
        627_050,
        954_431,
        106_798,
    ]
