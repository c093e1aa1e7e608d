"""Looks at all images before a training does: their health, their doubles, in an index to train on.

    X.parquet  X.rejects.csv  X.findings.csv

Every input ends in the index or in the rejects. A second scan with the same `out` opens what is new
or changed; one that was stopped goes on.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from btpipe import artifact, runtime
from btpipe.data import file_checks, findings, index, limits, previous_scan, rejects, supervisor
from btpipe.data.file_checks import Verdict
from btpipe.data.findings import ImageFinding
from btpipe.data.pipeline import prefetch
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import reading_threads
from btpipe.errors import BudgetError, Stopped, UsageError
from btpipe.events import Finished, Note, Progressed, Rejected, Report, TextTable, per_second

Depth = Literal["list", "header", "decode"]
"""list: names, bytes and times; no file is opened. header: a look at each file's first bytes.
decode: all of it is read, digested and decoded."""
SAVE_SECONDS = 300.0
"""What a kill can cost."""
NOT_DECODED = (
    "No image was decoded: --depth decode also finds files that are cut or damaged,"
    " doubles and pictures of one colour; it reads and decodes everything, once."
)
_READ_FILES, _READ_THREADS = 16, 4
_PROGRESS_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a scan found: usable images, rejects, findings.

    Of the images listed `kept` are as an earlier scan of this depth knew them and `read` are not;
    `dropped` inputs were known and are there no more.
    """

    index: index.Index
    rejects: list[Rejected]
    findings: list[ImageFinding]
    kept: int
    read: int
    dropped: int


def scan(
    source: Path | str | Sequence[Path | str],
    out: Path,
    on_event: Report,
    *,
    depth: Depth = "header",
    max_bad: float | None = None,
    limit_seconds: float = limits.DECODE_SECONDS,
    save_seconds: float = SAVE_SECONDS,
    image_column: str = "",
) -> Scan:
    """Scans the images of `source` into `out` and the two files beside it, and reports.

    `max_bad`: how many inputs may be bad, an int for a count and a float for a share of them; None:
    any number. `limit_seconds`: for one decode. `save_seconds`: what a kill can cost.
    `image_column`: the one of parquet files that hold several.

    Raises:
        UsageError: an input that is missing or of no known kind, or no image in any of them.
        IntegrityError: `out` holds something that is not an index.
        BudgetError: finished, with more bad inputs than `max_bad`.
        MachineError: no space, or no permission.
        Stopped: a signal; what was decoded is kept, the same command goes on.
    """
    started = time.monotonic()
    if out.suffix != ".parquet" or out.is_dir():
        raise UsageError("not a name for an index", where=out, expected="a file X.parquet")
    previous = previous_scan.read(out)
    listing: Literal["list", "header"] = "list" if depth == "list" else "header"
    images, listing_rejects = index.build(source, on_event, listing, previous.recall, image_column)
    with artifact.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    work = _Work(images, listing_rejects, previous, on_event)
    if depth == "decode":
        work.decode(out, limit_seconds, save_seconds)
    result = work.result(depth)
    save(result, out)
    _send_results(result, out, on_event, depth, time.monotonic() - started)
    _keep_budget(result, out, max_bad)
    return result


