"""One folder of whatever people call images, through one job: a row or a reject each, never both.

What each format becomes is in docs/formats.md and tests/data/pipeline/test_formats.py.
"""

import contextlib
import hashlib
import io
import os
import re
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny_run import draw_images, shared_home

from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.events import ignore

COSINE = 0.999
"""Of one picture stored in the eight ways that EXIF knows: what JPEG's blocks change."""
PEAK_BYTES = 100 << 20
"""What pixel bombs may cost at most."""


def picture(count: int = 1) -> Image.Image:
    coarse = np.random.default_rng(count).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95, **options)
    return content.getvalue()


def as_exif(image: Image.Image, orientation: int) -> bytes:
    """The picture as a camera that was held so stores it."""
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = image.transpose(stored[orientation]) if orientation in stored else image
    return jpeg(turned, exif=exif)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def nasty(folder: Path) -> set[bytes]:
    """Draws what must be refused; returns the names."""
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    (folder / "nothing.jpg").symlink_to("no-such-file")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "outside.jpg").symlink_to("/etc/hostname")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "bomb.png").write_bytes(bomb(60_000))
    (folder / "text.jpg").write_text("Dear reader,")
    (folder / "ghost.jpg").write_bytes(b"%!PS-Adobe-3.0\n(%pipe%touch ran) (w) file\n")
    (folder / "vector.jpg").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "paper.jpg").write_bytes(b"%PDF-1.7\n")
    whole = jpeg(picture())
    for percent in range(1, 100, 3):
        cut = whole[: max(len(whole) * percent // 100, 1)]
        (folder / f"cut-{percent:02d}.jpg").write_bytes(cut)
    (folder / "cut-last.jpg").write_bytes(whole[:-2])
    return {os.fsencode(path.name) for path in folder.iterdir()}


def good(folder: Path) -> set[bytes]:
    """Draws what must be embedded, under names that people and machines make."""
    names = [b"new\nline", b"tab\t", b"quo\"te'", "emoji-\U0001f642".encode(), b"-dash"]
    names += [b"n" * 251, b"latin-\xe9", b"percent%41", b"a::b", b"c#3", b" lead"]
    for i, name in enumerate(names):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name + b".jpg")).write_bytes(
            jpeg(picture(i + 10))
        )
    for below in ("one", "two"):
        (folder / below).mkdir()
        (folder / below / "same.jpg").write_bytes(jpeg(picture(30)))
    for orientation in range(1, 9):
        (folder / f"exif-{orientation}.jpg").write_bytes(as_exif(picture(40), orientation))
    picture(50).save(folder / "png-in.jpg", "PNG")
    (folder / "jpeg-in.png").write_bytes(jpeg(picture(51)))
    (folder / "jpeg-in.txt").write_bytes(jpeg(picture(52)))
    root = os.fsencode(folder)
    return {
        os.path.relpath(os.path.join(at, name), root)  # noqa: PTH118 - bytes
        for at, _, files in os.walk(root)
        for name in files
    }


class Watched:
    """The most anonymous memory that a child of this process had, in bytes."""

    def __init__(self) -> None:
        self.peak, self._is_done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        while not self._is_done.wait(0.02):
            for child in children.read_text().split():
                try:
                    text = Path(f"/proc/{child}/status").read_text()
                except OSError:
                    continue
                match = re.search(r"RssAnon:\s+(\d+)", text)
                self.peak = max(self.peak, int(match[1]) << 10 if match else 0)


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[bytes], set[bytes]]:
    """`images/` with its table, and the names of the good and of the bad files in it."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    good_names = good(folder / "images")
    refused = nasty(folder / "images") - {name.split(b"/")[0] for name in good_names}
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    with contextlib.chdir(folder):  # where a script in an image would leave its mark
        embed(
            folder / "images",
            folder / "v.parquet",
            EncoderConfig(bundle, device="cpu"),
            ignore,
            JobOptions(part_rows=16),
        )
    return folder, good_names, refused


def rows_of(folder: Path) -> dict[bytes, dict[str, object]]:
    rows = pq.read_table(folder / "v.parquet").to_pylist()
    return {row["path_bytes"] or row["path"].encode(): row for row in rows}


def test_every_file_is_a_row_or_a_reject_with_a_reason(
    embedding: tuple[Path, set[bytes], set[bytes]],
) -> None:
    folder, good_names, refused = embedding
    assert set(rows_of(folder)) == good_names
    rejects = pq.read_table(folder / "v.rejects.parquet").to_pylist()
    assert sorted(entry["path"].encode() for entry in rejects) == sorted(refused)
    assert all(entry["reason"] for entry in rejects)


def test_the_path_of_each_row_opens_the_same_file(
    embedding: tuple[Path, set[bytes], set[bytes]],
) -> None:
    folder, _, _ = embedding
    for name, row in rows_of(folder).items():
        content = Path(os.fsdecode(os.fsencode(folder / "images") + b"/" + name)).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["digest"]


def test_a_picture_has_one_vector_however_the_camera_was_held(
    embedding: tuple[Path, set[bytes], set[bytes]],
) -> None:
    folder, _, _ = embedding
    rows = rows_of(folder)
    vectors = np.array([rows[f"exif-{i}.jpg".encode()]["embedding"] for i in range(1, 9)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (vectors @ vectors.T).min() > COSINE
    assert {(rows[f"exif-{i}.jpg".encode()]["width"]) for i in range(1, 9)} == {96}


def test_nothing_in_a_file_is_executed(embedding: tuple[Path, set[bytes], set[bytes]]) -> None:
    folder, _, _ = embedding
    assert {path.name for path in folder.iterdir()} == {
        "images",
        "v.parquet",
        "v.rejects.parquet",
    }


@pytest.mark.slow
def test_pixel_bombs_cost_no_memory(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    draw_images(tmp_path / "images", 16)
    with Watched() as plain:
        embed(
            tmp_path / "images", tmp_path / "v.parquet", EncoderConfig(bundle, device="cpu"), ignore
        )
    for i in range(4):
        (tmp_path / "images" / f"bomb-{i}.png").write_bytes(bomb(40_000 + i))
    with Watched() as watched:
        embed(
            tmp_path / "images", tmp_path / "b.parquet", EncoderConfig(bundle, device="cpu"), ignore
        )
    assert pq.read_metadata(tmp_path / "b.rejects.parquet").num_rows == 4
    assert watched.peak - plain.peak < PEAK_BYTES


def test_a_jpeg_of_endless_scans_is_rejected_in_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = shared_home(tmp_path_factory) / "exports" / "tiny"
    draw_images(tmp_path / "images", 8)
    large = jpeg(Image.new("RGB", (4000, 4000), (9, 99, 200)), progressive=True)
    # The last scan again and again: each is gone through over the whole picture.
    at = large.rindex(b"\xff\xda")
    slow = large[:-2] + large[at:-2] * 400 + large[-2:]
    (tmp_path / "images" / "a" / "scans.jpg").write_bytes(slow)
    started = time.monotonic()
    embed(
        tmp_path / "images",
        tmp_path / "v.parquet",
        EncoderConfig(bundle, device="cpu"),
        ignore,
        JobOptions(limit_seconds=1.0),
    )
    rejects = pq.read_table(tmp_path / "v.rejects.parquet").to_pylist()
    assert [(entry["path"], entry["reason"]) for entry in rejects] == [
        ("a/scans.jpg", "decoding took longer than 1 s")
    ]
    assert pq.read_metadata(tmp_path / "v.parquet").num_rows == 8
    assert time.monotonic() - started < 60
