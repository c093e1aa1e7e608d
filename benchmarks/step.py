"""What the training core is worth on this machine: against the published formulation, in one run.

Each row is a process of its own. On a CPU the rows take turns (A, B, A, B, ...), so that whatever
else the machine does falls on all of them, and the number is the median over turns of the ratio of
CPU-seconds. On a GPU, whose memory they would share, one row follows another.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from benchmarks import compile_cache, step_cases
from benchmarks.step_cases import Sizes
from btpipe import progress, runtime
from btpipe.errors import UsageError
from btpipe.events import Note, Report, TextTable
from btpipe.pretrain import loss, step
from btpipe.recipe import Recipe, Run
from btpipe.tools import bench
from btpipe.tools.measured_process import MeasuredProcess, Timing
from btpipe.tools.measured_rows import (
    Compared,
    Device,
    Measurement,
    Prepare,
    faster,
    machine,
    number,
    spent,
)

MEBIBYTE, GIBIBYTE = 2**20, 2**30
SQUARES = 5
"""D x D matrices of float32 that the published loss holds at its peak, with its gradient."""


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What `bench step` measures: a step of these sizes, and the loss over a grid of N and D."""

    sizes: Sizes
    turns: int
    counts: tuple[int, ...]
    dimensions: tuple[int, ...]
    threads: int


QUICK = StepOptions(
    Sizes("resnet18", 32, 8, 64), turns=1, counts=(16,), dimensions=(64,), threads=1
)


def run(options: StepOptions, on_event: Report, *, compiled: bool, loss_only: bool) -> None:
    """Measures and reports: the step, the loss alone, LARS.

    `compiled` adds rows under torch.compile; `loss_only` leaves the loss's table alone.
    """
    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    if not loss_only:
        on_event(Compared(_step_table(options, device, compiled=compiled)))
        if compiled:
            on_event(Compared(compile_cache.cache_table(options.sizes, device)))
    on_event(Compared(_loss_table(options, device)))
    if not loss_only:
        on_event(Compared(_lars_table(options, device)))
    on_event(Note(f"{options.turns} turns a row, on {machine(device)}"))


def options(sizes: Sizes, *, steps: int, grid: str) -> StepOptions:
    """As the command line asks for them.

    Raises:
        UsageError: `grid` is not two lists of numbers from 2.
    """
    return StepOptions(sizes, steps, *parse_grid(grid), runtime.cores())


def sizes(backbone: str, image_size: int, batch: int, dimension: int) -> Sizes:
    """As the command line asks for them.

    Raises:
        UsageError: no torchvision ResNet of that name.
    """
    return Sizes(bench.parse_backbone(backbone), image_size, batch, dimension)


