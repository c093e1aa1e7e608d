import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btpipe.data import index
from btpipe.data.rejects import BadInputError
from btpipe.errors import IntegrityError, UsageError
from btpipe.events import Event, Note, Rejected


def write(
    path: Path, width: int = 40, height: int = 30, kind: str = "JPEG", **options: object
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (200, 90, 30)).save(path, kind, **options)
    return path


def reasons(rejected: list[Rejected]) -> dict[str, str]:
    return {event.path: event.reason for event in rejected}


def paths(images: index.Index) -> list[str]:
    return list(images.table["path"].to_pylist())


def test_every_image_is_a_row_sorted_by_path(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "a/9.jpg", "a/10.jpg", "B/1.jpg"):
        write(tmp_path / name)
    images, rejected = index.build(tmp_path)
    assert paths(images) == ["B/1.jpg", "a/10.jpg", "a/9.jpg", "b/2.jpg"]
    assert images.labels == ["B", "a", "a", "b"]
    assert rejected == []
    assert images.read_bytes(2) == (tmp_path / "a/9.jpg").read_bytes()


def test_an_image_beside_the_class_folders_takes_all_labels_away(tmp_path: Path) -> None:
    write(tmp_path / "a/1.jpg")
    write(tmp_path / "2.jpg")
    assert index.build(tmp_path)[0].labels == [None, None]


