"""The workers of a job, watched: one that dies or hangs is replaced, and the culprit found.

The process that supervises decodes nothing and runs no network, so no file can harm it.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection

from btpipe import runtime
from btpipe.data.index import Index
from btpipe.data.rejects import BadInputError
from btpipe.embed import culprits
from btpipe.embed.messages import (
    Drain,
    Failed,
    InFlight,
    JobStarted,
    PartProgress,
    PartTask,
    PartWritten,
    Ready,
    TaskRequest,
    WorkerConfig,
)
from btpipe.embed.worker_process import serve, start_with_signals_held
from btpipe.errors import MachineError, RefusedError
from btpipe.events import Rejected, Report, Warned

STALL_SECONDS = 600.0
"""How long a worker may have nothing to say, beside the time that a file server may be away."""
FRUITLESS = 5
"""Workers lost in a row without an image between them, after which it is the machine."""
LOSSES = 10
"""Workers lost over one part, after which it is the machine, or a file that cannot be told."""
CRASHES = 3
"""Workers that were lost with a file in hand that is well alone, after which it is kept apart."""
_TURN_SECONDS = 0.5
Answer = Ready | TaskRequest | PartProgress | PartWritten | Failed
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks


def worker_configs(config: WorkerConfig, workers: int) -> list[WorkerConfig]:
    """One configuration for each worker of this machine, with its own cores and GPU.

    Raises:
        UsageError: more workers than cores.
    """
    gpus = runtime.gpu_count() if config.encoder.device != "cpu" else 0
    groups = runtime.core_groups(workers or max(gpus, 1))
    return [
        dataclasses.replace(config, cores=cores, gpu=i % gpus if gpus else None)
        for i, cores in enumerate(groups)
    ]


class WorkerPool:
    """Processes that open the bundle at once and make parts when they are told which."""

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        limit_seconds: float,
        on_event: Report,
        signals: runtime.StopSignals,
    ) -> None:
        self._configs = configs
        self._limit_seconds, self._on_event, self._signals = limit_seconds, on_event, signals
        self._job: JobStarted | None = None
        self._fruitless = 0
        self._crash_counts: collections.Counter[int] = collections.Counter()
        self._losses: collections.Counter[int] = collections.Counter()
        self._rejected_rows: dict[int, Rejected] = {}
        self._apart: set[int] = set()
        self._workers: list[_WorkerProcess] = []

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the processes; parts that are not written are lost."""
        for worker in self._workers:
            worker.end()

    def start(self) -> None:
        """Starts a process for each configuration, if that was not done yet."""
        if not self._workers:
            self._workers = [_WorkerProcess(config) for config in self._configs]

    def _is_stopped(self) -> bool:
        return bool(self._signals.first)

    def _has_tasks(self) -> bool:
        return any(worker.tasks for worker in self._workers)

    def work(
        self, job: JobStarted, index: Index, tasks: Sequence[PartTask]
    ) -> Iterator[PartWritten | PartProgress]:
        """Has the parts made, and tells of each. When asked to stop, it ends within a second.

        It may be asked for more parts of the same plan later.

        Raises:
            BtpipeError: whatever ended a worker that could say so.
            MachineError: workers die one after the other, and no file is to blame.
        """
        self._waiting = collections.deque(tasks)
        if self._job is None:
            self._job, self._index = job, index
            for worker in self._workers:
                worker.send(job)
        while not self._is_stopped() and (self._waiting or self._has_tasks()):
            for worker in self._workers:
                if self._waiting and worker.is_idle:
                    self._assign(worker)
            connection.wait([worker.connection for worker in self._workers], _TURN_SECONDS)
            for i, worker in enumerate(self._workers):
                yield from self._receive(worker)
                how = worker.lost(self._limit_seconds)
                if how:
                    self._workers[i] = self._replace(worker, how)

    def _assign(self, worker: "_WorkerProcess") -> None:
        """Gives a worker its next part, or says that there is none for now."""
        if not self._waiting:
            worker.drain()
            return
        task = self._waiting.popleft()
        rows = range(task.first, task.end)
        rejected = {row: why for row, why in self._rejected_rows.items() if row in rows}
        apart = frozenset(row for row in self._apart if row in rows)
        worker.assign(dataclasses.replace(task, excluded=rejected, apart=apart))

    def _receive(self, worker: "_WorkerProcess") -> Iterator[PartWritten | PartProgress]:
        for message in worker.messages():
            match message:
                case Failed():
                    raise message.raised()
                case Ready():
                    self._check(message, worker.config)
                case TaskRequest():
                    self._assign(worker)
                case PartProgress():
                    self._fruitless = 0
                    yield message
                case PartWritten():
                    del worker.tasks[message.part]
                    yield message

    def _check(self, ready: Ready, config: WorkerConfig) -> None:
        """Compares how the worker computes with the plan.

        Raises:
            RefusedError: with another bundle, which took the place of the plan's.
            MachineError: with another engine, or in another precision.
        """
        assert self._job is not None
        footer = self._job.footer
        if ready.bundle != footer.bundle:
            raise RefusedError(
                f"the bundle on {socket.gethostname()} has the digest {ready.bundle}",
                where=config.encoder.bundle.absolute(),
                expected=f"digest {footer.bundle}, with which the job began",
                fix="put that bundle back, or embed with the other one to another --out",
            )
        planned = Ready(footer.bundle, footer.engine, footer.precision, footer.dimension)
        if ready != planned:
            raise MachineError(
                f"a worker computes {ready}",
                expected=str(planned),
                fix="see that onnxruntime (or torch) can use the GPU, or hide the GPU from btpipe",
            )

    def _replace(self, worker: "_WorkerProcess", how: str) -> "_WorkerProcess":
        """Finds out whether a file did it, and has another process go on."""
        worker.end()
        rows = [row for row, _ in worker.in_flight.rows()]
        self._waiting.extendleft(reversed(worker.tasks.values()))
        self._fruitless += 1
        self._losses.update(list(worker.tasks)[:1])  # parts are made in order
        if self._fruitless >= FRUITLESS or max(self._losses.values(), default=0) >= LOSSES:
            fix = "run the same command again: it goes on; if nobody killed it, memory is short"
            raise MachineError(f"workers are lost one after the other; the last {how}", fix=fix)
        self._on_event(Warned(f"a worker {how}: it is replaced, and its work done again"))
        self._reject_culprits(rows, worker.config, how)
        assert self._job is not None
        fresh = _WorkerProcess(worker.config)
        fresh.send(self._job)
        return fresh

    def _reject_culprits(self, rows: Sequence[int], config: WorkerConfig, how: str) -> None:
        """Refuses the files that end a process with the worker's decoder, out of those it had.

        Files that are well, but were there when workers were lost, are decoded apart from then on:
        one that was decoded apart, alone, is found when it takes another worker along.
        """
        files = {}
        for row in rows:
            with contextlib.suppress(BadInputError):  # the next worker meets it, and rejects it
                files[row] = self._index.read_bytes(row)
        limit, stop = self._limit_seconds, self._is_stopped
        try:
            crashes = culprits.find(files, config, limit_seconds=limit, should_stop=stop)
            self._rejected_rows |= {
                row: self._index.reject(row, "decode", error) for row, error in crashes.items()
            }
        except MachineError:
            if not self._is_stopped():  # what asks every process to stop ends one that starts
                raise
        if "SIGKILL" in how:  # that is somebody's, or want of memory
            return
        if len(rows) == 1 and rows[0] in self._apart:
            error = BadInputError(f"decoding it, {CRASHES + 1} workers {how}")
            rejected = self._index.reject(rows[0], "decode", error)
            self._rejected_rows.setdefault(rows[0], rejected)
        self._crash_counts.update(rows)
        suspects = {row for row in rows if self._crash_counts[row] >= CRASHES}
        self._apart |= suspects - self._rejected_rows.keys()


