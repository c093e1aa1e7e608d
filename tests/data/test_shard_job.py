import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from btpipe import artifact, recipe
from btpipe.data import change_detection, index, shard_job
from btpipe.data.index import Index, open_index
from btpipe.data.pipeline import decode
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader
from btpipe.data.shard_writer import ShardOptions
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import Event, Finished, Rejected, ignore
from btpipe.results import Sharded

SMALL = ShardOptions(shorter_side=48, quality=90, shard_bytes=20_000)
RESAMPLED_LEVELS = 4.0
"""Mean difference to Pillow's own resize of the decoded original: JPEG at quality 90."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images of two labels: small ones, large ones, turned ones, other formats, and junk."""
    rng = np.random.default_rng(0)
    for i in range(30):
        cells = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        side = 40 if i % 3 == 0 else 90 + i
        image = cells.resize((side + 20, side), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 5 == 0 else 1
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02}.{'png' if i % 7 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=95, exif=exif)
    junk = tmp_path / "images" / "a" / "99.jpg"
    junk.write_bytes((tmp_path / "images" / "b" / "01.jpg").read_bytes()[:-400])
    return tmp_path / "images"


def sharded(images: Path, out: Path, options: ShardOptions = SMALL) -> tuple[Index, list[Event]]:
    events: list[Event] = []
    source_images, refused = index.build(images)
    shard_job.write(source_images, refused, out, options, events.append)
    return open_index(out / "index.parquet"), events


