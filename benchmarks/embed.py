"""What embedding is worth on this machine: against what a user would write, in one run.

The rows of `btpipe bench`, and beside them an eager torchvision model behind a DataLoader with the
same weights on the same images.
"""

import functools
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import embed_cases
from btpipe import progress, runtime
from btpipe.events import Report, TextTable
from btpipe.tools import bench
from btpipe.tools.bench import BenchOptions, Setting
from btpipe.tools.measured_rows import (
    WAY_COLUMNS,
    Compared,
    Measurement,
    Prepare,
    faster,
    part_of,
    parts_table,
    speed,
)

USER = "torchvision eager, DataLoader"
HALF = "the same, fp16 autocast"


def run(
    options: BenchOptions, data: Path | None, model: Path | None, on_event: Report, *, workers: int
) -> None:
    """Measures and reports both tables; `workers` are the DataLoader's.

    Raises:
        UsageError: fewer images in `data` than a turn has, or no bundle under `model`.
    """
    with bench.prepare(options, data, model, on_event) as setting:
        user = functools.partial(embed_cases.user, setting.work, workers)
        cases: dict[str, Prepare] = {USER: functools.partial(user, False)}
        if options.device == "cuda":
            cases[HALF] = functools.partial(user, True)
        rows = bench.take(cases | bench.parts(setting), options, lambda name: name in (USER, HALF))
    on_event(Compared(_table(rows, setting, options)))
    on_event(Compared(parts_table(bench.parts_of(rows, setting, options))))


def _table(rows: dict[str, Measurement], setting: Setting, options: BenchOptions) -> TextTable:
    user, device = rows[USER], options.device
    cells = [
        (
            name,
            faster(rows[name], user, device),
            *speed(part_of(name, rows[name], options.images)),
            "",
        )
        for name in (USER, HALF)
        if name in rows
    ]
    for kind in setting.kinds:
        row = rows[f"whole {kind.name}"]
        share = bench.share_of_limit(rows, kind, options)
        part = part_of(f"btpipe, {kind.name}", row, options.images)
        cells.append((part.name, faster(row, user, device), *speed(part), f"{share:.2f}"))
    note = f"{bench.NOTES[device]} The DataLoader starts its workers in each turn."
    return TextTable(f"Embedding: {setting.about(options)}", WAY_COLUMNS, tuple(cells), note)


def main(
    data: Annotated[Path | None, typer.Option(help="Images; drawn ones if none.")] = None,
    model: Annotated[Path | None, typer.Option(help="Bundle; a random network if none.")] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="Images in a turn; 64, or 4096 on a GPU.")
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 3,
    workers: Annotated[int, typer.Option(min=0, help="Processes of the DataLoader.")] = 2,
    backbone: Annotated[str, typer.Option(help="Of the random network.")] = "resnet50",
    size: Annotated[int, typer.Option(min=16, help="Its pixels of a side.")] = 224,
    device: Annotated[runtime.AskedDevice, typer.Option(help="auto: a GPU if any.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
) -> None:
    """Measure embedding against torchvision behind a DataLoader, and against its own limit."""
    options = bench.options(images, turns, backbone, size, device=device, quick=quick)
    with progress.show("auto") as on_event:
        run(options, data, model, on_event, workers=workers)


if __name__ == "__main__":
    typer.run(main)
