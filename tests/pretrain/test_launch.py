"""Several ranks as one job: stopped together, none lost in silence, started by anything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import draw_images

RECIPE = """
[data]
batch_size = 8
image_size = 32
threads = 1
[network]
backbone = "resnet18"
projector = [16, 16]
[optim]
name = "sgd"
epochs = {epochs}
warmup_epochs = 1
[run]
precision = "fp32"
log_steps = 1
"""
WAIT_SECONDS = 120  # for a process to get so far, on a busy machine
LOST_SECONDS = 60  # the promise


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 images: 2 steps of 8 an epoch."""
    folder = tmp_path_factory.mktemp("launch-images")
    draw_images(folder, 17)
    return folder


def arguments(folder: Path, images: Path, epochs: int) -> list[str]:
    (folder / "tiny.toml").write_text(RECIPE.format(epochs=epochs))
    return ["-m", "btpipe", "pretrain", "tiny.toml", "--set", f"data.train={images}"]


@contextmanager
def started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, and nothing of it left afterwards."""
    (folder / "temporary").mkdir(exist_ok=True)
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "temporary")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, str]:
    """Exit code, what it said, and what it complained about; it ends within these seconds."""
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: Path, start: int = 1) -> list[int]:
    """The steps that the run has logged since its `start`-th start."""
    log = folder / "runs" / "tiny" / "events.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    found, starts = [], 0
    for event in map(json.loads, lines):
        starts += event["event"] == "RunStarted"
        if event["event"] == "StepDone" and starts >= start:
            found.append(event["step"])
    return found


def checkpoints(folder: Path) -> list[str]:
    found = (folder / "runs" / "tiny" / "checkpoints").glob("*")
    return sorted(path.name for path in found)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank to process: a launcher's children, in the order in which they were started."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = status.with_name("cmdline").read_text()
        except OSError:
            continue
        tracker = "resource_tracker" in command
        if int(fields[1]) == launcher and not tracker:
            children.append((int(fields[19]), int(status.parent.name)))
    return dict(enumerate(process for _, process in sorted(children)))


def lives(process: int) -> bool:
    """Whether a process runs: not gone, and not dead with nobody to ask for its exit code."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def left_behind(folder: Path) -> list[Path]:
    """Folders in the run's own temporary folder; DALI leaves files there when it is killed."""
    return [path for path in (folder / "temporary").iterdir() if path.is_dir()]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 2, process)
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        code, _, errors = ended(process, LOST_SECONDS)
    assert code == 5, errors
    assert "rank 1 was lost (killed by SIGKILL)" in errors
    assert "out of memory" in errors
    assert "Traceback" not in errors
    assert not lives(ranks[0])
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("to", ["one rank, SIGTERM", "launcher, SIGUSR1", "terminal, SIGINT"])
def test_a_signal_stops_all_ranks_at_one_step_with_one_checkpoint(
    tmp_path: Path, images: Path, to: str
) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    target, _, name = to.partition(", ")
    with started(command, tmp_path) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 2, process)
        number, rank = signal.Signals[name], ranks_of(process.pid)[1]
        if target == "terminal":
            os.killpg(process.pid, number)
        else:
            os.kill(rank if target == "one rank" else process.pid, number)
        code, _, errors = ended(process, LOST_SECONDS)
    assert code == 75, errors
    (checkpoint,) = checkpoints(tmp_path)
    assert f"stopped at step {int(checkpoint[-8:])} of 1000, the state is saved" in errors
    assert "Traceback" not in errors


def test_a_second_ctrl_c_ends_at_once_although_a_rank_hangs(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 2, process)
        os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(2.5)  # within two seconds it is the same Ctrl-C
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        code, _, errors = ended(process, 20)
    assert code == 130, errors
    assert checkpoints(tmp_path) == []


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(lambda: len(steps(tmp_path)) >= 2, process)
        ranks = ranks_of(process.pid)
        process.kill()
        _, _, errors = ended(process, LOST_SECONDS)  # the ranks hold its pipes until they end
    assert not [rank for rank in ranks.values() if lives(rank)]
    assert len(checkpoints(tmp_path)) == 1
    assert "Traceback" not in errors
    assert left_behind(tmp_path) == []
