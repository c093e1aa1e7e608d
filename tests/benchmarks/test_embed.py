"""The benchmark of embedding: every row computes the same vectors of the same images."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import draw_images, shared_home

from benchmarks import embed, embed_cases
from btpipe.data import index
from btpipe.embed.encoder import load
from btpipe.events import Event
from btpipe.tools import bench, bench_cases
from btpipe.tools.bench_cases import Work
from btpipe.tools.measured_rows import Compared

COUNT = 12
SAME_IMAGE = 0.98
"""Cosine of what differs from the mean vector: Pillow's decoder and resize against DALI's."""


@pytest.mark.slow
def test_the_quick_benchmark_sets_btpipe_beside_what_a_user_would_write() -> None:
    events: list[Event] = []
    options = bench.options(None, 3, "resnet50", 224, device="auto", quick=True)
    embed.run(options, None, None, events.append, workers=1)
    whole, parts = (event.table for event in events if isinstance(event, Compared))
    names, users = [row[0] for row in whole.rows], 2 if torch.cuda.is_available() else 1
    assert names[0] == "torchvision eager, DataLoader"
    assert all(name.startswith("btpipe, ") for name in names[users:])
    assert whole.rows[0][1] == "1.00"
    assert [row[4] for row in whole.rows[:users]] == [""] * users
    assert all(0 < float(row[4]) < 2 for row in whole.rows[users:])
    assert all(float(row[1]) > 0 for row in parts.rows)


def test_what_a_user_would_write_gives_the_same_vectors(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    draw_images(tmp_path / "images", COUNT)
    images, _ = index.build(tmp_path / "images")
    images.save(tmp_path / "index.parquet")
    work = Work(tmp_path / "index.parquet", bundle, COUNT)
    theirs = embed_cases.user_vectors(work, workers=0)
    encoder = load(bundle, device="cpu")
    bench_cases.write_table(tmp_path / "v.parquet", work, images, encoder)
    rows = pq.read_table(tmp_path / "v.parquet")
    assert rows["path"].to_pylist() == images.table["path"].to_pylist()
    ours = np.stack(rows["embedding"].to_numpy())
    assert ours.shape == theirs.shape == (COUNT, 512)
    a, b = (vectors - ours.mean(axis=0) for vectors in (ours, theirs))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > SAME_IMAGE
