"""The loader's benchmark: both sides do the same work on the same images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import draw_images

from benchmarks import loader, loader_cases
from benchmarks.loader_cases import LoaderWork
from btpipe.data import index
from btpipe.data.pipeline.train_loader import TrainingLoader
from btpipe.data.sources import synthetic
from btpipe.errors import UsageError
from btpipe.events import Event, ignore
from btpipe.reference import augmentations
from btpipe.tools.measured_process import MeasuredProcess, PeakMemory, Prepared
from btpipe.tools.measured_rows import Compared

VIEW_TOLERANCE = 0.15
"""Between the mean and spread of 96 images' views, drawn twice: in standard deviations."""
BURNT_SECONDS = 0.5


@pytest.mark.slow
def test_the_quick_benchmark_shows_its_tables() -> None:
    events: list[Event] = []
    loader.run(loader.QUICK, None, events.append)
    loaders, parts, *of_gpu = (event.table for event in events if isinstance(event, Compared))
    assert loaders.rows[0][1] == "1.00"
    assert len(loaders.rows) == 3
    assert [row[1] for row in parts.rows][::2] == ["1.00", "1.00"]
    assert all(float(row[2]) > 0 for row in loaders.rows + parts.rows)
    if torch.cuda.is_available():
        filled, decoders = of_gpu
        names = [row[0] for row in filled.rows]
        assert names == [row[0] for row in loaders.rows]
        assert filled.columns[2:] == ("pairs/s", "CPU ms a pair")
        assert decoders.rows[1][0] == "nvImageCodec, as pretrain uses it"


def test_too_few_images_for_a_batch_are_refused(tmp_path: Path) -> None:
    draw_images(tmp_path, 3)
    with pytest.raises(UsageError, match="3 images do not fill one batch of 4"):
        loader.run(loader.QUICK, tmp_path, ignore)


def test_both_loaders_get_the_same_images_and_hand_out_alike_views(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 100)
    images_index, _ = index.build(tmp_path / "images")
    images_index.save(tmp_path / "index.parquet")
    work = LoaderWork(tmp_path / "index.parquet", batch=8, batches=12, image_size=32, workers=1)
    rows = loader_cases.rows_of(work, images_index)
    with TrainingLoader(
        images_index,
        work.settings(work.batches),
        rank=0,
        world_size=1,
        start_step=0,
        device=torch.device("cpu"),
        on_event=ignore,
        rejected={},
    ) as loader:
        ours = list(loader)
    for batch, expected in zip(ours, rows, strict=True):
        np.testing.assert_array_equal(batch.images, expected)
    torch.manual_seed(0)
    pairs = augmentations.Pairs(images_index, work.image_size)
    theirs = list(augmentations.loader(pairs, [part.tolist() for part in rows], workers=0))
    mean, spread = (
        torch.tensor(values)[:, None, None] for values in (augmentations.MEAN, augmentations.STD)
    )
    for number in range(2):
        published = torch.cat([views[number] for views in theirs])
        view = torch.cat([b.views[number] for b in ours])
        scaled = (view.permute(0, 3, 1, 2) / 255 - mean) / spread
        assert published.shape == scaled.shape
        assert abs(float(published.mean() - scaled.mean())) < VIEW_TOLERANCE
        assert abs(float(published.std() - scaled.std())) < VIEW_TOLERANCE


def burn_in_a_child() -> Prepared:
    def action() -> None:
        process = torch.multiprocessing.get_context("fork").Process(target=burn)
        process.start()
        process.join()

    return Prepared(action, PeakMemory(torch.device("cpu")))


def burn() -> None:
    import time  # noqa: PLC0415

    while time.process_time() < BURNT_SECONDS:
        pass


def test_a_row_is_charged_for_the_processes_that_it_starts() -> None:
    process = MeasuredProcess("burns", burn_in_a_child, threads=1, has_children=True)
    try:
        process.prepare()
        turn = process.measure()
    finally:
        process.close()
    assert turn is not None
    assert BURNT_SECONDS <= turn.cpu_seconds < 2 * BURNT_SECONDS


def test_a_drawn_picture_is_the_same_each_time_and_takes_the_bytes_of_a_photograph() -> None:
    content = synthetic.jpeg(3, 400)
    synthetic.jpeg.cache_clear()
    assert synthetic.jpeg(3, 400) == content == synthetic.jpeg(3 + synthetic.DIFFERENT, 400)
    assert synthetic.jpeg(4, 400) != content
    with Image.open(io.BytesIO(content)) as image:
        assert image.size == (533, 400)
    assert 20_000 < len(content) < 60_000  # clothing photographs of that size: 30 kB
