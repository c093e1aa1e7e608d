"""Work that a hostile file can hang or kill, done in other processes and watched by this one.

A decoder in C that loops or dies takes its process along. Here that is a worker's: it is started
anew, the file is tried once more with nothing else running, and then it is given up, by name.
"""

import collections
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import connection
from typing import Generic, TypeAlias, TypeVar

from btpipe.data.rejects import BadInputError
from btpipe.errors import MachineError

START_SECONDS = 120.0
"""How long a worker may take to import what it works with."""
_TURN_SECONDS = 0.5  # between two looks at `should_stop`
_PR_SET_PDEATHSIG = 1  # prctl(2)
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Outcome: TypeAlias = tuple[Answer | BadInputError] | BadInputError
"""An answer, or how a task was lost with its process."""


def supervise(
    work: Callable[[Task], Answer],
    tasks: Iterator[tuple[int, Task]],
    *,
    processes: int,
    limit_seconds: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[tuple[int, Answer | BadInputError], None, None]:
    """(key, task) -> (key, `work(task)` or why there is none), as they are done.

    `work` is a function of a module, because the workers import it. A BadInputError that it raises
    is its answer; anything else ends its worker.
    A worker has one task at a time, so the culprit is known. A task that took longer than
    `limit_seconds` or ended its worker waits until the others are done, and is tried once more in a
    process of its own: the machine may have been busy, or memory short. When `should_stop` says so,
    it ends within a second, with tasks unanswered.

    Raises:
        MachineError: a worker cannot start.
    """
    workers: list[_DecodingWorker[Task, Answer]] = []
    suspects: collections.deque[tuple[int, Task]] = collections.deque()
    waiting = next(tasks, None)
    try:
        while not should_stop():
            idle = [worker for worker in workers if worker.is_idle]
            while waiting and idle and not suspects:
                idle.pop().give(*waiting, limit_seconds)
                waiting = next(tasks, None)
            if waiting and not suspects:
                workers += [_DecodingWorker(work) for _ in range(processes - len(workers))]
            at_work = [worker for worker in workers if worker.task is not None]
            if suspects and not at_work:
                key, task = suspects.popleft()
                answer = _alone(work, key, task, limit_seconds, should_stop)
                if answer is not None:
                    yield key, answer
            elif not waiting and not at_work:
                return
            for worker, assignment, outcome in _wait([w for w in workers if not w.is_idle]):
                if isinstance(outcome, BadInputError):
                    workers.remove(worker)
                    suspects.append(assignment)
                else:
                    yield assignment[0], outcome[0]
    finally:
        for worker in workers:
            worker.end()


def _alone(
    work: Callable[[Task], Answer],
    key: int,
    task: Task,
    limit_seconds: float,
    should_stop: Callable[[], bool],
) -> Answer | BadInputError | None:
    """The task's answer from a process of its own, while no other has a task; None if stopped."""
    worker: _DecodingWorker[Task, Answer] = _DecodingWorker(work)
    try:
        while not should_stop():
            if worker.is_idle:
                worker.give(key, task, limit_seconds)
            for _, _, outcome in _wait([worker]):
                return outcome if isinstance(outcome, BadInputError) else outcome[0]
        return None
    finally:
        worker.end()


class _DecodingWorker(Generic[Task, Answer]):
    """A process with at most one task; it is idle once it has said that it is ready."""

    def __init__(self, work: Callable[[Task], Answer]) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()
        self.task: tuple[int, Task] | None = None
        self.is_idle = False
        self._limit_seconds = START_SECONDS
        self.deadline = time.monotonic() + START_SECONDS

    def give(self, key: int, task: Task, limit_seconds: float) -> None:
        """Hands over a task; a worker that died meanwhile is noticed by `outcome`."""
        self.task, self.is_idle, self._limit_seconds = (key, task), False, limit_seconds
        with contextlib.suppress(OSError):
            self.connection.send(task)
        self.deadline = time.monotonic() + limit_seconds

    def outcome(self) -> "Outcome[Answer] | None":
        """Its answer, or how it was lost with its process; None while neither. Never waits."""
        try:
            if self.connection.poll():
                answer: tuple[Answer | BadInputError] = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self._process.join()
            how = _ending(self._process.exitcode or 0)
            return BadInputError(f"decoding ended the process ({how})")
        if time.monotonic() > self.deadline:
            return BadInputError(f"decoding took longer than {self._limit_seconds:g} s")
        return None

    def end(self) -> None:
        """Kills the process, if it is there."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _wait(
    workers: "list[_DecodingWorker[Task, Answer]]",
) -> "list[tuple[_DecodingWorker[Task, Answer], tuple[int, Task], Outcome[Answer]]]":
    """Waits a moment for a worker to answer, be lost or too late; the tasks that are decided.

    A worker that is lost is ended.
    """
    if not workers:
        return []
    patience = min(worker.deadline for worker in workers) - time.monotonic()
    connection.wait(
        [worker.connection for worker in workers], min(max(patience, 0) + 0.01, _TURN_SECONDS)
    )
    decided = []
    for worker in workers:
        outcome = worker.outcome()
        if outcome is None:
            continue
        task, worker.task = worker.task, None
        worker.is_idle = not isinstance(outcome, BadInputError)
        if not worker.is_idle:
            worker.end()
        if task is not None:
            decided.append((worker, task, outcome))
        elif isinstance(outcome, BadInputError):
            what = f"a process for decoding cannot start: it {outcome.reason[len('decoding ') :]}"
            fix = "see what it wrote on standard error; free some memory if it was killed"
            raise MachineError(what, fix=fix)
    return decided


def _ending(code: int) -> str:
    """How a process ended, in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve(tasks: "connection.Connection", work: Callable[[Task], Answer]) -> None:
    """A worker's life: it says that it is ready, then answers task by task until nobody asks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # whoever supervises may be killed
    for number in (signal.SIGINT, signal.SIGUSR1):  # they reach all; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    # Decoders in C complain on file descriptor 2 and name no file; Python still has its own.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    tasks.send(())
    while True:
        try:
            task = tasks.recv()
        except EOFError:
            return
        try:
            answer: Answer | BadInputError = work(task)
        except BadInputError as error:
            answer = error
        tasks.send((answer,))
