import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torchvision import transforms

from btpipe import recipe
from btpipe.data.pipeline import augment_params

COUNT = 4000
LEAST_P = 1e-3
"""Seeds are fixed, so a test passes always or never; at random 1 in 1000 would fail."""


def draws(
    view: recipe.View = recipe.VIEW_A,
    *,
    seed: int = 7,
    epoch: int = 3,
    view_number: int = 0,
    images: NDArray[np.int64] = np.arange(COUNT),
    width: int = 400,
    height: int = 300,
) -> augment_params.Draws:
    return augment_params.draw(
        view,
        seed=seed,
        epoch=epoch,
        view_number=view_number,
        images=images,
        widths=np.full(len(images), width),
        heights=np.full(len(images), height),
    )


def words(counter: list[int], key: list[int]) -> list[int]:
    counters = np.array([counter], dtype=np.uint32)
    return [
        int(word) for word in augment_params.philox(counters, np.array(key, dtype=np.uint32))[0]
    ]


def test_philox_gives_the_known_answers_of_random123() -> None:
    # kat_vectors of Random123, philox4x32 with 10 rounds
    assert words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    digits = [0xA4093822, 0x299F31D0]
    assert words(pi, digits) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_draw_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    together = draws()
    rows = np.array([17, 3999, 0])
    alone = draws(images=rows)
    for field in dataclasses.fields(augment_params.Draws):
        np.testing.assert_array_equal(
            getattr(alone, field.name), getattr(together, field.name)[rows], field.name
        )


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_together_draw_what_one_rank_draws(world_size: int) -> None:
    whole = draws(recipe.View(rotate90=0.5, vertical_flip=0.5))
    for rank in range(world_size):
        share = draws(
            recipe.View(rotate90=0.5, vertical_flip=0.5),
            images=np.arange(COUNT)[rank::world_size],
        )
        for field in dataclasses.fields(augment_params.Draws):
            ours, theirs = getattr(share, field.name), getattr(whole, field.name)
            np.testing.assert_array_equal(ours, theirs[rank::world_size], field.name)


@pytest.mark.parametrize(
    ("seed", "epoch", "view_number"), [(8, 3, 0), (7 + 2**40, 3, 0), (7, 4, 0), (7, 3, 1)]
)
def test_seed_epoch_and_view_number_each_change_the_draw(
    seed: int, epoch: int, view_number: int
) -> None:
    first, second = draws(), draws(seed=seed, epoch=epoch, view_number=view_number)
    assert (first.crop_start != second.crop_start).any(axis=1).mean() > 0.9
    correlation = np.corrcoef(first.factors[:, 0], second.factors[:, 0])[0, 1]
    assert abs(correlation) < 0.06  # four standard deviations of independent draws


def torchvision_crops(width: int, height: int, view: recipe.View) -> NDArray[np.float64]:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = transforms.RandomResizedCrop.get_params
    return np.array(
        [crop(image, list(view.scale), list(view.ratio)) for _ in range(COUNT)], dtype=np.float64
    )


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(400, 300), (90, 700), (2000, 100)])
def test_crops_are_distributed_as_torchvisions(
    width: int, height: int, scale: tuple[float, float]
) -> None:
    view = recipe.View(scale=scale)
    drawn = draws(view, width=width, height=height)
    start = drawn.crop_start.astype(np.float64)  # as torchvision's, so that equal ratios are ties
    extent = drawn.crop_end - start
    expected = torchvision_crops(width, height, view)
    for ours, theirs in [
        (start[:, 0], expected[:, 0]),
        (start[:, 1], expected[:, 1]),
        (extent[:, 0], expected[:, 2]),
        (extent[:, 1], expected[:, 3]),
        (extent.prod(axis=1), expected[:, 2] * expected[:, 3]),
        (extent[:, 1] / extent[:, 0], expected[:, 3] / expected[:, 2]),
    ]:
        assert stats.ks_2samp(ours, theirs).pvalue > LEAST_P


