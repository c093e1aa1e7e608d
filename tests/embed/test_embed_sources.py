"""`btpipe embed` on what is not a folder: the same vectors, whatever the images come in."""

import hashlib
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btpipe.data import index
from btpipe.data.scan import Depth, scan
from btpipe.embed.job import JobOptions, embed
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import UsageError
from btpipe.events import ignore

IMAGES = 6


def test_the_vectors_are_the_same_from_folder_tar_parquet_list_and_index(
    home: Path, tmp_path: Path
) -> None:
    files = sorted((home / "images").rglob("*.jpg"))[:IMAGES]
    contents = [path.read_bytes() for path in files]
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, content in enumerate(contents):
            (tmp_path / "images" / f"{i}.jpg").write_bytes(content)
            info = tarfile.TarInfo(f"../{i}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"image": contents}), tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "a.txt").write_text("".join(f"images/{i}.jpg\n" for i in range(IMAGES)))
    index.build(tmp_path / "images")[0].save(tmp_path / "index.parquet")
    names = ["images", "a.tar", "a.parquet", "a.txt", "index.parquet"]
    out = tmp_path / "v.parquet"
    embed(
        [tmp_path / name for name in names],
        out,
        EncoderConfig(home / "exports/tiny", device="cpu"),
        ignore,
    )
    table = pq.read_table(out)
    shown = {
        "images": [f"images/{i}.jpg" for i in range(IMAGES)],
        "a.tar": [f"a.tar::../{i}.jpg" for i in range(IMAGES)],
        "a.parquet": [f"a.parquet#{i}" for i in range(IMAGES)],
    }
    # The list and the index name files that the folder holds: those are the same images.
    assert table["path"].to_pylist() == [path for group in shown.values() for path in group]
    assert pq.read_metadata(tmp_path / "v.rejects.parquet").num_rows == 0
    first, second, third = (table.slice(i * IMAGES, IMAGES) for i in range(3))
    for other in (second, third):
        assert other["digest"].equals(first["digest"])
        assert other["embedding"].equals(first["embedding"])


@pytest.mark.parametrize("kind", ["parquet", "csv", "index", "listed", "tar"])
def test_labels_of_any_input_alone_are_in_the_table(home: Path, tmp_path: Path, kind: str) -> None:
    files = sorted((home / "images").rglob("*.jpg"))[9:15]
    labels = [path.parent.name for path in files]
    assert set(labels) == {"a", "b"}
    contents = [path.read_bytes() for path in files]
    source = tmp_path / ("in.parquet" if kind in {"index", "listed"} else f"in.{kind}")
    if kind == "parquet":
        pq.write_table(pa.table({"image": contents, "label": labels}), source)
    elif kind == "tar":
        with tarfile.open(source, "w") as tar:
            for i, (content, label) in enumerate(zip(contents, labels, strict=True)):
                for name, part in ((f"{i}.jpg", content), (f"{i}.cls", label.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
    else:
        pairs = zip(files, labels, strict=True)
        lines = "".join(f"{path},{label}\n" for path, label in pairs)
        (tmp_path / "in.csv").write_text("path,label\n" + lines)
        if kind != "csv":
            depth: Depth = "list" if kind == "listed" else "header"
            scan(tmp_path / "in.csv", source, ignore, depth=depth)
    out = tmp_path / "v.parquet"
    embed(source, out, EncoderConfig(home / "exports/tiny", device="cpu"), ignore)
    table = pq.read_table(out)
    assert table["label"].to_pylist() == labels
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    assert table["digest"].to_pylist() == digests


def test_an_output_that_is_an_input_is_refused_and_stays(home: Path, tmp_path: Path) -> None:
    content = next((home / "images").rglob("*.jpg")).read_bytes()
    pq.write_table(pa.table({"image": [content]}), tmp_path / "a.parquet")
    before = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(UsageError, match="is one of the inputs"):
        embed(
            tmp_path / "a.parquet",
            tmp_path / "a.parquet",
            EncoderConfig(home / "exports/tiny", device="cpu"),
            ignore,
            JobOptions(overwrite=True),
        )
    assert (tmp_path / "a.parquet").read_bytes() == before
