"""A job's own part of the work: the plan, the commits, the table. Workers do the rest."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from btpipe.data.index import Index
from btpipe.embed import outputs, table, vector_cache, work_folder
from btpipe.embed.messages import JobStarted, PartProgress, PartTask, PartWritten
from btpipe.embed.ray_pool import RayPool
from btpipe.embed.retried import Filler, Retried
from btpipe.embed.worker_pool import WorkerPool
from btpipe.errors import RefusedError
from btpipe.events import Note, Progressed, Rejected, Report, Warned

REPORT_SECONDS = 0.5
MOST_DROPPED = 0.1
"""A larger share of a table's rows is not dropped unasked: a disk may not be mounted."""


class Writer:
    """One job in its work folder, which this process has locked.

    `check` raises Stopped when the job was asked to stop.
    """

    def __init__(
        self,
        index: Index,
        refused: Sequence[Rejected],
        footer: table.Footer,
        folder: Path,
        on_event: Report,
        check: Callable[[], None],
        retried: Retried | None = None,
    ) -> None:
        self.index, self.refused, self.footer = index, refused, footer
        self.folder, self.on_event, self._check = folder, on_event, check
        self._retried = retried

    def follow(
        self,
        fresh: work_folder.JobPlan,
        earlier: Path | None,
        *,
        overwrite: bool = False,
        prune: bool = False,
    ) -> None:
        """Takes up the plan that was begun, or begins `fresh`.

        Vectors of `earlier`, a table with these settings, and of parts of an older plan are kept
        for files of the same content.

        Raises:
            RefusedError: the work there is of another bundle, and `overwrite` was not asked for; or
                much of what is there is not listed any more, and `prune` was not.
        """
        unfinished = work_folder.read_plan(self.folder)
        if unfinished is not None and unfinished.is_of(fresh):
            self.plan = unfinished
        else:
            if not prune:
                self._refuse_dropping(unfinished, fresh, earlier)
            self.plan = self._replace(unfinished, fresh, earlier, overwrite=overwrite)
        self.done = work_folder.committed(self.folder, self.plan, self.on_event)
        if self.done:
            kept = sum(commit.rows + len(commit.rejects) for commit in self.done.values())
            text = f"goes on: {kept} of {self._inputs} images are done"
            self.on_event(Note(text, {"done": kept, "total": self._inputs}))

    @property
    def _inputs(self) -> int:
        return len(self._retried.rows) if self._retried else self.plan.rows

    def _refuse_dropping(
        self,
        unfinished: work_folder.JobPlan | None,
        fresh: work_folder.JobPlan,
        earlier: Path | None,
    ) -> None:
        """Raises RefusedError where more than `MOST_DROPPED` of the rows there are not listed."""
        held = [(earlier, [earlier])] if earlier else []
        if unfinished is not None and unfinished.settings == fresh.settings:
            held.append((self.folder, work_folder.committed_paths(self.folder, unfinished)))
        for where, tables in held:
            rows, gone = vector_cache.unlisted(tables, self.index.table["path"])
            if len(gone) > MOST_DROPPED * rows:
                raise RefusedError(
                    f"{len(gone)} of {rows} rows there would be dropped, because the inputs list"
                    f" them no more, such as {', '.join(gone[:3])}",
                    where=where,
                    expected=f"at most {MOST_DROPPED:.0%} of the rows",
                    fix="see that the inputs are whole and mounted, or drop the rows with --prune",
                )

    def _replace(
        self,
        unfinished: work_folder.JobPlan | None,
        fresh: work_folder.JobPlan,
        earlier: Path | None,
        *,
        overwrite: bool,
    ) -> work_folder.JobPlan:
        """Makes `fresh` the plan; nothing of the one before is lost until it is."""
        tables = [earlier] if earlier else []
        if unfinished is not None and work_folder.committed_paths(self.folder, unfinished):
            if not overwrite:
                fix = "choose another --out, finish that job, or drop its work with --overwrite"
                work_folder.refuse_other(
                    unfinished.settings, fresh.settings, "unfinished work", self.folder, fix
                )
            what = "the images or the settings changed since this job began; it starts afresh"
            self.on_event(Warned(f"{self.folder}: {what}"))
            if unfinished.settings == fresh.settings:
                done = work_folder.committed(self.folder, unfinished, self.on_event)
                tables += [work_folder.part_path(self.folder, part) for part in sorted(done)]
        if tables:
            paths = self.index.table["path"]
            gathered = vector_cache.gather(self.folder, tables, self.footer, paths, self.on_event)
            fresh = dataclasses.replace(fresh, dropped=gathered.dropped)
        else:
            vector_cache.forget(self.folder)
        self.index.save(self.folder / work_folder.INDEX)
        work_folder.write_plan(self.folder, fresh)
        return fresh

    def embed(self, pool: WorkerPool | RayPool, batch_size: int | None) -> int:
        """Has the missing parts made and commits them; returns how many images that was."""
        missing = [part for part in range(self.plan.parts) if part not in self.done]
        tasks = [task for task in map(self._task, missing) if task.inputs]
        if not tasks:
            return 0
        meter = _JobMeter(sum(task.inputs for task in tasks), self._inputs, self.on_event)
        started = JobStarted(self.folder, self.footer, batch_size)
        for message in pool.work(started, self.index, tasks):
            if isinstance(message, PartProgress):
                meter.add(message)
            else:
                self._commit(message)
        self._check()
        return meter.done

    def _task(self, part: int) -> PartTask:
        rows = self.plan.part_range(part)
        chosen = self._retried.within(rows) if self._retried else None
        return PartTask(part, rows.start, rows.stop, {}, chosen=chosen)

    def _commit(self, written: PartWritten) -> None:
        for path in written.changed:
            what = "changed since it was listed; the vector is of what was read"
            self.on_event(Warned(f"{path}: {what}"))
        for reject in written.rejects:
            self.on_event(reject)
        done = work_folder.Commit(
            self.plan.digest,
            written.part,
            written.sha256,
            written.rows,
            written.reused,
            written.rejects,
        )
        work_folder.commit(self.folder, done, self.folder / written.temporary)
        self.done[written.part] = done

    def finish(self, out: Path) -> None:
        """Streams the parts into the table, writes the rejects, and gives both their names."""
        vectors, rejects = self.folder / f"vectors{out.suffix}", self.folder / "rejects.tmp"
        outputs.write(out, vectors, self.footer, self._parts())
        reject_rows = [*self.refused, *(r for commit in self.done.values() for r in commit.rejects)]
        reject_rows += self._retried.rejects if self._retried else ()
        table.write_rejects(rejects, self.footer, reject_rows)
        # The vectors last: a table that is there has its rejects beside it.
        table.take_place(rejects, table.rejects_path(out))
        outputs.take_place(out, vectors)

    def _parts(self) -> Iterator[pa.Table]:
        filler = Filler(self._retried, self.index, self.footer) if self._retried else None
        for part in range(self.plan.parts):
            self._check()
            path = work_folder.part_path(self.folder, part)
            if filler is None:
                yield table.read(path)
            else:
                yield filler.filled(self.plan.part_range(part), path if part in self.done else None)


class _JobMeter:
    """Counts images through a job and reports progress, twice a second at most.

    The time that workers wait for data is a share of all workers' time.
    """

    def __init__(self, missing: int, total: int, on_event: Report) -> None:
        self.done, self._waited = 0, 0.0
        self._before, self._total, self._on_event = total - missing, total, on_event
        self._started = time.monotonic()
        self._reported = 0.0

    def add(self, step: PartProgress) -> None:
        """Some more inputs are done; a part that is made again does not count twice."""
        self.done = min(self.done + step.images, self._total - self._before)
        self._waited += step.waited_seconds
        now, done = time.monotonic(), self._before + self.done
        if now - self._reported >= REPORT_SECONDS or done == self._total:
            seconds = max(now - self._started, 1e-9)
            wait = min(self._waited / seconds, 1.0)
            self._on_event(Progressed("embed", done, self._total, self.done / seconds, wait))
            self._reported = now