def test_crops_are_whole_pixels_inside_images_of_any_shape() -> None:
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 3000, (2, COUNT)).astype(np.int32)
    widths[:50], heights[50:100] = 1, 1
    drawn = augment_params.draw(
        recipe.VIEW_A,
        seed=0,
        epoch=0,
        view_number=0,
        images=np.arange(COUNT),
        widths=widths,
        heights=heights,
    )
    assert (drawn.crop_start >= 0).all()
    assert (drawn.crop_end <= np.stack([heights, widths], axis=1)).all()
    assert (drawn.crop_end - drawn.crop_start >= 1).all()
    assert (drawn.crop_start == np.rint(drawn.crop_start)).all()


def test_where_no_attempt_fits_the_crop_is_torchvisions_central_one() -> None:
    view = recipe.View(scale=(1.0, 1.0))  # the whole area of a panorama never has ratio 3/4 to 4/3
    drawn = draws(view, width=1000, height=100)
    top, left, height, width = torchvision_crops(1000, 100, view)[0]
    assert (drawn.crop_start == [top, left]).all()
    assert (drawn.crop_end == [top + height, left + width]).all()


@pytest.mark.parametrize(
    "strength", [(0.4, 0.4, 0.2, 0.1), (0.8, 0.8, 0.8, 0.2), (0.2, 0.2, 0.0, 0.0)]
)
def test_jitter_is_distributed_as_torchvisions(strength: tuple[float, ...]) -> None:
    theirs_of = transforms.ColorJitter(*strength)
    torch.manual_seed(0)
    theirs = [
        transforms.ColorJitter.get_params(
            theirs_of.brightness, theirs_of.contrast, theirs_of.saturation, theirs_of.hue
        )
        for _ in range(COUNT)
    ]
    names = ("brightness", "contrast", "saturation", "hue")
    jitter = recipe.Jitter.model_validate(dict(zip(names, strength, strict=True)))
    drawn = draws(recipe.View(jitter=jitter))
    for number, spread in enumerate(strength):
        ours = drawn.factors[drawn.jitter, number]
        if not spread:  # torchvision draws nothing then, which is the neutral factor
            assert (ours == (number != 3)).all()
            continue
        expected = [float(values[number + 1]) for values in theirs]
        assert stats.ks_2samp(ours, expected).pvalue > LEAST_P
    orders = [np.array([values[0].numpy() for values in theirs]), drawn.order]
    counts = [np.unique(order @ [64, 16, 4, 1], return_counts=True)[1] for order in orders]
    assert len(counts[0]) == len(counts[1]) == 24
    assert stats.chisquare(counts[1]).pvalue > LEAST_P
    assert stats.chi2_contingency(counts).pvalue > LEAST_P


def test_blur_is_drawn_as_the_published_code_draws_it() -> None:
    generator = random.Random(0)
    theirs = [generator.random() * 1.9 + 0.1 for _ in range(COUNT)]  # main.py, GaussianBlur
    ours = draws(recipe.VIEW_A).blur_sigma
    assert stats.ks_2samp(ours, theirs).pvalue > LEAST_P
    assert 0.1 <= ours.min() < ours.max() < 2.0


def test_choices_are_as_frequent_as_torchvisions_own() -> None:
    view = recipe.View(solarize=recipe.Solarize(probability=0.2))
    drawn = draws(view)
    image = torch.zeros(3, 2, 2)
    image[0, :, 0] = 1  # one red column: each choice changes it
    torch.manual_seed(0)
    for ours, choice in [
        (drawn.flip, transforms.RandomHorizontalFlip(view.flip)),
        (drawn.gray, transforms.RandomGrayscale(view.gray)),
        (drawn.solarize, transforms.RandomSolarize(0.5, view.solarize.probability)),
        (drawn.jitter, transforms.RandomApply([transforms.RandomSolarize(0.5, 1.0)], 0.8)),
    ]:
        theirs = np.array([not torch.equal(choice(image), image) for _ in range(COUNT)])
        table = [[int(happened.sum()), int((~happened).sum())] for happened in (ours, theirs)]
        assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_each_choice_happens_as_often_as_its_probability_says() -> None:
    view = recipe.View(
        flip=0.5,
        gray=0.2,
        jitter=recipe.Jitter(probability=0.8),
        blur=recipe.Blur(probability=0.1, sigma=(0.5, 2.0)),
        solarize=recipe.Solarize(probability=0.3),
    )
    drawn = draws(view)
    for happened, probability in [
        (drawn.flip, 0.5),
        (drawn.gray, 0.2),
        (drawn.jitter, 0.8),
        (drawn.blur_sigma > 0, 0.1),
        (drawn.solarize, 0.3),
    ]:
        assert stats.binomtest(int(happened.sum()), COUNT, probability).pvalue > LEAST_P
    sigma = drawn.blur_sigma[drawn.blur_sigma > 0]
    assert stats.kstest(sigma, stats.uniform(0.5, 1.5).cdf).pvalue > LEAST_P


