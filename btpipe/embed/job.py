"""Images to a table of vectors: planned, resumable, and the same table either way.

Every input ends as a row of `X.parquet` or of `X.rejects.parquet`. Parts of the table are made by
workers and committed in `X.parquet.work/` while the job runs; the same command again goes on behind
the last one. A table that is there gives its vectors to files whose content is as it was.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from btpipe import artifact, runtime
from btpipe.data import retry
from btpipe.data.index import build
from btpipe.data.limits import DECODE_SECONDS
from btpipe.data.retry import OUTAGE_SECONDS
from btpipe.embed import endings, outputs, resolve, retried, table, vector_cache, work_folder
from btpipe.embed.messages import FileDecoder, WorkerConfig
from btpipe.embed.precisions import EncoderConfig
from btpipe.embed.ray_pool import RayPool
from btpipe.embed.retried import Retried
from btpipe.embed.shares import Share
from btpipe.embed.worker_pool import WorkerPool, worker_configs
from btpipe.embed.writer import Writer
from btpipe.errors import IntegrityError, Stopped, UsageError
from btpipe.events import Event, Report, Warned
from btpipe.export import contract
from btpipe.results import Embedded

Cluster = Literal["none", "ray"]
PART_ROWS = 1024
"""Half a minute's work of two cores, and what a kill can cost."""


@dataclasses.dataclass(frozen=True)
class JobOptions:
    """How a job is carried out.

    `batch_size`: images in one call of the network; None: what suits the device. `workers`:
    processes; 0 is one for each GPU, or one. `cluster` "ray": they are on the machines of a Ray
    cluster, one for each GPU or machine. `max_bad`: how many inputs may be bad, an int for a count
    and a float for a share of them; None: any number. `shard`: "i/n", the i-th (from 0) of n
    shares. `overwrite`: replace the table, or drop the unfinished work, of another bundle.
    `repair`: read all of a finished table and compute again what is damaged. `part_rows`: rows in a
    part, the most that a kill can cost. `limit_seconds`: for one decode; `decode` stands in for
    DALI's decoder. `retry_rejects`: try again what a finished table rejected for good. `prune`:
    drop rows that are not listed any more, however many. `patience_seconds`: how long a source may
    give nothing. `image_column`: the one of parquet files that hold several.
    """

    batch_size: int | None = None
    workers: int = 0
    cluster: Cluster = "none"
    max_bad: float | None = None
    dtype: table.Dtype = "float32"
    shard: str = ""
    overwrite: bool = False
    repair: bool = False
    part_rows: int = PART_ROWS
    limit_seconds: float = DECODE_SECONDS
    decode: FileDecoder | None = None
    retry_rejects: bool = False
    prune: bool = False
    patience_seconds: float = OUTAGE_SECONDS
    image_column: str = ""


DEFAULTS = JobOptions()


def embed(
    source: Path | str | Sequence[Path | str],
    out: Path,
    encoder: EncoderConfig,
    on_event: Report,
    options: JobOptions = DEFAULTS,
) -> Embedded:
    """Embeds every image of `source` into `out` and its rejects file.

    `source`: folders, file lists, tar shards, parquet with image bytes, an index, URLs of these.

    Raises:
        UsageError: no such input, no image in it, `out` is one of them, no such bundle, or no Ray.
        RefusedError: `out` is of another bundle, or another process is at work on it, or more than
            a tenth of its rows would be dropped.
        MachineError: no space, no permission, or a source that gave nothing for minutes; what is
            committed stays. Or finished, but for inputs that could not be read.
        NumericsError: this machine makes other vectors of the bundle's golden images; or finished,
            but for vectors that were not finite. Where none is, there is no table.
        BudgetError: finished, with more bad inputs than `max_bad`.
        Stopped: a signal; what is committed stays.
    """
    started = time.monotonic()
    outputs.check(out)
    with retry.waiting_at_most(options.patience_seconds), runtime.StopSignals() as signals:
        run = _EmbedJob(out, encoder, options, _StoppableReport(on_event, signals))
        with _pool(run.encoder, options, on_event, signals) as pool:
            run.look_at_table()
            if run.before is None:
                pool.start()  # a worker starts in seconds: while the inputs are listed
            run.plan(source)
            images = run.make(pool) if run.is_due() else 0
    summary = run.summary(images, time.monotonic() - started)
    on_event(summary)
    inputs = summary.rows + summary.rejects
    endings.require_finite(table.read_rejects(out), inputs, table.rejects_path(out))
    endings.require_read(out, inputs)  # before the budget: what is bad for good is not known yet
    endings.keep_budget(out, summary.rejects, inputs, options.max_bad)
    return summary


def _pool(
    encoder: EncoderConfig, options: JobOptions, on_event: Report, signals: runtime.StopSignals
) -> WorkerPool | RayPool:
    config = WorkerConfig(encoder, decode=options.decode, patience_seconds=options.patience_seconds)
    limit = options.limit_seconds
    if options.cluster == "ray":
        return RayPool(config, options.workers, limit, on_event, signals)
    return WorkerPool(worker_configs(config, options.workers), limit, on_event, signals)


class _StoppableReport:
    """A report that ends the job when a signal asked for it."""

    def __init__(self, on_event: Report, signals: runtime.StopSignals) -> None:
        self.plain, self._signals = on_event, signals

    def __call__(self, event: Event) -> None:
        self.plain(event)
        self.check()

    def check(self) -> None:
        """Raises Stopped when a signal asked to stop."""
        if self._signals.first:
            raise Stopped(
                f"stopped by {self._signals.first}; finished parts are kept",
                fix="run the same command again: it goes on",
            )


