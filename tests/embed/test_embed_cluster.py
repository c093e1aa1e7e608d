"""What `--cluster ray` says where Ray is not installed. With Ray: make test-ray"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import draw_images, shared_home

from btpipe.errors import UsageError


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
