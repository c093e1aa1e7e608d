"""Images to a table of vectors: planned, resumable, and the same table either way.

Every input ends as a row of `X.parquet` or of `X.rejects.parquet`. Parts of the table are made by
workers and committed in `X.parquet.work/` while the job runs; the same command again goes on behind
the last one. A table that is there gives its vectors to files whose content is as it was.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btpipe import artifact, runtime
from btpipe.data.index import Index, build
from btpipe.data.limits import DECODE_SECONDS
from btpipe.embed import outputs, precisions, table, work
from btpipe.embed.crew import Crew
from btpipe.embed.orders import Choice, Decode, Setup
from btpipe.embed.shares import Share
from btpipe.embed.writer import Writer
from btpipe.errors import BudgetError, IntegrityError, Stopped, UsageError
from btpipe.events import Event, FileRejected, Finished, Note, Report, Warned
from btpipe.export import contract

if TYPE_CHECKING:
    from btpipe.export.session import Device  # which loads onnxruntime: the workers' business

PART_ROWS = 1024
"""Half a minute's work of two cores, and what a kill can cost."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job made. `images_per_second` is over what this process embedded itself.

    `reused` of the rows were known from an earlier table; `dropped` rows of that are listed no more
    (-1: there was none).
    """

    out: Path
    rows: int
    rejects: int
    dimension: int
    seconds: float
    images_per_second: float
    nothing_to_do: bool
    reused: int = 0
    dropped: int = -1


def embed(
    source: Path | str | Sequence[Path | str],
    out: Path,
    bundle: Path,
    report: Report,
    *,
    batch_size: int | None = None,
    threads: int = 0,
    workers: int = 0,
    max_bad: float | None = None,
    device: "Device" = "auto",
    engine: precisions.Engine = "auto",
    precision: precisions.Asked = "auto",
    layer: precisions.Layer = "pooled",
    normalize: bool = False,
    dtype: table.Dtype = "float32",
    shard: str = "",
    overwrite: bool = False,
    repair: bool = False,
    part_rows: int = PART_ROWS,
    limit_seconds: float = DECODE_SECONDS,
    decode: Decode | None = None,
) -> Summary:
    """Embeds every image of `source` into `out` and its rejects file.

    `source`: folders, file lists, tar shards, parquet with image bytes, an index, URLs of these.
    `workers`: processes; 0 is one for each GPU, or one. `threads` of each; 0 is one for each core.
    `max_bad`: how many inputs may be bad, an int for a count and a float for a share of them; None:
    any number. `shard`: "i/n", the i-th (from 0) of n shares. `overwrite`: replace the table, or
    drop the unfinished work, of another bundle. `repair`: read all of a finished table and compute
    again what is damaged. `part_rows`: rows in a part, the most that a kill can cost.
    `limit_seconds`: for one decode; `decode` stands in for DALI's decoder.

    Raises:
        UsageError: no such input, no image in it, `out` is one of them, or no such bundle.
        RefusedError: `out` is of another bundle, or another process is at work on it.
        BudgetError: finished, with more bad inputs than `max_bad`.
        MachineError: no space, or no permission; what is committed stays.
        Stopped: a signal; what is committed stays.
    """
    outputs.check(out)
    choice = Choice(bundle, device, engine, precision, layer, normalize)
    job = _Job(choice, out, Share.parse(shard), dtype)
    with runtime.StopSignals() as signals, contextlib.ExitStack() as stack:
        run = _Run(job, report, signals, workers, threads, limit_seconds, decode, stack)
        summary = run.embed(source, batch_size, part_rows, overwrite=overwrite, repair=repair)
    _tell(summary, report)
    _keep_budget(summary, max_bad)
    return summary