def parse_grid(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """ "64,256x8192" -> ((64, 256), (8192,)).

    Raises:
        UsageError: not two lists of numbers from 2.
    """
    try:
        counts, dimensions = (tuple(map(int, part.split(","))) for part in text.split("x"))
    except ValueError:
        counts = dimensions = ()
    if not counts or min(*counts, *dimensions) < 2:
        raise UsageError(f"--grid {text}", expected="batches x dimensions: 64,256,1024x8192")
    return counts, dimensions


def measure(
    cases: Mapping[str, Prepare], options: StepOptions, device: Device
) -> list[Measurement]:
    """Every variant in its own process, some turns each; interleaved on a CPU."""
    if device == "cuda":
        return [row for name in cases for row in _take_turns({name: cases[name]}, options)]
    return _take_turns(cases, options)


def _take_turns(cases: Mapping[str, Prepare], options: StepOptions) -> list[Measurement]:
    processes = [
        MeasuredProcess(name, prepare, options.threads)
        for name, prepare in cases.items()
        if prepare
    ]
    try:
        timings: dict[str, list[Timing]] = {
            process.name: [] for process in processes if process.prepare()
        }
        for _ in range(options.turns):
            for process in processes:
                timing = process.measure() if process.name in timings else None
                if timing is None:
                    timings.pop(process.name, None)
                else:
                    timings[process.name].append(timing)
        peaks = {
            process.name: process.peak_bytes() for process in processes if process.name in timings
        }
    finally:
        for process in processes:
            process.close()
    return [Measurement(name, tuple(timings.get(name, ())), peaks.get(name, 0)) for name in cases]


def _step_table(options: StepOptions, device: Device, *, compiled: bool) -> TextTable:
    sizes = options.sizes
    published = functools.partial(step_cases.published_step, device, sizes)
    core = functools.partial(step_cases.core_step, device, sizes)
    default = default_core(device)
    cases: dict[str, Prepare] = {"published, fp32": functools.partial(published, "fp32")}
    if default[0] == "bf16":
        published_half: Literal["fp16", "bf16"] = "fp16" if device == "cuda" else "bf16"
        name = f"published, {published_half} autocast"
        cases[name] = functools.partial(published, published_half)
    for kind in core_kinds(device, compiled=compiled):
        name = f"this core, {kind[0]}" + (", compiled" if kind[1] else "")
        name += " (as pretrain runs it)" if kind == default else ""
        cases[name] = functools.partial(core, *kind)
    rows = measure(cases, options, device)
    title = (
        f"One step: {sizes.backbone} at {sizes.image_size}, {sizes.batch} pairs of views, projector"
        f" 3 x {sizes.dimension}, {machine(device)}, {options.turns} turns"
    )
    clock = ("CPU-seconds", "seconds") if device == "cpu" else ("seconds",)
    columns = ("step", "times faster", *clock, "pairs/s", "peak GiB", "peak ratio")
    cells = [_step_cells(row, rows[0], sizes.batch, device) for row in rows]
    return TextTable(title, columns, tuple(cells), f"{_about(device)} {_about_memory(device)}")


def core_kinds(device: Device, *, compiled: bool) -> list[tuple[step_cases.CorePrecision, bool]]:
    """The rows of this core, precision and whether compiled: pretrain's own is among them."""
    default = default_core(device)
    precisions = step_cases.CORE_PRECISIONS[: 2 if default[0] == "bf16" else 1]
    kinds = itertools.product(precisions, (False, True))
    return [kind for kind in kinds if compiled or not kind[1] or kind == default]


def default_core(device: Device) -> tuple[runtime.Precision, bool]:
    """What `run.precision` and `run.compile` = "auto" mean: the precision, and whether compiled."""
    torch_device = torch.device(device)
    precision = runtime.precision(Run().precision, torch_device)
    return precision, step.is_compiled(Recipe(), torch_device)


def _step_cells(row: Measurement, base: Measurement, batch: int, device: Device) -> tuple[str, ...]:
    clocks = 2 if device == "cpu" else 1
    if not row.turns:
        return (row.name, *["out of memory"], *["-"] * (clocks + 3))
    seconds = statistics.median(turn.seconds for turn in row.turns)
    cpu_seconds = statistics.median(turn.cpu_seconds for turn in row.turns)
    times = [number(cpu_seconds), number(seconds)] if device == "cpu" else [number(seconds)]
    peak = number(row.peak_bytes / base.peak_bytes) if base.peak_bytes else "-"
    gibibytes = number(row.peak_bytes / GIBIBYTE)
    return row.name, faster(row, base, device), *times, number(batch / seconds), gibibytes, peak


def _loss_table(options: StepOptions, device: Device) -> TextTable:
    rows: list[tuple[str, ...]] = []
    for dimension in options.dimensions:
        for count in options.counts:
            cases: dict[str, Prepare] = {
                "published": functools.partial(step_cases.published_loss, device, count, dimension)
            }
            forms: tuple[loss.Form, ...] = ("gram", "cross")
            for form in forms:
                cases[form] = functools.partial(
                    step_cases.core_loss, device, count, dimension, form
                )
            if SQUARES * 4 * dimension**2 > _free_bytes(device):
                cases |= dict.fromkeys(("published", "cross"))
            measured = measure(cases, options, device)
            rows += [_loss_cells(row, measured[0], count, dimension, device) for row in measured]
    title = f"The loss with its gradient, float32, {machine(device)}, {options.turns} turns"
    unit = "CPU-seconds" if device == "cpu" else "seconds"
    columns = ("loss", "N", "D", "times faster", unit, "peak MiB", "peak ratio")
    note = f"{_about(device)} Peak: beyond the embeddings and their gradient."
    return TextTable(title, columns, tuple(rows), note)


def _loss_cells(
    row: Measurement, base: Measurement, count: int, dimension: int, device: Device
) -> tuple[str, ...]:
    labels = row.name, f"{count:,}", f"{dimension:,}"
    if not row.turns:
        return (*labels, "out of memory", "-", "-", "-")
    peak = number(row.peak_bytes / base.peak_bytes) if base.peak_bytes else "-"
    return (
        *labels,
        faster(row, base, device),
        number(statistics.median(spent(turn, device) for turn in row.turns)),
        number(row.peak_bytes / MEBIBYTE),
        peak,
    )


def _lars_table(options: StepOptions, device: Device) -> TextTable:
    cases: dict[str, Prepare] = {
        "published, a loop over parameters": functools.partial(
            step_cases.published_lars, device, options.sizes
        ),
        "this core, foreach": functools.partial(step_cases.core_lars, device, options.sizes),
    }
    rows = measure(cases, options, device)
    unit = "CPU-seconds" if device == "cpu" else "seconds"
    sizes = options.sizes
    title = f"LARS on {sizes.backbone} and projector 3 x {sizes.dimension}, {machine(device)}"
    cells = [(row.name, faster(row, rows[0], device), number(_median(row, device))) for row in rows]
    return TextTable(title, ("LARS", "times faster", unit), tuple(cells))


def _median(row: Measurement, device: Device) -> float:
    return statistics.median(spent(turn, device) for turn in row.turns) if row.turns else 0.0


def _free_bytes(device: Device) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]) * 1024


def _about(device: Device) -> str:
    if device == "cuda":
        return "Seconds by the clock, the GPU waited for; each row alone on it."
    return "Times faster: median ratio of CPU-seconds, the rows taking turns."


def _about_memory(device: Device) -> str:
    if device == "cuda":
        return "Peak: torch's allocator, everything of the step but the search for algorithms."
    return "Peak: growth of the resident set since the imports, everything of the step."


def main(
    backbone: Annotated[str, typer.Option(help="A torchvision ResNet.")] = "resnet50",
    size: Annotated[int, typer.Option(min=16, help="Pixels of a view's side.")] = 224,
    batch: Annotated[int, typer.Option(min=2, help="Pairs of views in a step.")] = 16,
    dimension: Annotated[int, typer.Option(min=2, help="Width of the projector's layers.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 3,
    grid: Annotated[
        str, typer.Option(metavar="N,..xD,..", help="Batches and dimensions for the loss alone.")
    ] = "64,256,1024,2048x8192",
    loss_only: Annotated[bool, typer.Option("--loss-only", help="The loss's table alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compiled rows as well.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
) -> None:
    """Measure the training step, loss and LARS against the published formulation."""
    requested = options(sizes(backbone, size, batch, dimension), steps=steps, grid=grid)
    with progress.show("auto") as on_event:
        run(QUICK if quick else requested, on_event, compiled=compiled, loss_only=loss_only)


if __name__ == "__main__":
    typer.run(main)
