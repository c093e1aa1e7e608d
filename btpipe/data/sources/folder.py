"""Images in a tree of folders, and files that are named one by one."""

import errno
import functools
import os
import random
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from btpipe.data import header, rejects, retry
from btpipe.data.header import Header
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import Patience, reading_threads
from btpipe.data.sources import storage
from btpipe.data.sources.listing_cache import Recall, Stamp
from btpipe.data.sources.rows import CHUNK_ROWS, SCHEMA, ImageRow, SourceRows, batch, reject
from btpipe.data.sources.source import Source
from btpipe.events import Note, Rejected, Report, ignore

HEADER_THREADS = 16
_LIST_THREADS = 2
"""To list is to hold the interpreter: more threads only wait for each other."""
UNREAD = Header(format="", width=0, height=0, orientation=1, mode="")
"""The header of a file that was only listed."""
NOTHING = Recall()
SPLITS = frozenset({"train", "val", "test", "valid", "validation"})
"""Folders that divide a data set, in any case; no classes where class folders lie below them."""
OnProgress = Callable[[int, int], None]
"""Called with the files done and the files in all."""


def walk(source: Source) -> tuple[list[bytes], list[Rejected]]:
    """Relative paths of the files to look at, sorted by their bytes, and what is refused unread."""
    patience, paths = Patience(source.place), list[bytes]()
    rejected: list[Rejected] = []
    folders = [b""]
    while folders:
        folder = folders.pop()
        try:
            found = patience.read(functools.partial(_found_in, source, folder))
        except OSError as error:
            bad = rejects.unreadable(error)
            rejected.append(reject(source, folder, f"folder {bad.reason}", bad.kind))
            continue
        paths += found[0]
        folders += found[1]
        rejected += found[2]
    paths.sort()
    return paths, rejected


def _found_in(source: Source, folder: bytes) -> tuple[list[bytes], list[bytes], list[Rejected]]:
    """Files to look at in a folder, folders in it, and what is refused unread."""
    top = os.fsencode(source.place)
    inside = os.path.realpath(top) + b"/"
    paths, folders, rejected = list[bytes](), list[bytes](), list[Rejected]()
    with os.scandir(top + b"/" + folder) as entries:
        for entry in entries:  # one by one: a folder may hold a million
            name = folder + b"/" + entry.name if folder else entry.name
            if entry.name.startswith(b"."):
                continue
            if entry.is_file(follow_symlinks=False):
                paths.append(name)
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            reason = _refuse(entry, inside)
            if reason is not None:
                rejected.append(reject(source, name, reason))
            elif entry.is_symlink():
                paths.append(name)
    return paths, folders, rejected


def _refuse(entry: "os.DirEntry[bytes]", inside: bytes) -> str | None:
    """Why an entry that is no plain file is refused; None where it is not, or not worth a word."""
    if entry.is_symlink():
        return _refuse_link(entry, inside)
    if not header.has_image_name(entry.name):
        return None
    if entry.is_dir(follow_symlinks=False):
        return "a folder, not a file; what is in it was looked at"
    return "not a regular file (pipe, socket or device)"


def _refuse_link(entry: "os.DirEntry[bytes]", inside: bytes) -> str | None:
    """Why a link is not followed; None where it leads to a file inside the folder."""
    try:
        target = os.path.realpath(entry.path, strict=True)
    except OSError as error:
        return "a link in a circle" if error.errno == errno.ELOOP else "a link to nothing"
    if not target.startswith(inside):
        return "a link that leads out of the folder: put the file itself there, or a hard link"
    if entry.is_dir():
        return "a link to a folder that is searched under its own name"
    return None if entry.is_file() else "not a regular file (pipe, socket or device)"


def look(
    source: Source,
    on_progress: OnProgress,
    previous: Recall = NOTHING,
    *,
    list_only: bool = False,
    on_event: Report = ignore,
) -> SourceRows:
    """The images below a folder or the prefix of a URL; each has its class folder as its label.

    `list_only`: by their names, no file is opened; sizes are then unknown. `previous`: files that
    are as they were stay closed too. `on_event` is told where the classes lie below splits.
    """
    if storage.is_url(source.place):
        try:
            names, rejected = remote_names(source.place), list[Rejected]()
        except OSError as error:
            raise rejects.unusable(error, source.place) from error
    else:
        names, rejected = walk(source)
    source_rows = look_at(source, names, on_progress, previous, list_only=list_only)
    return SourceRows(
        _with_class_folders(source, source_rows.batches, on_event),
        rejected + source_rows.rejected,
    )


def remote_names(url: str) -> list[bytes]:
    """Names below the prefix of a URL, sorted; hidden ones are passed over.

    Raises:
        OSError: it cannot be listed.
    """
    names = Patience(url).read(lambda: storage.names_below(url))
    hidden = [any(part.startswith(".") for part in name.split("/")) for name in names]
    return sorted(n.encode() for n, is_hidden in zip(names, hidden, strict=True) if not is_hidden)


