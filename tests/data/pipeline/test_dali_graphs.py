import dataclasses
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from parity import photograph
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, functional

from btpipe import recipe
from btpipe.data.pipeline import augment_params, dali_graphs, decode

SIZE = 96
# Mean differences from Pillow in grey levels (0 to 255), measured on photographs and rounded up.
RESIZE_LEVELS = 0.3  # bicubic with antialias 0.20, bilinear less
GRAY_LEVELS = 0.3  # 0.13
COLOUR_LEVELS = 2.0  # three fractions that Pillow cuts off against one rounding
HUE_LEVELS = 10.0  # 8 to 9 at a tenth of a turn: YIQ against HSV
MIRROR_LEVELS = 0.01  # the same sums in another order: single roundings

Picture = NDArray[np.uint8]


def encoded(image: Image.Image, kind: str = "PNG") -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def whole(image: Image.Image) -> augment_params.Draws:
    """The draw that takes the whole image and changes nothing."""
    return augment_params.Draws(
        crop_start=np.zeros((1, 2), np.float32),
        crop_end=np.array([[image.height, image.width]], np.float32),
        flip=np.zeros(1, np.bool_),
        vertical_flip=np.zeros(1, np.bool_),
        turns=np.zeros(1, np.int64),
        color_matrix=np.eye(3, dtype=np.float32)[None],
        color_offset=np.zeros((1, 3), np.float32),
        mean_matrix=np.zeros((1, 3, 3), np.float32),
        blur_sigma=np.zeros(1, np.float32),
        solarize=np.zeros(1, np.bool_),
        jitter=np.zeros(1, np.bool_),
        gray=np.zeros(1, np.bool_),
        factors=np.array([[1.0, 1.0, 1.0, 0.0]]),
        order=np.arange(4)[None],
    )


def decoded(file: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return decode.decode(file)


def drawn(image: Image.Image, draws: augment_params.Draws, kind: str = "PNG") -> NDArray[np.int64]:
    """View 1 of `training_pipeline` for these draws."""
    always = recipe.View(
        blur=recipe.Blur(probability=1.0), solarize=recipe.Solarize(probability=1.0)
    )
    pipeline = dali_graphs.training_pipeline(
        (always, always), (SIZE, SIZE), batch_size=1, threads=1, gpu=None
    )
    sizes = np.array([[image.height, image.width]])
    pipeline.feed_input("image", [decoded(encoded(image, kind))])
    pipeline.feed_input("serial", np.zeros((1, 1), np.int64))
    for name, values in dali_graphs.training_inputs((draws, whole(image)), sizes).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    view1, view2, _ = pipeline.outputs()
    untouched = drawn_by_pillow(Image.open(io.BytesIO(encoded(image, kind).tobytes())))
    assert levels(np.array(view2[0]), untouched) < RESIZE_LEVELS  # the other view is its own
    return np.array(view1[0]).astype(np.int64)


def drawn_by_pillow(image: Image.Image, box: tuple[int, int, int, int] | None = None) -> Picture:
    return np.asarray(image.crop(box or (0, 0, *image.size)).resize((SIZE, SIZE), 3))


def levels(ours: NDArray[np.integer], theirs: NDArray[np.integer]) -> float:
    return float(np.abs(ours.astype(np.float64) - theirs).mean())


def coloured(image: Image.Image, factors: list[float], order: list[int]) -> augment_params.Draws:
    number = np.array([factors]), np.array([order])
    matrix, mean_matrix, offset = augment_params.color(*number, np.zeros(1, np.bool_))
    return dataclasses.replace(
        whole(image),
        color_matrix=matrix.astype(np.float32),
        mean_matrix=mean_matrix.astype(np.float32),
        color_offset=offset.astype(np.float32),
        jitter=np.ones(1, np.bool_),
    )


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """As large as a view, so that only the operation in question can differ."""
    return photograph(SIZE, SIZE)


def test_the_crop_is_pillows_bicubic_one() -> None:
    image = photograph(300, 400)
    draws = dataclasses.replace(
        whole(image),
        crop_start=np.array([[20, 30]], np.float32),
        crop_end=np.array([[220, 310]], np.float32),
    )
    assert levels(drawn(image, draws), drawn_by_pillow(image, (30, 20, 310, 220))) < RESIZE_LEVELS


def test_a_flip_mirrors_left_and_right() -> None:
    image = photograph(200, 150)
    ours = drawn(image, dataclasses.replace(whole(image), flip=np.ones(1, np.bool_)))
    assert levels(ours, drawn(image, whole(image))[:, ::-1]) < MIRROR_LEVELS


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_flipped_then_turned_against_the_clock(
    flip: bool, vertical: bool, turns: int
) -> None:
    image = photograph(200, 150)
    draws = dataclasses.replace(
        whole(image),
        flip=np.array([flip]),
        vertical_flip=np.array([vertical]),
        turns=np.array([turns]),
    )
    plain = Image.fromarray(drawn(image, whole(image)).astype(np.uint8))
    theirs = ImageOps.mirror(plain) if flip else plain
    theirs = ImageOps.flip(theirs) if vertical else theirs
    theirs = functional.rotate(theirs, 90 * turns)
    assert levels(drawn(image, draws), np.asarray(theirs)) < MIRROR_LEVELS


def test_images_of_one_batch_are_turned_each_in_its_own_way() -> None:
    image = photograph(200, 150)
    one = whole(image)
    four = augment_params.Draws(
        **{f.name: np.repeat(getattr(one, f.name), 4, axis=0) for f in dataclasses.fields(one)}
    )
    four = dataclasses.replace(four, turns=np.arange(4))
    both = (recipe.VIEW_A, recipe.VIEW_B)
    pipeline = dali_graphs.training_pipeline(both, (SIZE, SIZE), batch_size=4, threads=1, gpu=None)
    pipeline.feed_input("image", [np.asarray(image)] * 4)
    pipeline.feed_input("serial", np.zeros((4, 1), np.int64))
    sizes = np.array([[image.height, image.width]] * 4)
    for name, values in dali_graphs.training_inputs((four, four), sizes).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    pixels = pipeline.outputs()[0].as_array()
    for turns in range(4):
        assert levels(pixels[turns], np.rot90(pixels[0], turns)) < MIRROR_LEVELS


@pytest.mark.parametrize("turns", [-0.1, 0.1])
def test_hue_turns_the_same_way_as_torchvisions(image: Image.Image, turns: float) -> None:
    ours = drawn(image, coloured(image, [1, 1, 1, turns], [0, 1, 2, 3]))
    assert levels(ours, np.asarray(functional.adjust_hue(image, turns))) < HUE_LEVELS
    assert levels(ours, np.asarray(functional.adjust_hue(image, -turns))) > HUE_LEVELS


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 1, 3, 0], [1, 2, 0, 3], [3, 0, 1, 2]])
def test_several_factors_together_are_pillows_in_any_order(
    image: Image.Image, order: list[int]
) -> None:
    factors = [0.8, 1.2, 0.8, 0.0]
    operations = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
    ]
    theirs = image
    for number in order:
        if number < 3:
            theirs = operations[number](theirs, factors[number])
    ours = drawn(image, coloured(image, factors, order))
    assert levels(ours, np.asarray(theirs)) < COLOUR_LEVELS


