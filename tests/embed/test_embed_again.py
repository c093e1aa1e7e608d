"""A job run again costs what changed; shards make the table of one job; a list may be piped in."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_run import draw_images

from btpipe.embed.job import JobOptions, embed
from btpipe.embed.merging import merge
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import RefusedError, UsageError
from btpipe.events import Event, Finished, Progressed, Warned, ignore
from btpipe.results import Embedded, Merged

IMAGES = 24
TABLES = ("whole.parquet", "whole.rejects.parquet")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    draw_images(tmp_path / "images", IMAGES)
    return tmp_path / "images"


def run(
    images: Path,
    out: Path,
    bundle: Path,
    events: list[Event] | None = None,
    *,
    shard: str = "",
    repair: bool = False,
) -> Embedded:
    report = ignore if events is None else events.append
    return embed(
        images,
        out,
        EncoderConfig(bundle, device="cpu"),
        report,
        JobOptions(part_rows=8, shard=shard, repair=repair),
    )


def bytes_of(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(f"{out.stem}.rejects.parquet").read_bytes()


def fresh(images: Path, out: Path, bundle: Path) -> tuple[bytes, bytes]:
    """What a job makes that knows nothing from before."""
    run(images, out, bundle)
    return bytes_of(out)


def test_only_new_and_changed_content_is_embedded_and_the_table_is_that_of_a_fresh_job(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    run(images, out, bundle)
    (images / "a" / "000.jpg").unlink()
    (images / "a" / "002.jpg").rename(images / "b" / "renamed.jpg")
    os.utime(images / "a" / "004.jpg", ns=(1, 1))
    donors = draw_images(tmp_path / "donors", IMAGES + 2)
    (images / "a" / "006.jpg").write_bytes(donors[-1].read_bytes())
    (images / "b" / "new.jpg").write_bytes(donors[-2].read_bytes())
    events: list[Event] = []
    result = run(images, out, bundle, events)
    # Dropped are paths: the one that was removed, and the old name of the one that moved.
    assert (result.rows, result.reused, result.dropped) == (IMAGES, IMAGES - 2, 2)
    messages = [event.text for event in events if isinstance(event, Finished)]
    assert "2 embedded, 22 as they were, 2 dropped" in messages[-1]
    assert bytes_of(out) == fresh(images, tmp_path / "fresh.parquet", bundle)


def test_unchanged_content_is_not_decoded(images: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.parquet"
    run(images, out, bundle)
    before = pq.read_table(out)["embedding"]
    # The vectors are not those of the images: whoever decodes them shows it.
    swapped = pq.read_table(out)
    column = before.take(list(reversed(range(IMAGES))))
    position = swapped.schema.get_field_index("embedding")
    schema = swapped.schema
    pq.write_table(swapped.set_column(position, schema.field(position), column).cast(schema), out)
    (images / "a" / "000.jpg").unlink()
    run(images, out, bundle)
    assert pq.read_table(out)["embedding"].to_pylist() == column.to_pylist()[1:]


def test_finished_parts_of_a_job_whose_images_changed_are_kept(
    images: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "v.parquet"
    stop = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from btpipe.embed.job import JobOptions, embed\n"
        "from btpipe.embed.precisions import EncoderConfig\n"
        "from btpipe.events import Rejected\n"
        "def report(event):\n"
        "    if isinstance(event, Rejected):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "source, out, bundle = map(Path, sys.argv[1:])\n"
        "encoder = EncoderConfig(bundle, device='cpu')\n"
        "embed(source, out, encoder, report, JobOptions(part_rows=8))\n"
    )
    bad = images / "b" / "021.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-30])
    command = [sys.executable, "-c", stop, str(images), str(out), str(bundle)]
    assert subprocess.run(command, check=False).returncode < 0
    bad.write_bytes(whole)
    events: list[Event] = []
    result = run(images, out, bundle, events)
    assert (result.rows, result.reused) == (IMAGES, 16)
    assert any(isinstance(event, Warned) and "afresh" in event.text for event in events)
    assert bytes_of(out) == fresh(images, tmp_path / "fresh.parquet", bundle)


@pytest.mark.parametrize("deed", ["flip", "cut"])
def test_a_damaged_table_is_mended_when_asked(
    sharded: Path, bundle: Path, tmp_path: Path, deed: str
) -> None:
    images, out = sharded / "images", tmp_path / "v.parquet"
    for whole, name in zip(TABLES, (out.name, "v.rejects.parquet"), strict=True):
        shutil.copy(sharded / whole, tmp_path / name)
    before = bytes_of(out)
    damaged = bytearray(before[0])
    if deed == "flip":
        damaged[len(damaged) // 2] ^= 1
    out.write_bytes(damaged if deed == "flip" else damaged[: len(damaged) // 2])
    events: list[Event] = []
    run(images, out, bundle, events, repair=True)
    assert bytes_of(out) == before
    assert any(isinstance(event, Warned) for event in events)
    stamp = out.stat().st_mtime_ns
    assert run(images, out, bundle, repair=True).nothing_to_do
    assert out.stat().st_mtime_ns == stamp


@pytest.fixture(scope="module")
def sharded(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images/`, of which one is damaged and a file is none; tables of three shards, and of all."""
    home = tmp_path_factory.mktemp("sharded")
    draw_images(home / "images", IMAGES)
    damaged = home / "images" / "a" / "004.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (home / "images" / "b" / "letter.png").write_text("Dear reader,")
    for i in range(3):
        run(home / "images", home / f"shard-{i}.parquet", bundle, shard=f"{i}/3")
    run(home / "images", home / "whole.parquet", bundle)
    return home


