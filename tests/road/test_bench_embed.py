"""The benchmark of embedding: every row computes the same vectors of the same images."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_run import draw_images, shared_home
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.data import index
from btpipe.embed.encoder import load
from btpipe.road import embed_worker
from btpipe.road.embed_worker import Load

COUNT = 12
SAME_IMAGE = 0.98
"""Cosine of what differs from the mean vector: Pillow's decoder and resize against DALI's."""


@pytest.mark.slow
def test_the_quick_benchmark_shows_its_tables() -> None:
    result = CliRunner().invoke(app, ["bench", "embed", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    note, whole, parts, end = (json.loads(line) for line in result.stdout.splitlines())
    assert "no int8 row" in note["text"]
    assert end["event"] == "Finished"
    names = [row[0] for row in whole["rows"]]
    assert names == [
        "torchvision eager, DataLoader",
        "btpipe, onnxruntime fp32",
        "btpipe, torch bf16",
    ]
    assert (whole["rows"][0][1], whole["rows"][1][2]) == ("1.00", "1.00")
    assert all(0 < float(row[5]) < 2 for row in whole["rows"][1:])
    assert all(float(row[1]) > 0 for row in parts["rows"])


def test_too_few_images_for_a_turn_are_refused(tmp_path: Path) -> None:
    draw_images(tmp_path, 3)
    result = CliRunner().invoke(app, ["bench", "embed", "--quick", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "3 images" in str(result.exception)


def test_what_a_user_would_write_gives_the_same_vectors(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    draw_images(tmp_path / "images", COUNT)
    made, _ = index.build(tmp_path / "images")
    made.save(tmp_path / "index.parquet")
    turn = Load(tmp_path / "index.parquet", bundle, COUNT, workers=0)
    theirs = embed_worker.user_vectors(turn)
    encoder = load(bundle, device="cpu")
    embed_worker.write_table(tmp_path / "v.parquet", turn, made, encoder)
    rows = pq.read_table(tmp_path / "v.parquet")
    assert rows["path"].to_pylist() == made.table["path"].to_pylist()
    ours = np.stack(rows["embedding"].to_numpy())
    assert ours.shape == theirs.shape == (COUNT, 512)
    a, b = (vectors - ours.mean(axis=0) for vectors in (ours, theirs))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > SAME_IMAGE
