"""What was measured of the variants of one thing, and how people read it."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from btpipe import runtime
from btpipe.events import Event, Finished, TextTable
from btpipe.tools.measured_process import Prepared, Timing

Device = Literal["cpu", "cuda"]
Prepare = Callable[[], Prepared] | None
"""How a row is prepared; None where this machine's memory does not do."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one variant; no turns where the memory did not do."""

    name: str
    turns: tuple[Timing, ...] = ()
    peak_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Compared(Event):
    """A table of a comparison with others; people alone read it, no command writes it as JSON."""

    table: TextTable

    def tables(self) -> list[TextTable]:
        """That one."""
        return [self.table]


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a job, medians over turns: CPU-milliseconds of an image, images a second."""

    name: str
    cpu_ms: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class Way(Part):
    """Files to vectors in one way: how much faster than the first way, and than its own limit.

    `share_of_limit`: 1 is as fast as decoding and the network alone allow.
    """

    times_faster: float
    share_of_limit: float


@dataclasses.dataclass(frozen=True)
class Benchmarked(Finished):
    """How fast this machine embeds: `images` images of `source`, `turns` turns of each row."""

    job = "bench"

    network: str
    image_size: int
    images: int
    source: str
    machine: str
    turns: int
    ways: tuple[Way, ...]
    parts: tuple[Part, ...]
    note: str

    @property
    def text(self) -> str:
        return f"{self.turns} turns a row, on {self.machine}"

    def tables(self) -> list[TextTable]:
        """The ways, and every part alone."""
        title = about(self.network, self.image_size, self.images, self.source)
        rows = tuple(
            (way.name, number(way.times_faster), *speed(way), f"{way.share_of_limit:.2f}")
            for way in self.ways
        )
        whole = TextTable(f"Embedding: {title}, {self.text}", WAY_COLUMNS, rows, self.note)
        return [whole, parts_table(self.parts)]


WAY_COLUMNS = ("files to vectors", "times faster", "CPU ms an image", "images/s", "of the limit")


def about(network: str, image_size: int, images: int, source: str) -> str:
    """What is embedded, as a table's title names it."""
    return f"{network} at {image_size}, {images} images, {source}"


def parts_table(parts: Sequence[Part]) -> TextTable:
    """Every part alone, for people."""
    rows = tuple((part.name, *speed(part)) for part in parts)
    return TextTable("Each alone, on all cores", ("part", "CPU ms an image", "images/s"), rows)


def speed(part: Part) -> tuple[str, str]:
    """CPU-milliseconds of an image, and images a second, for people."""
    return number(part.cpu_ms), number(part.images_per_second)


def machine(device: Device) -> str:
    """The hardware, as a table's title names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{runtime.cores()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"


def faster(row: Measurement, base: Measurement, device: Device) -> str:
    """`times_faster` for people; "-" where the memory did not do."""
    return number(times_faster(row, base, device)) if row.turns and base.turns else "-"


def times_faster(row: Measurement, base: Measurement, device: Device) -> float:
    """Median over turns of base's time over this row's, of the same turn."""
    pairs = zip(base.turns, row.turns, strict=True)
    return statistics.median(spent(b, device) / spent(r, device) for b, r in pairs)


def spent(turn: Timing, device: Device) -> float:
    """CPU-seconds on a CPU, where the clock is not the process's own; else seconds."""
    return turn.cpu_seconds if device == "cpu" else turn.seconds


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value else "0"


def part_of(name: str, row: Measurement, images: int) -> Part:
    """Of a row, by its medians over turns."""
    cpu = statistics.median(turn.cpu_seconds for turn in row.turns)
    seconds = statistics.median(turn.seconds for turn in row.turns)
    return Part(name, 1000 * cpu / images, images / seconds)


def limit_seconds(parts: Sequence[Timing], device: Device) -> float:
    """By the clock, of parts that are done at once: a CPU's share its cores, a GPU's none."""
    if device == "cuda":
        return max(part.seconds for part in parts)
    return sum(part.cpu_seconds for part in parts) / runtime.cores()
