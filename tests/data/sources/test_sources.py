"""What a user may name instead of a folder: tar shards, parquet with images, lists, several."""

import io
import json
import os
import resource
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.data import change_detection, index
from btpipe.data.rejects import BadInputError
from btpipe.data.sources.parquet import RowGroups
from btpipe.errors import MachineError, UsageError
from btpipe.events import Rejected

MEMORY_BYTES = 30 << 20
"""What indexing a tar of 200 MB may add: buffers and modules, far less than a member."""


def image(width: int = 40, kind: str = "JPEG", height: int = 30) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, 90, 30)).save(content, kind)
    return content.getvalue()


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    return info


def shard(path: Path, *members: tuple[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            tar.addfile(member(name, content), io.BytesIO(content))
    return path


def file(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def paths(images: index.Index) -> list[str]:
    return list(images.table["path"].to_pylist())


def reasons(rejected: list[Rejected]) -> dict[str, str]:
    return {event.path: event.reason for event in rejected}


def require_readable(images: index.Index) -> None:
    """Every row's bytes are an image of the width that the index says."""
    for row in range(len(images)):
        content = images.read_bytes(row)
        assert len(content) == images.table["bytes"][row].as_py()
        with Image.open(io.BytesIO(content)) as opened:
            assert opened.width == images.widths[row]


# Tar files


def test_members_of_a_tar_are_read_where_they_lie(tmp_path: Path) -> None:
    tar = shard(tmp_path / "a.tar", ("0.JPG", image(40)), ("d/1.png", image(41, "PNG")))
    images, rejected = index.build(tar)
    assert paths(images) == ["a.tar::0.JPG", "a.tar::d/1.png"]
    assert (rejected, images.root, images.labels) == ([], tmp_path, [None, None])
    assert images.table["offset"].to_pylist()[0] == 512
    require_readable(images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_labels_come_from_the_cls_or_json_member_of_the_same_key(tmp_path: Path) -> None:
    tar = shard(
        tmp_path / "a.tar",
        ("x.jpg", image()),
        ("x.cls", b"7\n"),
        ("x.json", b'{"label": "other"}'),
        ("y.json", b'{"label": "cat", "more": [1]}'),
        ("y.front.jpg", image()),
        ("z.jpg", image()),
        ("z.json", b"[1, 2]"),
        ("z.txt", b"a caption"),
    )
    images, rejected = index.build(tar)
    assert paths(images) == ["a.tar::x.jpg", "a.tar::y.front.jpg", "a.tar::z.jpg"]
    assert images.labels == ["7", "cat", None]
    assert rejected == []


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_strange_names_survive_in_a_tar(tmp_path: Path, kind: int) -> None:
    names = ["l" * 300 + ".jpg", "\N{SNOWMAN} \n.jpg", "../up.jpg", "/etc/absolute.jpg", "./d.jpg"]
    raw = os.fsdecode(b"latin-\xe9.jpg")
    members = [(name, image(40 + i)) for i, name in enumerate([*names, raw])]
    images, rejected = index.build(shard(tmp_path / "in/a.tar", *members, kind=kind))
    assert paths(images) == [f"a.tar::{name}" for name in [*names, "latin-%E9.jpg"]]
    assert images.table["path_bytes"].to_pylist()[-1] == b"a.tar::latin-\xe9.jpg"
    assert rejected == []
    require_readable(images)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_every_thing_in_a_tar_that_is_no_image_has_its_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in [
            ("good.jpg", image()),
            ("good.jpg", image(50)),
            ("cut.jpg", image()[:40]),
            ("empty.jpg", b""),
            ("page.jpg", b"<html>"),
            ("a.gif", image(kind="GIF")),
            ("notes.txt", b"no image, no word"),
            ("._good.jpg", image()),
        ]:
            tar.addfile(member(name, content), io.BytesIO(content))
        link = member("link.jpg", kind=tarfile.SYMTYPE)
        link.linkname = "/etc/passwd"
        hard = member("hard.jpg", kind=tarfile.LNKTYPE)
        hard.linkname = "good.jpg"
        tar.addfile(link)
        tar.addfile(hard)
        for name, kind in [("tty.jpg", tarfile.CHRTYPE), ("pipe.jpg", tarfile.FIFOTYPE)]:
            tar.addfile(member(name, kind=kind))
        tar.addfile(member("folder.jpg", kind=tarfile.DIRTYPE))
        tar.addfile(member("last.jpg", image(60)), io.BytesIO(image(60)))
    images, rejected = index.build(tmp_path / "a.tar")
    assert paths(images) == ["a.tar::good.jpg", "a.tar::last.jpg"]
    assert images.widths.tolist() == [40, 60]
    again = 512 + -(-len(image()) // 512) * 512
    actual = {path.removeprefix("a.tar::"): reason for path, reason in reasons(rejected).items()}
    expected = {
        f"good.jpg (again at byte {again})": "a second member of this name",
        "cut.jpg": "damaged JPEG header",
        "empty.jpg": "empty file",
        "page.jpg": "not an image",
        "a.gif": "GIF is not supported",
        "link.jpg": "a link in a tar",
        "hard.jpg": "a hard link in a tar",
        "tty.jpg": "not a regular file",
        "pipe.jpg": "not a regular file",
    }
    assert actual.keys() == expected.keys()
    assert all(actual[name].startswith(reason) for name, reason in expected.items())


def test_a_tar_cut_in_a_member_gives_the_members_before_it(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", image(40 + i)) for i in range(4)]
    tar = shard(tmp_path / "a.tar", *members)
    with tarfile.open(tar) as opened:
        inside = opened.getmember("2.jpg").offset_data + 10
    os.truncate(tar, inside)
    images, rejected = index.build(tar)
    assert paths(images) == ["a.tar::0.jpg", "a.tar::1.jpg"]
    missing = len(members[2][1]) - 10
    assert reasons(rejected) == {
        "a.tar::2.jpg": f"cut: the tar file ends {missing} bytes too early"
    }
    require_readable(images)


@pytest.mark.parametrize("more_bytes", [0, 100, 600])
def test_a_tar_cut_behind_a_member_gives_that_member_too(tmp_path: Path, more_bytes: int) -> None:
    tar = shard(tmp_path / "a.tar", ("0.jpg", image()), ("1.jpg", image()), ("2.jpg", image()))
    with tarfile.open(tar) as opened:
        info = opened.getmember("1.jpg")
    end = info.offset_data + info.size
    assert end % 512, "there is padding to be cut"
    os.truncate(tar, end + more_bytes)
    images, rejected = index.build(tar)
    assert paths(images) == ["a.tar::0.jpg", "a.tar::1.jpg"]
    assert list(reasons(rejected)) == ["a.tar"]
    assert reasons(rejected)["a.tar"].startswith("cut at byte")
    require_readable(images)


def lying(path: Path, size: bytes) -> Path:
    """A tar whose second of three headers tells another size, with a right checksum."""
    shard(path, ("0.jpg", image()), ("1.jpg", image()), ("2.jpg", image()))
    with tarfile.open(path) as opened:
        at = opened.getmember("1.jpg").offset
    content = bytearray(path.read_bytes())
    content[at + 124 : at + 136] = size
    content[at + 148 : at + 156] = b" " * 8
    total = sum(content[at : at + 512])
    content[at + 148 : at + 156] = b"%06o\0 " % total
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (b"77777777777\0", "cut: the tar file ends"),
        (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", "cut: the tar file ends"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe\0", "a size of -512 bytes"),
        (b"00000000001\0", "damaged at byte"),
    ],
)
def test_a_size_that_lies_costs_what_lies_behind_it(
    tmp_path: Path, size: bytes, reason: str
) -> None:
    images, rejected = index.build(lying(tmp_path / "a.tar", size))
    assert paths(images) == ["a.tar::0.jpg"]
    assert any(text.startswith(reason) for text in reasons(rejected).values())


def test_an_extended_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    tar = shard(tmp_path / "a.tar", ("0.jpg", image()))
    liar = tarfile.TarInfo("././@LongLink")
    liar.type, liar.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with tar.open("r+b") as opened:
        opened.truncate(512 + 1024)
        opened.seek(1536)
        opened.write(liar.tobuf(tarfile.GNU_FORMAT))
        opened.truncate(1 << 34)  # a sparse file: 16 GB that are not there
    images, rejected = index.build(tar)
    assert paths(images) == ["a.tar::0.jpg"]
    assert "a name of 8589934592 bytes" in reasons(rejected)["a.tar"]


@pytest.mark.parametrize("content", [b"", b"\0" * 1024, b"no tar" * 200, b"\x1f\x8b\x08" * 200])
def test_a_tar_without_images_is_refused_with_its_reason(tmp_path: Path, content: bytes) -> None:
    file(tmp_path / "a.tar", content)
    good = file(tmp_path / "good.jpg", image())
    with pytest.raises(UsageError, match="no image in"):
        index.build(tmp_path / "a.tar")
    images, rejected = index.build([tmp_path / "a.tar", good])
    assert paths(images) == ["good.jpg"]
    is_empty_archive = content == b"\0" * 1024
    assert list(reasons(rejected)) == ([] if is_empty_archive else ["a.tar"])


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.addfile(member("0.jpg", image()), io.BytesIO(image()))
    with pytest.raises(UsageError, match=r"no random access: unpack it \(gunzip"):
        index.build(tmp_path / "a.tar.gz")


def test_memory_stays_flat_over_a_large_tar(tmp_path: Path) -> None:
    index.build(shard(tmp_path / "small.tar", ("0.jpg", image())))
    large = image() + bytes(20 << 20)
    tar = shard(tmp_path / "a.tar", *((f"{i}.jpg", large) for i in range(10)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, _ = index.build(tar)
    assert len(images) == 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY_BYTES


def test_a_tar_that_was_cut_since_it_was_indexed_is_a_read_error(tmp_path: Path) -> None:
    tar = shard(tmp_path / "a.tar", ("0.jpg", image()))
    images, _ = index.build(tar)
    os.truncate(tar, 600)
    with pytest.raises(BadInputError, match="shorter than it was"):
        images.read_bytes(0)


@pytest.mark.parametrize("pattern", ["s-{000..002}.tar", "s-*.tar", "s-{000,001,002}.tar"])
def test_braces_and_globs_name_shards(tmp_path: Path, pattern: str) -> None:
    for i in range(3):
        shard(tmp_path / f"s-{i:03d}.tar", (f"{i}.jpg", image()))
    images, _ = index.build(str(tmp_path / pattern))
    assert paths(images) == [f"s-{i:03d}.tar::{i}.jpg" for i in range(3)]
    assert images.table["source"].to_pylist() == [0, 1, 2]
    require_readable(images)


# Parquet with images


def table(
    path: Path, contents: Sequence[bytes | None], rows: int = 2, **columns: list[int]
) -> Path:
    structs = [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(contents)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrow_table = pa.table({"image": pa.array(structs, kind), **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(arrow_table, path, row_group_size=rows)
    return path


def test_rows_of_a_hugging_face_parquet_are_images_with_named_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", [image(40 + i) for i in range(5)], label=[0, 1, 1, -1, 2])
    features = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    content = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(content, path, row_group_size=2)
    images, rejected = index.build(path)
    assert paths(images) == [f"a.parquet#{i}" for i in range(5)]
    assert images.labels == ["cat", "dog", "dog", None, "2"]
    assert rejected == []
    require_readable(images)


def test_a_binary_column_holds_images_too(tmp_path: Path) -> None:
    content = pa.table({"jpg": [image(40), image(41)], "label": ["a", "b"], "n": [1, 2]})
    pq.write_table(content, tmp_path / "a.parquet")
    images, _ = index.build(tmp_path / "a.parquet")
    assert images.labels == ["a", "b"]
    require_readable(images)


def test_a_second_image_column_is_refused_by_name_until_one_is_chosen(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    mask = pa.array([{"bytes": image(50), "path": ""}], kind)
    path = table(tmp_path / "a.parquet", [image(40)], mask=mask)
    with pytest.raises(UsageError, match=r"2 columns: image, mask(.|\n)*--image-column image"):
        index.build(path)
    out, chosen = str(tmp_path / "i.parquet"), ["--image-column", "mask"]
    assert CliRunner().invoke(app, ["scan", str(path), "--out", out, *chosen]).exit_code == 0
    images, _ = index.build(out)
    assert images.widths.tolist() == [50]
    require_readable(images)
    with pytest.raises(UsageError, match=r"no image column 'label'\nexpected: image, mask"):
        index.build(path, image_column="label")


def test_a_parquet_row_without_an_image_is_a_reject(tmp_path: Path) -> None:
    contents = [image(), None, b"<html>", b"", image(60)]
    images, rejected = index.build(table(tmp_path / "a.parquet", contents))
    assert paths(images) == ["a.parquet#0", "a.parquet#4"]
    assert reasons(rejected) == {
        "a.parquet#1": "no image bytes in this row",
        "a.parquet#2": "not an image",
        "a.parquet#3": "empty file",
    }
    require_readable(images)


def test_a_file_is_read_with_the_time_that_it_has_then(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(image(1))
    os.utime(path, ns=(1, 1_000_000_001))
    images, _ = index.build(tmp_path)
    assert images.read(0) == (path.read_bytes(), 1_000_000_001)
    path.write_bytes(image(2))
    os.utime(path, ns=(1, 2_000_000_002))
    assert images.read(0) == (path.read_bytes(), 2_000_000_002)
    assert images.table["mtime_ns"].to_pylist() == [1_000_000_001]


def test_a_part_of_a_container_has_the_containers_time(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", ("x.jpg", image(42)))
    table(tmp_path / "t.parquet", [image(43)])
    for name, content in (("s.tar", image(42)), ("t.parquet", image(43))):
        os.utime(tmp_path / name, ns=(1, 3_000_000_003))
        images, _ = index.build(tmp_path / name)
        assert images.read(0) == (content, 3_000_000_003)


def test_only_the_row_groups_used_last_stay_in_memory(tmp_path: Path) -> None:
    content = [image(40 + i) + bytes(100_000) for i in range(8)]
    images, _ = index.build(table(tmp_path / "a.parquet", content, rows=2))
    groups = RowGroups(most_bytes=450_000)
    for row in [0, 7, 3, 5, 1, 0, 6]:
        assert groups.read(images.sources[0], row) == content[row]
        assert groups.bytes < 450_000


def test_a_parquet_without_images_or_paths_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [b""], "z": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="columns x, y, z: neither images nor a column `path`"):
        index.build(tmp_path / "a.parquet")
    file(tmp_path / "b.parquet", b"PAR1 not really")
    with pytest.raises(UsageError, match="not a readable parquet file"):
        index.build(tmp_path / "b.parquet")


# Lists


def test_a_list_names_files_from_its_own_folder(tmp_path: Path) -> None:
    file(tmp_path / "lists/near.jpg", image(40))
    far = file(tmp_path / "far.jpg", image(41))
    strange = file(tmp_path / "lists" / os.fsdecode(b"latin-\xe9.jpg"), image(42))
    file(tmp_path / "lists/notes.dat", b"nothing")
    os.mkfifo(tmp_path / "lists/pipe.jpg")
    lines = [
        "near.jpg",
        "../far.jpg",
        str(far),
        "",
        "gone.jpg",
        "near.jpg",
        "notes.dat",
        "pipe.jpg",
    ]
    content = "\n".join(lines).encode() + b"\r\n" + os.fsencode(strange.name) + b"\n"
    images, rejected = index.build(file(tmp_path / "lists/a.txt", content))
    assert paths(images) == ["near.jpg", "../far.jpg", str(far), "latin-%E9.jpg"]
    assert reasons(rejected) == {
        "gone.jpg": "cannot be read: No such file or directory",
        "notes.dat": "not an image",
        "pipe.jpg": "cannot be read: not a regular file",
    }
    require_readable(images)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_with_columns_may_name_labels(tmp_path: Path, kind: str) -> None:
    names = ["a, b.jpg", "c.jpg", "d.jpg"]
    for i, name in enumerate(names):
        file(tmp_path / name, image(40 + i))
    list_path = tmp_path / f"l.{kind}"
    if kind == "csv":
        list_path.write_text('label,path\ncat,"a, b.jpg"\n,c.jpg\ndog,d.jpg\n')
    else:
        pq.write_table(pa.table({"path": names, "label": ["cat", None, "dog"]}), list_path)
    images, rejected = index.build(list_path)
    assert (paths(images), images.labels, rejected) == (names, ["cat", None, "dog"], [])
    require_readable(images)


def test_a_csv_without_paths_is_refused_with_its_columns(tmp_path: Path) -> None:
    list_path = file(tmp_path / "a.csv", b"file,label\n1.jpg,cat\n")
    with pytest.raises(UsageError, match=r"no column `path` \(there is: file, label\)"):
        index.build(list_path)


# Several


def everything(tmp_path: Path) -> list[Path]:
    file(tmp_path / "train/cat/1.jpg", image(40))
    file(tmp_path / "val/cat/1.jpg", image(41))
    shard(tmp_path / "shards/a.tar", ("1.jpg", image(42)))
    table(tmp_path / "shards/a.parquet", [image(43)])
    file(tmp_path / "listed/1.jpg", image(44))
    file(tmp_path / "listed/l.txt", b"1.jpg\n")
    file(tmp_path / "one.png", image(45, "PNG"))
    names = ["train", "val", "shards/a.tar", "shards/a.parquet", "listed/l.txt", "one.png"]
    return [tmp_path / name for name in names]


EVERYTHING = [
    "train/cat/1.jpg",
    "val/cat/1.jpg",
    "shards/a.tar::1.jpg",
    "shards/a.parquet#0",
    "listed/1.jpg",
    "one.png",
]


def test_several_inputs_have_paths_from_the_folder_that_holds_them_all(tmp_path: Path) -> None:
    images, rejected = index.build(everything(tmp_path))
    assert (paths(images), images.root, rejected) == (EVERYTHING, tmp_path, [])
    assert images.labels == ["cat", "cat", None, None, None, None]
    assert images.widths.tolist() == [40, 41, 42, 43, 44, 45]
    require_readable(images)


def test_an_index_is_an_input_alone_and_among_others(tmp_path: Path) -> None:
    images, _ = index.build(everything(tmp_path / "data"))
    images.save(tmp_path / "index.parquet")
    alone, _ = index.build(tmp_path / "index.parquet")
    assert alone.fingerprint == images.fingerprint
    require_readable(alone)
    more = file(tmp_path / "more/1.jpg", image(50))
    both, _ = index.build([tmp_path / "index.parquet", more.parent])
    assert paths(both) == [*(f"data/{path}" for path in EVERYTHING), "more/1.jpg"]
    require_readable(both)
    both.save(tmp_path / "both.parquet")
    assert index.open_index(tmp_path / "both.parquet").sources == both.sources


def test_a_file_that_several_inputs_name_is_one_image(tmp_path: Path) -> None:
    file(tmp_path / "images/1.jpg", image())
    list_path = file(tmp_path / "l.txt", b"images/1.jpg\nimages/1.jpg\n")
    images, rejected = index.build([tmp_path / "images", list_path])
    assert (paths(images), rejected) == (["images/1.jpg"], [])


def test_what_is_missing_or_unknown_is_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder or file(.|\n)*tar shards"):
        index.build(tmp_path / "missing.tar")
    with pytest.raises(UsageError, match="nothing matches this pattern"):
        index.build(str(tmp_path / "*.tar"))
    with pytest.raises(UsageError, match=r"no input that btpipe knows(.|\n)*tar shards"):
        index.build(file(tmp_path / "notes.md", b"hello"))


# Whether they are still what they were


def test_changes_are_seen_in_every_kind_of_source(tmp_path: Path) -> None:
    images, _ = index.build(everything(tmp_path))
    assert not change_detection.changes(images, frozenset())
    file(tmp_path / "train/cat/2.jpg", image(46))
    (tmp_path / "val/cat/1.jpg").write_bytes(image(41) + b"\0")
    shard(tmp_path / "shards/a.tar", ("1.jpg", image(42)), ("2.jpg", image(42)))
    table(tmp_path / "shards/a.parquet", [image(430)])
    (tmp_path / "listed/l.txt").write_text("1.jpg\n../train/cat/2.jpg\n")
    (tmp_path / "one.png").unlink()
    changes = change_detection.changes(images, frozenset())
    added = ["train/cat/2.jpg", "shards/a.tar::2.jpg", "listed/../train/cat/2.jpg"]
    assert changes.added == added
    assert changes.removed == ["one.png"]
    assert changes.resized == ["val/cat/1.jpg", "shards/a.parquet#0"]


def test_a_container_that_was_only_touched_is_as_it_was(tmp_path: Path) -> None:
    tar = shard(tmp_path / "a.tar", ("0.jpg", image()), ("1.jpg", image()))
    images, _ = index.build(tar)
    os.utime(tar, (1, 1))
    assert not change_detection.changes(images, frozenset())
    tar.unlink()
    with pytest.raises(MachineError, match="are not there"):
        change_detection.changes(images, frozenset())


# URLs


@pytest.fixture
def bucket() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def put(url: str, content: bytes) -> None:
    import fsspec  # noqa: PLC0415

    with fsspec.open(url, "wb") as opened:
        opened.write(content)


def test_folders_shards_and_tables_are_read_from_urls(tmp_path: Path, bucket: str) -> None:
    put(f"{bucket}/images/cat/1.jpg", image(40))
    put(f"{bucket}/images/dog/2.png", image(41, "PNG") + bytes(2 << 20))
    put(f"{bucket}/images/dog/bad.jpg", b"<html>")
    put(f"{bucket}/s-0.tar", shard(tmp_path / "s.tar", ("x.jpg", image(42))).read_bytes())
    put(f"{bucket}/t.parquet", table(tmp_path / "t.parquet", [image(43)]).read_bytes())
    inputs = [f"{bucket}/images", f"{bucket}/s-{{0..0}}.tar", f"{bucket}/t.parquet"]
    images, rejected = index.build(inputs)
    assert paths(images) == [
        "memory://bucket/images/cat/1.jpg",
        "memory://bucket/images/dog/2.png",
        "memory://bucket/s-0.tar::x.jpg",
        "memory://bucket/t.parquet#0",
    ]
    assert images.labels == ["cat", "dog", None, None]
    assert list(reasons(rejected)) == ["memory://bucket/images/dog/bad.jpg"]
    require_readable(images)
    assert not change_detection.changes(images, frozenset())
    put(f"{bucket}/images/cat/3.jpg", image(44))
    assert change_detection.changes(images, frozenset()).added == [
        "memory://bucket/images/cat/3.jpg"
    ]


def test_a_list_may_name_urls(tmp_path: Path, bucket: str) -> None:
    put(f"{bucket}/1.jpg", image(40))
    images, rejected = index.build(
        file(tmp_path / "l.txt", f"{bucket}/1.jpg\n{bucket}/2.jpg\n".encode())
    )
    assert paths(images) == [f"{bucket}/1.jpg"]
    assert reasons(rejected)[f"{bucket}/2.jpg"].startswith("cannot be read")
    require_readable(images)


def test_a_url_of_an_unknown_kind_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r"pip install 'btpipe\[remote\]'"):
        index.build("nonsense://bucket/a.tar")


# Large ones


def large(tmp_path: Path) -> index.Index:
    file(tmp_path / "images/1.jpg", image())
    images, _ = index.build(tmp_path / "images")
    table = pa.concat_tables([images.table] * index.MAPPED_ROWS).combine_chunks()
    return index.Index(images.root, table, images.sources)


def test_a_large_index_is_mapped_and_not_read(tmp_path: Path) -> None:
    images = large(tmp_path)
    images.save(tmp_path / "index.parquet")
    before = pa.total_allocated_bytes()
    again = index.open_index(tmp_path / "index.parquet")
    taken = pa.total_allocated_bytes() - before
    assert taken < images.table.nbytes // 10
    assert again.table.equals(images.table)
    require_readable(index.Index(again.root, again.table.slice(7, 1), again.sources))


@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_without_its_mapped_table_a_large_index_is_read_from_parquet(
    tmp_path: Path, damage: str
) -> None:
    images = large(tmp_path)
    images.save(tmp_path / "index.parquet")
    mapped = tmp_path / "index.arrow"
    if damage == "cut":
        os.truncate(mapped, 1000)
    elif damage == "gone":
        mapped.unlink()
    else:
        index.Index(images.root, pa.concat_tables([images.table] * 2), images.sources).save(
            tmp_path / "other.parquet"
        )
        (tmp_path / "other.arrow").replace(mapped)
    assert index.open_index(tmp_path / "index.parquet").table.equals(images.table)


def test_listing_alone_opens_no_file_and_knows_no_sizes(tmp_path: Path) -> None:
    file(tmp_path / "cat/1.jpg", b"no image, but who looks")
    file(tmp_path / "cat/notes.txt", b"")
    images, rejected = index.build(tmp_path, depth="list")
    assert (paths(images), rejected, images.widths.tolist()) == (["cat/1.jpg"], [], [0])
    assert images.labels == ["cat"]