def test_grey_is_pillows(image: Image.Image) -> None:
    matrix, mean_matrix, _ = augment_params.color(
        np.array([[1.0, 1, 1, 0]]), np.arange(4)[None], np.ones(1, np.bool_)
    )
    draws = dataclasses.replace(
        whole(image),
        color_matrix=matrix.astype(np.float32),
        mean_matrix=mean_matrix.astype(np.float32),
        gray=np.ones(1, np.bool_),
    )
    ours = drawn(image, draws)
    assert levels(ours, np.asarray(image.convert("L"))[..., None]) < GRAY_LEVELS
    assert np.ptp(ours, axis=2).max() <= 1


def test_a_jpeg_is_decoded_as_by_pillow(image: Image.Image) -> None:
    again = Image.open(io.BytesIO(encoded(image, "JPEG").tobytes()))
    assert levels(drawn(image, whole(image), "JPEG"), np.asarray(again)) < 0.01  # the same library


SIZES = [
    (256, 256),
    (300, 400),
    (401, 307),
    (1000, 333),
    (64, 50),
    (97, 1203),
    (500, 375),
    (30, 31),
]
"""(height, width): odd and even, panoramas, and smaller than the view."""


@pytest.mark.parametrize("size", [224, 96])
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(size: int) -> None:
    geometry = dali_graphs.Geometry.for_size(size)
    images = [photograph(*shape, seed) for seed, shape in enumerate(SIZES)]
    pipeline = dali_graphs.evaluation_pipeline(geometry, batch_size=len(SIZES), threads=1, gpu=None)
    pipeline.feed_input("image", [decoded(encoded(image)) for image in images])
    pipeline.feed_input("serial", np.arange(len(SIZES), dtype=np.int64)[:, None])
    for name, values in dali_graphs.evaluation_inputs(geometry, np.array(SIZES)).items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    pixels, serials = pipeline.outputs()
    np.testing.assert_array_equal(serials.as_array()[:, 0], np.arange(len(SIZES)))
    for i, image in enumerate(images):
        resized = functional.resize(
            image, geometry.resize, InterpolationMode.BILINEAR, antialias=True
        )
        theirs = np.asarray(functional.center_crop(resized, [size, size]))
        assert levels(np.array(pixels[i]), theirs) < 0.5, SIZES[i]


def test_geometry_keeps_the_published_field_of_view() -> None:
    assert dali_graphs.Geometry.for_size(224) == dali_graphs.Geometry(224, 256, "bilinear")
    assert dali_graphs.Geometry.for_size(96).resize == 110


def test_every_graph_can_be_defined_for_a_gpu_where_there_is_none() -> None:
    # Definition checks what may be on which device; running needs the GPU.
    both = (recipe.VIEW_A, recipe.VIEW_B)
    dali_graphs.training_pipeline(both, (SIZE, SIZE), batch_size=2, threads=1, gpu=0)
    dali_graphs.evaluation_pipeline(
        dali_graphs.Geometry.for_size(SIZE), batch_size=2, threads=1, gpu=0
    )
