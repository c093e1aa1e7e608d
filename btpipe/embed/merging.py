"""The tables of all shares of a job, as the one table that a single job would have made."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from btpipe import artifact
from btpipe.embed import endings, outputs, table, work_folder
from btpipe.embed.shares import Share
from btpipe.errors import RefusedError, UsageError
from btpipe.events import Rejected, Report
from btpipe.results import Merged


def merge(shards: Sequence[Path], out: Path, on_event: Report, *, overwrite: bool = False) -> None:
    """Streams the tables that `embed(..., shard="i/n")` made into `out`, in the plan's order.

    Raises:
        UsageError: a table that is not there.
        RefusedError: tables of different inputs, bundles or settings; one missing or named twice.
        IntegrityError: one that is damaged, or not btpipe's.
        MachineError: no space, or no permission; or all is merged, and a shard lacks inputs that
            could not be read.
    """
    started = time.monotonic()
    outputs.check(out)
    tables, footer = _in_order(shards)
    identity = footer.identity()
    if not overwrite:
        earlier = outputs.footer_of(out)
        if earlier is not None:
            if (
                identity.items() <= earlier.items()
                and not earlier.get(table.SHARD)
                and _holds(out, tables)
            ):
                on_event(_merged(out, len(tables), started, nothing_to_do=True))
                return
            fix = "choose another --out, or replace the table with --overwrite"
            work_folder.refuse_other(earlier, identity, "vectors", out, fix)
    folder = table.work_path(out)
    with work_folder.locked(folder), artifact.disk_errors(out):
        work_folder.sweep(folder, set())
        vectors, rejects = folder / f"vectors{out.suffix}", folder / "rejects.tmp"
        outputs.write(out, vectors, footer, _rows(tables))
        table.write_rejects(rejects, footer, _rejects(tables))
        table.take_place(rejects, table.rejects_path(out))
        outputs.take_place(out, vectors)
        work_folder.remove(folder)
    on_event(_merged(out, len(tables), started))
    bad = table.read_rejects(out)
    endings.require_finite(bad, outputs.count(out) + len(bad), table.rejects_path(out))
    names = [f"{number}/{len(tables)}" for number in range(len(tables))]
    endings.require_shards_read(dict(zip(names, tables, strict=True)), out)


def _holds(out: Path, tables: Sequence[Path]) -> bool:
    """Whether a merged table has all that shards have by now, and they have all that they can."""
    is_whole = not any(map(endings.unread, [out, *tables]))
    return is_whole and outputs.count(out) == sum(map(outputs.count, tables))


def _merged(out: Path, shards: int, started: float, *, nothing_to_do: bool = False) -> Merged:
    rows, bad = outputs.count(out), table.count(table.rejects_path(out))
    return Merged(time.monotonic() - started, out, rows, bad, shards, nothing_to_do)


def _in_order(shards: Sequence[Path]) -> tuple[list[Path], table.Footer]:
    """The tables in the order of their rows, and the footer of all of them together."""
    tables: dict[int, Path] = {}
    first: Mapping[str, str] = {}
    count = 0
    for path in shards:
        footer = _footer(path)
        share = Share.parse(footer[table.SHARD])
        if not tables:
            first, count = footer, share.count
        _refuse_differing(path, footer, shards[0], first, count)
        if share.number in tables:
            what = f"is shard {share.text}, as {tables[share.number]} is"
            raise RefusedError(what, where=path, expected="each shard once")
        tables[share.number] = path
    missing = [f"{number}/{count}" for number in range(count) if number not in tables]
    if missing:
        raise RefusedError(
            f"{len(missing)} of {count} shards are missing: {', '.join(missing[:8])}",
            expected="the tables of all of them",
            fix=f"run embed --shard {missing[0]}, and name its table here",
        )
    return [tables[number] for number in range(count)], _whole(first)


def _footer(path: Path) -> Mapping[str, str]:
    footer = outputs.footer_of(path)
    if footer is None:
        raise UsageError("no such table", where=path, fix="run embed --shard for it first")
    if not footer.get(table.SHARD):
        raise RefusedError(
            "a whole table, no shard of one", where=path, expected="--shard's output"
        )
    return footer


def _refuse_differing(
    path: Path, footer: Mapping[str, str], other: Path, first: Mapping[str, str], count: int
) -> None:
    """Raises RefusedError where two tables are not shards of one."""
    versions = (table.FORMAT, table.VERSION)
    keys = sorted(k for k in {*footer, *first} if k.startswith("btpipe.") and k not in versions)
    differing = [k for k in keys if k != table.SHARD and footer.get(k) != first.get(k)]
    if Share.parse(footer[table.SHARD]).count != count:
        differing.append(table.SHARD)
    if differing:
        key = differing[0]
        raise RefusedError(
            f"{key} is {footer.get(key)}",
            where=path,
            expected=f"{first.get(key)}, as in {other}",
            fix="merge shards of one input, bundle and settings",
        )


def _whole(first: Mapping[str, str]) -> table.Footer:
    """The footer of a shard as that of the whole table."""
    return dataclasses.replace(table.Footer.of(first), shard="")


def _rows(shards: Sequence[Path]) -> Iterator[pa.Table]:
    for path in shards:
        for batch in outputs.rows(path):
            yield pa.Table.from_batches([batch])


def _rejects(shards: Sequence[Path]) -> Iterator[Rejected]:
    for path in shards:
        yield from table.read_rejects(path)
