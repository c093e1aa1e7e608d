"""A job whose processes are killed at random, or whose disk fills up, ends with the same table."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import draw_images

from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import MachineError
from btpipe.events import ignore

KILLS, FEW_KILLS = 50, 1
SMALL_DISK = "200k"
"""Too small for the parts."""


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
        options = JobOptions(part_rows=16, batch_size=8)
        embed(source, out, EncoderConfig(bundle, device="cpu"), ignore, options)
    except BtpipeError as error:
        sys.stderr.write(str(error))
        sys.exit(error.exit_code)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def spoiled(folder: Path, count: int) -> Path:
    """Images of which two are cut off."""
    for path in draw_images(folder, count)[9:20:10]:
        path.write_bytes(path.read_bytes()[:-30])
    return folder


def children_of(parent: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    except OSError:
        return []


def kill_again_and_again(folder: Path, bundle: Path, images: Path, kills: int) -> None:
    """Kills the job or one of its processes, each time at another moment, until it is done."""
    script = folder / "job.py"
    script.write_text(JOB)
    (folder / "whole").mkdir()
    command = [sys.executable, str(script), str(images)]
    began = time.monotonic()
    whole = [*command, str(folder / "whole" / "v.parquet"), str(bundle)]
    assert subprocess.run(whole, check=False).returncode == 0
    seconds = time.monotonic() - began
    draw = random.Random(0)
    out, done = folder / "killed" / "v.parquet", 0
    out.parent.mkdir()
    while done < kills:
        with subprocess.Popen([*command, str(out), str(bundle)]) as job:
            while done < kills and job.poll() is None:
                time.sleep(draw.uniform(0.1, 0.6) * seconds)
                victim = draw.choice([job.pid, job.pid, *children_of(job.pid)])
                if job.poll() is None:
                    try:
                        os.kill(victim, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    done += 1
            assert job.wait(120) in (0, 5, -signal.SIGKILL)
        if out.exists():
            assert content(out.parent) == content(folder / "whole")
            out.unlink()
    assert subprocess.run([*command, str(out), str(bundle)], check=False).returncode == 0
    assert content(out.parent) == content(folder / "whole")
    assert len(list(out.parent.iterdir())) == 2


def test_a_random_kill_of_any_process_leaves_no_trace(bundle: Path, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "images", 48)
    kill_again_and_again(tmp_path, bundle, images, FEW_KILLS)


@pytest.mark.slow
def test_fifty_random_kills_of_any_process_leave_no_trace(bundle: Path, tmp_path: Path) -> None:
    images = spoiled(tmp_path / "images", 400)
    kill_again_and_again(tmp_path, bundle, images, KILLS)


def fill_up(disk: Callable[[str], Path], bundle: Path, images: Path, sizes: list[str]) -> int:
    """Runs the job on disks that are too small, then on a large one; how often there was space."""
    (images.parent / "whole").mkdir()
    embed(
        images,
        images.parent / "whole" / "v.parquet",
        EncoderConfig(bundle, device="cpu"),
        ignore,
        JobOptions(part_rows=16),
    )
    passed = 0
    for size in sizes:
        out = disk(size) / "v.parquet"
        try:
            embed(
                images, out, EncoderConfig(bundle, device="cpu"), ignore, JobOptions(part_rows=16)
            )
            passed += 1
        except MachineError as error:
            assert "no space left" in str(error)  # noqa: PT017 - either may happen
            assert not out.exists()
        disk("64m")
        embed(images, out, EncoderConfig(bundle, device="cpu"), ignore, JobOptions(part_rows=16))
        assert content(out.parent) == content(images.parent / "whole")
        for path in out.parent.glob("*.parquet"):
            path.unlink()
    return passed


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    disk: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    images = spoiled(tmp_path / "images", 64)
    assert fill_up(disk, bundle, images, [SMALL_DISK]) == 0


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment_is_said(
    disk: Callable[[str], Path], bundle: Path, tmp_path: Path
) -> None:
    images = spoiled(tmp_path / "images", 64)
    sizes = [f"{kilobytes}k" for kilobytes in range(8, 480, 12)]
    assert 0 < fill_up(disk, bundle, images, sizes) < len(sizes)
