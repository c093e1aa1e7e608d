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
    made, refused = index.build("synthetic:70x48")
    assert (len(made), refused) == (70, [])
    for row in (0, 1, 33, 69):
        content = made.read_bytes(row)
        assert len(content) == made.table["bytes"][row].as_py()
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (made.widths[row], made.heights[row])
            assert min(image.size) == 48
    assert made.read_bytes(1) == made.read_bytes(1 + synthetic.DIFFERENT) != made.read_bytes(3)
    assert not change_detection.changes(made, set())


def test_a_training_loader_takes_them_from_memory() -> None:
    made, _ = index.build("synthetic:20x48")
    chosen = LoaderSettings(
        seed=0, views=(VIEW_A, VIEW_B), view_sizes=(32, 32), batch_size=8, steps=2, threads=1
    )
    with TrainingLoader(
        made,
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
