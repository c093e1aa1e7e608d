"""Images to a table of vectors: planned, resumable, and the same table either way.

Every input ends as a row of `X.parquet` or of `X.rejects.parquet`. Parts of the table are committed
in `X.parquet.work/` while the job runs; the same command again goes on behind the last one.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from btpipe import artifact
from btpipe.data.index import Index, build
from btpipe.embed import table, work
from btpipe.embed.encoder import Encoder, Settings
from btpipe.embed.writer import Writer
from btpipe.errors import BudgetError, IntegrityError, RefusedError, UsageError
from btpipe.events import FileRejected, Finished, Note, Report
from btpipe.export.session import Device

PART_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job made. `images_per_second` is over what this process embedded itself."""

    out: Path
    rows: int
    rejects: int
    dimension: int
    seconds: float
    images_per_second: float
    nothing_to_do: bool


def embed(
    source: Path | str | Sequence[Path | str],
    out: Path,
    bundle: Path,
    report: Report,
    *,
    batch_size: int = 32,
    threads: int = 0,
    max_bad: float | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    part_rows: int = PART_ROWS,
) -> Summary:
    """Embeds every image of `source` into `out` and its rejects file.

    `source`: folders, file lists, tar shards, parquet with image bytes, an index, URLs of these.
    `max_bad`: how many inputs may be bad, an int for a count and a float for a share of them; None:
    any number. `overwrite`: replace the table, or drop the unfinished work, of another bundle.
    `part_rows`: rows in a part, the most that a kill can cost.

    Raises:
        UsageError: no such input, no image in it, `out` is one of them, or no such bundle.
        RefusedError: `out` is of another bundle, or another process is at work on it.
        BudgetError: finished, with more bad inputs than `max_bad`.
        MachineError: no space, or no permission; what is committed stays.
        Stopped: a signal; what is committed stays.
    """
    started = time.monotonic()
    if out.suffix != ".parquet" or out.is_dir():
        raise UsageError("not a name for a table", where=out, expected="a file X.parquet")
    encoder = Encoder(Settings(bundle, device=device, threads=threads))
    if not overwrite:
        _refuse_another_bundle(out, encoder.digest)
    index, refused = build(source, report)
    _refuse_own_input(out, index)
    footer = _footer(index, refused, encoder)
    folder = work.folder_of(out)
    finished = _is_finished(out, footer)
    images = 0
    if not finished or folder.exists():
        with work.locked(folder), artifact.disk_errors(out):
            if not finished:
                writer = Writer(index, refused, encoder, footer, folder, report)
                writer.follow(overwrite=overwrite, part_rows=part_rows)
                images = writer.embed(batch_size, threads)
                writer.finish(out)
            work.remove(folder)
    seconds = time.monotonic() - started
    summary = _summary(out, encoder.dimension, images, seconds, nothing_to_do=finished)
    _tell(summary, report)
    _keep_budget(summary, max_bad)
    return summary


def _refuse_another_bundle(out: Path, digest: str) -> None:
    """Raises RefusedError when `out` is a table of another bundle, or not one of btpipe's."""
    found = table.footer_of(out)
    if found is not None and found.get(table.BUNDLE) != digest:
        raise RefusedError(
            f"holds vectors of bundle {found.get(table.BUNDLE)}",
            where=out,
            expected=f"bundle {digest}",
            fix="choose another --out, or replace the table with --overwrite",
        )


def _refuse_own_input(out: Path, index: Index) -> None:
    """Raises UsageError where the table would take the place of what it is made from."""
    written = {os.path.realpath(path) for path in (out, table.rejects_path(out))}
    for origin in index.sources:
        if os.path.realpath(origin.place) in written:
            raise UsageError(
                "is one of the inputs",
                where=out,
                expected="a table beside the images",
                fix="choose another --out, or name the inputs by a pattern that leaves it out",
            )


def _is_finished(out: Path, footer: table.Footer) -> bool:
    """Whether table and rejects stand there for this very input and bundle."""
    wanted = footer.metadata().items()
    try:
        found = [table.footer_of(path) for path in (out, table.rejects_path(out))]
    except IntegrityError:
        return False
    return all(metadata is not None and wanted <= metadata.items() for metadata in found)


def _footer(index: Index, refused: Sequence[FileRejected], encoder: Encoder) -> table.Footer:
    return table.Footer(
        bundle=encoder.digest,
        input=table.fingerprint(index.table, refused),
        preprocessing=encoder.preprocessing.text(),
        precision=encoder.precision,
        root=index.root.resolve().name,
        dimension=encoder.dimension,
    )


def _summary(
    out: Path, dimension: int, images: int, seconds: float, *, nothing_to_do: bool
) -> Summary:
    return Summary(
        out=out,
        rows=table.count(out),
        rejects=table.count(table.rejects_path(out)),
        dimension=dimension,
        seconds=seconds,
        images_per_second=images / seconds,
        nothing_to_do=nothing_to_do,
    )


def _tell(summary: Summary, report: Report) -> None:
    if summary.nothing_to_do:
        report(Note(f"{summary.out} is finished: nothing to do"))
        return
    text = (
        f"{summary.out}: {summary.rows} vectors of {summary.dimension}, {summary.rejects} rejects,"
        f" {summary.images_per_second:.1f} images/s"
    )
    report(Finished("embed", text, summary.seconds))


def _keep_budget(summary: Summary, max_bad: float | None) -> None:
    """Raises BudgetError when more inputs were rejected than allowed."""
    if max_bad is None:
        return
    total = summary.rows + summary.rejects
    bad = summary.rejects if isinstance(max_bad, int) else summary.rejects / max(total, 1)
    if bad > max_bad:
        raise BudgetError(
            f"{summary.rejects} of {total} inputs are bad",
            where=table.rejects_path(summary.out),
            expected=f"max_bad {max_bad}",
            fix="read the reasons there; the table is finished and holds the others",
        )
