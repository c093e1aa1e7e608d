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
from btpipe.events import Progressed, Rejected, Report, per_second

_PROGRESS_SECONDS = 1.0
Part = tuple[pa.Table, tuple[Source, ...], list[Rejected]]
"""Rows whose source numbers count from 0, their sources, rejects."""


def collect(
    source: Source,
    name: str,
    tell: Callable[[int, int], None],
    known: Recall = folder.NOTHING,
    *,
    list_only: bool = False,
) -> Part:
    """The images of a source; `name` is the file's own among named files.

    `known`: files and containers that are as they were stay closed.
    """
    rows = known.container(source) if source.is_container else None
    if rows is not None:
        return rows, (source,), []
    if source.kind == "folder":
        found = folder.look(source, tell, known, list_only=list_only)
    elif source.kind == "list":
        found = lists.look(source, tell, known, list_only=list_only)
    elif source.kind == "files":
        found = folder.look_at(source, [os.fsencode(name)], tell, list_only=list_only)
    elif source.kind == "synthetic":
        found = synthetic.look(source)
    else:
        found = tar.look(source) if source.kind == "tar" else parquet.look(source)
    return pa.Table.from_batches(found.batches, SCHEMA), (source,), found.rejected


def merge(parts: list[Part]) -> Part:
    """All parts as one, in their order; a file that comes twice is one image."""
    tables, sources = [], list[Source]()
    rejected = [event for part in parts for event in part[2]]
    for table, own, _ in parts:
        numbers = np.array(table["source"], dtype=np.int32)
        to = np.array([_number(source, sources) for source in own] or [0], dtype=np.int32)
        place = SCHEMA.get_field_index("source")
        tables.append(table.set_column(place, SCHEMA.field("source"), pa.array(to[numbers])))
    whole = pa.concat_tables(tables)
    if len(parts) > 1:
        whole = _without_doubles(whole)
    return whole.combine_chunks(), tuple(sources), rejected


def _number(source: Source, known: list[Source]) -> int:
    """The place of a source among the known ones, where it is added."""
    if source not in known[-1:]:  # files of one folder follow each other
        known.append(source)
    return len(known) - 1


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
    """Counts the files of all inputs together, and tells once a second."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._started = self._told = time.monotonic()
        self._before = self.files = 0

    def tell(self, done: int, total: int) -> None:
        """Hears how far the present input is."""
        self.files = self._before + done
        if (now := time.monotonic()) - self._told > _PROGRESS_SECONDS:
            self._told, rate = now, per_second(self.files, now - self._started)
            self._report(Progressed("index", self.files, self._before + total, rate, 0.0))

    def close(self, files: int) -> None:
        """An input is done; it had at least so many files."""
        self._before = self.files = max(self.files, self._before + files)
