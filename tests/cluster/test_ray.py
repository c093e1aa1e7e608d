"""A job on a Ray cluster of this machine, with the real Ray. Run: make test-ray"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import stand_in_embedding
from tiny_run import draw_images

from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import Stopped, UsageError
from btpipe.events import Event, Note, Rejected, Warned, ignore

IMAGES, PART_ROWS, BATCH = 60, 8, 5
START_SECONDS = 120.0  # for Ray, where nothing else may run beside it

JOB = """
import sys
from pathlib import Path
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError
from btpipe.events import ignore

if __name__ == "__main__":
    source, out, bundle = map(Path, sys.argv[1:])
    try:
        options = JobOptions(cluster="ray", workers=2, part_rows=2)
        embed(source, out, EncoderConfig(bundle, device="cpu"), ignore, options)
    except BtpipeError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", IMAGES)
    return tmp_path / "images"


def run(source: Path, out: Path, bundle: Path, *, on_ray: bool, part_rows: int = PART_ROWS) -> None:
    embed(
        source,
        out,
        EncoderConfig(bundle, device="cpu"),
        ignore,
        JobOptions(
            cluster="ray" if on_ray else "none",
            workers=2 if on_ray else 1,
            batch_size=BATCH,
            part_rows=part_rows,
        ),
    )


def content(out: Path) -> Sequence[bytes]:
    """The table and its rejects."""
    return out.read_bytes(), out.with_suffix(".rejects.parquet").read_bytes()


def spoil(images: Path) -> None:
    """Cuts off one image and empties another."""
    cut = images / "a" / "004.jpg"
    cut.write_bytes(cut.read_bytes()[:-30])
    (images / "b" / "007.jpg").write_bytes(b"")


def processes_with(text: str) -> list[int]:
    """Processes whose command line or title holds the text."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "cmdline").read_bytes():
                processes.append(int(folder.name))
        except OSError:
            continue
    return processes


def start(out: Path, images: Path, bundle: Path) -> "subprocess.Popen[str]":
    script = out.with_name("job.py")
    script.write_text(JOB)
    command = [sys.executable, str(script), str(images), str(out), str(bundle)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_commits(out: Path, count: int) -> None:
    """Waits until a job has so many parts."""
    deadline = time.monotonic() + START_SECONDS
    commits = out.with_name(f"{out.name}.work") / "commits.jsonl"
    while not commits.exists() or len(commits.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_actors_make_the_very_table_of_one_process_and_reject_the_same(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    spoil(images)
    run(images, tmp_path / "one.parquet", bundle, on_ray=False)
    run(images, tmp_path / "ray.parquet", bundle, on_ray=True)
    assert content(tmp_path / "ray.parquet") == content(tmp_path / "one.parquet")
    assert not (tmp_path / "ray.parquet.work").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_keeps_its_parts_and_goes_on(
    number: signal.Signals, images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ray.parquet"
    with start(out, images, bundle) as job:
        wait_for_commits(out, 2)
        os.killpg(job.pid, number)  # as a terminal or a scheduler does
        errors = job.communicate(timeout=60)[1]
        assert (job.returncode, "finished parts are kept" in errors) == (Stopped.exit_code, True)
    assert processes_with("raylet") == []
    events: list[Event] = []
    embed(
        images,
        out,
        EncoderConfig(bundle, device="cpu"),
        events.append,
        JobOptions(cluster="ray", workers=2, part_rows=2),
    )
    assert [e for e in events if isinstance(e, Note) and e.text.startswith("goes on: ")]
    run(images, tmp_path / "one.parquet", bundle, on_ray=False, part_rows=2)
    assert content(out) == content(tmp_path / "one.parquet")


def test_the_part_of_a_killed_actor_is_made_again(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ray.parquet"
    with start(out, images, bundle) as job:
        wait_for_commits(out, 2)
        victims = processes_with("ray::MapWorker") or processes_with("ray::_MapWorker")
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        errors = job.communicate(timeout=120)[1]
        assert (job.returncode, errors) == (0, "")
    run(images, tmp_path / "one.parquet", bundle, on_ray=False, part_rows=2)
    assert content(out) == content(tmp_path / "one.parquet")


def test_a_file_that_kills_its_decoder_is_rejected_by_name(
    images: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stand-in is where pytest looks; what Ray starts looks where the environment says.
    monkeypatch.setenv("PYTHONPATH", str(Path(stand_in_embedding.__file__).parent))
    with (images / "b" / "003.jpg").open("ab") as file:
        file.write(stand_in_embedding.CRASH)
    events: list[Event] = []
    embed(
        images,
        tmp_path / "ray.parquet",
        EncoderConfig(bundle, device="cpu"),
        events.append,
        JobOptions(cluster="ray", workers=2, part_rows=PART_ROWS, decode=stand_in_embedding.decode),
    )
    assert [e.path for e in events if isinstance(e, Rejected)] == ["b/003.jpg"]
    assert any(isinstance(e, Warned) and "SIGSEGV" in e.text for e in events)


def test_more_workers_than_cores_are_refused(images: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="999 workers"):
        embed(
            images,
            tmp_path / "v.parquet",
            EncoderConfig(bundle),
            ignore,
            JobOptions(cluster="ray", workers=999),
        )
