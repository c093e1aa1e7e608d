"""What 0.2 wrote is read by this version: verified, inspected, exported, embedded, merged, resumed.

The archive is never made again for 0.2: where a test here fails, what is to be mended is the code.
"""

import fcntl
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from btpipe import recipe
from btpipe.cli import app
from btpipe.data import rejects
from btpipe.embed import table

PLACE = Path("/tmp/btpipe-old")
ARCHIVE = Path(__file__).parent / "0.2.0.tar.xz"
COLUMNS = {
    "path": "string",
    "path_bytes": "binary",
    "digest": "string",
    "bytes": "int64",
    "mtime_ns": "int64",
    "width": "int32",
    "height": "int32",
    "label": "string",
    "embedding": "fixed_size_list<element: float>[512]",
}
REJECT_COLUMNS = {"path", "stage", "kind", "reason", "bytes", "mtime_ns"}
GOOD = 32
SAME_VECTOR = 1e-3
"""Of its length: an encoder's vectors on another CPU."""


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The archive, unpacked where it was made, as the working folder of one test at a time."""
    with PLACE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        with tarfile.open(ARCHIVE) as packed:
            packed.extractall(PLACE, filter="data")
        monkeypatch.chdir(PLACE)
        yield PLACE
        shutil.rmtree(PLACE)


def btpipe(*words: str) -> list[dict[str, object]]:
    """The events of a command that ends well."""
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, (words, done.output, done.exception)
    return [json.loads(line) for line in done.stdout.splitlines()]


def reused(events: list[dict[str, object]]) -> int:
    return int(str(next(event["reused"] for event in events if "reused" in event)))


def vectors(path: Path) -> dict[str, NDArray[np.float32]]:
    content = pq.read_table(path)
    rows = np.stack(content["embedding"].to_numpy(zero_copy_only=False))
    return dict(zip(content["path"].to_pylist(), rows, strict=True))


def assert_same(one: Path, other: Path) -> None:
    """The rows of both tables, in both orders."""
    a, b = vectors(one), vectors(other)
    assert list(a) == list(b)
    for path, vector in a.items():
        assert np.linalg.norm(vector - b[path]) < SAME_VECTOR * np.linalg.norm(vector), path


def assert_columns(vectors: Path, rejects: Path) -> None:
    """Both files have at least the columns of 0.2, and every reject its kind."""
    schema = pq.read_schema(vectors)
    assert {name: str(schema.field(name).type) for name in COLUMNS} == COLUMNS
    assert set(pq.read_schema(rejects).names) >= REJECT_COLUMNS
    assert {reject["kind"] for reject in pq.read_table(rejects).to_pylist()} == {"content"}


@pytest.mark.usefixtures("old")
def test_everything_is_what_it_was_and_says_what_it_is() -> None:
    kinds = ("runs/old", "exports/old", "index.parquet", "vectors.parquet", "share-1.parquet")
    for path in kinds:
        btpipe("verify", path)
        (inspected,) = (e for e in btpipe("inspect", path) if e["event"] == "Inspected")
        assert inspected["facts"], path


def test_the_digest_of_a_recipe_is_the_one_that_its_checkpoints_name(old: Path) -> None:
    states = list(old.glob("runs/old/checkpoints/*/state.json"))
    digests = {json.loads(path.read_text())["recipe"] for path in states}
    assert digests == {recipe.load(old / "runs/old/recipe.toml").digest}


def test_a_table_has_the_columns_that_it_had_and_rejects_have_their_kind(old: Path) -> None:
    assert_columns(old / "vectors.parquet", old / "vectors.rejects.parquet")
    listed = rejects.read(old / "index.rejects.csv")
    assert {(reject.path, reject.kind) for reject in listed} == {
        ("even/empty.jpg", "content"),
        ("odd/torn.jpg", "content"),
    }


def test_a_run_is_exported_to_the_same_vectors(old: Path) -> None:
    btpipe("export", "runs/old", "--out", "exports/again")
    btpipe("embed", "images", "--model", "exports/again", "--out", "again.parquet")
    assert_same(old / "vectors.parquet", old / "again.parquet")


def test_a_finished_table_is_finished_and_takes_what_is_new(old: Path) -> None:
    before = (old / "vectors.parquet").read_bytes()
    btpipe("embed", "images", "--model", "exports/old", "--out", "vectors.parquet")
    assert (old / "vectors.parquet").read_bytes() == before
    shutil.copy(old / "images/odd/03.jpg", old / "images/odd/99.jpg")
    events = btpipe("embed", "images", "--model", "exports/old", "--out", "vectors.parquet")
    assert reused(events) >= GOOD  # the new one has the content of another
    assert len(vectors(old / "vectors.parquet")) == GOOD + 1
    assert_columns(old / "vectors.parquet", old / "vectors.rejects.parquet")


def test_a_half_done_job_goes_on_with_the_parts_that_it_has(old: Path) -> None:
    work = old / "half.parquet.work"
    parts = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(parts) > 2
    btpipe("embed", "images", "--model", "exports/old", "--out", "half.parquet")
    assert not work.exists()
    assert_same(old / "vectors.parquet", old / "half.parquet")


def test_shares_are_merged_into_the_whole_table(old: Path) -> None:
    btpipe("merge", "share-0.parquet", "share-1.parquet", "--out", "whole.parquet")
    assert_same(old / "vectors.parquet", old / "whole.parquet")
    assert_columns(old / "whole.parquet", old / "whole.rejects.parquet")


def test_a_stopped_run_goes_on_where_it_was(old: Path) -> None:
    saved = max(int(path.name.split("-")[1]) for path in old.glob("runs/old/checkpoints/step-*"))
    assert 0 < saved < 8
    events = btpipe("pretrain", "old.toml", "--set", "data.max_bad=0.1")
    (started,) = (event for event in events if event["event"] == "RunStarted")
    assert (started["step"], started["steps"]) == (saved, 8)
    assert (old / "runs/old/checkpoints/step-00000008").is_dir()


def test_another_version_of_btpipe_embeds_none_of_it_again(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "__version__", "9.9.9")
    words = ("embed", "images", "--model", "exports/old", "--out")
    (done,) = (e for e in btpipe(*words, "vectors.parquet") if e["event"] == "Embedded")
    assert done["nothing_to_do"] is True
    events = btpipe(*words, "half.parquet")
    assert any(str(event.get("text")).startswith("goes on: ") for event in events)
    assert not [event for event in events if event["event"] == "Warned"]
    btpipe("merge", "share-0.parquet", "share-1.parquet", "--out", "whole.parquet")
    assert_same(old / "half.parquet", old / "whole.parquet")
