"""A process of its own for each thing that is measured: its memory and its threads are its own."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from btpipe.errors import MachineError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TURN_SECONDS = 0.2
"""A turn repeats its action until it has taken this long, so that clocks resolve it."""
WARM_UPS = {"cpu": 1, "cuda": 3}
"""Repeats before the first turn: on a GPU they also compile, and search for algorithms."""

Order = Literal["prepare", "measure", "peak"]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one action: by the clock, and of all CPU cores."""

    seconds: float
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """What a measured process answers when its GPU has too little memory."""


Answer = Timing | OutOfMemory | int | None


class PeakMemory:
    """Most memory in use since this was made, beyond what was in use then and `beside_bytes`.

    On a CPU the growth of the resident set (VmHWM of the process, set back when this is made,
    against VmRSS). On a GPU the peak of the turns, without the warm-ups and their search for
    algorithms: of what torch's allocator hands out, or, if `whole`, of all that leaves the GPU's
    free memory, which is torch's cache, DALI's pools, onnxruntime's arena and the kernels' code,
    but not the CUDA context, nor what other programs hold, if they leave it as it is meanwhile.
    """

    def __init__(self, device: torch.device, beside_bytes: int = 0, *, whole: bool = False) -> None:
        self.device, self._whole = device, whole
        if device.type == "cuda":
            self.forget_warm_ups()
            before = self._peak_bytes()
        else:
            with contextlib.suppress(OSError):  # then earlier peaks count too
                Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
        self._before = before + beside_bytes

    def forget_warm_ups(self) -> None:
        """On a GPU the peak starts anew, from what is in use."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def read_bytes(self) -> int:
        """The peak so far."""
        return max(0, self._peak_bytes() - self._before)

    def _peak_bytes(self) -> int:
        if self.device.type == "cpu":
            return _status_bytes("VmHWM")
        if not self._whole:
            return torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        peak, now = torch.cuda.max_memory_reserved(), torch.cuda.memory_reserved()
        return peak_in_use(total - free, torch_peak_bytes=peak, torch_bytes=now)


def peak_in_use(bytes_now: int, *, torch_peak_bytes: int, torch_bytes: int) -> int:
    """Bytes of a GPU at their peak: torch alone gives memory back, so all else is at its own."""
    return bytes_now - torch_bytes + torch_peak_bytes


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An action that can be repeated, and the memory that it is charged for.

    `repeats`: how often it does by itself what is measured.
    """

    action: Callable[[], object]
    memory: PeakMemory
    repeats: int = 1


class MeasuredProcess:
    """A process that prepares an action once and then takes its turns.

    `prepare` runs in that process and must be picklable: a function of a module, or a partial.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], Prepared],
        threads: int,
        *,
        has_children: bool = False,
    ) -> None:
        """`has_children`: the action starts processes, and is charged for those that it ends."""
        self.name = name
        # Forked from a server that has done the imports once, and nothing else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["btpipe.tools.plan_cases"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, prepare, threads),
            daemon=not has_children,  # a daemon may have none; without, the pipe's end is its end
        )
        self._process.start()
        theirs.close()

    def prepare(self) -> bool:
        """Makes the action and runs it untimed; False where the GPU's memory does not do."""
        return not isinstance(self._ask("prepare"), OutOfMemory)

    def measure(self) -> Timing | None:
        """One turn; None where the GPU's memory does not do."""
        answer = self._ask("measure")
        assert isinstance(answer, Timing | OutOfMemory)
        return None if isinstance(answer, OutOfMemory) else answer

    def peak_bytes(self) -> int:
        """Peak memory of all actions so far."""
        answer = self._ask("peak")
        assert isinstance(answer, int)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()

    def _ask(self, order: Order) -> Answer:
        try:
            self._pipe.send(order)
            answer: Answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(timeout=5)
            raise MachineError(
                f"the process of {self.name!r} ended (exit code {self._process.exitcode})",
                fix="-9: too little memory, take smaller sizes; else see its traceback above",
            ) from error
        return answer


def take_turns(
    named: Mapping[str, Callable[[], Prepared] | None],
    turns: int,
    *,
    threads: int,
    has_children: Callable[[str], bool],
) -> dict[str, tuple[Timing, ...]]:
    """Every row in a process of its own, one after the other, `turns` times: name to its turns."""
    with contextlib.ExitStack() as cleanup:
        processes = []
        for name, prepare in named.items():
            assert prepare is not None
            process = MeasuredProcess(name, prepare, threads, has_children=has_children(name))
            cleanup.callback(process.close)
            processes.append(process)
        for process in processes:
            process.prepare()
        timings: dict[str, list[Timing]] = {process.name: [] for process in processes}
        for _ in range(turns):
            for process in processes:
                turn = process.measure()
                assert turn is not None
                timings[process.name].append(turn)
    return {name: tuple(some) for name, some in timings.items()}


def _serve(pipe: Connection, prepare: Callable[[], Prepared], threads: int) -> None:
    """The life of a measured process: answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle; it closes the pipe
    torch.set_num_threads(threads)
    compute_as_pretrain()
    prepared: Prepared | None = None
    while True:
        try:
            order: Order = pipe.recv()
        except EOFError:
            return
        try:
            answer: Answer = None
            if order == "prepare":
                prepared = _warmed_up(prepare)
            else:
                assert prepared is not None
                measures = order == "measure"
                answer = _turn(prepared) if measures else prepared.memory.read_bytes()
        except torch.OutOfMemoryError:
            answer = OutOfMemory()
        _give_memory_back()
        pipe.send(answer)


def compute_as_pretrain() -> None:
    """Sets in this process what `runtime.start` sets for training on a GPU."""
    torch.backends.cudnn.benchmark = True


def _give_memory_back() -> None:
    """Freed memory goes to the system before another process's turn: together they would not fit.

    Asked of glibc; elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _warmed_up(prepare: Callable[[], Prepared]) -> Prepared:
    prepared = prepare()
    for _ in range(math.ceil(WARM_UPS[prepared.memory.device.type] / prepared.repeats)):
        prepared.action()
    prepared.memory.forget_warm_ups()
    return prepared


def _turn(prepared: Prepared) -> Timing:
    """Repeats the action for about `TURN_SECONDS`; the mean of one."""
    if prepared.memory.device.type == "cuda":
        return _turn_of_gpu(prepared.action)
    calls, started, cpu_started = 0, time.perf_counter(), _cpu_seconds()
    while calls == 0 or time.perf_counter() - started < TURN_SECONDS:
        prepared.action()
        calls += 1
    cpu_seconds = _cpu_seconds() - cpu_started
    return Timing((time.perf_counter() - started) / calls, cpu_seconds / calls)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _turn_of_gpu(action: Callable[[], object]) -> Timing:
    """As many calls as one call's time allows, all streams of the GPU waited for at both ends."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    calls = math.ceil(TURN_SECONDS / (time.perf_counter() - started))
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    started, cpu_started = time.perf_counter(), _cpu_seconds()
    for _ in range(calls):
        action()
    done.record()
    done.synchronize()  # sleeps; what comes now would burn CPU time while it waits
    torch.cuda.synchronize()
    cpu_seconds = _cpu_seconds() - cpu_started
    return Timing((time.perf_counter() - started) / calls, cpu_seconds / calls)
