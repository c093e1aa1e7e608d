"""`btpipe verify` on real things, and on the same with bytes flipped, cut and deleted."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import event_schema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from one_of_each import copy, one_of_each, replace
from typer.testing import CliRunner

from btpipe import artifact, cli
from btpipe.data import index, rejects, shard_job, shard_writer
from btpipe.embed import outputs, table
from btpipe.errors import IntegrityError, NewerError, UsageError
from btpipe.events import Event, Finished, Rejected, ignore
from btpipe.tools.inspect import inspect
from btpipe.tools.verify import verify

IMAGES = 24
FLIPS = {"v.parquet": 150, "i.parquet": 1500}
"""More of the small file, of whose bytes 0.745 are looked at: few flips are too rough a sample."""
MEANT = (b"root", b"sources", b"btpipe.bundle", b"btpipe.input", b"btpipe.precision")
"""Keys of a footer that decide something."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_of_each(tmp_path_factory)


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    return copy(home, tmp_path / "copied")


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * at), len(content) - 1)] ^= 0x10
    replace(path, bytes(content))


def cut(path: Path) -> None:
    content = path.read_bytes()
    replace(path, content[: len(content) // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "gone": Path.unlink}


@pytest.mark.parametrize(
    ("name", "files", "rows"),
    [
        ("exports/tiny", 3, 0),
        ("runs/tiny", 6, IMAGES),
        ("runs/tiny/checkpoints/step-00000003", 4, 0),
        ("v.parquet", 2, IMAGES),
        ("v.rejects.parquet", 1, 0),
        ("i.parquet", 3, IMAGES),
        ("small", 4, IMAGES),
        ("runs/tiny/recipe.toml", 6, IMAGES),
    ],
)
def test_what_is_whole_is_said_so_with_a_count(
    home: Path, name: str, files: int, rows: int
) -> None:
    events: list[Event] = []
    account = verify(home / name, events.append)
    assert account.files >= files
    assert account.rows == rows
    (finished,) = events
    assert isinstance(finished, Finished)
    assert f"{account.files} files" in finished.text


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "exports/tiny/encoder.onnx",
        "exports/tiny/model.safetensors",
        "exports/tiny/config.json",
        "exports/tiny/README.md",
        "runs/tiny/checkpoints/step-00000003/model.safetensors",
        "runs/tiny/checkpoints/step-00000003/state.json",
        "small/index.parquet",
        "small/rejects.csv",
        "small/shard-00000.tar",
    ],
)
def test_a_file_under_a_manifest_that_changed_is_named(
    copied: Path, name: str, damage: str
) -> None:
    path = copied / name
    DAMAGES[damage](path)
    top = copied / "/".join(name.split("/")[:2]) if name[0] != "s" else copied / "small"
    with pytest.raises(IntegrityError) as refused:
        verify(top, ignore)
    assert refused.value.exit_code == 4
    assert path.name in refused.value.where
    assert refused.value.fix


@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize("name", ["v.parquet", "v.rejects.parquet", "i.parquet"])
def test_a_table_that_was_cut_or_is_gone_is_an_error(copied: Path, name: str, damage: str) -> None:
    DAMAGES[damage](copied / name)
    vectors = copied / name.replace(".rejects", "")
    with pytest.raises(
        UsageError if (copied / name, damage) == (vectors, "gone") else IntegrityError
    ):
        verify(vectors, ignore)


