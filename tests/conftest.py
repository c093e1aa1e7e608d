"""What every test starts from: no launcher's variables, two threads, no terminal, one bundle."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stumbling_server import Stumbling, serving

# Before numpy, torch or onnxruntime are imported, and inherited by every process a test starts:
# one number of threads, because sums over another number of threads round differently.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits leaves its core to others
# Bytecode is kept: without it each of the hundreds of processes compiles btpipe for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["COLUMNS"] = (
    "200"  # so that messages are not wrapped in the middle of what is looked for
)

LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_", "NCCL_", "GLOO_")
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what a launcher set: a test is one process unless it says otherwise."""
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/` (24), `runs/tiny/` and `exports/tiny/`: to be read, or copied."""
    from tiny_run import shared_home  # noqa: PLC0415 - loads torch, which reads what is set above

    return shared_home(tmp_path_factory)


@pytest.fixture(scope="session")
def bundle(home: Path) -> Path:
    """The bundle of the tiny run."""
    return home / "exports" / "tiny"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, type[Stumbling]]]:
    """The server's URL, the folder that it gives, and its handler to make it stumble."""
    pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")
    folder = tmp_path / "served"
    folder.mkdir()
    with serving(folder) as (url, handler):
        yield url, folder, handler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size ("256k"), or gives the mounted one another; returns its folder."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    mounted = tmp_path / "disk"

    def resize(size: str) -> Path:
        option = f"remount,size={size}" if mounted.exists() else f"size={size}"
        mounted.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(mounted)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            mounted.rmdir()
            pytest.skip("this machine does not let root mount a disk")
        return mounted

    yield resize
    if mounted.exists():
        subprocess.run(["umount", str(mounted)], check=True)