def test_turns_are_as_frequent_as_they_should_be() -> None:
    drawn = draws(recipe.View(vertical_flip=0.3, rotate90=0.75))
    assert stats.binomtest(int(drawn.vertical_flip.sum()), COUNT, 0.3).pvalue > LEAST_P
    counts = np.bincount(drawn.turns, minlength=4)
    assert len(counts) == 4
    assert stats.chisquare(counts).pvalue > LEAST_P  # 0.75 means four equal directions
    rare = np.bincount(draws(recipe.View(rotate90=0.3)).turns, minlength=4)
    assert stats.chisquare(rare, COUNT * np.array([0.7, 0.1, 0.1, 0.1])).pvalue > LEAST_P


def test_a_view_without_turns_stands_upright() -> None:
    drawn = draws()
    assert not drawn.vertical_flip.any()
    assert not drawn.turns.any()


def test_choices_are_independent_of_each_other() -> None:
    solarize = recipe.Solarize(probability=0.5)
    drawn = draws(recipe.View(solarize=solarize, gray=0.5, vertical_flip=0.5, rotate90=0.5))
    crop = drawn.crop_start[:, 1] > 40
    choices = [drawn.flip, drawn.vertical_flip, drawn.turns > 0, drawn.gray, drawn.solarize, crop]
    correlations = np.corrcoef(np.stack(choices))[np.triu_indices(len(choices), 1)]
    assert np.abs(correlations).max() < 0.06  # four standard deviations


def test_colours_map_greys_to_greys_whatever_is_drawn() -> None:
    drawn = draws()
    total = drawn.color_matrix.sum(axis=2), drawn.mean_matrix.sum(axis=2)
    for rows in total:
        assert np.abs(rows - rows[:, :1]).max() < 1e-5  # float32 sums of a few numbers around 1


def test_without_clipping_the_order_of_the_factors_changes_nothing() -> None:
    orders = np.array(list(itertools.permutations(range(4))))
    factors = np.tile([1.3, 0.7, 1.15, 0.08], (len(orders), 1))
    for part in augment_params.color(factors, orders, np.zeros(len(orders), np.bool_)):
        assert np.ptp(part, axis=0).max() < 1e-14  # sums of a few doubles around 1


def test_nothing_drawn_leaves_the_colours_alone() -> None:
    still = recipe.View(jitter=recipe.Jitter(probability=0.0), gray=0.0)
    drawn = draws(still)
    assert np.abs(drawn.color_matrix - np.eye(3)).max() < 1e-7  # a turn by 0 there and back
    assert not (drawn.jitter | drawn.gray).any()
    assert not drawn.mean_matrix.any()
    assert not drawn.color_offset.any()


def test_a_seed_means_the_same_for_ever() -> None:
    # Numbers of the first version: a change here makes every run in progress another one.
    images = np.array([0, 12_345_678_901])
    drawn = draws(images=images, view_number=1)
    assert drawn.crop_start.tolist() == [[51, 84], [159, 156]]
    assert drawn.crop_end.tolist() == [[284, 266], [281, 282]]
    assert drawn.flip.tolist() == [False, True]
    assert drawn.order.tolist() == [[3, 2, 0, 1], [2, 1, 0, 3]]
    np.testing.assert_allclose(
        drawn.factors,
        [[1.0602, 0.8608, 0.8872, -0.071], [1.1309, 0.6139, 1.0102, 0.0613]],
        atol=1e-4,  # as many digits as are written here
    )
