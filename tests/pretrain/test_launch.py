"""Several ranks as one job: stopped together, none lost in silence, started by anything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import event_schema
import pytest
from tiny_run import draw_images

from btpipe import recipe
from btpipe.errors import RefusedError, UsageError
from btpipe.pretrain import launch, sbatch

RECIPE = """
[data]
batch_size = 8
image_size = 16
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
                for rank in ranks_of(process.pid).values():  # torchrun's have groups of their own
                    os.kill(rank, signal.SIGKILL)
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
    numbers, starts = [], 0
    for event in map(json.loads, lines):
        starts += event["event"] == "RunStarted"
        if event["event"] == "StepDone" and starts >= start:
            numbers.append(event["step"])
    return numbers


def two_steps(folder: Path, start: int = 1) -> bool:
    return len(steps(folder, start)) >= 2


def checkpoints(folder: Path) -> list[str]:
    folders = (folder / "runs" / "tiny" / "checkpoints").glob("*")
    return sorted(path.name for path in folders)


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
    """Folders in the run's own temporary folder; DALI leaves files there when it is killed.

    Python keeps the bytecode of one of them, which it imports.
    """
    left = (folder / "temporary").iterdir()
    return [path for path in left if path.is_dir() and path.name != "__pycache__"]


def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(partial(two_steps, tmp_path), process)
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


@pytest.mark.parametrize(
    "to",
    [
        "one rank, SIGTERM",
        pytest.param("launcher, SIGUSR1", marks=pytest.mark.slow),
        "terminal, SIGINT",
    ],
)
def test_a_signal_stops_all_ranks_at_one_step_with_one_checkpoint(
    tmp_path: Path, images: Path, to: str
) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    target, _, name = to.partition(", ")
    with started(command, tmp_path) as process:
        wait_until(partial(two_steps, tmp_path), process)
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


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_although_a_rank_hangs(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(partial(two_steps, tmp_path), process)
        os.kill(ranks_of(process.pid)[1], signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(2.5)  # within two seconds it is the same Ctrl-C
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        code, _, errors = ended(process, 20)
    assert code == 130, errors
    assert checkpoints(tmp_path) == []


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path, images: Path) -> None:
    command = [sys.executable, *arguments(tmp_path, images, 500), "--devices", "2"]
    with started(command, tmp_path) as process:
        wait_until(partial(two_steps, tmp_path), process)
        ranks = ranks_of(process.pid)
        process.kill()
        _, _, errors = ended(process, LOST_SECONDS)  # the ranks hold its pipes until they end
    assert not [rank for rank in ranks.values() if lives(rank)]
    assert len(checkpoints(tmp_path)) == 1
    assert "Traceback" not in errors
    assert left_behind(tmp_path) == []


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_from_the_newest_checkpoint(
    tmp_path: Path, images: Path
) -> None:
    pretrain_command = [*arguments(tmp_path, images, 500), "--set", "run.checkpoint_steps=2"]
    with started(
        [*torchrun("--standalone", "--max-restarts", "1"), *pretrain_command], tmp_path
    ) as process:
        wait_until(lambda: "step-00000002" in checkpoints(tmp_path), process)
        with pytest.raises(RefusedError, match="another process is training here"):
            pretrain(tmp_path, images, 500)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        wait_until(lambda: steps(tmp_path, start=2), process)
        process.terminate()
        code, _, errors = ended(process, LOST_SECONDS)
    assert steps(tmp_path, start=2)[0] > 2
    assert code != 0
    assert "(exitcode: -9) local_rank: 1" in errors  # torchrun's own words, and the right rank
    newest = int(checkpoints(tmp_path)[-1][-8:])
    assert f"stopped at step {newest} of 1000, the state is saved" in errors


def test_a_finished_run_is_left_alone_under_torchrun(tmp_path: Path, images: Path) -> None:
    pretrain_command = arguments(tmp_path, images, 2)
    pretrain(tmp_path, images, 2)
    before = (tmp_path / "runs" / "tiny" / "events.jsonl").read_bytes()
    command = [*torchrun("--standalone"), *pretrain_command, "--json"]
    with started(command, tmp_path) as process:
        code, out, errors = ended(process, WAIT_SECONDS)
    assert code == 0, errors
    (result,) = event_schema.read(out)
    assert (result["event"], result["step"], result["nothing_to_do"]) == ("Pretrained", 4, True)
    assert (tmp_path / "runs" / "tiny" / "events.jsonl").read_bytes() == before


def pretrain(folder: Path, images: Path, epochs: int) -> None:
    """The command for one process, in this one."""
    (folder / "tiny.toml").write_text(RECIPE.format(epochs=epochs))
    tiny = recipe.load(folder / "tiny.toml", (f"data.train={images}",))
    launch.pretrain(folder / "runs" / "tiny", tiny, devices="1", mode="auto")


# Two tasks on this machine, told what SLURM tells them; a signal to a step goes to its tasks.
SRUN = """#!{python}
import os, signal, subprocess, sys
step = dict(os.environ, SLURM_STEP_ID="0", SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2",
            SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NODELIST="localhost")
tasks = [subprocess.Popen(sys.argv[1:], env=dict(step, SLURM_PROCID=i, SLURM_LOCALID=i))
         for i in ("0", "1")]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "$@" >> requeued; fi
"""


@pytest.mark.slow
def test_a_slurm_job_saves_is_requeued_and_goes_on(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = [*arguments(tmp_path, images, 500), "--devices", "2", "--sbatch", "job.sh"]
    subprocess.run([sys.executable, *written], cwd=tmp_path, check=True)
    assert not (tmp_path / "runs").exists()
    subprocess.run(["bash", "-n", "job.sh"], cwd=tmp_path, check=True)
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
    for start in (1, 2):
        with started(["bash", "job.sh"], tmp_path) as process:
            wait_until(partial(two_steps, tmp_path, start), process)
            os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
            code, _, errors = ended(process, LOST_SECONDS)
        assert code == 75, errors
        assert "the state is saved" in errors
        assert len((tmp_path / "requeued").read_text().splitlines()) == start
        assert steps(tmp_path) == list(range(1, len(steps(tmp_path)) + 1))
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n" * 2


def test_a_job_file_is_checked_before_it_is_written_and_never_overwritten(tmp_path: Path) -> None:
    file, job = tmp_path / "job.sh", sbatch.SlurmJob(2, "4", time="1-00:00:00", partition="gpu")
    batch = recipe.Recipe(data=recipe.Data(batch_size=64))
    sbatch.write(file, "shoes", batch, ["pretrain", "my recipe.toml"], job)
    text = file.read_text()
    options = ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1-00:00:00")
    for line in (*options, "--partition=gpu", "--signal=USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert f"srun {sys.executable} -m btpipe pretrain 'my recipe.toml'\n" in text
    sbatch.write(file, "shoes", batch, ["pretrain", "my recipe.toml"], job)
    with pytest.raises(RefusedError, match="says something else"):
        sbatch.write(file, "shoes", batch, ["pretrain", "other.toml"], job)
    assert file.read_text() == text
    for wrong in (sbatch.SlurmJob(2, "auto"), sbatch.SlurmJob(3, "5")):
        with pytest.raises(UsageError, match=r"GPUs of each machine|64 on 15 processes"):
            sbatch.write(tmp_path / "other.sh", "shoes", batch, [], wrong)
    with pytest.raises(UsageError, match="--sbatch FILE"):
        sbatch.SlurmJob(2, "4").require_default()
    assert not (tmp_path / "other.sh").exists()
