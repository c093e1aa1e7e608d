"""What `btpipe views` shows is what a run trains on, with the numbers that made it."""

import base64
import io
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import resized_crop
from PIL import Image, ImageFilter, ImageOps
from tiny_run import draw_images
from torchvision.transforms import functional
from typer.testing import CliRunner

from btpipe import recipe
from btpipe.cli import app
from btpipe.data import index
from btpipe.data.pipeline import augment_params
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.errors import UsageError
from btpipe.events import ignore
from btpipe.preview.samples import SampleView, draw_samples
from btpipe.preview.sheet import make

SIZE = 64
SEEN_LEVELS = 3.0
"""From Pillow at the same numbers and hue 0: cut-off fractions, boxes as blur, clipping."""


def described(images: Path) -> recipe.Recipe:
    view = recipe.View(jitter=recipe.Jitter(hue=0.0), vertical_flip=0.5, rotate90=0.75)
    return recipe.Recipe(
        seed=5,
        data=recipe.Data(train=str(images), batch_size=16, image_size=SIZE),
        views=(view, view.model_copy(update={"solarize": recipe.Solarize(probability=0.5)})),
    )


def by_hand(image: Image.Image, view: SampleView) -> Image.Image:
    """The view from its numbers, by Pillow."""
    pixels = resized_crop(view.top, view.left, view.height, view.width, SIZE)(image)
    pixels = ImageOps.mirror(pixels) if view.flip else pixels
    pixels = ImageOps.flip(pixels) if view.vertical_flip else pixels
    pixels = functional.rotate(pixels, 90 * view.turns)
    for name, value in view.factors:
        pixels = getattr(functional, f"adjust_{name}")(pixels, value)
    pixels = functional.to_grayscale(pixels, 3) if view.gray else pixels
    pixels = pixels.filter(ImageFilter.GaussianBlur(view.sigma)) if view.sigma else pixels
    return ImageOps.solarize(pixels, 128) if view.solarize else pixels


