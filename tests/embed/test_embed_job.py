"""Every input is a row or a reject; a job that was killed ends with the same table."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from PIL import Image
from tiny_run import draw_images

from btpipe.data.index import build
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import (
    BudgetError,
    IntegrityError,
    NumericsError,
    RefusedError,
    Stopped,
    UsageError,
)
from btpipe.events import Event, Note, Progressed, Rejected, Warned, ignore
from btpipe.results import Embedded

IMAGES = 40
PART_ROWS = 8
RANDOM_KILLS = 10
BATCH = 5  # does not divide a part: batches lie across the borders of parts


@pytest.fixture(scope="session")
def other_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.other_bundle(bundle, tmp_path_factory.mktemp("other") / "bundle")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", IMAGES)
    return tmp_path / "images"


def run(source: Path, out: Path, bundle: Path, events: list[Event] | None = None) -> None:
    report = ignore if events is None else events.append
    embed(
        source,
        out,
        EncoderConfig(bundle, device="cpu"),
        report,
        JobOptions(batch_size=BATCH, part_rows=PART_ROWS),
    )


def content(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def moments(folder: Path) -> Mapping[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def spoil(images: Path) -> dict[str, str]:
    """Makes a truncated, an empty and a false image; returns path to the stage that finds it."""
    whole = (images / "a" / "004.jpg").read_bytes()
    (images / "a" / "004.jpg").write_bytes(whole[:-30])
    (images / "b" / "007.jpg").write_bytes(b"")
    (images / "b" / "letter.png").write_text("Dear reader,")
    return {"a/004.jpg": "decode", "b/007.jpg": "index", "b/letter.png": "index"}


def test_every_input_is_a_row_or_a_reject_and_none_is_both(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    stages = spoil(images)
    events: list[Event] = []
    run(images, tmp_path / "v.parquet", bundle, events)
    rows = pq.read_table(tmp_path / "v.parquet").column("path").to_pylist()
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    inputs = sorted(p.relative_to(images).as_posix() for p in images.rglob("*") if p.is_file())
    assert {entry["path"]: entry["stage"] for entry in rejects} == stages
    assert all(entry["reason"] for entry in rejects)
    assert sorted([*rows, *stages]) == inputs
    assert {event.path for event in events if isinstance(event, Rejected)} == set(stages)


def test_a_bad_file_changes_no_other_row(images: Path, bundle: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "good.parquet", bundle)
    bad = spoil(images)
    run(images, tmp_path / "bad.parquet", bundle)
    good = pq.read_table(tmp_path / "good.parquet")
    kept = good.filter(pa.array([path not in bad for path in good.column("path").to_pylist()]))
    rows = pq.read_table(tmp_path / "bad.parquet")
    assert rows.column("path").to_pylist() == kept.column("path").to_pylist()
    vectors, expected = (np.stack(t.column("embedding").to_numpy()) for t in (rows, kept))
    assert np.array_equal(vectors, expected)


def test_a_row_says_which_bytes_of_what_time_it_is_of(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    spoil(images)
    changed = images / "a" / "000.jpg"
    listed, _ = build(images)
    changed.write_bytes((images / "b" / "001.jpg").read_bytes())
    os.utime(changed, ns=(5, 1_234_567_890_123_456_789))
    shown = listed.table["mtime_ns"].to_pylist()
    listed.save(tmp_path / "i.parquet")
    run(tmp_path / "i.parquet", tmp_path / "v.parquet", bundle)
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    for row in rows:
        status = (images / row["path"]).stat()
        assert (row["bytes"], row["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
    assert rows[0]["path"] == "a/000.jpg"
    assert rows[0]["mtime_ns"] not in shown
    (rejected,) = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    status = (images / "a" / "004.jpg").stat()
    assert rejected["kind"] == "content"
    assert (rejected["bytes"], rejected["mtime_ns"]) == (status.st_size, status.st_mtime_ns)


def test_columns_and_footer_are_those_of_the_contract(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    run(images, tmp_path / "v.parquet", bundle)
    table = pq.read_table(tmp_path / "v.parquet", page_checksum_verification=True)
    assert table.schema.names == [
        "path",
        "path_bytes",
        "digest",
        "bytes",
        "mtime_ns",
        "width",
        "height",
        "label",
        "embedding",
    ]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 512)
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["path"], first["label"], first["path_bytes"]) == ("a/000.jpg", "a", None)
    with Image.open(images / "a" / "000.jpg") as image:
        assert (first["width"], first["height"]) == image.size
    footer = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert footer["btpipe.bundle"] == manifest["digest"]
    assert footer["btpipe.precision"] == "fp32"
    assert footer["btpipe.root"] == "images"
    assert (footer["btpipe.format_version"], footer["btpipe.pixels"]) == ("2", "1")
    assert json.loads(footer["btpipe.preprocessing"])["orientation"] == "exif"


def test_pandas_polars_and_duckdb_open_the_table_with_the_right_shape(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    run(images, out, bundle)
    vectors = np.stack(pq.read_table(out).column("embedding").to_numpy())
    frame = pd.read_parquet(out)
    assert np.array_equal(np.stack(list(frame["embedding"])), vectors)
    polars = pl.read_parquet(out)
    assert polars.schema["embedding"] == pl.Array(pl.Float32, 512)
    assert np.array_equal(polars["embedding"].to_numpy(), vectors)
    with duckdb.connect() as connection:
        question = "SELECT typeof(embedding::FLOAT[512]), count(*) FROM read_parquet(?) GROUP BY 1"
        assert connection.execute(question, [str(out)]).fetchall() == [("FLOAT[512]", IMAGES)]


def test_parts_and_batches_leave_no_trace_in_the_table(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    embed(images, tmp_path / "one" / "v.parquet", EncoderConfig(bundle, device="cpu"), ignore)
    run(images, tmp_path / "many" / "v.parquet", bundle)
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_a_finished_job_touches_nothing(images: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "v.parquet"
    run(images, out, bundle)
    before = moments(out.parent)
    events: list[Event] = []
    run(images, out, bundle, events)
    assert moments(out.parent) == before
    assert any(isinstance(event, Embedded) and event.nothing_to_do for event in events)


def test_changed_images_are_embedded_again_and_replace_the_table(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    run(images, out, bundle)
    (images / "a" / "000.jpg").unlink()
    run(images, out, bundle)
    assert pq.read_metadata(out).num_rows == IMAGES - 1
    assert not (tmp_path / "v.parquet.work").exists()


def test_vectors_of_another_bundle_are_not_replaced_unasked(
    images: Path, bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    run(images, out, bundle)
    before = out.read_bytes()
    digests = [
        json.loads((b / "manifest.json").read_text())["digest"] for b in (bundle, other_bundle)
    ]
    with pytest.raises(RefusedError) as refusal:
        run(images, out, other_bundle)
    assert all(text in str(refusal.value) for text in (*digests, "--overwrite"))
    assert out.read_bytes() == before
    embed(
        images, out, EncoderConfig(other_bundle, device="cpu"), ignore, JobOptions(overwrite=True)
    )
    assert pq.read_schema(out).metadata[b"btpipe.bundle"].decode() == digests[1]


def test_a_file_that_is_no_table_of_btpipes_is_not_replaced_unasked(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    out.write_text("my notes")
    with pytest.raises(IntegrityError, match="not a table that btpipe wrote"):
        run(images, out, bundle)
    assert out.read_text() == "my notes"


JOB = """
import os, sys
from pathlib import Path
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError
from btpipe.events import Rejected