@pytest.fixture
def shards(sharded: Path) -> list[Path]:
    return [sharded / f"shard-{i}.parquet" for i in range(3)]


def test_merged_shards_are_the_table_of_one_job(
    tmp_path: Path, sharded: Path, shards: list[Path]
) -> None:
    out = tmp_path / "v.parquet"
    merged: list[Event] = []
    merge([shards[i] for i in (2, 0, 1)], out, merged.append)
    assert bytes_of(out) == bytes_of(sharded / "whole.parquet")
    assert not list(tmp_path.glob("*.work"))
    stamp = out.stat().st_mtime_ns
    merge(shards, out, merged.append)
    assert out.stat().st_mtime_ns == stamp
    first, second = (event for event in merged if isinstance(event, Merged))
    assert second == dataclasses.replace(first, nothing_to_do=True)


def test_shards_that_are_missing_double_or_of_another_job_are_refused(
    bundle: Path, tmp_path: Path, sharded: Path, shards: list[Path]
) -> None:
    out = tmp_path / "v.parquet"
    with pytest.raises(RefusedError, match=r"1 of 3 shards are missing: 1/3"):
        merge([shards[0], shards[2]], out, ignore)
    with pytest.raises(RefusedError, match="each shard once"):
        merge([*shards, shards[1]], out, ignore)
    with pytest.raises(UsageError, match="no such table"):
        merge([*shards[:2], tmp_path / "none.parquet"], out, ignore)
    with pytest.raises(RefusedError, match=r"shard 0/3\nexpected: shard 1/3"):
        run(sharded / "images", shards[0], bundle, shard="1/3")
    with pytest.raises(RefusedError, match="a whole table"):
        merge([*shards, sharded / "whole.parquet"], out, ignore)
    fewer = shutil.copytree(sharded / "images", tmp_path / "images")
    (fewer / "a" / "000.jpg").unlink()
    run(fewer, tmp_path / "other.parquet", bundle, shard="2/3")
    with pytest.raises(RefusedError, match=r"btpipe\.input"):
        merge([*shards[:2], tmp_path / "other.parquet"], out, ignore)
    assert not out.exists()


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3"])
def test_a_shard_that_is_none_is_a_mistake(
    images: Path, bundle: Path, tmp_path: Path, text: str
) -> None:
    with pytest.raises(UsageError, match="--shard"):
        run(images, tmp_path / "v.parquet", bundle, shard=text)


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_a_list_on_standard_input_is_an_input(
    images: Path, bundle: Path, tmp_path: Path, end: bytes
) -> None:
    names = [b"images/b/001.jpg", b"images/a/000.jpg", os.fsencode(images / "a" / "002.jpg")]
    command = [sys.executable, "-m", "btpipe", "embed", "-", "--out", "v.parquet"]
    process = subprocess.run(
        [*command, "--model", str(bundle)],
        input=end.join(names) + end,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = pq.read_table(tmp_path / "v.parquet")["path"].to_pylist()
    assert rows == [os.fsdecode(name) for name in names]


def test_files_that_change_or_vanish_while_a_job_runs_are_told(
    bundle: Path, tmp_path: Path
) -> None:
    paths = draw_images(tmp_path / "images", 120)
    changed, gone = paths[-1], paths[-3]
    donor = draw_images(tmp_path / "donors", 3)[-1].read_bytes()
    events: list[Event] = []

    def meddle(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progressed) and event.job == "embed" and gone.exists():
            gone.unlink()
            changed.write_bytes(donor)

    out = tmp_path / "v.parquet"
    embed(
        tmp_path / "images",
        out,
        EncoderConfig(bundle, device="cpu"),
        meddle,
        JobOptions(part_rows=8, batch_size=4),
    )
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert [text.partition(":")[0] for text in warnings] == ["b/119.jpg"]
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    assert [(entry["path"], entry["reason"]) for entry in rejects] == [
        ("b/117.jpg", "cannot be read: No such file or directory")
    ]
    row = pq.read_table(out).to_pylist()[-1]
    with Image.open(changed) as image:
        assert (row["width"], row["height"]) == image.size
    assert row["digest"] == hashlib.sha256(donor).hexdigest()
