"""The messages between a job and its workers: frozen records, pickled through a pipe."""

import ctypes
import dataclasses
import time
from collections.abc import Callable, Mapping
from ctypes import Array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe.data.retry import OUTAGE_SECONDS
from btpipe.embed import table
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import BtpipeError
from btpipe.events import Rejected

FileDecoder = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""`decode.decode`, or a function of a module that stands in for it."""


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """What a worker opens before the plan is known; `cores` and `gpu` are its own.

    `patience_seconds`: for a source that gives nothing.
    """

    encoder: EncoderConfig
    cores: tuple[int, ...] = ()
    gpu: int | None = None
    decode: FileDecoder | None = None
    patience_seconds: float = OUTAGE_SECONDS


@dataclasses.dataclass(frozen=True)
class JobStarted:
    """The plan, as it stands in the work folder."""

    folder: Path
    footer: table.Footer
    batch_size: int | None


@dataclasses.dataclass(frozen=True)
class PartTask:
    """A part to make: rows `first` to `end` of the index, without those that are `excluded`.

    Rows that are `apart` are decoded alone, on the CPU, while no other is. `chosen`: only these are
    made, the others have their vectors.
    """

    part: int
    first: int
    end: int
    excluded: Mapping[int, Rejected]
    apart: frozenset[int] = frozenset()
    chosen: frozenset[int] | None = None

    @property
    def inputs(self) -> int:
        """How many it answers for."""
        return self.end - self.first if self.chosen is None else len(self.chosen)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Those to read, in their order."""
        rows = range(self.first, self.end) if self.chosen is None else sorted(self.chosen)
        return np.array([row for row in rows if row not in self.excluded], np.int64)


@dataclasses.dataclass(frozen=True)
class Drain:
    """Nothing follows for now: finish what is begun."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has opened the bundle of that digest, and computes so."""

    bundle: str
    engine: str
    precision: str
    dimension: int


@dataclasses.dataclass(frozen=True)
class TaskRequest:
    """The worker has begun to read the last of its parts: it wants another, or a `Drain`."""


@dataclasses.dataclass(frozen=True)
class PartProgress:
    """So many inputs are through the network, after waiting for them for so long."""

    images: int
    waited_seconds: float


@dataclasses.dataclass(frozen=True)
class PartWritten:
    """A part is on the disk under the name `temporary`.

    `reused` of its rows were not decoded; `changed` files were not as listed.
    """

    part: int
    temporary: str
    sha256: str
    rows: int
    reused: int
    rejects: tuple[Rejected, ...]
    changed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Failed:
    """What ended a worker that could say so."""

    error: type[BtpipeError]
    what: str
    where: str
    expected: str
    fix: str

    @classmethod
    def of(cls, error: BtpipeError) -> "Failed":
        return cls(type(error), error.what, error.where, error.expected, error.fix)

    def raised(self) -> BtpipeError:
        """The same error, in this process."""
        return self.error(self.what, where=self.where, expected=self.expected, fix=self.fix)


class InFlight:
    """Rows that a worker is decoding, in memory that its supervisor sees when it is dead.

    Each slot holds a row and the moment its decoding began; the monotonic clock is the machine's.
    """

    SLOTS = 4096

    def __init__(self, memory: Array[ctypes.c_longlong]) -> None:
        self._memory = memory
        self._free = list(range(self.SLOTS))  # a list's pop and append are one step to threads

    def enter(self, row: int, *, timed: bool) -> int:
        """Marks a row as being decoded; returns its slot."""
        slot = self._free.pop()
        self._memory[2 * slot + 1] = time.monotonic_ns() if timed else 0
        self._memory[2 * slot] = row + 1
        return slot

    def leave(self, slot: int) -> None:
        """The row of the slot is decoded."""
        self._memory[2 * slot] = 0
        self._free.append(slot)

    def rows(self) -> list[tuple[int, float]]:
        """(row, seconds since its decoding began) of each; 0 where that is not timed."""
        now = time.monotonic_ns()
        words = memoryview(self._memory).cast("B").cast("q").tolist()
        busy = [(row, began) for row, began in zip(words[::2], words[1::2], strict=True) if row]
        return [(row - 1, (now - began) / 1e9 if began else 0.0) for row, began in busy]