@pytest.mark.parametrize("name", FLIPS)
def test_a_flipped_bit_anywhere_is_seen_or_means_nothing(copied: Path, name: str) -> None:
    """A parquet file has bytes, such as who wrote it, that no reader looks at."""
    path = copied / name
    whole, seen = path.read_bytes(), 0
    before, metadata = pq.read_table(path), pq.read_schema(path).metadata
    places = range(4, len(whole), len(whole) // FLIPS[name])
    for at in places:
        replace(path, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            verify(path, ignore)
        except (IntegrityError, UsageError):
            seen += 1
        else:
            assert pq.read_table(path).equals(before)
            after = pq.read_schema(path).metadata
            assert {key: after.get(key) for key in MEANT} == {
                key: metadata.get(key) for key in MEANT
            }
    assert seen > 0.7 * len(places)


def rewritten(path: Path, content: pa.Table) -> None:
    path.unlink()
    pq.write_table(content, path)


def test_a_table_whose_rows_do_not_add_up_is_an_error(copied: Path) -> None:
    path, rejects_path = copied / "v.parquet", copied / "v.rejects.parquet"
    content, bad = pq.read_table(path), pq.read_table(rejects_path)
    first = content["path"][0].as_py()
    rewritten(path, pa.concat_tables([content, content.slice(0, 1)]))
    with pytest.raises(IntegrityError, match="1 inputs have more than one row"):
        verify(path, ignore)
    zeros = pa.array([float("nan")] * content.schema.field("embedding").type.list_size)
    lists = pa.FixedSizeListArray.from_arrays(zeros.cast(pa.float32()), len(zeros))
    broken = pa.concat_arrays([lists, *content["embedding"].slice(1).chunks])
    rewritten(path, content.set_column(8, content.schema.field("embedding"), broken))
    with pytest.raises(IntegrityError, match="1 rows have a vector that is not finite"):
        verify(path, ignore)
    rewritten(path, content)
    verify(path, ignore)
    cut = dataclasses.asdict(Rejected(first, "decode", "content", "cut"))
    row = pa.Table.from_pylist([cut], schema=bad.schema)
    rewritten(rejects_path, row)
    with pytest.raises(IntegrityError, match="1 inputs are rows and rejects at once, such as"):
        verify(path, ignore)
    other = {**bad.schema.metadata, table.INPUT.encode(): b"another"}
    rewritten(rejects_path, bad.replace_schema_metadata(other))
    with pytest.raises(IntegrityError, match=r"is of another job .*btpipe\.input differ"):
        verify(path, ignore)


def written(home: Path, name: str) -> Path:
    """The vectors of the table under another name, in the format that its ending says."""
    metadata = table.footer_of(home / "v.parquet")
    assert metadata is not None
    footer = table.Footer(
        bundle=metadata["btpipe.bundle"],
        input=metadata["btpipe.input"],
        preprocessing=metadata["btpipe.preprocessing"],
        precision=metadata["btpipe.precision"],
        root=metadata["btpipe.root"],
        dimension=int(metadata["btpipe.dimension"]),
    )
    out = home / name
    outputs.write(out, home / f"beside{out.suffix}", footer, [table.read(home / "v.parquet")])
    outputs.take_place(out, home / f"beside{out.suffix}")
    shutil.copy(home / "v.rejects.parquet", table.rejects_path(out))
    return out


@pytest.mark.parametrize(("name", "files"), [("w", 2), ("w.npy", 3), ("w.safetensors", 3)])
def test_vectors_of_any_format_are_known_and_checked(copied: Path, name: str, files: int) -> None:
    out = written(copied, name)
    account = verify(out, ignore)
    assert (account.files, account.rows) == (files, IMAGES)
    inspected = inspect(out)
    assert (inspected.kind, inspected.facts["vectors"]) == ("vectors", str(IMAGES))
    assert [link.found for link in inspected.chain if link.what == "bundle"] == ["here, the same"]
    cut(out / "part-000000.parquet" if out.is_dir() else out)
    with pytest.raises(IntegrityError):
        verify(out, ignore)


def wrong(path: Path) -> set[tuple[str, str]]:
    """(file, what is wrong) of all that the check lists."""
    events: list[Event] = []
    with pytest.raises(IntegrityError):
        verify(path, events.append)
    (listed,) = [table for event in events for table in event.tables()]
    return {(Path(row[0]).name, row[1]) for row in listed.rows}


def test_a_folder_of_tables_with_a_gap_or_anothers_part_is_an_error(copied: Path) -> None:
    out = written(copied, "w")
    first = out / "part-000000.parquet"
    shutil.copy(first, out / "part-000002.parquet")
    short = (first.name, f"{IMAGES} rows before the last part")
    assert {short, ("part-000001.parquet", "is missing")} <= wrong(out)
    (out / "part-000002.parquet").unlink()
    content = pq.read_table(first)
    other = {**content.schema.metadata, table.BUNDLE.encode(): b"another"}
    pq.write_table(content.replace_schema_metadata(other), out / "part-000001.parquet")
    assert ("part-000001.parquet", "is of another job than the first part") in wrong(out)


def test_an_index_with_an_image_that_is_a_reject_is_an_error(copied: Path) -> None:
    path = rejects.path_beside(copied / "i.parquet")
    path.unlink()
    rejects.write(path, [Rejected("a/000.jpg", "decode", "content", "cut")])
    with pytest.raises(IntegrityError, match=r"rows and rejects at once, such as a/000\.jpg"):
        verify(copied / "i.parquet", ignore)


def test_the_mapped_table_of_a_large_index_is_checked_too(copied: Path) -> None:
    small = index.open_index(copied / "i.parquet")
    many = pa.concat_tables([small.table] * (index.MAPPED_ROWS // IMAGES + 1))
    index.Index(small.root, many, small.sources).save(copied / "large.parquet")
    assert verify(copied / "large.parquet", ignore).files == 2
    flip(copied / "large.arrow", 0.3)
    with pytest.raises(IntegrityError, match=r"its bytes changed(.|\n)*remove it"):
        verify(copied / "large.parquet", ignore)


def test_a_run_whose_recipe_or_index_is_anothers_is_an_error(copied: Path) -> None:
    run = copied / "runs/tiny"
    text = (run / "recipe.toml").read_bytes()
    replace(run / "recipe.toml", text.replace(b"seed = 3", b"seed = 4"))
    with pytest.raises(IntegrityError, match="is of another recipe than the run's"):
        verify(run, ignore)
    replace(run / "recipe.toml", text)
    other, _ = index.build(copied / "images/a")
    (run / "index.parquet").unlink()
    other.save(run / "index.parquet")
    with pytest.raises(IntegrityError, match="is of another data than the run's"):
        verify(run, ignore)


def test_all_that_is_wrong_is_listed_and_the_first_is_the_error(copied: Path) -> None:
    run = copied / "runs/tiny"
    flip(run / "checkpoints/step-00000003/model.safetensors")
    cut(run / "index.parquet")
    events: list[Event] = []
    with pytest.raises(IntegrityError, match="1 more, listed above"):
        verify(run, events.append)
    (listed,) = [table for event in events for table in event.tables()]
    assert [row[0] for row in listed.rows] == [
        str(run / "index.parquet"),
        str(run / "checkpoints/step-00000003/model.safetensors"),
    ]
    assert all(row[2] for row in listed.rows)


def test_a_manifest_that_was_written_for_other_files_is_an_error(copied: Path) -> None:
    path = copied / "small/manifest.json"
    content = json.loads(path.read_text())
    (copied / "small/rejects.csv").unlink()
    (copied / "small/rejects.csv").write_text("path,stage,kind,reason,bytes,mtime_ns\n")
    content["files"]["rejects.csv"] = {
        "bytes": (copied / "small/rejects.csv").stat().st_size,
        "sha256": artifact.file_digest(copied / "small/rejects.csv"),
    }
    content["digest"] = "0" * 64
    replace(path, json.dumps(content).encode())
    with pytest.raises(IntegrityError, match="its digest is not that of its files"):
        verify(copied / "small", ignore)


def test_what_a_newer_btpipe_wrote_is_not_called_damaged(copied: Path) -> None:
    path = copied / "runs/tiny/checkpoints/step-00000003/manifest.json"
    replace(path, json.dumps(json.loads(path.read_text()) | {"format_version": 99}).encode())
    with pytest.raises(NewerError):
        verify(copied / "runs/tiny", ignore)


SLOW_JOB = """
import sys
from pathlib import Path
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.events import ignore
if __name__ == "__main__":
    images, out, bundle = map(Path, sys.argv[1:])
    options = JobOptions(batch_size=1, part_rows=2)
    embed(images, out, EncoderConfig(bundle, device="cpu"), ignore, options)
"""


def test_the_finished_parts_of_a_killed_job_are_checked(copied: Path) -> None:
    script, work = copied / "slow.py", copied / "w.parquet.work"
    script.write_text(SLOW_JOB)
    named = [str(copied / name) for name in ("images", "w.parquet", "exports/tiny")]
    commits = work / "commits.jsonl"
    with subprocess.Popen([sys.executable, str(script), *named]) as job:
        while not (commits.is_file() and commits.read_bytes().count(b"\n") > 1):
            assert job.poll() is None, "it ended before a part was seen"
            time.sleep(0.005)
        job.kill()
    whole = verify(work, ignore)
    assert whole.rows >= 4
    flip(work / "part-000001.parquet")
    with pytest.raises(IntegrityError, match=r"part-000001.*its bytes changed") as refused:
        verify(work, ignore)
    assert "run the same btpipe embed again" in refused.value.fix


def test_the_finished_shards_of_a_killed_job_are_checked(copied: Path) -> None:
    work = copied / "more.work"
    work.mkdir()
    options = shard_job.ShardOptions(shorter_side=24, quality=90, shard_bytes=5_000)
    artifact.write_json(work / "plan.json", {"shard_bytes": 5_000})
    listed, _ = index.build(copied / "images")
    with shard_writer.Maker(listed, 0, options, 1) as maker:
        for number in range(2):
            shard_writer.write(work, number, maker, options, lambda _done: None)
    assert verify(work, ignore).rows > 2
    first = shard_writer.read(work, 1)
    assert first is not None
    size = (work / shard_writer.name_of(1)).stat().st_size
    flip(work / shard_writer.name_of(1), (first.members[0].offset + 30) / size)
    with pytest.raises(IntegrityError, match=r"shard-00001\.tar: 1 images changed"):
        verify(work, ignore)


def test_the_command_ends_with_0_or_4(copied: Path) -> None:
    fine = CliRunner().invoke(cli.app, ["verify", str(copied / "v.parquet"), "--json"])
    assert fine.exit_code == 0
    (record,) = event_schema.read(fine.stdout)
    assert (record["event"], record["kind"]) == ("Verified", "vectors")
    flip(copied / "v.parquet", 0.4)
    command = [sys.executable, "-m", "btpipe", "verify", str(copied / "v.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "v.parquet" in done.stderr
    assert "to do: " in done.stderr
