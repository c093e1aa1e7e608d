"""The table of vectors: its columns, its footer, and how parts become one file.

path       string         relative to the root; bytes that are not UTF-8 as %XX
path_bytes binary         the exact name where it is not UTF-8, else null
digest     string         sha256 of the file's bytes
bytes      int64          size of the file when it was read
mtime_ns   int64          its time of change then; a container's for what lies within one
width      int32          pixels, turned as EXIF says
height     int32
label      string         class folder, null where the input names none
embedding  fixed_size_list<float32>[D], or float16
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import __version__, artifact
from btpipe.data import PIXELS_VERSION
from btpipe.errors import IntegrityError
from btpipe.events import Rejected

FORMAT_VERSION = 2
ROW_GROUP_ROWS = 4096
"""2 MB of vectors at D 128, 32 MB at D 2048: small enough to stream, large enough to scan."""

FORMAT = "btpipe.format_version"
VERSION = "btpipe.version"
PIXELS = "btpipe.pixels"
BUNDLE = "btpipe.bundle"
INPUT = "btpipe.input"
ROOT = "btpipe.root"
SHARD = "btpipe.shard"

Dtype = Literal["float32", "float16"]
TYPES: Mapping[Dtype, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}


@dataclasses.dataclass(frozen=True)
class Footer:
    """What a table says about where its vectors are from. No time stamp: same job, same bytes.

    `bundle` is the bundle's digest, `input` the fingerprint of the files that were listed. Rows of
    two tables may stand in one if all but `input` and `root` are equal. `shard` is "i/n" in a table
    of the i-th (from 0) of n shares of the input's rows, and empty in a whole one.
    """

    bundle: str
    input: str
    preprocessing: str
    precision: str
    root: str
    dimension: int
    dtype: Dtype = "float32"
    normalize: bool = False
    layer: str = "pooled"
    engine: str = "onnx"
    shard: str = ""

    def metadata(self) -> dict[str, str]:
        """Key-value metadata of the parquet file."""
        return {
            FORMAT: str(FORMAT_VERSION),
            VERSION: __version__,
            PIXELS: str(PIXELS_VERSION),
            BUNDLE: self.bundle,
            INPUT: self.input,
            "btpipe.preprocessing": self.preprocessing,
            "btpipe.precision": self.precision,
            ROOT: self.root,
            "btpipe.dimension": str(self.dimension),
            "btpipe.dtype": self.dtype,
            "btpipe.normalize": str(self.normalize).lower(),
            "btpipe.layer": self.layer,
            "btpipe.engine": self.engine,
            **({SHARD: self.shard} if self.shard else {}),
        }

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Footer":
        """The footer that `metadata` wrote.

        Raises:
            IntegrityError: something is missing.
        """
        texts = {
            field.name: metadata.get(f"btpipe.{field.name}") for field in dataclasses.fields(cls)
        }
        try:
            return cls(
                bundle=str(texts["bundle"]),
                input=str(texts["input"]),
                preprocessing=str(texts["preprocessing"]),
                precision=str(texts["precision"]),
                root=str(texts["root"]),
                dimension=int(texts["dimension"] or ""),
                dtype="float16" if texts["dtype"] == "float16" else "float32",
                normalize=texts["normalize"] == "true",
                layer=str(texts["layer"]),
                engine=str(texts["engine"]),
                shard=texts["shard"] or "",
            )
        except ValueError as error:
            raise IntegrityError(f"says nothing usable about its vectors ({metadata})") from error

    def identity(self) -> dict[str, str]:
        """`metadata` without the versions that wrote it: equal where the rows are the same."""
        return {key: t for key, t in self.metadata().items() if key not in (FORMAT, VERSION)}

    def settings(self) -> dict[str, str]:
        """`identity` without what is the input's: equal where rows may stand in one table."""
        return {key: t for key, t in self.identity().items() if key not in (INPUT, ROOT)}


def schema(footer: Footer) -> pa.Schema:
    """The columns of a table of vectors of this dimension."""
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("path_bytes", pa.binary()),
            pa.field("digest", pa.string(), nullable=False),
            pa.field("bytes", pa.int64(), nullable=False),
            pa.field("mtime_ns", pa.int64(), nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("embedding", pa.list_(TYPES[footer.dtype], footer.dimension)),
        ],
        metadata=footer.metadata(),
    )


def rejects_schema(footer: Footer) -> pa.Schema:
    """The columns of the table of inputs that have no vector, and why."""
    types = {name: pa.string() for name in ("path", "stage", "kind", "reason")}
    types |= {name: pa.int64() for name in ("bytes", "mtime_ns")}
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, metadata=footer.metadata())


def rows(
    footer: Footer, listed: pa.Table, digests: Sequence[str], vectors: NDArray[np.float32]
) -> pa.Table:
    """The rows of an index (n), their digests and vectors (n, D) as a table of vectors."""
    assert vectors.shape == (listed.num_rows, footer.dimension)
    flat = pa.array(stored(footer, vectors).reshape(-1))
    columns = {
        **{name: listed[name] for name in ("path", "path_bytes")},
        "digest": pa.array(list(digests), pa.string()),
        **{name: listed[name] for name in ("bytes", "mtime_ns", "width", "height")},
        "label": listed["label"].cast(pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, footer.dimension),
    }
    return pa.Table.from_arrays(list(columns.values()), schema=schema(footer))


