import io

import numpy as np
import pytest
import torch
from PIL import Image

from btpipe.data import change_detection, index
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.data.sources import synthetic
from btpipe.errors import UsageError
from btpipe.events import ignore
from btpipe.recipe import VIEW_A, VIEW_B


def test_synthetic_images_are_indexed_as_they_are() -> None:
    images, refused = index.build("synthetic:70x48")
    assert (len(images), refused) == (70, [])
    for row in (0, 1, 33, 69):
        content = images.read_bytes(row)
        assert len(content) == images.table["bytes"][row].as_py()
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (images.widths[row], images.heights[row])
            assert min(image.size) == 48
    assert (
        images.read_bytes(1) == images.read_bytes(1 + synthetic.DIFFERENT) != images.read_bytes(3)
    )
    assert not change_detection.changes(images, set())


def test_a_training_loader_takes_them_from_memory() -> None:
    images, _ = index.build("synthetic:20x48")
    chosen = LoaderSettings(
        seed=0, views=(VIEW_A, VIEW_B), view_sizes=(32, 32), batch_size=8, steps=2, threads=1
    )
    with TrainingLoader(
        images,
        chosen,
        rank=0,
        world_size=1,
        start_step=0,
        device=torch.device("cpu"),
        on_event=ignore,
        rejected={},
    ) as loader:
        batches = list(loader)
    assert [batch.views[0].shape for batch in batches] == [(8, 32, 32, 3)] * 2
    assert len(np.unique(np.concatenate([batch.images for batch in batches]))) == 16


@pytest.mark.parametrize("text", ["synthetic:", "synthetic:9", "synthetic:0x9", "synthetic:9x0"])
def test_a_name_without_two_numbers_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="synthetic:10000x400"):
        index.build(text)
