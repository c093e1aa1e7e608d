"""The map by UMAP, with the real umap-learn. Run: make test-readers"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import vector_table
from numpy.typing import NDArray

from btpipe.errors import UsageError
from btpipe.explore import layout

pytest.importorskip("umap")

GROUP = 60
TOGETHER = 0.95
"""Share of points whose nearest one on the map is of their group; all of them, as a rule."""


def grouped() -> NDArray[np.float32]:
    """`GROUP` vectors of 24 numbers round each of three directions."""
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, (3 * GROUP, 24))
    return (np.repeat(np.eye(24)[:3], GROUP, axis=0) + noise).astype(np.float32)


def test_what_lies_together_is_drawn_together() -> None:
    places = layout.umap(grouped())
    assert places.shape == (3 * GROUP, 2)
    apart = np.square(places[:, None] - places[None]).sum(axis=2)
    np.fill_diagonal(apart, np.inf)
    same = apart.argmin(axis=1) // GROUP == np.arange(3 * GROUP) // GROUP
    assert same.mean() > TOGETHER


def test_two_processes_draw_the_same_page(tmp_path: Path) -> None:
    vector_table.write(tmp_path / "v.parquet", grouped())
    for name, seed in (("a.html", "1"), ("b.html", "2")):
        command = [sys.executable, "-m", "btpipe", "map", "v.parquet", "--by", "umap"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([*command, "--out", name], cwd=tmp_path, env=environment, check=True)
    page = (tmp_path / "a.html").read_bytes()
    assert page == (tmp_path / "b.html").read_bytes()
    assert b'"umap": "' in page


def test_too_few_vectors_for_a_neighbourhood_are_refused() -> None:
    with pytest.raises(UsageError, match="too few for UMAP"):
        layout.umap(grouped()[:10])
