"""An embedding job that is asked twice, orphaned, given every format, or a disk it cannot use."""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data.pipeline.test_formats import COLOUR, KINDS, LEVELS, SECOND, expected, lines
from PIL import Image, features
from tiny_run import draw_images

from btpipe import runtime
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import MachineError
from btpipe.events import Event, Note, ignore

PART_ROWS = 8
IMAGES = 64
PIPE_BYTES = 4096
"""The smallest that Linux makes: a few dozen events fill it, and whoever writes more waits."""
QUIET_SECONDS = 1.0
"""Without a commit, when parts take a hundredth of that: the job waits for its reader."""
APART_SECONDS = 0.5
"""Between signals, so that the kernel does not make them one."""
PAGES = 40
"""More than the small job needs on the disk, which is 32."""
END_SECONDS = 10.0
"""For a process that is orphaned, on a busy machine; it takes a hundredth of that."""

JOB = """
import ctypes, os, signal, sys
from pathlib import Path
from btpipe import progress
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError

source, out, bundle, marks = map(Path, sys.argv[1:])

def mark(text):
    with marks.open("a") as file:
        file.write(text + "\\n")

def decode(content):
    import btpipe.data.pipeline.decode
    mark("decoded")
    return btpipe.data.pipeline.decode.decode(content)

def outlive(*_):
    kernel, number = ctypes.CDLL(None), ctypes.c_int()
    kernel.prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    kernel.prctl(1, 0)  # PR_SET_PDEATHSIG
    mark(f"was to get signal {number.value}")

signal.signal(signal.SIGUSR2, outlive)  # in the workers too: they import this file

if __name__ == "__main__":
    try:
        with progress.show("json") as report:
            options = JobOptions(part_rows=8, decode=decode)
            embed(source, out, EncoderConfig(bundle, device="cpu"), report, options)
    except BtpipeError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""
"""The job as the command runs it; its decoder leaves a mark, and SIGUSR2 makes a worker forget
that it is to be killed when its parent dies."""


def command(folder: Path, out: Path, bundle: Path) -> list[str]:
    script = folder / "job.py"
    script.write_text(JOB)
    paths = (script, folder / "images", out, bundle, folder / "marks")
    return [sys.executable, *map(str, paths)]


def group_of(session: int) -> list[int]:
    """The processes of a session that are no zombies."""
    return [number for number, _ in _processes(session)]


def workers_of(session: int) -> list[int]:
    return [number for number, line in _processes(session) if b"spawn_main" in line]


def _processes(session: int) -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(words[3]) == session and words[0] != "Z":
            yield int(folder.name), line


def end_group(group: int) -> None:
    """Kills whatever a test that failed would leave behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def stuck(bundle: Path, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A job with a part done that cannot go on: nobody reads what it says of cut images."""
    for path in draw_images(tmp_path / "images", IMAGES, labels=["a"])[PART_ROWS:]:
        path.write_bytes(path.read_bytes()[:-30])
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    line = command(tmp_path, tmp_path / "v.parquet", bundle)
    try:
        with subprocess.Popen(line, start_new_session=True, stdout=writing) as job:
            os.close(writing)
            wait_for(lambda: commits_of(tmp_path))
            yield job
            job.kill()
    finally:
        os.close(reading)
        end_group(job.pid)


def commits_of(folder: Path) -> int:
    path = folder / "v.parquet.work" / "commits.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def is_quiet(folder: Path) -> bool:
    commits = folder / "v.parquet.work" / "commits.jsonl"
    return time.time() - commits.stat().st_mtime > QUIET_SECONDS


def test_a_second_ctrl_c_ends_a_job_that_cannot_stop_and_the_same_command_goes_on(
    stuck: "subprocess.Popen[bytes]", bundle: Path, tmp_path: Path
) -> None:
    wait_for(lambda: is_quiet(tmp_path))
    for _ in range(2):  # close together they are one: terminals and launchers send it twice
        os.killpg(stuck.pid, signal.SIGINT)
        time.sleep(APART_SECONDS)
    time.sleep(runtime.signals.REPEAT_SECONDS + 0.2)
    assert stuck.poll() is None
    os.killpg(stuck.pid, signal.SIGINT)
    assert stuck.wait(END_SECONDS) == 130
    wait_for(lambda: not group_of(stuck.pid), END_SECONDS)
    done, events = commits_of(tmp_path), list[Event]()
    embed(
        tmp_path / "images",
        tmp_path / "v.parquet",
        EncoderConfig(bundle, device="cpu"),
        events.append,
    )
    message = f"goes on: {done * PART_ROWS} of {IMAGES} images are done"
    (note,) = [event for event in events if isinstance(event, Note) and event.text == message]
    assert note.values == {"done": done * PART_ROWS, "total": IMAGES}
    assert pq.read_metadata(tmp_path / "v.parquet").num_rows == PART_ROWS
    assert pq.read_metadata(tmp_path / "v.rejects.parquet").num_rows == IMAGES - PART_ROWS


def test_a_worker_that_cannot_look_is_killed_with_its_supervisor(
    stuck: "subprocess.Popen[bytes]",
) -> None:
    # A stopped process reads no end of a pipe: what ends it is the kernel, as it was asked to.
    (worker,) = workers_of(stuck.pid)
    os.kill(worker, signal.SIGSTOP)
    stuck.kill()
    stuck.wait()
    wait_for(lambda: not group_of(stuck.pid), END_SECONDS)


def test_a_worker_that_is_not_killed_sees_that_its_supervisor_is_gone(
    stuck: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    # The kernel kills nobody here: what ends the worker is its pipe, at an end, broken or reset.
    (worker,) = workers_of(stuck.pid)
    os.kill(worker, signal.SIGUSR2)
    marks = tmp_path / "marks"
    wait_for(lambda: f"was to get signal {signal.SIGKILL:d}\n" in marks.read_text(), END_SECONDS)
    stuck.kill()
    stuck.wait()
    wait_for(lambda: not group_of(stuck.pid), END_SECONDS)


@pytest.mark.slow
def test_a_supervisor_killed_while_its_worker_starts_leaves_none(
    bundle: Path, tmp_path: Path
) -> None:
    # Before the worker could ask to be killed; its parent's number or the broken pipe ends it.
    draw_images(tmp_path / "images", 8)
    line = command(tmp_path, tmp_path / "v.parquet", bundle)
    with subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL) as job:
        wait_for(lambda: workers_of(job.pid))
        job.kill()
    try:
        wait_for(lambda: not group_of(job.pid), END_SECONDS)
    finally:
        end_group(job.pid)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_decoded(
    disk: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    draw_images(tmp_path / "images", 8)
    line, marks = command(tmp_path, disk("1m") / "v.parquet", bundle), tmp_path / "marks"
    disk("1m,ro")
    refused = subprocess.run(line, capture_output=True, text=True, check=False)
    assert refused.returncode == 5
    assert not marks.exists()
    assert "Read-only file system" in refused.stderr
    assert "Traceback" not in refused.stderr
    folder = disk("1m,rw")
    assert list(folder.iterdir()) == []
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert marks.read_text().count("decoded") == 8
    disk("1m,ro")  # and what is finished is nothing to do, there too
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0


def avif() -> bytes:
    if not features.check("avif"):
        return KINDS["AVIF"]()
    content = io.BytesIO()
    Image.new("RGB", (40, 30), COLOUR).save(content, "AVIF")
    return content.getvalue()


def draw_kinds(folder: Path) -> dict[str, str]:
    """Every kind of docs/formats.md under a name that says nothing of it; returns its outcome."""
    folder.mkdir()
    contents = {**{kind: make() for kind, make in KINDS.items()}, "AVIF": avif()}
    for i, content in enumerate(contents.values()):
        (folder / f"{i:02}.jpg").write_bytes(content)
    return {f"{i:02}.jpg": kind for i, kind in enumerate(contents)}


def draw_colours(folder: Path) -> list[tuple[int, int, int]]:
    """A PNG of each colour that a kind of image has, and of those that it must not have."""
    colours_of_kinds = {
        expected(kind, line.outcome) for kind, line in lines().items() if not line.rejected
    }
    colours = sorted({*colours_of_kinds, SECOND, (0, 0, 0), (255, 255, 255)})
    for i, colour in enumerate(colours):
        Image.new("RGB", (40, 30), colour).save(folder / f"colour-{i:02}.png")
    return colours


def test_each_format_becomes_a_row_or_a_reject_as_the_document_says(
    bundle: Path, tmp_path: Path
) -> None:
    kinds = draw_kinds(tmp_path / "images")
    colours = draw_colours(tmp_path / "images")
    (tmp_path / "images" / "cut.jpg").write_bytes(KINDS["JPEG"]()[:-30])
    embedding = [sys.executable, "-m", "btpipe", "embed", "images", "--out", "v.parquet"]
    embedding += ["--model", str(bundle), "--device", "cpu"]
    subprocess.run(embedding, cwd=tmp_path, capture_output=True, check=True)
    rows = {row["path"]: row for row in pq.read_table(tmp_path / "v.parquet").to_pylist()}
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    reasons = {entry["path"]: entry["reason"] for entry in rejects}
    names = [f"colour-{i:02}.png" for i in range(len(colours))]
    assert sorted([*rows, *reasons]) == sorted([*kinds, *names, "cut.jpg"])
    shown = np.array([rows[name]["embedding"] for name in names])
    for name, kind in kinds.items():
        line = lines()[kind]
        if line.rejected:
            assert reasons[name].startswith(line.rejected), kind
            assert reasons[name] != reasons["cut.jpg"]
            continue
        assert (rows[name]["width"], rows[name]["height"]) == (40, 30), kind
        distances = np.linalg.norm(shown - np.array(rows[name]["embedding"]), axis=1)
        nearest = np.array(colours[int(distances.argmin())])
        assert np.abs(nearest - expected(kind, line.outcome)).max() <= LEVELS, kind
    assert "not supported" not in reasons["cut.jpg"]


def fill_up(
    disk: Callable[[str], Path], bundle: Path, folder: Path, options: Iterable[str]
) -> list[bool]:
    """Runs the job on each disk, then again where there is room: whether it passed at once."""
    draw_images(folder / "images", 24)
    whole = folder / "whole.parquet"
    embed(
        folder / "images",
        whole,
        EncoderConfig(bundle, device="cpu"),
        ignore,
        JobOptions(part_rows=PART_ROWS),
    )
    passed = []
    for option in options:
        out = disk(option) / "v.parquet"
        try:
            embed(
                folder / "images",
                out,
                EncoderConfig(bundle, device="cpu"),
                ignore,
                JobOptions(part_rows=PART_ROWS),
            )
            passed.append(True)
        except MachineError as error:
            passed.append(False)
            assert "no space left" in str(error)  # noqa: PT017 - either may happen
            assert not out.exists()
        disk("64m,nr_inodes=1000")
        embed(
            folder / "images",
            out,
            EncoderConfig(bundle, device="cpu"),
            ignore,
            JobOptions(part_rows=PART_ROWS),
        )
        assert out.read_bytes() == whole.read_bytes()
        assert len(list(out.parent.iterdir())) == 2
        for path in out.parent.iterdir():
            path.unlink()
    return passed


@pytest.mark.slow
def test_the_first_file_that_cannot_be_made_is_said_whichever_it_is(
    disk: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    options = [f"64m,nr_inodes={count}" for count in range(2, 13)]  # the folder itself is one
    passed = fill_up(disk, bundle, tmp_path, options)
    assert passed == sorted(passed)
    assert set(passed) == {False, True}


@pytest.mark.slow
def test_the_first_page_that_cannot_be_written_is_said_whichever_it_is(
    disk: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    # A disk in memory takes a page for 4096 bytes of a file: each in turn is the one too many.
    options = [f"{pages * 4}k,nr_inodes=1000" for pages in range(1, PAGES)]
    passed = fill_up(disk, bundle, tmp_path, options)
    assert set(passed) == {False, True}