source, out, bundle, spot, number = sys.argv[1:]

def report(event):
    if isinstance(event, Rejected) and event.stage == "decode" and event.path == spot:
        os.kill(os.getpid(), int(number))

try:
    options = JobOptions(batch_size=5, part_rows=8)
    embed(Path(source), Path(out), EncoderConfig(Path(bundle), device="cpu"), report, options)
except BtpipeError as error:
    sys.exit(error.exit_code)
assert "torch" not in sys.modules
"""
"""The job in a process of its own; at a bad file it gets a signal, before that part is written."""


def start(images: Path, out: Path, bundle: Path, spot: str = "", number: int = 0) -> int:
    command = [sys.executable, "-c", JOB, *map(str, (images, out, bundle)), spot, str(number)]
    return subprocess.run(command, check=False, timeout=120).returncode


def cut(images: Path, *names: str) -> None:
    for name in names:
        whole = (images / name).read_bytes()
        (images / name).write_bytes(whole[:-30])


def committed(out: Path) -> int:
    return (out.parent / f"{out.name}.work" / "commits.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_a_job_killed_twice_ends_with_the_table_of_one_that_was_not(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    cut(images, "a/018.jpg", "b/021.jpg")  # rows 9 and 30: parts 1 and 3
    whole, killed = tmp_path / "whole" / "v.parquet", tmp_path / "killed" / "v.parquet"
    assert start(images, whole, bundle) == 0
    assert start(images, killed, bundle, "a/018.jpg", signal.SIGKILL) == -signal.SIGKILL
    assert committed(killed) == 1
    with (tmp_path / "killed" / "v.parquet.work" / "commits.jsonl").open("a") as file:
        file.write('{"part": 1, "sha2')  # a line that a kill tore
    assert start(images, killed, bundle, "b/021.jpg", signal.SIGKILL) == -signal.SIGKILL
    assert committed(killed) == 3
    assert not killed.exists()
    assert start(images, killed, bundle) == 0
    assert content(killed.parent) == content(whole.parent)
    assert sorted(path.name for path in killed.parent.iterdir()) == [
        "v.parquet",
        "v.rejects.parquet",
    ]


@pytest.mark.slow
def test_a_job_killed_at_any_time_ends_with_the_table_of_one_that_was_not(
    bundle: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    draw_images(images, 400)
    cut(images, "a/018.jpg", "b/221.jpg")
    whole, killed = tmp_path / "whole" / "v.parquet", tmp_path / "killed" / "v.parquet"
    began = time.monotonic()
    assert start(images, whole, bundle) == 0
    seconds = time.monotonic() - began
    random = np.random.default_rng(0)
    command = [sys.executable, "-c", JOB, *map(str, (images, killed, bundle)), "", "0"]
    for _ in range(RANDOM_KILLS):
        with subprocess.Popen(command) as job:
            time.sleep(random.uniform(0.3, 1) * seconds)
            job.kill()
        if killed.exists():
            assert content(killed.parent) == content(whole.parent)
            killed.unlink()  # the job is made to finish again from nothing, or from its parts
    assert start(images, killed, bundle) == 0
    assert content(killed.parent) == content(whole.parent)
    assert len(list(killed.parent.iterdir())) == 2


def test_sigterm_ends_the_job_with_75_and_the_same_command_goes_on(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    cut(images, "a/018.jpg")
    out = tmp_path / "v.parquet"
    assert start(images, out, bundle, "a/018.jpg", signal.SIGTERM) == Stopped.exit_code
    assert committed(out) == 2
    assert not out.exists()
    events: list[Event] = []
    run(images, out, bundle, events)
    assert any(isinstance(event, Note) and "16 of 40" in event.text for event in events)
    assert pq.read_metadata(out).num_rows == IMAGES - 1


def test_the_handlers_of_signals_are_as_before(images: Path, bundle: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run(images, tmp_path / "v.parquet", bundle)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def unfinished(images: Path, bundle: Path, tmp_path: Path) -> Path:
    """The name of a table whose job was stopped with two of five parts done."""
    cut(images, "a/018.jpg")
    out = tmp_path / "v.parquet"
    assert start(images, out, bundle, "a/018.jpg", signal.SIGTERM) == Stopped.exit_code
    return out


def test_a_part_that_was_flipped_and_one_that_is_gone_are_computed_again(
    images: Path, bundle: Path, unfinished: Path, tmp_path: Path
) -> None:
    first, second = sorted((tmp_path / "v.parquet.work").glob("part-*.parquet"))
    flipped = bytearray(first.read_bytes())
    flipped[100] ^= 1
    first.write_bytes(flipped)
    second.unlink()
    events: list[Event] = []
    run(images, unfinished, bundle, events)
    assert sum(isinstance(event, Warned) for event in events) == 2
    (tmp_path / "whole").mkdir()
    run(images, tmp_path / "whole" / "v.parquet", bundle)
    assert content(tmp_path) == content(tmp_path / "whole")


def test_work_of_another_bundle_is_refused_and_work_for_other_images_dropped(
    images: Path, bundle: Path, other_bundle: Path, unfinished: Path
) -> None:
    with pytest.raises(RefusedError, match="unfinished work of bundle"):
        run(images, unfinished, other_bundle)
    assert committed(unfinished) == 2
    (images / "a" / "000.jpg").unlink()
    events: list[Event] = []
    run(images, unfinished, bundle, events)
    assert any(isinstance(event, Warned) and "afresh" in event.text for event in events)
    assert pq.read_metadata(unfinished).num_rows == IMAGES - 2


def test_vectors_beyond_float16_are_rejects_and_end_the_job_with_6_every_time(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    large = tiny_run.other_bundle(bundle, tmp_path / "large", 2e5)  # about half of the vectors
    run(images, tmp_path / "exact.parquet", large)
    exact = pq.read_table(tmp_path / "exact.parquet").to_pylist()
    fits = {row["path"] for row in exact if max(map(abs, row["embedding"])) < 65_504}
    assert 0 < len(fits) < IMAGES
    encoder, options = EncoderConfig(large, device="cpu"), JobOptions(dtype="float16")
    for _ in range(2):
        with pytest.raises(NumericsError, match=f"{IMAGES - len(fits)} of {IMAGES} vectors"):
            embed(images, out, encoder, ignore, options)
        assert {row["path"] for row in pq.read_table(out).to_pylist()} == fits
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    assert {(bad["stage"], bad["kind"]) for bad in rejects} == {("encode", "content")}
    assert len(rejects) == IMAGES - len(fits)


@pytest.mark.parametrize(("factor", "what"), [(1e7, "40 of 40 vectors"), (math.inf, "golden")])
def test_where_no_vector_is_finite_there_is_no_table(
    images: Path, bundle: Path, tmp_path: Path, factor: float, what: str
) -> None:
    out, events = tmp_path / "v.parquet", list[Event]()
    broken = tiny_run.other_bundle(bundle, tmp_path / "broken", factor)
    encoder, options = EncoderConfig(broken, device="cpu"), JobOptions(dtype="float16")
    for _ in range(2):
        with pytest.raises(NumericsError, match=what):
            embed(images, out, encoder, events.append, options)
        assert not out.exists()
    embedded = sum(isinstance(event, Rejected) for event in events)
    assert embedded == (IMAGES if math.isfinite(factor) else 0)  # the second time nothing is made


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_machine_that_makes_other_golden_vectors_makes_no_table(
    images: Path, bundle: Path, tmp_path: Path, engine: Literal["onnx", "torch"]
) -> None:
    drifted = tiny_run.drifted_bundle(bundle, tmp_path / "drifted")
    encoder = EncoderConfig(drifted, device="cpu", engine=engine)
    with pytest.raises(NumericsError, match=r"least cosine \w+ 0\."):
        embed(images, tmp_path / "v.parquet", encoder, ignore)
    assert not (tmp_path / "v.parquet").exists()


def test_a_second_process_on_one_output_is_refused_and_a_dead_ones_lock_taken_over(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    hold = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from btpipe.embed import work_folder\n"
        "with work_folder.locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", hold, f"{out}.work"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError, match="another process"):
            run(images, out, bundle)
        holder.kill()
    run(images, out, bundle)
    assert pq.read_metadata(out).num_rows == IMAGES


@pytest.mark.parametrize(("max_bad", "kept"), [(3, True), (2, False), (0.08, True), (0.07, False)])
def test_more_bad_inputs_than_allowed_are_an_error_after_the_table_is_finished(
    images: Path, bundle: Path, tmp_path: Path, max_bad: float, kept: bool
) -> None:
    spoil(images)  # 3 of 41 inputs, 0.073
    out = tmp_path / "v.parquet"

    def job() -> None:
        embed(images, out, EncoderConfig(bundle, device="cpu"), ignore, JobOptions(max_bad=max_bad))

    for _ in range(2):  # a finished job says the same again
        if kept:
            job()
        else:
            with pytest.raises(BudgetError, match="3 of 41"):
                job()
    assert pq.read_metadata(out).num_rows == 38


def test_progress_counts_up_to_the_number_of_images(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    run(images, tmp_path / "v.parquet", bundle, events)
    last = [event for event in events if isinstance(event, Progressed)][-1]
    assert (last.job, last.done, last.total) == ("embed", IMAGES, IMAGES)
    assert last.images_per_second > 0
    assert 0 <= last.data_wait <= 1


def test_names_that_are_not_utf8_open_the_same_file(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    odd = os.fsencode(images / "a") + b"/odd \xff\n'.jpg"
    Path(os.fsdecode(odd)).write_bytes((images / "a" / "000.jpg").read_bytes())
    run(images, tmp_path / "v.parquet", bundle)
    (row,) = [row for row in pq.read_table(tmp_path / "v.parquet").to_pylist() if row["path_bytes"]]
    assert row["path"] == "a/odd %FF\n'.jpg"
    assert Path(os.fsdecode(os.fsencode(images) + b"/" + row["path_bytes"])).is_file()


def test_images_without_folders_have_no_label(bundle: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "flat", 3, labels=["."])
    run(tmp_path / "flat", tmp_path / "v.parquet", bundle)
    assert pq.read_table(tmp_path / "v.parquet").column("label").to_pylist() == [None] * 3


def test_mistakes_are_named_before_anything_is_written(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"X\.parquet"):
        run(images, tmp_path / "v.csv", bundle)
    with pytest.raises(UsageError, match="btpipe export"):
        run(images, tmp_path / "v.parquet", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no such folder or file"):
        run(tmp_path / "nowhere", tmp_path / "v.parquet", bundle)
    assert sorted(tmp_path.iterdir()) == before
