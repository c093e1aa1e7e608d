"""Who ended a worker: found by halves, and nobody is refused for the company it was in."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stand_in_embedding import CRASH, CROWD, KILL, decode
from tiny_run import draw_images

from btpipe.embed import culprits
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.messages import WorkerConfig
from btpipe.embed.precisions import EncoderConfig
from btpipe.events import Event, Warned

LIMIT_SECONDS = 30.0
IMAGES = 16
CROWDED = 48
"""More than one thread reads at a time."""


@pytest.mark.parametrize("gpu", [None, 0], ids=["each alone", "by halves"])
def test_the_files_that_end_a_process_are_found_and_no_other(
    gpu: int | None, tmp_path: Path
) -> None:
    files = {10 + i: path.read_bytes() for i, path in enumerate(draw_images(tmp_path, IMAGES))}
    files[13] += CRASH
    files[21] += KILL
    config = WorkerConfig(EncoderConfig(tmp_path, threads=1), gpu=gpu, decode=decode)
    errors = culprits.find(files, config, limit_seconds=LIMIT_SECONDS, should_stop=lambda: False)
    assert {row: error.reason for row, error in errors.items()} == {
        13: "decoding ended the process (SIGSEGV)",
        21: "decoding ended the process (SIGKILL)",
    }


def test_a_file_that_ends_a_worker_beside_others_alone_gets_its_row(
    bundle: Path, tmp_path: Path
) -> None:
    images = draw_images(tmp_path / "images", CROWDED)
    with images[0].open("ab") as file:
        file.write(CROWD)
    events: list[Event] = []
    out = tmp_path / "v.parquet"
    embed(
        tmp_path / "images",
        out,
        EncoderConfig(bundle, device="cpu", threads=2),
        events.append,
        JobOptions(part_rows=CROWDED, decode=decode),
    )
    assert pq.read_table(out).num_rows == CROWDED
    assert pq.read_table(tmp_path / "v.rejects.parquet").num_rows == 0
    assert any(isinstance(event, Warned) and "SIGSEGV" in event.text for event in events)
