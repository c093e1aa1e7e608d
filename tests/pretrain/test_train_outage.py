"""A training whose images are away for too long keeps its steps, and goes on from there."""

from pathlib import Path

import pytest
from small_training import IMAGES, checkpoints, pretrain, weights
from stumbling_server import Stumbling
from tiny_run import draw_images

from btpipe.data import index
from btpipe.data.retry import waiting_at_most
from btpipe.errors import MachineError


def test_a_training_ends_when_its_source_gives_nothing_and_goes_on_where_it_was(
    served: tuple[str, Path, type[Stumbling]], tmp_path: Path
) -> None:
    url, folder, handler = served
    draw_images(folder / "images", IMAGES)
    index.build(f"{url}/images/")[0].save(tmp_path / "listed.parquet")
    handler.requests.clear()
    whole = pretrain(tmp_path, tmp_path / "listed.parquet", "optim.name=sgd", name="whole")
    handler.down, handler.gives = 503, len(handler.requests) - 8  # the last batch is not given
    handler.requests.clear()
    with waiting_at_most(0.5), pytest.raises(MachineError, match="given nothing"):
        pretrain(tmp_path, tmp_path / "listed.parquet", "optim.name=sgd")
    assert 0 < checkpoints(tmp_path / "run")[-1] < checkpoints(whole)[-1]
    handler.down = 0
    run = pretrain(tmp_path, tmp_path / "listed.parquet", "optim.name=sgd")
    assert weights(run) == weights(whole)
    assert not (run / "rejects.csv").read_text().count("machine")