def look_at(
    source: Source,
    names: Sequence[bytes],
    on_progress: OnProgress,
    previous: Recall = NOTHING,
    *,
    list_only: bool = False,
) -> SourceRows:
    """Those of the named files that are images, in their order.

    In a list every file that is no image is refused; in a folder, one that looks like an image.
    """
    source_rows, done = SourceRows([], []), 0
    work = functools.partial(_look_at_all, source, Patience(source.base), previous, list_only)
    rows = previous.rows(source, names)
    starts = range(0, len(names), CHUNK_ROWS)
    chunks = [(names[i : i + CHUNK_ROWS], rows[i : i + CHUNK_ROWS]) for i in starts]
    threads = _LIST_THREADS if list_only else HEADER_THREADS
    with reading_threads(threads) as pool:
        for images, rejected in pool.map(work, chunks):
            if images is not None:
                source_rows.batches.append(images)
            source_rows.rejected.extend(rejected)
            done = min(done + CHUNK_ROWS, len(names))
            on_progress(done, len(names))
    return source_rows


def _look_at_all(
    source: Source,
    patience: Patience,
    previous: Recall,
    list_only: bool,
    part: tuple[Sequence[bytes], NDArray[np.int64]],
) -> tuple[pa.RecordBatch | None, list[Rejected]]:
    names, rows = part
    headers = previous.headers(rows)
    results = [
        _look_at(source, patience, list_only, names, i, headers.get(i)) for i in range(len(names))
    ]
    images = [result for result in results if isinstance(result, ImageRow)]
    rejected = [result for result in results if isinstance(result, Rejected)]
    return (batch(source, images) if images else None), rejected


def _look_at(
    source: Source,
    patience: Patience,
    list_only: bool,
    names: Sequence[bytes],
    at: int,
    previous: tuple[Stamp, Header] | None,
) -> ImageRow | Rejected | None:
    """The row of one of the files, why it is refused, or None where nothing says it is an image."""
    name = names[at]
    is_asked_for = source.kind != "folder"
    if list_only and not is_asked_for and not header.has_image_name(name):
        return None
    try:
        return patience.read(
            lambda: _row(source, list_only, name, previous),
            lambda: _row(source, list_only, random.choice(names), None),  # noqa: S311
        )
    except OSError as error:
        bad: BadInputError = rejects.unreadable(error)
        is_unknown = retry.is_transient(error)
        is_reported = is_asked_for or is_unknown or header.has_image_name(name)
    except BadInputError as error:
        bad = error
        is_reported = is_asked_for or header.is_image_or_named(error, name)
    return reject(source, name, bad.reason, bad.kind) if is_reported else None


def _row(
    source: Source, list_only: bool, name: bytes, previous: tuple[Stamp, Header] | None
) -> ImageRow:
    """The row of a file; raises BadInputError or OSError where it has none."""
    location = file_location(source, os.fsdecode(name))
    size, mtime_ns = storage.measure(location)
    if list_only:
        return ImageRow(name, size, mtime_ns, UNREAD)
    if previous and previous[0] == (size, mtime_ns):
        return ImageRow(name, size, mtime_ns, previous[1])
    with storage.open_binary(location) as file:
        return ImageRow(name, size, mtime_ns, header.look(file, name))


def file_location(source: Source, name: str) -> str:
    """The file of a name in a folder, a list, or among named files."""
    return storage.join(source.base, name)


def _with_class_folders(
    source: Source, batches: list[pa.RecordBatch], on_event: Report
) -> list[pa.RecordBatch]:
    """The first folder of each path as its label, where every image is in one.

    Where those are splits, and classes lie below one of them, it is the second folder.
    """
    if not batches:
        return batches
    table = pa.Table.from_batches(batches, SCHEMA)
    # Counted in characters of the readable prefix: the path's own.
    start = len(batch(source, [ImageRow(b"", 0, 0, UNREAD)])["path"][0].as_py())
    names = pc.utf8_slice_codeunits(table["path"], start)
    if not pc.all(pc.match_substring(names, "/")).as_py():
        return batches
    parts = pc.split_pattern(names, "/", max_splits=2)
    label, is_deep = pc.list_element(parts, 0), pc.greater(pc.list_value_length(parts), 2)
    folders = sorted(pc.unique(label).to_pylist())
    with_classes = set(folders) - set(label.filter(pc.invert(is_deep)).to_pylist())
    if with_classes and all(name.lower() in SPLITS for name in folders):
        label = pc.if_else(is_deep, pc.list_element(parts, 1), pa.scalar(None, pa.string()))
        what = f"{', '.join(folders)} are splits: labels are the class folders below them"
        on_event(Note(f"{source.place}: {what}"))
    position = SCHEMA.get_field_index("label")
    return list(table.set_column(position, SCHEMA.field("label"), label).to_batches())