class _Work:
    """The state of a scan: what is known of each listed image, from before or by now."""

    def __init__(
        self,
        images: index.Index,
        listing_rejects: list[Rejected],
        previous: previous_scan.PreviousScan,
        on_event: Report,
    ) -> None:
        self._same = previous.rows(images)
        self._images = dataclasses.replace(
            images, table=previous.complete(images.table, self._same)
        )
        self._listing_rejects, self._previous, self._on_event = listing_rejects, previous, on_event
        self._widths, self._heights = self._images.widths.copy(), self._images.heights.copy()
        self._is_known = np.array(self._images.table["digest"].is_valid(), dtype=bool)
        self._flat = previous.flat(images, self._same)
        self._bad = previous.bad(images)
        for row, reject in self._bad.items():
            self._reject(row, reject)
        self._recalled = int(self._is_known.sum())
        self._new: dict[int, str] = {}

    def decode(self, out: Path, limit_seconds: float, save_seconds: float) -> None:
        """Decodes what is not known yet; saves every few minutes, and when a signal comes."""
        rows = np.flatnonzero(~self._is_known)
        started = last_save = time.monotonic()
        last_event = 0.0
        with (
            runtime.StopSignals() as signals,
            reading_threads(_READ_THREADS) as pool,
        ):
            verdicts = supervisor.supervise(
                file_checks.examine,
                self._contents(rows, pool),
                processes=min(runtime.cores(), len(rows)),
                limit_seconds=limit_seconds,
                should_stop=lambda: bool(signals.first),
            )
            for row, verdict in verdicts:
                self._note(row, verdict)
                now, done = time.monotonic(), int(self._is_known.sum()) - self._recalled
                if now - last_event > _PROGRESS_SECONDS or done == len(rows):
                    last_event, rate = now, per_second(done, now - started)
                    self._on_event(Progressed("scan", done, len(rows), rate, 0.0))
                if now - last_save > save_seconds:
                    save(self.result("decode"), out)
                    last_save = time.monotonic()
        if signals.first:
            save(self.result("decode"), out)
            what = f"stopped by {signals.first}: {done} of {len(rows)} images are decoded"
            raise Stopped(what, where=out, fix="run the same command again: it goes on")

    def _contents(
        self, rows: NDArray[np.int64], pool: concurrent.futures.Executor
    ) -> Iterator[tuple[int, bytes]]:
        """(row, content) of what can be read; the others are noted as bad."""
        starts = range(0, len(rows), _READ_FILES)
        tasks = ((i, rows[start : start + _READ_FILES]) for i, start in enumerate(starts))

        def read(row: int) -> bytes | BadInputError:
            try:
                return self._images.read_bytes(row)
            except BadInputError as error:
                return error

        for _, part, contents in prefetch.read_ahead(tasks, read, lambda _, read: read, pool):
            for row, content in zip(part.tolist(), contents, strict=True):
                if isinstance(content, BadInputError):
                    self._reject(row, self._images.reject(row, "decode", content))
                else:
                    yield row, content

    def _note(self, row: int, verdict: Verdict | BadInputError) -> None:
        """Keeps what came of a decode."""
        if isinstance(verdict, BadInputError):
            self._reject(row, self._images.reject(row, "decode", verdict))
            return
        self._is_known[row], self._new[row] = True, verdict.digest
        self._widths[row], self._heights[row] = verdict.width, verdict.height
        if verdict.is_flat:
            self._flat.add(row)

    def _reject(self, row: int, rejected: Rejected) -> None:
        self._is_known[row], self._bad[row] = True, rejected
        self._on_event(rejected)

    def _path(self, row: int) -> str:
        return str(self._images.table["path"][row].as_py())

    def result(self, depth: Depth) -> Scan:
        """The scan as it stands."""
        digests = self._images.table["digest"].to_pylist()
        for row, digest in self._new.items():
            digests[row] = digest
        table = self._images.table
        for name, values in (
            ("digest", digests),
            ("width", self._widths),
            ("height", self._heights),
        ):
            field = index.SCHEMA.field(name)
            at = table.schema.get_field_index(name)
            table = table.set_column(at, field, pa.array(values, field.type))
        good = np.ones(len(table), dtype=bool)
        good[list(self._bad)] = False
        flat = [row for row in sorted(self._flat) if good[row]]
        table = table.filter(pa.array(good)).combine_chunks()
        usable = dataclasses.replace(self._images, table=table)
        rejected = sorted([*self._listing_rejects, *self._bad.values()], key=lambda r: r.path)
        kept = self._recalled if depth == "decode" else int((self._same >= 0).sum())
        read = int(self._is_known.sum()) - kept if depth == "decode" else len(self._same) - kept
        image_findings = findings.of([self._path(row) for row in flat], table)
        return Scan(
            usable, rejected, image_findings, kept, read, self._previous.gone(usable, rejected)
        )


@dataclasses.dataclass(frozen=True)
class Scanned(Finished):
    """An index of `images`, and what was rejected and found, by reason and kind.

    `kept` are as they were at the scan before, `read` were looked at now, `dropped` are gone.
    """

    job = "scan"

    out: Path
    depth: Depth
    images: int
    rejects: int
    kept: int
    read: int
    dropped: int
    reasons: tuple[file_checks.RejectedAlike, ...]
    findings: tuple[findings.FoundAlike, ...]

    @property
    def text(self) -> str:
        return (
            f"{self.out}: {self.images:,} images, {self.rejects:,} rejects;"
            f" {self.kept:,} as they were, {self.read:,} read, {self.dropped:,} dropped"
        )

    def tables(self) -> list[TextTable]:
        """The rejects, and what is worth a look, where there are any."""
        bad = tuple((r.reason, f"{r.files:,}", r.to_do, r.examples) for r in self.reasons)
        odd = tuple((f.finding, f"{f.images:,}", f.examples) for f in self.findings)
        title = f"Rejected, listed in {rejects.path_beside(self.out)}"
        rejected = TextTable(title, ("reason", "files", "what to do", "such as"), bad)
        title = f"Usable, but look at them: {findings.path_beside(self.out)}"
        usable = TextTable(title, ("finding", "images", "such as"), odd)
        return [table for table in (rejected, usable) if table.rows]


def save(result: Scan, out: Path) -> None:
    """Writes rejects and findings, then the index.

    Raises:
        MachineError: no space, or no permission.
    """
    rejects.write(rejects.path_beside(out), result.rejects)
    findings.write(findings.path_beside(out), result.findings)
    result.index.save(out)


def _send_results(result: Scan, out: Path, on_event: Report, depth: Depth, seconds: float) -> None:
    if depth != "decode":
        on_event(Note(NOT_DECODED))
    on_event(
        Scanned(
            seconds=seconds,
            out=out,
            depth=depth,
            images=len(result.index),
            rejects=len(result.rejects),
            kept=result.kept,
            read=result.read,
            dropped=result.dropped,
            reasons=tuple(file_checks.advice(result.rejects)),
            findings=tuple(findings.summary(result.findings)),
        )
    )


def _keep_budget(result: Scan, out: Path, max_bad: float | None) -> None:
    """Raises BudgetError when more inputs were rejected than allowed."""
    if max_bad is None:
        return
    total = len(result.index) + len(result.rejects)
    bad = len(result.rejects) if isinstance(max_bad, int) else len(result.rejects) / max(total, 1)
    if bad > max_bad:
        raise BudgetError(
            f"{len(result.rejects)} of {total} inputs are bad",
            where=rejects.path_beside(out),
            expected=f"max_bad {max_bad}",
            fix="read the reasons there; the index is finished and holds the others",
        )
