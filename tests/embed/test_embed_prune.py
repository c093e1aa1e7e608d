"""A table loses no more than a tenth of its rows unasked: a folder may be half mounted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import draw_images

from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import RefusedError
from btpipe.events import ignore
from btpipe.results import Embedded

IMAGES = 20
STOP_AT_A_REJECT = """
import os, signal, sys
from pathlib import Path
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.events import Rejected
def report(event):
    if isinstance(event, Rejected):
        os.kill(os.getpid(), signal.SIGKILL)
source, out, bundle = map(Path, sys.argv[1:])
embed(source, out, EncoderConfig(bundle, device="cpu"), report, JobOptions(part_rows=4))
"""


def run(source: Path, out: Path, bundle: Path, options: JobOptions | None = None) -> Embedded:
    encoder = EncoderConfig(bundle, device="cpu")
    return embed(source, out, encoder, ignore, options or JobOptions(part_rows=4))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_list_that_lost_more_than_a_tenth_of_a_table_is_refused_until_pruning_is_asked_for(
    bundle: Path, tmp_path: Path
) -> None:
    paths = draw_images(tmp_path / "images", IMAGES)
    names = tmp_path / "list.txt"
    names.write_text("\n".join(map(str, paths)))
    (tmp_path / "table").mkdir()
    out = tmp_path / "table" / "v.parquet"
    run(names, out, bundle)
    before = contents(out.parent)
    names.write_text("\n".join(map(str, paths[3:])))
    with pytest.raises(RefusedError, match=rf"3 of {IMAGES} rows.*000\.jpg.*\n.*\n.*--prune"):
        run(names, out, bundle)
    assert {name: was for name, was in contents(out.parent).items() if was} == before
    names.write_text("\n".join(map(str, paths[2:])))
    assert (result := run(names, out, bundle)).dropped == 2
    assert "2 dropped" in result.text
    names.write_text("\n".join(map(str, paths[-1:])))
    assert run(names, out, bundle, JobOptions(prune=True)).rows == 1


def test_finished_parts_of_a_folder_that_is_half_there_are_kept(
    bundle: Path, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "v.parquet"
    paths = sorted(draw_images(images, IMAGES))
    whole = paths[-1].read_bytes()
    paths[-1].write_bytes(whole[:-30])
    command = [sys.executable, "-c", STOP_AT_A_REJECT, str(images), str(out), str(bundle)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    paths[-1].write_bytes(whole)
    work = tmp_path / "v.parquet.work"
    before = contents(work)
    os.rename(images / "a", tmp_path / "unmounted")
    with pytest.raises(RefusedError, match=r"rows there would be dropped.*a/000\.jpg"):
        run(images, out, bundle)
    assert contents(work) == before
    os.rename(tmp_path / "unmounted", images / "a")
    assert run(images, out, bundle).reused == IMAGES - 4
