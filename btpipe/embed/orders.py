"""What a job and its workers say to each other: frozen records, pickled through a pipe.

A worker's life begins here as well. Nothing heavy is imported before it is in its own process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from btpipe import runtime
from btpipe.embed import table
from btpipe.errors import BtpipeError
from btpipe.events import FileRejected

if TYPE_CHECKING:
    from ctypes import Array

    import numpy as np
    from numpy.typing import NDArray

    from btpipe.embed.precisions import Asked, Engine, Layer
    from btpipe.export.session import Device

    Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8] | str]
    """`decoding.decode`, or a function of a module that stands in for it."""

_PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What decides about the vectors, and what they are called in a table's footer."""

    bundle: Path
    device: Device = "auto"
    engine: Engine = "auto"
    precision: Asked = "auto"
    layer: Layer = "pooled"
    normalize: bool = False


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a worker opens before the plan is known; `cores` and `gpu` are its own.

    `threads`: for reading and decoding, and for the network; 0: one for each core.
    """

    choice: Choice
    threads: int
    cores: tuple[int, ...] = ()
    gpu: int | None = None
    decode: Decode | None = None


@dataclasses.dataclass(frozen=True)
class Begin:
    """The plan, as it stands in the work folder."""

    folder: Path
    footer: table.Footer
    batch_size: int | None


@dataclasses.dataclass(frozen=True)
class Order:
    """A part to make: rows `first` to `end` of the index, without those that are `excluded`.

    Rows that are `apart` are decoded alone, on the CPU, while no other is.
    """

    part: int
    first: int
    end: int
    excluded: Mapping[int, str]
    apart: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Flush:
    """Nothing follows for now: finish what is begun."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """The worker has opened the bundle, and computes so."""

    engine: str
    precision: str
    dimension: int


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The worker has begun to read the last of its parts: it wants another, or a `Flush`."""


@dataclasses.dataclass(frozen=True)
class Advanced:
    """So many inputs are through the network, after waiting for them for so long."""

    images: int
    waited_seconds: float


@dataclasses.dataclass(frozen=True)
class Written:
    """A part is on the disk under the name `beside`.

    `reused` of its rows were not decoded; `changed` files were not as listed.
    """

    part: int
    beside: str
    sha256: str
    rows: int
    reused: int
    rejects: tuple[FileRejected, ...]
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
    def of(cls, error: BtpipeError) -> Failed:
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
        found = [(row, began) for row, began in zip(words[::2], words[1::2], strict=True) if row]
        return [(row - 1, (now - began) / 1e9 if began else 0.0) for row, began in found]


def serve(ours: Connection, setup: Setup, memory: Array[ctypes.c_longlong], parent: int) -> None:
    """A worker's life, in its own process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before this process could ask to follow
        return
    for number in runtime.StopSignals.SIGNALS:  # they may reach every process; one decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, runtime.StopSignals.SIGNALS)
    # Decoders in C complain on file descriptor 2 and name no file; Python still has its own.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    runtime.keep_to(setup.cores, setup.gpu)
    try:
        from btpipe.embed import worker  # noqa: PLC0415 - DALI and the network are the worker's

        worker.work_for(ours, setup, InFlight(memory))
    except (EOFError, ConnectionError):  # the supervisor is gone
        return
    except BtpipeError as error:
        ours.send(Failed.of(error))
    except Exception:
        text = f"a bug, met by a worker:\n{traceback.format_exc()}"
        ours.send(Failed(BtpipeError, text, "", "", ""))
