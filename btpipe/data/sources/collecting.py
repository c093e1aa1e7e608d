"""The images of one source, whatever its kind; and of several together."""

import os
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from btpipe.data.sources import folder, lists, parquet, synthetic, tar
from btpipe.data.sources.listing_cache import Recall
from btpipe.data.sources.rows import SCHEMA
from btpipe.data.sources.source import Source
from btpipe.events import Progressed, Rejected, Report, ignore, per_second

_PROGRESS_SECONDS = 1.0
Part = tuple[pa.Table, tuple[Source, ...], list[Rejected]]
"""Rows whose source numbers count from 0, their sources, rejects."""


def collect(
    source: Source,
    name: str,
    on_progress: Callable[[int, int], None],
    previous: Recall = folder.NOTHING,
    *,
    list_only: bool = False,
    on_event: Report = ignore,
) -> Part:
    """The images of a source; `name` is the file's own among named files.

    `previous`: files and containers that are as they were stay closed.
    """
    rows = previous.container(source) if source.is_container else None
    if rows is not None:
        return rows, (source,), []
    if source.kind == "folder":
        source_rows = folder.look(
            source, on_progress, previous, list_only=list_only, on_event=on_event
        )
    elif source.kind == "list":
        source_rows = lists.look(source, on_progress, previous, list_only=list_only)
    elif source.kind == "files":
        source_rows = folder.look_at(source, [os.fsencode(name)], on_progress, list_only=list_only)
    elif source.kind == "synthetic":
        source_rows = synthetic.look(source)
    else:
        source_rows = tar.look(source) if source.kind == "tar" else parquet.look(source)
    return pa.Table.from_batches(source_rows.batches, SCHEMA), (source,), source_rows.rejected


def merge(parts: list[Part]) -> Part:
    """All parts as one, in their order; a file that comes twice is one image."""
    tables, sources = [], list[Source]()
    rejected = [event for part in parts for event in part[2]]
    for table, part_sources, _ in parts:
        numbers = np.array(table["source"], dtype=np.int32)
        to = np.array([_number(source, sources) for source in part_sources] or [0], dtype=np.int32)
        position = SCHEMA.get_field_index("source")
        tables.append(table.set_column(position, SCHEMA.field("source"), pa.array(to[numbers])))
    whole = pa.concat_tables(tables)
    if len(parts) > 1:
        whole = _without_doubles(whole)
    return whole.combine_chunks(), tuple(sources), rejected


def _number(source: Source, sources: list[Source]) -> int:
    """The position of a source in `sources`, where it is added."""
    if source not in sources[-1:]:  # files of one folder follow each other
        sources.append(source)
    return len(sources) - 1


def _without_doubles(table: pa.Table) -> pa.Table:
    """The same rows without those of a file that an earlier input named already."""
    exact = pc.coalesce(table["path_bytes"], table["path"].cast(pa.binary())).combine_chunks()
    if pc.count_distinct(exact).as_py() == len(table):
        return table
    codes = np.array(exact.dictionary_encode().indices)
    is_first = np.zeros(len(table), dtype=bool)
    is_first[np.unique(codes, return_index=True)[1]] = True
    return table.filter(pa.array(is_first))


class ListingMeter:
    """Counts the files of all inputs together, with an event once a second."""

    def __init__(self, on_event: Report) -> None:
        self._on_event = on_event
        self._started = self._last_event = time.monotonic()
        self._finished_files = self.files = 0

    def update(self, done: int, total: int) -> None:
        """The present input is so far."""
        self.files = self._finished_files + done
        if (now := time.monotonic()) - self._last_event > _PROGRESS_SECONDS:
            self._last_event, rate = now, per_second(self.files, now - self._started)
            self._on_event(Progressed("index", self.files, self._finished_files + total, rate, 0.0))

    def close(self, files: int) -> None:
        """An input is done; it had at least so many files."""
        self._finished_files = self.files = max(self.files, self._finished_files + files)
