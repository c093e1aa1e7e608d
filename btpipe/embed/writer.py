"""Images through the encoder into committed parts, and the parts into the table."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact, runtime
from btpipe.data.index import Index
from btpipe.data.loader import EvaluationBatch, evaluation_batches
from btpipe.embed import table, work
from btpipe.embed.encoder import Encoder
from btpipe.errors import Stopped
from btpipe.events import FileRejected, Note, Progressed, Report
from btpipe.runtime import StopSignals

REPORT_SECONDS = 0.5


@dataclasses.dataclass
class _Part:
    """What is known of a part so far."""

    number: int
    rows: list[NDArray[np.int64]]
    digests: list[str]
    vectors: list[NDArray[np.float32]]
    rejects: list[FileRejected]

    @property
    def seen(self) -> int:
        """Inputs that ended in the part, as a row or as a reject."""
        return sum(map(len, self.rows)) + len(self.rejects)

    def append(self, piece: "_Part") -> None:
        """Adds the next rows of the same part."""
        self.rows += piece.rows
        self.digests += piece.digests
        self.vectors += piece.vectors
        self.rejects += piece.rejects


class Writer:
    """One job in its work folder, which this process has locked."""

    def __init__(
        self,
        index: Index,
        refused: Sequence[FileRejected],
        encoder: Encoder,
        footer: table.Footer,
        folder: Path,
        report: Report,
    ) -> None:
        self.index, self.refused, self.encoder = index, refused, encoder
        self.footer, self.folder, self.report = footer, folder, report

    def follow(self, *, overwrite: bool, part_rows: int) -> None:
        """Takes up the plan that was begun, or begins one."""
        fresh = work.Plan(self.footer.bundle, self.footer.input, len(self.index), part_rows)
        self.plan = work.open_plan(self.folder, fresh, self.report, overwrite=overwrite)
        self.done = work.committed(self.folder, self.plan, self.report)
        if self.done:
            kept = sum(self.plan.part_size(part) for part in self.done)
            self.report(Note(f"goes on: {kept} of {self.plan.rows} images are done"))

    def embed(self, batch_size: int, threads: int) -> int:
        """Embeds and commits what is missing; returns how many images that was."""
        missing = [part for part in range(self.plan.parts) if part not in self.done]
        rows = [
            np.arange(
                part * self.plan.part_rows, part * self.plan.part_rows + self.plan.part_size(part)
            )
            for part in missing
        ]
        if not missing:
            return 0
        gpu = 0 if self.encoder.device == "cuda" else None
        batches = evaluation_batches(
            self.index,
            np.concatenate(rows),
            self.encoder.geometry,
            batch_size=batch_size,
            threads=threads or runtime.cores(),
            gpu=gpu,
        )
        meter = _Meter(sum(map(len, rows)), self.plan.rows, self.report)
        pending: dict[int, _Part] = {}
        with StopSignals() as stop:
            for batch in meter.watch(batches):
                for piece in self._pieces(batch, batch_size):
                    part = pending.setdefault(piece.number, piece)
                    if part is not piece:
                        part.append(piece)
                    if part.seen == self.plan.part_size(part.number):
                        self._commit(pending.pop(part.number))
                if stop.asked:
                    raise Stopped(
                        f"stopped by {stop.asked}; finished parts are kept",
                        where=self.folder,
                        fix="run the same command again: it goes on",
                    )
        assert not pending, "every row of a batch is embedded or rejected"
        return meter.done

    def _pieces(self, batch: EvaluationBatch, batch_size: int) -> Iterator[_Part]:
        """The batch's rows and rejects, split at the borders of parts."""
        vectors = self._vectors(batch.pixels, batch_size)
        parts = batch.rows // self.plan.part_rows
        rejected = [(row // self.plan.part_rows, row, reason) for row, reason in batch.rejected]
        for number in sorted({*parts.tolist(), *(number for number, _, _ in rejected)}):
            chosen = np.flatnonzero(parts == number)
            paths = self.index.table["path"]
            yield _Part(
                number,
                [batch.rows[chosen]],
                [batch.digests[i] for i in chosen],
                [vectors[chosen]],
                [
                    FileRejected(str(paths[row].as_py()), "decode", reason)
                    for part, row, reason in rejected
                    if part == number
                ],
            )

    def _vectors(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """(n, S, S, 3) -> (n, D). A GPU gets batches of one shape: another has other algorithms."""
        short = batch_size - len(pixels) if self.encoder.device == "cuda" else 0
        if short == 0 or len(pixels) == 0:
            return self.encoder.embed(pixels)
        padding = np.zeros((short, *pixels.shape[1:]), np.uint8)
        return self.encoder.embed(np.concatenate([pixels, padding]))[: len(pixels)]

    def _commit(self, part: _Part) -> None:
        for reject in part.rejects:
            self.report(reject)
        rows = np.concatenate(part.rows)
        columns = table.rows(
            self.footer, self.index.table.take(rows), part.digests, np.concatenate(part.vectors)
        )
        beside = self.folder / f"part-{part.number:06d}.tmp"
        table.write(beside, table.schema(self.footer), [columns])
        digest = artifact.file_digest(beside)
        done = work.Commit(part.number, digest, len(rows), tuple(part.rejects))
        work.commit(self.folder, done, beside)
        self.done[part.number] = done

    def finish(self, out: Path) -> None:
        """Streams the parts into the table, writes the rejects, and gives both their names."""
        parts = [work.part_path(self.folder, part) for part in range(self.plan.parts)]
        vectors, rejects = self.folder / "vectors.tmp", self.folder / "rejects.tmp"
        table.write(vectors, table.schema(self.footer), map(table.read, parts))
        every = [*self.refused, *(r for commit in self.done.values() for r in commit.rejects)]
        table.write_rejects(rejects, self.footer, every)
        # The vectors last: a table that is there has its rejects beside it.
        table.take_place(rejects, table.rejects_path(out))
        table.take_place(vectors, out)


class _Meter:
    """Counts images through a job and reports progress, twice a second at most."""

    def __init__(self, missing: int, total: int, report: Report) -> None:
        self.done = 0
        self._before, self._total, self._report = total - missing, total, report

    def watch(self, batches: Iterator[EvaluationBatch]) -> Iterator[EvaluationBatch]:
        """The same batches; the time they are waited for is measured."""
        started = reported = asked = time.monotonic()
        waited = 0.0
        for batch in batches:
            waited += time.monotonic() - asked
            yield batch
            self.done += len(batch.rows) + len(batch.rejected)
            asked = time.monotonic()
            done = self._before + self.done
            if asked - reported >= REPORT_SECONDS or done == self._total:
                seconds = max(asked - started, 1e-9)
                rate, wait = self.done / seconds, waited / seconds
                self._report(Progressed("embed", done, self._total, rate, wait))
                reported = asked
