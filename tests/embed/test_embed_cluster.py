"""What can be seen of `--cluster ray` where Ray is not installed. With Ray: make test-ray"""

import importlib.util
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import draw_images, other_bundle, shared_home

from btpipe.data.index import build
from btpipe.embed import outputs, ray_pool, table, work_folder
from btpipe.embed.job import embed
from btpipe.embed.messages import Failed, JobStarted, PartTask, WorkerConfig
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import RefusedError, UsageError
from btpipe.events import ignore


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_a_cluster_without_ray_ends_with_2_and_says_what_to_install(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw_images(tmp_path / "images", 2)
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    words = ["images", "--out", "v.parquet", "--model", str(bundle), "--cluster", "ray"]
    done = subprocess.run(
        [sys.executable, "-m", "btpipe", "embed", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == UsageError.exit_code
    assert "pip install 'btpipe[ray]'" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_machine_with_an_old_copy_of_the_bundle_is_refused_by_name(
    bundle: Path, tmp_path: Path
) -> None:
    draw_images(tmp_path / "images", 8)
    index, _ = build(tmp_path / "images")
    index.save(tmp_path / work_folder.INDEX)
    embed(tmp_path / "images", tmp_path / "v.parquet", EncoderConfig(bundle, "cpu"), ignore)
    footer = table.Footer.of(outputs.footer_of(tmp_path / "v.parquet") or {})
    copy = other_bundle(bundle, tmp_path / "copy")
    actor = ray_pool.Actor(
        WorkerConfig(EncoderConfig(copy, "cpu")),
        JobStarted(tmp_path, footer, None),
        10.0,
        ray_pool.SharedPaths(str(Path.cwd()), ()),
    )
    tasks = {"task": np.array([pickle.dumps(PartTask(0, 0, 8, {}))], dtype=object)}
    outcome = pickle.loads(actor(tasks)["answer"][0]).outcome
    assert isinstance(outcome, Failed), outcome
    assert outcome.error is RefusedError
    assert socket.gethostname() in outcome.what
    assert outcome.where == str(copy)