def stored(footer: Footer, vectors: NDArray[np.float32]) -> NDArray[np.floating]:
    """The vectors in the table's type; what is beyond it becomes infinite."""
    with np.errstate(over="ignore"):
        return vectors.astype(footer.dtype, copy=False)


def write(path: Path, columns: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Streams tables into one parquet file in row groups of equal length, and fsyncs it.

    However the rows are spread over `tables`, the file is the same. Pages carry a checksum.
    """
    with pq.ParquetWriter(
        path.absolute(),  # pyarrow takes a relative name with a colon for a URI
        columns,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=["label", "stage", "kind"],
    ) as writer:
        for group in _groups(tables, columns):
            writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
    artifact.fsync_path(path)


def _groups(tables: Iterable[pa.Table], columns: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of `ROW_GROUP_ROWS`, the last one shorter."""
    waiting = columns.empty_table()
    for table in tables:
        # Only the rows count: a part's own metadata must not reach the file.
        waiting = pa.concat_tables([waiting, table.replace_schema_metadata(columns.metadata)])
        while waiting.num_rows >= ROW_GROUP_ROWS:
            yield waiting.slice(0, ROW_GROUP_ROWS).combine_chunks()
            waiting = waiting.slice(ROW_GROUP_ROWS).combine_chunks()
    if waiting.num_rows:
        yield waiting.combine_chunks()


def write_rejects(path: Path, footer: Footer, rejects: Iterable[Rejected]) -> None:
    """Writes the table of rejects, by path; without any it still has its columns."""
    ordered = sorted(rejects, key=lambda reject: (reject.path, reject.stage))
    columns = rejects_schema(footer)
    content = [dataclasses.asdict(reject) for reject in ordered]
    write(path, columns, [pa.Table.from_pylist(content, schema=columns)])


def read_rejects(out: Path) -> list[Rejected]:
    """The inputs without a vector, as they stand beside the table `out`."""
    return [Rejected(**entry) for entry in read(rejects_path(out)).to_pylist()]


def read(path: Path) -> pa.Table:
    """A table of vectors or rejects, with its pages checked."""
    return pq.read_table(path.absolute(), page_checksum_verification=True)


def footer_of(path: Path) -> Mapping[str, str] | None:
    """The key-value metadata of a table that btpipe wrote; None where there is no file.

    Raises:
        IntegrityError: a file that is no table of btpipe's, or one of a newer format.
    """
    if not path.exists():
        return None
    try:
        metadata = pq.read_schema(path.absolute()).metadata
    except (pa.ArrowException, OSError) as error:
        raise _foreign(path, error) from error
    return parse_footer(metadata, path)


def parse_footer(metadata: Mapping[bytes, bytes] | None, path: Path) -> Mapping[str, str]:
    """The key-value metadata of a schema that btpipe wrote.

    Raises:
        IntegrityError: one of something else, or of a newer format.
    """
    try:
        texts = {key.decode(): value.decode() for key, value in (metadata or {}).items()}
        version = int(texts[FORMAT])
    except (KeyError, ValueError) as error:
        raise _foreign(path, error) from error
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"format_version {version}, written by btpipe {texts.get(VERSION)}",
            where=path,
            expected=f"format_version {FORMAT_VERSION} or older",
            fix=f"install btpipe {texts.get(VERSION)} or newer",
        )
    return texts


def _foreign(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"is not a table that btpipe wrote ({error!r})",
        where=path,
        fix="choose another --out, or replace it with --overwrite",
    )


def count(path: Path) -> int:
    """Rows of a parquet file, from its footer."""
    return int(pq.read_metadata(path.absolute()).num_rows)


def rejects_path(out: Path) -> Path:
    """`X.parquet` -> `X.rejects.parquet`."""
    stem = out.name.removesuffix(".parquet")
    return out.with_name(f"{stem}.rejects.parquet")


def work_path(out: Path) -> Path:
    """`X.parquet` -> `X.parquet.work`: the folder of the job that writes it."""
    return out.with_name(f"{out.name}.work")


def take_place(temporary: Path, path: Path) -> None:
    """Renames a finished file to its final name, for good."""
    os.replace(temporary, path)
    artifact.fsync_path(path.parent)


def fingerprint(listed: pa.Table, rejects: Sequence[Rejected]) -> str:
    """sha256 of what was listed: path, bytes and mtime of each file, and what was refused."""
    names = ("path", "path_bytes", "bytes", "mtime_ns", "width", "height", "label")
    total = [f"files {listed.num_rows}"]
    for batch in listed.select(list(names)).to_batches(max_chunksize=65_536):
        lines = json.dumps([_plain(row) for row in batch.to_pylist()], sort_keys=True)
        total.append(artifact.json_digest(lines))
    total += sorted(json.dumps([reject.path, reject.stage]) for reject in rejects)
    return artifact.json_digest(total)


def _plain(row: Mapping[str, object]) -> dict[str, object]:
    return {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
