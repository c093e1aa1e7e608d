"""Each operation of the graphs agrees with torchvision's and Pillow's, as docs/views.md says."""

import re
from pathlib import Path

import numpy as np
import parity
import parity_table
import pytest
import torch
from parity import Case, Measured
from torchvision.transforms import functional

from btpipe.data.pipeline import dali_graphs

DOCUMENT = Path(__file__).parents[3] / "docs" / "views.md"
DOCUMENTED_LEVELS = 0.05
"""Mean grey levels by which another processor or version may differ from the table."""
DOCUMENTED_LARGEST = 4
"""Likewise the largest difference, which is that of one pixel."""
EMBEDDED_LEVELS = 0.5
"""The promise for what is embedded; 0.18 on drawn pictures."""
CLIPPING_LEVELS = 1.0
"""Between the factors values are not clipped here."""

Table = dict[tuple[str, str], Measured]


@pytest.fixture(scope="module")
def measured() -> Table:
    """What each row of the table is here."""
    rows = parity_table.rows(parity.pictures(**parity.UPRIGHT))
    return {(operation, reference): levels for operation, reference, levels in rows}


@pytest.mark.parametrize("case", parity_table.CASES, ids=lambda c: f"{c.operation}, {c.reference}")
def test_an_operation_is_its_reference_but_for_the_grey_levels_allowed(
    case: Case, measured: Table
) -> None:
    levels = measured[case.operation, case.reference]
    assert levels.mean <= case.mean_levels
    assert levels.largest <= case.largest_levels


@pytest.mark.parametrize("name", parity_table.VIEWS)
def test_a_whole_view_is_the_published_one_but_for_the_grey_levels_allowed(
    name: str, measured: Table
) -> None:
    assert measured[name, "published transform"].mean <= parity_table.VIEWS[name][1]


def test_a_file_is_decoded_to_the_bytes_that_pillow_decodes(measured: Table) -> None:
    assert measured["decode PNG", "Image.open"].largest == 0
    assert measured["decode JPEG", "Image.open"].largest == 0  # the same library, and upsampling


def test_what_is_embedded_is_the_published_preprocessing(measured: Table) -> None:
    assert measured["embedding's view", "Resize(256), CenterCrop(224)"].mean < EMBEDDED_LEVELS


def test_the_table_in_the_documentation_holds_here(measured: Table) -> None:
    text = DOCUMENT.read_text()
    row = r"^\| ([^|]+) \| ([^|]+) \| ([\d.]+), (\d+) \| [\d.]+, \d+ \|"
    written = {
        (operation, reference): Measured(float(mean), int(largest))
        for operation, reference, mean, largest in re.findall(row, text, re.MULTILINE)
    }
    assert written.keys() == measured.keys()
    for name, levels in measured.items():
        assert abs(levels.mean - written[name].mean) <= DOCUMENTED_LEVELS, name
        assert abs(levels.largest - written[name].largest) <= DOCUMENTED_LARGEST, name


def test_clipping_between_the_factors_is_what_colours_lack_beside_hue(measured: Table) -> None:
    levels = measured["brightness, contrast, saturation as drawn", "without rounding"]
    assert levels.mean < CLIPPING_LEVELS
    images = [parity.photograph(parity.SIZE, parity.SIZE, seed) for seed in range(3)]
    faded = [image.point(lambda value: value // 2 + 64) for image in images]  # nothing clips
    assert parity.measure_clipping(faded).largest <= 1


def test_the_evaluation_view_has_torchvisions_geometry_at_every_size() -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate(
        [
            rng.integers(1, 6000, (500, 2)),
            rng.integers(1, 80, (200, 2)),
            np.array([[224, 224], [256, 256], [1, 1], [1, 5000], [5000, 1], [255, 257]]),
        ]
    )
    for size in (224, 96, 161):
        geometry = dali_graphs.Geometry.for_size(size)
        inputs = dali_graphs.evaluation_inputs(geometry, sizes)
        for (height, width), start, end in zip(sizes, inputs["start"], inputs["end"], strict=True):
            # Tensors without content have a shape and an offset, which is all that is asked.
            image = torch.empty((1, int(height), int(width)), device="meta")
            resized = functional.resize(image, geometry.resize)
            view = functional.center_crop(resized, [size, size])
            shape = np.array(resized.shape[1:])
            corner = np.array(divmod(view.storage_offset(), shape[1]))
            np.testing.assert_allclose(start, corner / shape, atol=1e-6)  # float32 of a share
            np.testing.assert_allclose(end, (corner + size) / shape, atol=1e-6)


def test_the_evaluation_view_has_torchvisions_pixels_at_odd_sizes() -> None:
    rng = np.random.default_rng(1)
    odd = 2 * rng.integers(15, 300, (24, 2)) + 1
    images = [parity.photograph(int(h), int(w), seed) for seed, (h, w) in enumerate(odd)]
    for image in images:
        assert parity.measure_evaluation([image]).mean < EMBEDDED_LEVELS, image.size
