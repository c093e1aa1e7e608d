"""Workers that die, hang or are killed cost their work and no row; several make one table."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from stand_in_embedding import CRASH, HANG, KILL, decode
from tiny_run import draw_images, other_bundle

from btpipe import artifact
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError, RefusedError, UsageError
from btpipe.events import Event, Warned, ignore
from btpipe.export import contract

IMAGES = 40
LIMIT_SECONDS = 2.0
"""For a decode of a millisecond on a busy machine; one that hangs would take an hour."""
QUIET_SECONDS = 1.5
"""Without a commit, when parts take a hundredth of that: the job hangs."""
STOP_SECONDS = 10.0
"""The promise for a job that is asked to stop."""


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/`, and the table of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    draw_images(folder / "images", IMAGES)
    embed(folder / "images", folder / "v.parquet", EncoderConfig(bundle, device="cpu"), ignore)
    return folder


def bytes_of(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name("v.rejects.parquet").read_bytes()


def test_several_workers_make_the_very_table_of_one(
    whole: Path, bundle: Path, tmp_path: Path
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    out = tmp_path / "v.parquet"
    embed(
        whole / "images",
        out,
        EncoderConfig(bundle, device="cpu"),
        ignore,
        JobOptions(workers=2, part_rows=4),
    )
    assert bytes_of(out) == bytes_of(whole / "v.parquet")


def test_more_workers_than_cores_are_refused(whole: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="1001 workers"):
        embed(
            whole / "images",
            tmp_path / "v.parquet",
            EncoderConfig(bundle),
            ignore,
            JobOptions(workers=1001),
        )


def test_files_that_kill_or_hang_a_decoder_are_rejected_by_name_and_no_other(
    whole: Path, bundle: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(whole / "images", images)  # with their times, which are columns
    deeds = {"a/004.jpg": KILL, "b/021.jpg": CRASH, "b/033.jpg": HANG}
    for name, deed in deeds.items():
        with (images / name).open("ab") as file:
            file.write(deed)
    events: list[Event] = []
    out, started = tmp_path / "v.parquet", time.monotonic()
    embed(
        images,
        out,
        EncoderConfig(bundle, device="cpu"),
        events.append,
        JobOptions(part_rows=8, limit_seconds=LIMIT_SECONDS, decode=decode),
    )
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    assert {entry["path"]: entry["reason"] for entry in rejects} == {
        "a/004.jpg": "decoding ended the process (SIGKILL)",
        "b/021.jpg": "decoding ended the process (SIGSEGV)",
        "b/033.jpg": f"decoding took longer than {LIMIT_SECONDS:g} s",
    }
    good = pq.read_table(whole / "v.parquet").to_pylist()
    assert pq.read_table(out).to_pylist() == [row for row in good if row["path"] not in deeds]
    # Two of them that are in a worker's hands together are found together; another worker may
    # be lost only for the time limit, where the machine stands still for as long.
    lost = [str(event) for event in events if isinstance(event, Warned)]
    assert 0 < len([text for text in lost if "SIG" in text]) <= 2
    assert time.monotonic() - started < 60


JOB = """
import sys
from pathlib import Path
from btpipe import artifact
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError
from btpipe.events import Warned
from stand_in_embedding import decode

def report(event):
    if isinstance(event, Warned):
        print(event.text, flush=True)

if __name__ == "__main__":
    source, out, bundle = map(Path, sys.argv[1:4])
    try:
        options = JobOptions(part_rows=8, decode=decode)
        embed(source, out, EncoderConfig(bundle, device="cpu"), report, options)
    except BtpipeError as error:
        sys.exit(error.exit_code)
    light = {"torch", "onnx", "onnxruntime", "nvidia"} & set(sys.modules)
    assert not light, light
"""


def start(folder: Path, images: Path, bundle: Path) -> "subprocess.Popen[bytes]":
    """The job in a process group of its own, as a terminal makes one."""
    script = folder / "job.py"
    script.write_text(JOB)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    command = [sys.executable, str(script), str(images), str(folder / "v.parquet"), str(bundle)]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE
    )


def processes_of(group: int) -> list[tuple[int, int, bytes]]:
    """(process, parent, command line) of each that is in a session, and no zombie."""
    return list(_processes_of(group))


def _processes_of(group: int) -> Iterator[tuple[int, int, bytes]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(words[3]) == group and words[0] != "Z":
            yield int(folder.name), int(words[1]), command


def workers_of(job: "subprocess.Popen[bytes]") -> list[int]:
    return [number for number, _, line in processes_of(job.pid) if b"spawn_main" in line]


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def hanging(bundle: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A job with some parts done that hangs in its last one."""
    draw_images(tmp_path / "images", 96)
    with (tmp_path / "images" / "b" / "095.jpg").open("ab") as file:
        file.write(HANG)
    commits = tmp_path / "v.parquet.work" / "commits.jsonl"
    with start(tmp_path, tmp_path / "images", bundle) as job:
        wait_for(lambda: commits.exists() and time.time() - commits.stat().st_mtime > QUIET_SECONDS)
        yield job
        job.kill()


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_a_signal_to_every_process_ends_the_job_in_time_and_leaves_none(
    hanging: "subprocess.Popen[bytes]", number: int
) -> None:
    began = time.monotonic()
    os.killpg(hanging.pid, number)
    assert hanging.wait(STOP_SECONDS) == 75
    assert time.monotonic() - began < STOP_SECONDS
    wait_for(lambda: not processes_of(hanging.pid), 5)


