"""Which images there are: an Arrow table of paths, sizes and labels, and where each lies.

Content decides what is an image, not the extension. Every file with the name or the content of an
image ends in the table or in the rejects. Hidden files and folders are passed over.
"""

import dataclasses
import functools
import hashlib
import io
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.data import index_checksum, index_mmap, rejects
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import Patience
from btpipe.data.sources import Source, collecting, folder, inputs, opening, parquet, source
from btpipe.data.sources.listing_cache import Recall
from btpipe.data.sources.rows import SCHEMA
from btpipe.data.sources.source import SHARDS
from btpipe.errors import BtpipeError, IntegrityError, MachineError, UsageError
from btpipe.events import Rejected, Report, ignore

__all__ = ["FORMAT_VERSION", "SCHEMA", "Index", "Source", "build", "open_index"]

FORMAT_VERSION = 2
MAPPED_ROWS = 100_000
"""An index of so many images has its table beside it, uncompressed, to be mapped into memory."""
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Index:
    """The images of `sources`, one row each; `width` and `height` are upright.

    `root` is the folder that holds all of it. Without sources it is the only one.
    """

    root: Path
    table: pa.Table
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def origins(self) -> tuple[Source, ...]:
        """`sources`, or the only one."""
        return self.sources or (Source("folder", os.fspath(self.root)),)

    def file(self, row: int) -> Path:
        """The file of a row, by the exact bytes of its name; of a tar member it is the tar."""
        origin = self.origins[self.table["source"][row].as_py()]
        if origin.is_container:
            return Path(origin.place)
        exact = self.table["path_bytes"][row].as_py()
        path = os.fsdecode(exact) if exact else self.table["path"][row].as_py()
        return Path(folder.file_location(origin, path.removeprefix(origin.prefix)))

    def read_bytes(self, row: int) -> bytes:
        """The image file's content; raises as `read`."""
        return self.read(row)[0]

    def read(self, row: int) -> tuple[bytes, int]:
        """The image file's content and mtime_ns; what a disk or network fails to give is retried.

        The time is the file's own when it is read, or its container's, or what a server listed.

        Raises:
            BadInputError: empty, vanished, not permitted, no longer a regular file, shorter by now.
            MachineError: its source has given nothing for minutes.
        """
        number = self.table["source"][row].as_py()
        read, other = self._readers[number], functools.partial(self._read_another, number)
        try:
            content, mtime_ns = self._patience[number].read(functools.partial(read, row), other)
        except OSError as error:
            raise rejects.unreadable(error) from error
        if not content:
            raise rejects.UnreadableError("empty file")
        return content, mtime_ns

    def with_rejects(
        self, rows: NDArray[np.int64], results: Sequence[Result | BadInputError]
    ) -> list[Result | Rejected]:
        """The results of decoding these rows, with a reject for each that has none."""
        return [
            self.reject(int(row), "decode", result) if isinstance(result, BadInputError) else result
            for row, result in zip(rows, results, strict=True)
        ]

    def reject(self, row: int, stage: str, error: BadInputError) -> Rejected:
        """The row as an input that is not used.

        With size and time where it is this very content that is bad: it is not tried again.
        """
        path, *stamp = (self.table[n][row].as_py() for n in ("path", "bytes", "mtime_ns"))
        if isinstance(error, rejects.UnreadableError):
            stamp, stage = [], "read" if stage == "decode" else stage
        return Rejected(path, stage, error.kind, error.reason, *stamp)

    @functools.cached_property
    def _readers(self) -> list[opening.Read]:
        row_groups = parquet.RowGroups()
        return [opening.reader(origin, self.table, row_groups) for origin in self.origins]

    @functools.cached_property
    def _patience(self) -> list[Patience]:
        return opening.patience(self.origins)

    def _read_another(self, number: int) -> None:
        """Reads an image of what shares its patience with a source."""
        alike = [i for i, each in enumerate(self._patience) if each is self._patience[number]]
        rows = np.flatnonzero(np.isin(np.array(self.table["source"]), alike))
        row = random.choice(rows.tolist())  # noqa: S311
        self._readers[self.table["source"][row].as_py()](row)

    @property
    def recall(self) -> Recall:
        """What `build` may take from here instead of opening files again."""
        return Recall(self.table, self.origins)

    @functools.cached_property
    def widths(self) -> NDArray[np.int32]:
        return np.array(self.table["width"], dtype=np.int32)

    @functools.cached_property
    def heights(self) -> NDArray[np.int32]:
        return np.array(self.table["height"], dtype=np.int32)

    @property
    def labels(self) -> list[str | None]:
        return list(self.table["label"].to_pylist())

    @functools.cached_property
    def fingerprint(self) -> str:
        """The data's identity: sha256 over path, size in bytes, width and height of every row."""
        digest = hashlib.sha256()
        for i, batch in enumerate(self.table.select(["path"]).to_batches(max_chunksize=65_536)):
            paths = "\0".join(batch["path"].to_pylist())
            digest.update(f"\0{paths}".encode() if i else paths.encode())
        for name in ("bytes", "width", "height"):
            digest.update(np.array(self.table[name], dtype="<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the index as parquet, whole or not at all; a large one as `X.arrow` as well.

        Raises:
            MachineError: no space, or no permission.
        """
        metadata = {"root": os.fsencode(self.root), "format_version": str(FORMAT_VERSION)}
        metadata |= {"sources": source.to_json(self.sources)}
        metadata |= index_checksum.of(self.table, self.root, self.sources)
        mapped = path.with_suffix(".arrow")
        if len(self) >= MAPPED_ROWS:
            index_mmap.write(mapped, self.table)
        else:
            mapped.unlink(missing_ok=True)
        content = io.BytesIO()
        described = self.table.replace_schema_metadata(metadata)
        pq.write_table(described, content, write_page_checksum=True)
        artifact.write_file(path, content.getvalue())


def open_index(path: Path) -> Index:
    """The index that `save` wrote.

    Raises:
        IntegrityError: no such file, not an index, or written by a newer btpipe.
    """
    try:
        metadata = pq.read_schema(path.absolute()).metadata or {}
        table = index_mmap.read(path.with_suffix(".arrow"), metadata.get(b"content", b"").decode())
        table = pq.read_table(path.absolute()) if table is None else table
        root, version = Path(os.fsdecode(metadata[b"root"])), int(metadata[b"format_version"])
        origins = source.from_json(metadata.get(b"sources", b"[]").decode())
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        what = f"not a readable index ({error})"
        raise IntegrityError(what, where=path, fix="make it again from the folder") from error
    if version > FORMAT_VERSION:
        expected = f"format_version {FORMAT_VERSION} or older"
        fix = "install a newer btpipe, or make the index again"
        raise IntegrityError(f"format_version {version}", where=path, expected=expected, fix=fix)
    table = table.replace_schema_metadata(None)
    if table.schema != SCHEMA:
        raise IntegrityError(
            f"columns {table.column_names}", where=path, expected=f"{SCHEMA.names}"
        )
    return Index(root, table.combine_chunks(), origins)


def build(
    names: Path | str | Sequence[Path | str],
    on_event: Report = ignore,
    depth: Literal["list", "header"] = "header",
    previous: Recall = folder.NOTHING,
    image_column: str = "",
) -> tuple[Index, list[Rejected]]:
    """The images of all inputs, in their order, and what of them cannot be used.

    An input is whatever `sources.inputs.KINDS` says. Of a folder the paths are relative to it, of
    several inputs to the folder that holds them all. `depth` "list" opens no file of a folder or a
    list: the names count, and sizes are 0 for unknown. `previous`: what an earlier index says;
    files of the same path, bytes and mtime stay closed. `image_column`: of parquet files.

    Raises:
        UsageError: an input that is missing or of no known kind, or no image in any of them.
        MachineError: an input that cannot be read, or gives nothing for minutes.
    """
    requested = [names] if isinstance(names, Path | str) else list(names)
    locations = inputs.expand(requested)
    indexes = {
        location: _opened(Path(location)) for location in locations if inputs.is_index(location)
    }
    root = inputs.root_of(locations, {location: index.root for location, index in indexes.items()})
    meter, parts = collecting.ListingMeter(on_event), []
    collect = functools.partial(
        collecting.collect, previous=previous, list_only=depth == "list", on_event=on_event
    )
    for location in locations:
        if location in indexes:
            parts.append(_moved(indexes[location], rejects.path_beside(Path(location)), root))
        else:
            origin = inputs.describe(location, root, image_column)
            parts.append(collect(origin, location.rpartition("/")[2], meter.update))
        meter.close(len(parts[-1][0]) + len(parts[-1][2]))
    table, sources, refused = collecting.merge(parts)
    rejected = sorted(set(refused), key=lambda event: (event.path, event.reason))
    for event in rejected:
        on_event(event)
    if not len(table):
        raise _no_image(requested, meter.files, rejected)
    return Index(root, table, sources), rejected


def _opened(path: Path) -> Index:
    """An index that is an input. One among shards is of those beside it, wherever they are by now.

    Raises:
        IntegrityError: as `open_index`, or a shard is missing or cut.
    """
    index, folder = open_index(path), path.parent
    if index.root == folder or not inputs.holds_shards(folder):
        return index
    artifact.read(folder, SHARDS)
    sources = [
        dataclasses.replace(s, place=str(folder / Path(s.place).name)) for s in index.sources
    ]
    return Index(folder, index.table, tuple(sources))


def _moved(index: Index, rejects_path: Path, root: Path) -> collecting.Part:
    """An index as an input: its rows are the very files, with paths below another root.

    What its scan rejected, the file `rejects_path`, stays rejected.
    """
    name = inputs.relative(os.fspath(index.root), root)
    sources = [origin.listed() for origin in index.origins]
    bad = [rejects.below(one, f"{name}/" if name else "") for one in rejects.read(rejects_path)]
    if not name:
        return index.table, tuple(sources), bad
    table, prefix = index.table, f"{name}/"
    paths = table["path"]
    is_absolute = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    longer = pc.binary_join_element_wise(prefix, paths, "")
    path = pc.if_else(is_absolute, paths, longer)
    exact = [raw and os.fsencode(prefix) + raw for raw in table["path_bytes"].to_pylist()]
    for column, values in (("path", path), ("path_bytes", pa.array(exact, pa.binary()))):
        at = SCHEMA.get_field_index(column)
        table = table.set_column(at, SCHEMA.field(column), values)
    return table, tuple(dataclasses.replace(s, prefix=prefix + s.prefix) for s in sources), bad


def _no_image(
    requested: Sequence[Path | str], files: int, rejected: Sequence[Rejected]
) -> BtpipeError:
    first = f", such as {rejected[0].path}: {rejected[0].reason}" if rejected else ""
    what = f"no image in {files} files ({len(rejected)} rejected{first})"
    where = " ".join(map(str, requested))
    if any(bad.kind == "machine" for bad in rejected):
        return MachineError(what, where=where, fix="see that it can be read, and start again")
    expected = f"JPEG, PNG, WebP, TIFF, BMP, PPM or JPEG 2000 in {inputs.KINDS}"
    fix = "put the images there, or name what holds them"
    return UsageError(what, where=where, expected=expected, fix=fix)