def test_it_shows_the_first_images_of_an_epoch_as_the_run_sees_them(tmp_path: Path) -> None:
    draw_images(tmp_path, 40)
    views_recipe = described(tmp_path)
    images, _ = index.build(tmp_path)
    for epoch in (0, 2):
        samples = draw_samples(views_recipe, ignore, count=6, epoch=epoch)
        with TrainingLoader(
            images,
            LoaderSettings.of(views_recipe, len(images)),
            rank=0,
            world_size=1,
            start_step=epoch * (40 // 16),
            device=torch.device("cpu"),
            on_event=ignore,
            rejected={},
        ) as loader:
            batch = next(iter(loader))
        paths = [images.table["path"][int(row)].as_py() for row in batch.images[:6]]
        assert [sample.path for sample in samples] == paths
        for i, sample in enumerate(samples):
            np.testing.assert_array_equal(sample.views[0].pixels, batch.views[0][i].numpy())
            np.testing.assert_array_equal(sample.views[1].pixels, batch.views[1][i].numpy())


def test_the_numbers_on_show_make_the_pixels_on_show(tmp_path: Path) -> None:
    draw_images(tmp_path, 16)
    gaps = []
    for sample in draw_samples(described(tmp_path), ignore, count=16, epoch=0):
        with Image.open(tmp_path / sample.path) as file:
            image = file.convert("RGB")
        assert image.size == (sample.width, sample.height)
        for view in sample.views:
            theirs = np.asarray(by_hand(image, view)).astype(int)
            gaps.append(np.abs(view.pixels.astype(int) - theirs).mean())
            assert view.share == pytest.approx(view.width * view.height / np.prod(image.size))
    assert np.mean(gaps) < SEEN_LEVELS


def test_factors_are_shown_in_the_order_that_was_drawn(tmp_path: Path) -> None:
    draw_images(tmp_path, 16)
    views_recipe = described(tmp_path)
    images, _ = index.build(tmp_path)
    rows = {path: row for row, path in enumerate(images.table["path"].to_pylist())}
    for sample in draw_samples(views_recipe, ignore, count=16, epoch=1):
        for number, view in enumerate(sample.views):
            drawn = augment_params.draw(
                views_recipe.views[number],
                seed=views_recipe.seed,
                epoch=1,
                view_number=number,
                images=np.array([rows[sample.path]]),
                widths=np.array([sample.width]),
                heights=np.array([sample.height]),
            )
            order = [("brightness", "contrast", "saturation", "hue")[k] for k in drawn.order[0]]
            assert [name for name, _ in view.factors] == (order if drawn.jitter[0] else [])


def test_images_of_any_shape_and_name_fit_the_sheet(tmp_path: Path) -> None:
    names = ["a" * 120 + ".png", "<b>&.png", "ж日本.png", "d.png", "e.png"]
    for name, size in zip(names, [(900, 3), (2, 700), (1, 1), (64, 64), (33, 47)], strict=True):
        Image.new("RGB", size, "teal").save(tmp_path / name)
    out = tmp_path / "out" / "sheet.png"
    out.parent.mkdir()
    views_recipe = described(tmp_path)
    make(views_recipe, "mine", out, ignore, count=20, epoch=0, page=True)
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width == 2 * (3 * 224 + 2 * 12) + 3 * 24
    page = out.with_suffix(".html").read_text()
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>" not in page


def test_small_views_are_shown_beside_the_others(tmp_path: Path) -> None:
    draw_images(tmp_path, 8)
    small = recipe.View(size=16)
    views_recipe = described(tmp_path).model_copy(
        update={"views": (recipe.VIEW_A, recipe.VIEW_B, small, small)}
    )
    out = tmp_path / "views.png"
    make(views_recipe, "mine", out, ignore, count=5, epoch=0, page=True)
    with Image.open(out) as sheet:
        assert sheet.width == 5 * 224 + 4 * 12 + 2 * 24  # one image in a row
    page = out.with_suffix(".html").read_text()
    assert page.count("<figcaption>view 4</figcaption>") == 5


def test_the_page_holds_all_numbers_and_loads_nothing(tmp_path: Path) -> None:
    draw_images(tmp_path, 6)
    views_recipe, out = described(tmp_path), tmp_path / "views.png"
    samples = draw_samples(views_recipe, ignore, count=6, epoch=0)
    make(views_recipe, "mine", out, ignore, count=6, epoch=0, page=True)
    page = (tmp_path / "views.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 18
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|<script|<link", page)
    HTMLParser().feed(page)
    first = Image.open(io.BytesIO(base64.b64decode(sources[1].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(first), samples[0].views[0].pixels)
    for view in (view for sample in samples for view in sample.views):
        assert f"{view.width} x {view.height} at {view.left}, {view.top}" in page
        for name, value in view.factors:
            sign = "+" if name == "hue" else ""
            assert f"<th>{name}</th><td>{value:{sign}.4f}</td>" in page


def test_the_command_writes_a_picture_and_says_so(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 6)
    out = tmp_path / "views.png"
    words = f"views satellite.toml --data {tmp_path / 'images'} --out {out} --count 3 --epoch 1"
    result = CliRunner().invoke(app, shlex.split(words))
    assert result.exit_code == 0, result.output
    assert "3 images as epoch 1 shows them" in result.output
    with Image.open(out) as sheet:
        assert sheet.width == 3 * 224 + 2 * 12 + 2 * 24
    assert not out.with_suffix(".html").exists()


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    draw_images(tmp_path, 4)
    views_recipe = described(tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.png"):
        make(views_recipe, "mine", tmp_path / "views.jpg", ignore, count=2, epoch=0, page=False)
    nameless = views_recipe.model_copy(update={"data": recipe.Data()})
    with pytest.raises(UsageError, match="--data DIR"):
        draw_samples(nameless, ignore, count=2, epoch=0)
