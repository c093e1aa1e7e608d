"""What the loader is worth on this machine: against the published transform, in one run.

The rows take turns in processes of their own, on the same images with the same number of workers;
the number is the median over turns of the ratio of CPU-seconds, worker processes included.
"""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import loader_cases
from benchmarks.loader_cases import LoaderWork
from btpipe import progress
from btpipe.data.index import build
from btpipe.data.sources import synthetic
from btpipe.errors import UsageError
from btpipe.events import Note, Report, TextTable
from btpipe.tools import measured_rows
from btpipe.tools.measured_process import Timing, take_turns
from btpipe.tools.measured_rows import Compared, Measurement, Prepare, machine, number

DRAWN_SHORTER_SIDE = 400
"""Pixels of the images that are drawn where none are named; a set that `shard` made has that."""
GPU_BATCHES = 10
"""Times as many batches in a turn on a GPU: starting the published loader is part of a turn."""
HARDWARE_LOADS = (0.0, 0.3, 0.5, 0.65, 0.8, 0.9, 1.0)

CLOCK = "Seconds by the clock, the GPU waited for."


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """What is measured: `turns` turns of `batches` batches."""

    batch: int
    image_size: int
    workers: int
    batches: int
    turns: int


QUICK = LoaderOptions(batch=4, image_size=32, workers=1, batches=2, turns=1)


def run(options: LoaderOptions, data: Path | None, on_event: Report) -> None:
    """Measures and reports: the whole loader, decoding alone, augmenting alone.

    Where there is a GPU also the loader that fills it, and decoders for it.

    Raises:
        UsageError: no images in `data`, or fewer than a batch.
    """
    with _images(options, data, on_event) as (index, source):
        work = LoaderWork(
            index, options.batch, options.batches, options.image_size, options.workers
        )
        on_event(Compared(_loader_table(work, options, source)))
        on_event(Compared(_parts_table(work, options, source)))
        if torch.cuda.is_available():
            longer = dataclasses.replace(work, batches=GPU_BATCHES * work.batches)
            on_event(Compared(_gpu_loader_table(longer, options, source)))
            on_event(Compared(_gpu_table(work, options, source)))
    on_event(Note(f"{options.turns} turns a row, on {machine('cpu')}"))


@contextlib.contextmanager
def _images(
    options: LoaderOptions, data: Path | None, on_event: Report
) -> Iterator[tuple[Path, str]]:
    """An index's file and what its images are, as long as this is open."""
    with tempfile.TemporaryDirectory(prefix="btpipe-") as name:
        folder = Path(name)
        if data is None:
            shorter_side = min(DRAWN_SHORTER_SIDE, 2 * options.image_size)
            (folder / "images").mkdir()
            for i in range(max(options.batch, synthetic.DIFFERENT)):
                content = synthetic.jpeg(i, shorter_side)
                (folder / "images" / f"{i:04d}.jpg").write_bytes(content)
            source = f"drawn images, shorter side {shorter_side}"
        else:
            source = str(data)
        index, _ = build(data or folder / "images", on_event)
        if len(index) < options.batch:
            what = f"{len(index)} images do not fill one batch of {options.batch}"
            raise UsageError(what, where=data or "", fix="add images, or set --batch")
        index.save(folder / "index.parquet")
        yield folder / "index.parquet", source


def _loader_table(work: LoaderWork, options: LoaderOptions, source: str) -> TextTable:
    cases: dict[str, Prepare] = {
        "published transform, DataLoader": functools.partial(loader_cases.published_loader, work),
        "this loader": functools.partial(loader_cases.core_loader, work, False),
        "this loader, cast and normalised": functools.partial(loader_cases.core_loader, work, True),
    }
    rows = _take_turns(cases, options)
    pairs = work.batch * work.batches
    title = (
        f"Pairs of views at {work.image_size} pixels, {work.batches} batches of {work.batch},"
        f" {work.workers} workers, {source}, {machine('cpu')}, {options.turns} turns"
    )
    columns = ("loader", "times faster", "CPU ms a pair", "pairs per CPU-second", "pairs/s")
    cells = [(*_cells(row, rows[0], pairs), _rate(row, pairs)) for row in rows]
    note = (
        "Times faster: median ratio of CPU-seconds, the rows taking turns. The published one hands"
        " out float32, normalised; ours uint8, and the training step casts and normalises."
    )
    return TextTable(title, columns, tuple(cells), note)