@pytest.mark.parametrize(
    ("names", "labels", "is_said"),
    [
        (("train/cat/1.jpg", "train/dog/2/1.jpg", "val/cat/2.jpg"), ["cat", "dog", "cat"], True),
        (("Train/cat/1.jpg", "test/1.jpg"), ["cat", None], True),
        (("validation/cat/1.jpg",), ["cat"], True),
        (("other/1.jpg", "test/1.jpg"), ["other", "test"], False),
        (("test/1.jpg", "train/1.jpg"), ["test", "train"], False),
        (("test/a/1.jpg", "test/2.jpg"), ["test", "test"], False),
        (("other/a/1.jpg", "train/a/1.jpg"), ["other", "train"], False),
    ],
)
def test_labels_are_the_class_folders_below_splits(
    tmp_path: Path, names: tuple[str, ...], labels: list[str | None], is_said: bool
) -> None:
    for name in names:
        write(tmp_path / name)
    events = list[Event]()
    assert index.build(tmp_path, events.append)[0].labels == labels
    notes = [event.text for event in events if isinstance(event, Note)]
    assert len(notes) == is_said
    assert all("are splits" in note and str(tmp_path) in note for note in notes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "1.jpg", 40, 30, exif=exif)
    images, _ = index.build(tmp_path)
    upright = (40, 30) if orientation < 5 else (30, 40)
    assert (images.widths[0], images.heights[0]) == upright
    assert images.table["orientation"].to_pylist() == [orientation]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_content_decides_what_is_an_image(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.dat", kind=kind)
    write(tmp_path / "y.gif", kind=kind)
    images, rejected = index.build(tmp_path)
    assert (paths(images), rejected) == (["x.dat", "y.gif"], [])


def test_what_never_claimed_to_be_an_image_is_passed_over_in_silence(tmp_path: Path) -> None:
    write(tmp_path / "1.jpg")
    write(tmp_path / ".hidden.jpg")
    write(tmp_path / ".thumbnails/1.jpg")
    (tmp_path / "labels.csv").write_text("1.jpg,cat")
    (tmp_path / "empty.txt").touch()
    images, rejected = index.build(tmp_path)
    assert (paths(images), rejected) == (["1.jpg"], [])


def test_each_unusable_file_is_rejected_with_its_own_reason(tmp_path: Path) -> None:
    write(tmp_path / "good.jpg")
    write(tmp_path / "animation.gif", kind="GIF")
    write(tmp_path / "disguised.jpg", kind="GIF")
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (tmp_path / "start.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:40])
    images, rejected = index.build(tmp_path)
    reason_of = reasons(rejected)
    assert paths(images) == ["good.jpg"]
    assert reason_of["animation.gif"].startswith("GIF is not supported")
    assert reason_of["disguised.jpg"].startswith("GIF is not supported")
    assert reason_of["empty.png"] == "empty file"
    assert reason_of["page.jpg"] == "not an image"
    assert reason_of["script.jpg"].startswith("PostScript is not supported")
    assert reason_of["start.jpg"].startswith("damaged JPEG header")
    assert len(reason_of) == 6
    assert all(event.stage == "index" for event in rejected)


def test_a_pixel_bomb_is_rejected_from_its_header(tmp_path: Path) -> None:
    write(tmp_path / "good.jpg")
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")  # 48 kB for 400 megapixels
    (tmp_path / "bomb.png").write_bytes(content.getvalue())
    _, rejected = index.build(tmp_path)
    assert reasons(rejected)["bomb.png"].startswith("pixel bomb")


def test_pipes_and_links_never_hang_the_walk_and_have_a_reason_each(tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere/secret.jpg")
    root = tmp_path / "images"
    write(root / "a/1.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "to_inside.jpg").symlink_to(root / "a/1.jpg")
    (root / "to_outside.jpg").symlink_to(outside)
    (root / "to_nothing.jpg").symlink_to("missing.jpg")
    (root / "circle.jpg").symlink_to("circle.jpg")
    (root / "a/up").symlink_to(root)
    (root / "folder.jpg").mkdir()
    images, rejected = index.build(root)
    reason_of = reasons(rejected)
    assert paths(images) == ["a/1.jpg", "to_inside.jpg"]
    assert reason_of["pipe.jpg"].startswith("not a regular file")
    assert reason_of["to_outside.jpg"].startswith("a link that leads out of the folder")
    assert reason_of["to_nothing.jpg"] == "a link to nothing"
    assert reason_of["circle.jpg"] == "a link in a circle"
    assert reason_of["folder.jpg"].startswith("a folder")
    assert "a/up" in reason_of
    assert len(reason_of) == 6


STRANGE_NAMES = [
    b"new\nline.jpg",
    b"tab\t\"quotes'.jpg",
    "\N{SNOWMAN} \N{ROCKET}.jpg".encode(),
    b"-leading.jpg",
    b"100%25.jpg",
    b"latin-\xe9.jpg",
    b"n" * 251 + b".jpg",
]


def test_a_row_opens_the_file_it_names_whatever_the_name(tmp_path: Path) -> None:
    for width, name in enumerate(STRANGE_NAMES, 20):
        write(tmp_path / os.fsdecode(name), width=width)
    images, rejected = index.build(tmp_path)
    assert rejected == []
    assert len(images) == len(STRANGE_NAMES)
    for row in range(len(images)):
        with Image.open(io.BytesIO(images.read_bytes(row))) as image:
            assert image.width == images.widths[row]
    row = paths(images).index("latin-%E9.jpg")
    assert images.table["path_bytes"][row].as_py() == b"latin-\xe9.jpg"
    assert images.table["path_bytes"].null_count == len(images) - 1


def test_an_index_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "images/a/1.jpg")
    write(tmp_path / "images/b/caf\xe9.png", kind="PNG")
    images, _ = index.build(tmp_path / "images")
    images.save(tmp_path / "index.parquet")
    again = index.open_index(tmp_path / "index.parquet")
    assert again.root == images.root
    assert again.table.equals(images.table)
    assert again.fingerprint == images.fingerprint
    np.testing.assert_array_equal(again.widths, images.widths)
    assert again.file(0) == tmp_path / "images/a/1.jpg"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_the_colour_mode_is_that_of_the_file(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8)).save(tmp_path / "1.png")
    assert index.build(tmp_path)[0].table["mode"].to_pylist() == [mode]


def test_the_fingerprint_changes_with_a_files_size_and_not_with_its_time(tmp_path: Path) -> None:
    image = write(tmp_path / "1.jpg")
    first = index.build(tmp_path)[0].fingerprint
    os.utime(image, (1, 1))
    assert index.build(tmp_path)[0].fingerprint == first
    image.write_bytes(image.read_bytes() + b"\0")
    assert index.build(tmp_path)[0].fingerprint != first


def test_a_missing_or_empty_folder_is_refused_with_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder(.|\n)*to do: name a folder"):
        index.build(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UsageError, match=r"no image in 1 files(.|\n)*JPEG"):
        index.build(tmp_path)


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(IntegrityError, match="not a readable index"):
        index.open_index(tmp_path / "index.parquet")
    with pytest.raises(IntegrityError, match="not a readable index"):
        index.open_index(tmp_path / "missing.parquet")


def test_rejects_are_reported_as_they_are_returned(tmp_path: Path) -> None:
    write(tmp_path / "good.jpg")
    (tmp_path / "empty.png").touch()
    events: list[Event] = []
    _, rejected = index.build(tmp_path, events.append)
    assert events == rejected


def test_a_pipe_that_takes_a_files_place_is_an_error_and_no_wait(tmp_path: Path) -> None:
    image = write(tmp_path / "1.jpg")
    images, _ = index.build(tmp_path)
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(BadInputError, match="not a regular file"):
        images.read_bytes(0)


def test_a_reject_names_its_content_only_where_that_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "1.jpg")
    images, _ = index.build(tmp_path)
    status = path.stat()
    damaged = images.reject(0, "decode", BadInputError("damaged"))
    assert (damaged.bytes, damaged.mtime_ns) == (status.st_size, status.st_mtime_ns)
    path.write_bytes(b"")
    with pytest.raises(BadInputError, match="empty file") as emptied:
        images.read_bytes(0)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadInputError, match="cannot be read") as replaced:
        images.read_bytes(0)
    for caught in (emptied, replaced):
        reject = images.reject(0, "decode", caught.value)
        assert (reject.kind, reject.bytes, reject.mtime_ns) == ("content", -1, -1)
