"""btpipe from a checkout that nobody installed, beside packages that are not called as here."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import btpipe

ROOT = Path(__file__).parent.parent
LEFT_OUT = ("btpipe", "_editable_impl_btpipe", "nvidia_dali_cuda130-")
"""Of site-packages: what says that btpipe, and DALI under its name for CUDA 13, are installed."""
ASKED = """
import importlib.metadata, json
from btpipe import runtime
for name in ("btpipe", "nvidia-dali-cuda130"):
    try:
        raise SystemExit(f"{name} is installed: {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(runtime.environment()))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with this one's packages, without the names of two of them."""
    folder = tmp_path_factory.mktemp("uninstalled")
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(LEFT_OUT) and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [python, *arguments],
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_doctor_examines_a_checkout(python: Path, tmp_path: Path) -> None:
    shown = json.loads(run(python, tmp_path, "-m", "btpipe", "doctor", "--json").splitlines()[0])
    rows = {row["name"]: row["found"] for row in shown["findings"]}
    assert f"btpipe {btpipe.__version__}" in rows["Python"]
    assert "decodes" in rows["DALI"]


def test_what_a_run_records_of_versions_never_ends_it(python: Path, tmp_path: Path) -> None:
    packages = json.loads(run(python, tmp_path, "-c", ASKED))["packages"]
    assert packages["btpipe"] == btpipe.__version__
    assert "torch" in packages
    assert not [name for name in packages if "dali" in name]


def test_whichever_dali_is_installed_is_recorded(python: Path, tmp_path: Path) -> None:
    """Under its name for CUDA 12, as `pip install nvidia-dali-cuda120` leaves it."""
    info = tmp_path / "nvidia_dali_cuda120-2.4.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-dali-cuda120\nVersion: 2.4.0\n"
    )
    packages = json.loads(run(python, tmp_path, "-c", ASKED))["packages"]
    assert packages["nvidia-dali-cuda120"] == "2.4.0"


def test_the_install_line_for_older_drivers_names_everything_but_dali_for_cuda_13() -> None:
    """docs/start.md installs btpipe without its dependencies: none may be missing there."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\s;<>=\[]", line)[0] for line in dependencies}
    (block,) = re.findall(
        r"install torch .*?```sh\n(pip install .*?)```",
        (ROOT / "docs/start.md").read_text(),
        re.DOTALL,
    )
    words = block.replace("\\\n", " ").replace("'", "").split()
    installed = {re.split(r"[<>=\[]", word)[0] for word in words}
    # torch is pytorch.org's line, for the driver at hand.
    others = {"nvidia-dali-cuda130", "onnxruntime", "torch", "torchvision"}
    expected = names - others | {"nvidia-dali-cuda120"}
    assert expected <= installed, expected - installed