def _parts_table(work: LoaderWork, options: LoaderOptions, source: str) -> TextTable:
    parts = {
        "decode": (loader_cases.published_decode, loader_cases.core_decode),
        "augment, two views": (loader_cases.published_augment, loader_cases.core_augment),
    }
    cells: list[tuple[str, ...]] = []
    for part, (published, core) in parts.items():
        cases: dict[str, Prepare] = {
            f"{part}: Pillow and torchvision": functools.partial(published, work),
            f"{part}: DALI": functools.partial(core, work),
        }
        rows = _take_turns(cases, options)
        cells += [_cells(row, rows[0], work.batch * work.batches) for row in rows]
    columns = ("part", "times faster", "CPU ms an image", "images per CPU-second")
    return TextTable(f"Parts of the loader, one thread each, {source}", columns, tuple(cells))


def _gpu_loader_table(work: LoaderWork, options: LoaderOptions, source: str) -> TextTable:
    cases: dict[str, Prepare] = {
        "published transform, DataLoader": functools.partial(
            loader_cases.published_gpu_loader, work
        ),
        "this loader": functools.partial(loader_cases.core_gpu_loader, work, False),
        "this loader, cast and normalised": functools.partial(
            loader_cases.core_gpu_loader, work, True
        ),
    }
    rows = _take_turns(cases, options)
    title = (
        f"Pairs of views at {work.image_size} pixels in the memory of {machine('cuda')},"
        f" {work.batches} batches of {work.batch}, {work.workers} workers, {source},"
        f" {options.turns} turns"
    )
    columns = ("loader", "times faster", "pairs/s", "CPU ms a pair")
    note = (
        f"{CLOCK} Ours decodes and augments on the GPU, as pretrain does; the published one starts"
        " its workers in each turn. An image is decoded for each pair: the decoders below are"
        " their limit."
    )
    cells = [_gpu_cells(row, rows[0], work.batch * work.batches) for row in rows]
    return TextTable(title, columns, tuple(cells), note)


def _gpu_table(work: LoaderWork, options: LoaderOptions, source: str) -> TextTable:
    """Decoding for a GPU: on the CPU, and on the GPU with each share for its hardware decoder."""
    cases: dict[str, Prepare] = {
        "CPU": functools.partial(loader_cases.gpu_decode, work, None),
        "nvImageCodec, as pretrain uses it": functools.partial(loader_cases.batch_decode, work),
    }
    for share in HARDWARE_LOADS:
        name = f"DALI, mixed, hw_decoder_load {share:g}"
        cases[name] = functools.partial(loader_cases.gpu_decode, work, share)
    rows = [_take_turns({name: prepare}, options)[0] for name, prepare in cases.items()]
    title = f"Decoding a batch of {work.batch} for {machine('cuda')}, {source}"
    cells = [_gpu_cells(row, rows[0], work.batch) for row in rows]
    columns = ("decoder", "times faster", "images/s", "CPU ms an image")
    return TextTable(title, columns, tuple(cells), CLOCK)


def _gpu_cells(row: Measurement, base: Measurement, count: int) -> tuple[str, ...]:
    cpu_milliseconds = 1000 * _median_cpu(row.turns) / count
    faster = measured_rows.faster(row, base, "cuda")
    return row.name, faster, _rate(row, count), number(cpu_milliseconds)


def _take_turns(cases: Mapping[str, Prepare], options: LoaderOptions) -> list[Measurement]:
    """Every row in a process of its own, one after the other, `turns` times."""
    # One thread for torch: what it does here is small, and threads that wait burn CPU time.
    turns = take_turns(cases, options.turns, threads=1, has_children=lambda _: True)
    return [Measurement(name, taken) for name, taken in turns.items()]


def _cells(row: Measurement, base: Measurement, count: int) -> tuple[str, ...]:
    seconds = _median_cpu(row.turns) / count
    faster = measured_rows.faster(row, base, "cpu")
    return row.name, faster, number(1000 * seconds), number(1 / seconds)


def _rate(row: Measurement, count: int) -> str:
    return number(count / statistics.median(turn.seconds for turn in row.turns))


def _median_cpu(turns: tuple[Timing, ...]) -> float:
    return statistics.median(turn.cpu_seconds for turn in turns)


def main(
    data: Annotated[Path | None, typer.Option(help="Images; drawn ones if none.")] = None,
    batch: Annotated[int, typer.Option(min=2, help="Pairs of views in a batch.")] = 64,
    size: Annotated[int, typer.Option(min=16, help="Pixels of a view's side.")] = 224,
    workers: Annotated[int, typer.Option(min=1, help="Threads, or worker processes.")] = 2,
    batches: Annotated[int, typer.Option(min=1, help="Batches in a turn.")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each row; medians count.")] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: seconds, no verdict.")
    ] = False,
) -> None:
    """Measure the loader against the published transform in a DataLoader, on the same images."""
    options = QUICK if quick else LoaderOptions(batch, size, workers, batches, turns)
    with progress.show("auto") as on_event:
        run(options, data, on_event)


if __name__ == "__main__":
    typer.run(main)