def hashes(out: Path) -> dict[str, str]:
    names = [p for p in out.iterdir() if p.name != "manifest.json"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


def content(images: Index, row: int) -> bytes:
    """Read by tarfile, which knows nothing of the index."""
    name, _, member = images.table["path"][row].as_py().partition("::")
    with tarfile.open(images.root / name) as tar:
        file = tar.extractfile(member)
        assert file is not None
        return file.read()


def original(images: Index, row: int) -> Path:
    name, _, member = images.table["path"][row].as_py().partition("::")
    with tarfile.open(images.root / name) as tar:
        file = tar.extractfile(member.replace(".jpg", ".json"))
        assert file is not None
        about = json.loads(file.read())
    assert about["label"] == images.table["label"][row].as_py()
    return Path(about["path"])


def test_every_image_is_in_one_shard_or_in_the_rejects(folder: Path, tmp_path: Path) -> None:
    images, events = sharded(folder, tmp_path / "out")
    paths = [original(images, row).as_posix() for row in range(len(images))]
    assert len(set(paths)) == len(paths) == 30
    assert [e.path for e in events if isinstance(e, Rejected)] == ["a/99.jpg"]
    rejects = (tmp_path / "out" / "rejects.csv").read_text()
    assert rejects.startswith(
        "path,stage,kind,reason,bytes,mtime_ns\na/99.jpg,shard,content,truncated or damaged JPEG"
    )
    assert len(images.sources) > 3
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [Path(source.place) for source in images.sources] == tars
    for path in tars:
        assert path.stat().st_size < 2 * SMALL.shard_bytes
    assert paths != sorted(paths)  # in a random order
    assert "30 images" in next(e.text for e in events if isinstance(e, Finished))


def test_the_index_says_what_is_there(folder: Path, tmp_path: Path) -> None:
    images, _ = sharded(folder, tmp_path / "out")
    for row in range(len(images)):
        expected = content(images, row)
        entry = {name: images.table[name][row].as_py() for name in images.table.column_names}
        source = images.sources[entry["source"]]
        with Path(source.place).open("rb") as file:
            file.seek(entry["offset"])
            assert file.read(entry["bytes"]) == expected
        assert images.read_bytes(row) == expected
        assert hashlib.sha256(expected).hexdigest() == entry["digest"]
        with Image.open(io.BytesIO(expected)) as image:
            assert image.size == (entry["width"], entry["height"])
            assert image.format == entry["format"] == "JPEG"
    artifact.verify(tmp_path / "out", shard_job.KIND)
    scanned, _ = index.build(tmp_path / "out" / "shard-00000.tar")
    for name in ("offset", "bytes", "width", "height", "mode", "label", "mtime_ns"):
        count = len(scanned)
        assert scanned.table[name].to_pylist() == images.table[name].to_pylist()[:count], name


def test_images_are_upright_and_no_larger_and_small_ones_are_the_same_bytes(
    folder: Path, tmp_path: Path
) -> None:
    images, _ = sharded(folder, tmp_path / "out")
    copied = 0
    for row in range(len(images)):
        file = folder / original(images, row)
        was = decode.decode(np.frombuffer(file.read_bytes(), np.uint8))
        height, width = was.shape[:2]
        got = images.read_bytes(row)
        if min(width, height) <= SMALL.shorter_side:
            assert (images.widths[row], images.heights[row]) == (width, height)
        else:
            assert min(images.widths[row], images.heights[row]) == SMALL.shorter_side
        with Image.open(file) as image:
            turned, jpeg = image.getexif().get(0x0112, 1) != 1, image.format == "JPEG"
        if jpeg and not turned and min(width, height) <= SMALL.shorter_side:
            assert got == file.read_bytes()
            copied += 1
            continue
        with Image.open(io.BytesIO(got)) as image:
            assert not image.getexif()
            assert "icc_profile" not in image.info
            expected = Image.fromarray(was).resize(image.size, Image.Resampling.BICUBIC)
            difference = np.asarray(image, np.float64) - np.asarray(expected, np.float64)
        assert np.abs(difference).mean() < RESAMPLED_LEVELS
    assert copied > 3


def test_the_same_images_give_the_same_bytes_and_a_second_start_nothing_to_do(
    folder: Path, tmp_path: Path
) -> None:
    _, events = sharded(folder, tmp_path / "out")
    first = hashes(tmp_path / "out")
    _, again = sharded(folder, tmp_path / "out")
    (result,) = again
    assert isinstance(result, Sharded)
    assert "nothing to do" in result.text
    speeds = ("decoded_per_cpu_second", "decoded_per_cpu_second_before", "times_faster")
    unlike = dict.fromkeys(speeds, None) | {"nothing_to_do": True}
    unlike |= {name: result.record()[name] for name in ("seconds", "time")}
    assert result.record() == events[-1].record() | unlike
    shutil.rmtree(tmp_path / "out")
    sharded(folder, tmp_path / "out")
    assert hashes(tmp_path / "out") == first


def test_other_settings_or_another_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    sharded(folder, tmp_path / "out")
    with pytest.raises(RefusedError, match="shorter_side is 48, asked for 32"):
        sharded(folder, tmp_path / "out", ShardOptions(32, 90, 20_000))
    (tmp_path / "mine").mkdir()
    with pytest.raises(RefusedError, match="holds no finished shards"):
        sharded(folder, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "mine", "out"]


def test_training_reads_the_images_of_the_shards(folder: Path, tmp_path: Path) -> None:
    images, _ = sharded(folder, tmp_path / "out")
    data = recipe.Data(
        batch_size=8, image_size=32, threads=2, shuffle="blocks", block_images=4, mixed_blocks=3
    )
    chosen = recipe.Recipe(data=data, optim=recipe.Optim(epochs=1, warmup_epochs=0))
    rejected: dict[int, Rejected] = {}
    with TrainingLoader(
        images,
        LoaderSettings.of(chosen, len(images)),
        rank=0,
        world_size=1,
        start_step=0,
        device=torch.device("cpu"),
        on_event=ignore,
        rejected=rejected,
    ) as loader:
        batches = list(loader)
    assert len(batches) == 3
    assert not rejected


def test_the_folder_itself_is_an_input_also_where_it_was_moved(
    folder: Path, tmp_path: Path
) -> None:
    images, _ = sharded(folder, tmp_path / "out")
    from_folder, _ = index.build(tmp_path / "out")
    assert from_folder.table.equals(images.table)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    (tmp_path / "out").rename(tmp_path / "moved")
    for name in ("moved", "moved/index.parquet", "copy", "copy/index.parquet"):
        moved, refused = index.build(tmp_path / name)
        assert not refused
        assert moved.table.equals(images.table)
        assert moved.root == (tmp_path / name.partition("/")[0])
        for row, digest in enumerate(images.table["digest"].to_pylist()):
            assert hashlib.sha256(moved.read_bytes(row)).hexdigest() == digest
        assert not change_detection.changes(moved, frozenset())
    both, _ = index.build([tmp_path / "moved", tmp_path / "copy" / "index.parquet"])
    assert len(both) == 2 * len(images)
    assert {source.place.split("/")[-2] for source in both.sources} == {"moved", "copy"}
    next((tmp_path / "moved").glob("*.tar")).write_bytes(b"cut")
    for name in ("moved", "moved/index.parquet"):
        with pytest.raises(IntegrityError, match="found 3 bytes"):
            index.build(tmp_path / name)


def write_slowly(images: Path, out: Path) -> None:
    source_images, refused = index.build(images)
    shard_job.write(source_images, refused, out, SMALL, ignore)


def test_a_killed_job_goes_on_at_its_last_finished_shard(folder: Path, tmp_path: Path) -> None:
    sharded(folder, tmp_path / "whole")
    out, work = tmp_path / "out", tmp_path / "out.work"
    process = multiprocessing.get_context("forkserver").Process(
        target=write_slowly, args=(folder, out)
    )
    process.start()
    while not list(work.glob("shard-*.json")):
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not out.exists()
    records = sorted(work.glob("shard-*.json"))
    finished = {path.stem: path.with_suffix(".tar").stat().st_ino for path in records}
    sharded(folder, out)
    kept = {name: (out / f"{name}.tar").stat().st_ino for name in finished}
    assert kept == finished
    assert not work.exists()
    ours, whole = hashes(out), hashes(tmp_path / "whole")
    assert ours.pop("index.parquet") != whole.pop("index.parquet")  # it names its folder
    assert ours == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("256MiB", 2**28), ("1GB", 10**9), ("5000", 5000), ("64 KiB", 2**16), ("2kB", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert shard_job.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "MiB", "-1MiB", "1.5GB", "5 miles", "3iB"])
def test_a_size_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="256MiB"):
        shard_job.parse_bytes(text)