def test_a_killed_supervisor_leaves_no_process_behind(hanging: "subprocess.Popen[bytes]") -> None:
    assert workers_of(hanging)
    hanging.kill()
    hanging.wait()
    wait_for(lambda: not processes_of(hanging.pid), 5)


def test_a_killed_worker_is_replaced_and_the_table_is_the_same(
    whole: Path, bundle: Path, tmp_path: Path
) -> None:
    with start(tmp_path, whole / "images", bundle) as job:
        killed: set[int] = set()
        for _ in range(2):
            wait_for(lambda: set(workers_of(job)) - killed or job.poll() is not None)
            for worker in set(workers_of(job)) - killed:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
        assert job.stdout is not None
        output = job.stdout.read().decode()
        assert job.wait(60) == 0, output
    assert "a worker was lost (SIGKILL)" in output
    assert bytes_of(tmp_path / "v.parquet") == bytes_of(whole / "v.parquet")


def test_a_bundle_replaced_between_two_workers_gives_no_row(
    whole: Path, bundle: Path, tmp_path: Path
) -> None:
    images, live, out = tmp_path / "images", tmp_path / "live", tmp_path / "v.parquet"
    shutil.copytree(whole / "images", images)
    with (images / "b" / "021.jpg").open("ab") as file:
        file.write(CRASH)
    shutil.copytree(bundle, live)
    other = other_bundle(bundle, tmp_path / "other")

    def replace_bundle(event: Event) -> None:
        if isinstance(event, Warned) and other.exists():  # the next worker is not started yet
            shutil.rmtree(live)
            other.rename(live)

    error = None
    try:
        options = JobOptions(part_rows=8, decode=decode)
        embed(images, out, EncoderConfig(live, device="cpu"), replace_bundle, options)
    except BtpipeError as raised:
        error = raised
    assert not other.exists()
    if out.exists():
        rows = {row["path"]: row for row in pq.read_table(whole / "v.parquet").to_pylist()}
        differ = [row["path"] for row in pq.read_table(out).to_pylist() if row != rows[row["path"]]]
        assert differ == []
    assert isinstance(error, RefusedError)
    assert str(live) in error.where
    assert artifact.read(bundle, contract.KIND).digest in error.expected


@pytest.mark.slow
def test_no_table_holds_two_bundles_whenever_one_is_replaced(bundle: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 400)
    live, aside, away = tmp_path / "live", tmp_path / "aside", tmp_path / "away"
    shutil.copytree(bundle, live)
    other_bundle(bundle, aside)
    clean: dict[str, dict[str, list[float]]] = {}
    for path in (live, aside):
        out = tmp_path / f"{path.name}.parquet"
        embed(tmp_path / "images", out, EncoderConfig(path, device="cpu"), ignore)
        vectors = {row["path"]: row["embedding"] for row in pq.read_table(out).to_pylist()}
        clean[artifact.read(path, contract.KIND).digest] = vectors
    random, codes = np.random.default_rng(0), set()
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        commits = folder / "v.parquet.work" / "commits.jsonl"
        with start(folder, tmp_path / "images", live) as job:
            while not commits.exists() and job.poll() is None:
                time.sleep(0.02)
            time.sleep(float(random.uniform(0, 0.3)))
            for worker in workers_of(job):
                os.kill(worker, signal.SIGKILL)
            time.sleep(float(random.uniform(0, 1.5)))  # the next one may be open, or half open
            for source, target in ((live, away), (aside, live), (away, aside)):
                source.rename(target)
            for worker in workers_of(job):
                os.kill(worker, signal.SIGKILL)
            codes.add(job.wait(60))
        if (table := folder / "v.parquet").exists():
            digest = (pq.read_schema(table).metadata or {})[b"btpipe.bundle"].decode()
            for row in pq.read_table(table).to_pylist():
                assert row["embedding"] == clean[digest][row["path"]]
    assert 4 in codes, codes