class _WorkerProcess:
    """One worker's process, and what is in its hands."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.connection, theirs = _CONTEXT.Pipe()
        memory = _CONTEXT.RawArray("q", 2 * InFlight.SLOTS)
        self.in_flight = InFlight(memory)
        self._process = _CONTEXT.Process(
            target=serve, args=(theirs, config, memory, os.getpid()), daemon=True
        )
        start_with_signals_held(self._process)
        theirs.close()
        self.tasks: dict[int, PartTask] = {}
        self._is_drained, self._is_gone = True, False
        self._last_message = time.monotonic()

    def send(self, message: JobStarted | PartTask | Drain) -> None:
        """Sends a message; that the process is dead is noticed by `lost`."""
        try:
            self.connection.send(message)
        except OSError:
            self._is_gone = True

    def assign(self, task: PartTask) -> None:
        """Hands over a part."""
        if not self.tasks:
            self._last_message = time.monotonic()
        self.tasks[task.part] = task
        self._is_drained = False
        self.send(task)

    def drain(self) -> None:
        """Says that nothing follows for now."""
        self._is_drained = True
        self.send(Drain())

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a part without having asked for one."""
        return self._is_drained and not self.tasks

    def messages(self) -> Iterator[Answer]:
        """What the worker has said since; never waits."""
        try:
            while self.connection.poll():
                message: Answer = self.connection.recv()
                self._last_message = time.monotonic()
                yield message
        except (EOFError, OSError):
            self._is_gone = True

    def lost(self, limit_seconds: float) -> str:
        """How the worker was lost, in words; nothing while it lives and works."""
        if self._is_gone:
            self._process.join()
            code = self._process.exitcode or 0
            ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"was lost ({ending})"
        if any(seconds > limit_seconds for _, seconds in self.in_flight.rows()):
            return f"took longer than {limit_seconds:g} s to decode a file"
        stall_seconds = STALL_SECONDS + self.config.patience_seconds
        if self.tasks and time.monotonic() - self._last_message > stall_seconds:
            return f"said nothing for {stall_seconds:.0f} s"
        return ""

    def end(self) -> None:
        """Kills the process, if it is there."""
        self._process.kill()
        self._process.join()
        self.connection.close()