class _EmbedJob:
    """One call of `embed`, from what is there already to the table."""

    def __init__(
        self,
        out: Path,
        requested: EncoderConfig,
        options: JobOptions,
        on_event: _StoppableReport,
    ) -> None:
        self._out, self._folder, self._on_event = out, table.work_path(out), on_event
        self._options, self._share = options, Share.parse(options.shard)
        if not requested.bundle.is_dir():
            fix = "make one first: btpipe export --onnx"
            raise UsageError("no bundle there", where=requested.bundle, fix=fix)
        opened = contract.open_bundle(requested.bundle)
        earlier = () if options.overwrite else resolve.earlier_settings(out, self._share)
        self.encoder = resolve.resolve(opened, requested, earlier, on_event)
        self._footer = resolve.footer(opened, self.encoder, self._share, options.dtype)
        self.before: Mapping[str, str] | None = None
        self._is_finished = False
        self._reused, self._dropped = 0, -1

    def look_at_table(self) -> None:
        """Reads what a table that is there says about itself.

        Raises:
            RefusedError: it is of another bundle or other settings, or not one of btpipe's.
        """
        try:
            self.before = outputs.footer_of(self._out)
        except IntegrityError as error:
            if not self._options.overwrite and not self._options.repair:
                raise
            self._on_event(Warned(f"{self._out}: replaced, because it {error.what}"))
        if self.before is not None and not self._options.overwrite:
            fix = "choose another --out, or replace the table with --overwrite"
            ours = self._footer.metadata()
            work_folder.refuse_other(self.before, ours, "vectors", self._out, fix)
            if (pixels := self.before.get(table.PIXELS)) != ours[table.PIXELS]:
                what = f"its vectors are of version {pixels} of the pixels; all are made anew"
                self._on_event(Warned(f"{self._out}: {what}"))

    def plan(self, source: Path | str | Sequence[Path | str]) -> None:
        """Lists the inputs, and sees whether the table is of them."""
        self._index, refused = build(
            source, self._on_event, image_column=self._options.image_column
        )
        outputs.refuse_input(self._out, [origin.place for origin in self._index.sources])
        self._footer = dataclasses.replace(
            self._footer,
            input=table.fingerprint(self._index.table, refused),
            root=self._index.root.resolve().name,
        )
        # What was refused while listing is told once, by the first share.
        self._refused = refused if self._share.number == 0 else []
        rows = self._share.rows(len(self._index))
        settings, digest = self._footer.settings(), self._footer.input
        self._retried: Retried | None = None
        if self._is_of(self.before) and self._is_of(self._rejects_footer()):
            every = self._options.retry_rejects
            self._retried = retried.find(self._out, self._index, rows, every=every)
            self._is_finished = self._retried is not None and not self._retried.rows
        self._fresh = work_folder.JobPlan(
            settings, digest, rows.start, len(rows), self._options.part_rows
        )

    def _rejects_footer(self) -> Mapping[str, str] | None:
        try:
            return table.footer_of(table.rejects_path(self._out))
        except IntegrityError:
            return None

    def _is_of(self, metadata: Mapping[str, str] | None) -> bool:
        """Whether a table's footer names this very input and these settings."""
        return metadata is not None and self._footer.identity().items() <= metadata.items()

    def is_due(self) -> bool:
        """Whether there is anything to make; a finished table's leftovers are removed."""
        if self._is_finished and self._options.repair and not vector_cache.is_whole(self._out):
            self._on_event(Warned(f"{self._out}: damaged; what is whole of it is kept"))
            self._is_finished, self._retried = False, None
        if self._is_finished and self._folder.exists():
            with work_folder.locked(self._folder):
                work_folder.remove(self._folder)
        return not self._is_finished

    def make(self, pool: WorkerPool | RayPool) -> int:
        """Makes the table; returns how many images went through the workers."""
        fresh, earlier = self._fresh, self._earlier()
        if self._retried is not None:
            digest = self._retried.digest(fresh.input)
            fresh, earlier = dataclasses.replace(fresh, input=digest, dropped=0), None
        with work_folder.locked(self._folder), artifact.disk_errors(self._out):
            writer = Writer(
                self._index,
                self._refused,
                self._footer,
                self._folder,
                self._on_event.plain,
                self._on_event.check,
                self._retried,
            )
            options = self._options
            writer.follow(fresh, earlier, overwrite=options.overwrite, prune=options.prune)
            pool.start()
            images = writer.embed(pool, self._options.batch_size)
            if self._retried is None and not any(commit.rows for commit in writer.done.values()):
                rejects = [bad for commit in writer.done.values() for bad in commit.rejects]
                endings.require_finite(rejects, writer.plan.rows, self._folder)
            writer.finish(self._out)
            work_folder.remove(self._folder)
        made = sum(commit.rows - commit.reused for commit in writer.done.values())
        self._reused = outputs.count(self._out) - made
        self._dropped = writer.plan.dropped
        return images

    def _earlier(self) -> Path | None:
        """The table that is there, if its vectors are as these will be."""
        settings = self._footer.settings().items()
        return self._out if self.before is not None and settings <= self.before.items() else None

    def summary(self, images: int, seconds: float) -> Embedded:
        """What was made."""
        rows, unread = outputs.count(self._out), len(endings.unread(self._out))
        return Embedded(
            out=self._out,
            rows=rows,
            embedded=rows - self._reused,
            rejects=table.count(table.rejects_path(self._out)),
            dimension=self._footer.dimension,
            bundle=self._footer.bundle,
            engine=self._footer.engine,
            precision=self._footer.precision,
            seconds=seconds,
            images_per_second=images / seconds,
            nothing_to_do=self._is_finished and not unread,
            unread=unread,
            reused=self._reused,
            dropped=self._dropped,
        )
