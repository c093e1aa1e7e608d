"""Whether a folder still holds the images of its index: names and sizes, without opening a file."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Set
from pathlib import Path

from btpipe.data.index import HEADER_THREADS, Index, Row, look_at_all, readable, walk
from btpipe.errors import MachineError

_CHUNK_FILES = 1024


@dataclasses.dataclass(frozen=True)
class Changes:
    """Images that came, went, or have another size in bytes than the index says."""

    added: list[str]
    removed: list[str]
    resized: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.resized)


def changes(index: Index, passed_over: Set[str]) -> Changes:
    """How `index.root` differs from the index; `passed_over` are readable paths of no account.

    100,000 files take about half a second. Of files that the index does not know the headers are
    read: text between the images is no change.

    Raises:
        MachineError: the folder is gone or empty, or a part of it cannot be read.
    """
    fix = "mount or restore it and run the same command again"
    if not index.root.is_dir():
        raise MachineError("the training images are not there", where=index.root, fix=fix)
    names, refused = walk(index.root)
    for name, reason in refused:
        if reason.startswith("folder cannot be read") and readable(name) not in passed_over:
            raise MachineError(reason, where=index.root / os.fsdecode(name), fix=fix)
    if not names:
        raise MachineError("the folder of the training images is empty", where=index.root, fix=fix)
    sizes = dict(zip(_names(index), index.table["bytes"].to_pylist(), strict=True))
    there = set(names)
    kept = [name for name in names if name in sizes]
    new = [name for name in names if name not in sizes and readable(name) not in passed_over]
    gone = [readable(name) for name in sizes if name not in there]
    with concurrent.futures.ThreadPoolExecutor(HEADER_THREADS) as pool:
        looked = pool.map(lambda part: look_at_all(index.root, part), _chunks(new))
        stats = pool.map(lambda part: _sizes(index.root, part), _chunks(kept))
        added = [readable(row.name) for part in looked for row in part if isinstance(row, Row)]
        found = [size for part in stats for size in part]
    resized = [readable(n) for n, size in zip(kept, found, strict=True) if size != sizes[n]]
    return Changes(
        added,
        [name for name in gone if name not in passed_over],
        [name for name in resized if name not in passed_over],
    )


def _names(index: Index) -> list[bytes]:
    paths, exact = index.table["path"].to_pylist(), index.table["path_bytes"].to_pylist()
    return [name or path.encode() for path, name in zip(paths, exact, strict=True)]


def _chunks(names: list[bytes]) -> list[list[bytes]]:
    return [names[i : i + _CHUNK_FILES] for i in range(0, len(names), _CHUNK_FILES)]


def _sizes(root: Path, names: list[bytes]) -> list[int]:
    """Sizes in bytes; -1 for a file that cannot be looked at any more."""
    top = os.fsencode(root) + b"/"
    return [_size(top + name) for name in names]


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - bytes, and half the time of a Path
    except OSError:
        return -1
