"""Whether the sources still hold the images of an index: names and sizes, no image is opened."""

import dataclasses
import os
from collections.abc import Sequence, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from btpipe.data import rejects
from btpipe.data.index import Index
from btpipe.data.retry import Patience, reading_threads
from btpipe.data.sources import Source, collecting, folder, storage
from btpipe.data.sources.rows import path_of, readable
from btpipe.errors import MachineError

_CHUNK_FILES = 1024
_FIX = "mount or restore it and run the same command again"


@dataclasses.dataclass(frozen=True)
class Changes:
    """Images that came, went, or have another size in bytes than the index says."""

    added: list[str]
    removed: list[str]
    resized: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.resized)


def changes(index: Index, passed_over: Set[str]) -> Changes:
    """How the sources differ from the index; `passed_over` are readable paths of no account.

    100,000 files take about half a second. Of files that the index does not know the headers are
    read: text between the images is no change. A tar or parquet file of the same size and time is
    taken as it was; one of another time is read again.

    Raises:
        MachineError: a source is gone or empty, or a part of it cannot be read.
    """
    total = Changes([], [], [])
    numbers = np.array(index.table["source"], dtype=np.int32)
    sources = index.sources or (Source("folder", os.fspath(index.root)),)
    for number, source in enumerate(sources):
        if source.kind == "synthetic":
            continue  # always there
        rows = index.table if len(sources) == 1 else index.table.filter(pa.array(numbers == number))
        source_changes = (
            _container(source, rows) if source.is_container else _files(source, rows, passed_over)
        )
        total.added.extend(path for path in source_changes.added if path not in passed_over)
        total.removed.extend(path for path in source_changes.removed if path not in passed_over)
        total.resized.extend(path for path in source_changes.resized if path not in passed_over)
    return total


def _container(source: Source, rows: pa.Table) -> Changes:
    try:
        size, mtime_ns = _measure(source)
    except OSError as error:
        what = f"the training images are not there ({error.strerror or error})"
        raise MachineError(what, where=source.place, fix=_FIX) from error
    if (size, mtime_ns) == (source.bytes, source.mtime_ns):
        return Changes([], [], [])
    table, _, _ = collecting.collect(source, "", _ignore)
    current, previous = _contents(table), _contents(rows)
    return Changes(
        [path for path in current if path not in previous],
        [path for path in previous if path not in current],
        [path for path, content in current.items() if previous.get(path, content) != content],
    )


def _contents(table: pa.Table) -> dict[str, tuple[object, ...]]:
    columns = [table[name].to_pylist() for name in ("offset", "bytes", "width", "height")]
    return dict(zip(table["path"].to_pylist(), zip(*columns, strict=True), strict=True))


def _ignore(_done: int, _total: int) -> None:
    """Nobody waits for the count."""


def _files(source: Source, rows: pa.Table, passed_over: Set[str]) -> Changes:
    sizes = dict(zip(_names(source, rows), rows["bytes"].to_pylist(), strict=True))
    names, added = list(sizes), list[str]()
    if source.kind == "folder":
        names = _walked(source, passed_over)
        new = [name for name in names if name not in sizes]
        new = [name for name in new if _shown(source, name) not in passed_over]
        source_rows = folder.look_at(source, new, _ignore)
        added = [path for batch in source_rows.batches for path in batch["path"].to_pylist()]
    elif source.kind == "list":
        added = _new_in_list(source, sizes.keys())
    listing = set(names)
    kept = [name for name in names if name in sizes]
    patience = Patience(source.base)
    with reading_threads(folder.HEADER_THREADS) as pool:
        stats = pool.map(lambda part: _sizes(source, part, patience), _chunks(kept))
        current_sizes = [size for part in stats for size in part]
    changed = [(n, size) for n, size in zip(kept, current_sizes, strict=True) if size != sizes[n]]
    gone = [name for name in sizes if name not in listing]
    if source.kind != "folder":
        gone = [name for name, size in changed if size < 0]
        changed = [(name, size) for name, size in changed if size >= 0]
    return Changes(
        added, [_shown(source, name) for name in gone], [_shown(source, n) for n, _ in changed]
    )


def _walked(source: Source, passed_over: Set[str]) -> list[bytes]:
    """Names of the files in a folder.

    Raises:
        MachineError: it is gone or empty, or a part of it cannot be read.
    """
    if storage.is_url(source.place):
        try:
            return folder.remote_names(source.place)
        except OSError as error:
            what = f"the training images are not there ({error.strerror or error})"
            raise MachineError(what, where=source.place, fix=_FIX) from error
    if not Path(source.place).is_dir():
        raise MachineError("the training images are not there", where=source.place, fix=_FIX)
    names, rejected = folder.walk(source)
    for bad in rejected:
        if bad.reason.startswith("folder cannot be read") and bad.path not in passed_over:
            path = Path(source.place) / bad.path.removeprefix(source.prefix)
            raise MachineError(bad.reason, where=path, fix=_FIX)
    if not names:
        what = "the folder of the training images is empty"
        raise MachineError(what, where=source.place, fix=_FIX)
    return names


def _new_in_list(source: Source, previous_names: Set[bytes]) -> list[str]:
    """Images that a list names by now, where it is another list than it was."""
    try:
        size, mtime_ns = _measure(source)
    except OSError:
        return []  # the files that it named are what counts
    if (size, mtime_ns) == (source.bytes, source.mtime_ns):
        return []
    table, _, _ = collecting.collect(source, "", _ignore)
    names = _names(source, table)
    return [_shown(source, name) for name in names if name not in previous_names]


def _shown(source: Source, name: bytes) -> str:
    return readable(path_of(source, name))


def _names(source: Source, rows: pa.Table) -> list[bytes]:
    """Names in the source, exact."""
    exact = pc.coalesce(rows["path_bytes"], rows["path"].cast(pa.binary())).to_pylist()
    prefix = os.fsencode(source.prefix)
    return [path.removeprefix(prefix) for path in exact]


def _chunks(names: Sequence[bytes]) -> list[Sequence[bytes]]:
    return [names[i : i + _CHUNK_FILES] for i in range(0, len(names), _CHUNK_FILES)]


def _sizes(source: Source, names: Sequence[bytes], patience: Patience) -> list[int]:
    """Sizes in bytes; -1 for a file that is there no more.

    Raises:
        MachineError: one that the disk or the network does not let see.
    """
    return [_size(folder.file_location(source, os.fsdecode(name)), patience) for name in names]


def _measure(source: Source) -> tuple[int, int]:
    return Patience(source.place).read(lambda: storage.measure(source.place))


def _size(location: str, patience: Patience) -> int:
    try:
        return patience.read(lambda: storage.measure(location))[0]
    except OSError as error:
        if rejects.is_machine(error):
            raise rejects.unusable(error, location) from error
        return -1
