"""What was measured of the variants of one thing, and how people read it."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

import torch

from btpipe import runtime
from btpipe.road.seat import Prepared, Turn

Device = Literal["cpu", "cuda"]
Prepare = Callable[[], Prepared] | None
"""How a row is prepared; None where this machine's memory does not do."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one variant; no turns where the memory did not do."""

    name: str
    turns: tuple[Turn, ...] = ()
    peak_bytes: int = 0


def machine(device: Device) -> str:
    """The hardware, as a table's title names it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{runtime.cores()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"


def faster(row: Row, base: Row, device: Device) -> str:
    """Median over turns of base's time over this row's, of the same turn."""
    if not (row.turns and base.turns):
        return "-"
    pairs = zip(base.turns, row.turns, strict=True)
    return number(statistics.median(spent(b, device) / spent(r, device) for b, r in pairs))


def spent(turn: Turn, device: Device) -> float:
    """CPU-seconds on a CPU, where the clock is not the process's own; else seconds."""
    return turn.cpu_seconds if device == "cpu" else turn.seconds


def number(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}" if value else "0"
