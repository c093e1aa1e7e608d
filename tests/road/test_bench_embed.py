"""The benchmark of embedding: every row computes the same vectors of the same images."""

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import draw_images, shared_home
from typer.testing import CliRunner

from btpipe import runtime
from btpipe.cli import app
from btpipe.data import index
from btpipe.embed.encoder import load
from btpipe.road import bench_embed, embed_worker
from btpipe.road.embed_worker import Load
from btpipe.road.seat import Turn

COUNT = 12
SAME_IMAGE = 0.98
"""Cosine of what differs from the mean vector: Pillow's decoder and resize against DALI's."""


@pytest.mark.slow
def test_the_quick_benchmark_shows_its_tables() -> None:
    result = CliRunner().invoke(app, ["bench", "embed", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    *notes, whole, parts, end = (json.loads(line) for line in result.stdout.splitlines())
    assert end["event"] == "Finished"
    names = [row[0] for row in whole["rows"]]
    if torch.cuda.is_available():
        users, kinds = 2, ["onnxruntime fp32", "onnxruntime tf32", "onnxruntime fp16", "torch bf16"]
        assert not notes
    else:
        users, kinds = 1, ["onnxruntime fp32", "torch bf16"]
        assert "no int8 row" in notes[0]["text"]
    assert names[0] == "torchvision eager, DataLoader"
    assert names[users:] == [f"btpipe, {kind}" for kind in kinds]
    assert (whole["rows"][0][1], whole["rows"][users][2]) == ("1.00", "1.00")
    assert all(0 < float(row[5]) < 2 for row in whole["rows"][users:])
    alone = ["read and hash", "read, decode and resize", "write the table"]
    assert [row[0] for row in parts["rows"]] == [*alone, *(f"network, {kind}" for kind in kinds)]
    assert all(float(row[1]) > 0 for row in parts["rows"])


def test_the_limit_is_the_slower_part_on_a_gpu_and_the_sum_over_all_cores_on_a_cpu() -> None:
    decode, network = Turn(seconds=3.0, cpu_seconds=8.0), Turn(seconds=2.0, cpu_seconds=4.0)
    assert bench_embed.limit_seconds([decode, network], "cuda") == 3.0
    assert bench_embed.limit_seconds([decode, network], "cpu") == 12.0 / runtime.cores()


def test_a_gpu_gets_more_images_in_a_turn_unless_somebody_says_how_many() -> None:
    asked = functools.partial(bench_embed.options, turns=3, workers=2, backbone="resnet50")
    made = asked(None, image_size=224, device="cpu", quick=False)
    assert (made.images, made.device) == (64, "cpu")
    assert bench_embed.IMAGES["cuda"] == 4096
    assert asked(9, image_size=224, device="cpu", quick=False).images == 9
    assert asked(9, image_size=224, device="cpu", quick=True).images == 8


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
