"""A GPU that cannot be used ends a job in words, and leaves nothing that refuses the next one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import draw_images

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
"""
"""Shows one GPU and can do nothing with it."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 of our own."""
    folder = tmp_path_factory.mktemp("driver")
    source, library = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    compiler = shutil.which("cc") or shutil.which("g++")
    assert compiler, "torch.compile needs a compiler as well"
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return folder


def embed(
    images: Path, out: Path, bundle: Path, *options: str, driver: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    environment = dict(os.environ)
    if driver is not None:
        environment["LD_LIBRARY_PATH"] = str(driver)
    words = ["embed", str(images), "--out", str(out), "--model", str(bundle), *options]
    return subprocess.run(
        [sys.executable, "-m", "btpipe", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_gpu_that_cannot_be_used_ends_the_job_and_the_next_try_may_be_another(
    bundle: Path, driver: Path, tmp_path: Path
) -> None:
    draw_images(tmp_path / "images", 8)
    out = tmp_path / "v.parquet"
    for options in ((), ("--engine", "torch"), ("--precision", "fp32")):
        failed = embed(tmp_path / "images", out, bundle, *options, driver=driver)
        assert failed.returncode == 5, failed.stderr
        assert "to do:" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not out.exists()
    # Nothing of those tries holds a vector: no need to drop them first.
    done = embed(tmp_path / "images", out, bundle, "--device", "cpu", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_device_cuda_without_a_driver_says_so(bundle: Path, tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    draw_images(tmp_path / "images", 8)
    failed = embed(tmp_path / "images", tmp_path / "v.parquet", bundle, "--device", "cuda")
    assert failed.returncode == 5
    assert "the driver shows no GPU" in failed.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "images"]
