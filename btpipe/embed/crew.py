"""The workers of a job, watched: one that dies or hangs is replaced, and the culprit found.

The process that supervises decodes nothing and runs no network, so no file can harm it.
"""

import collections
import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection

from btpipe import runtime
from btpipe.data import reading
from btpipe.data.index import Index
from btpipe.embed import culprits
from btpipe.embed.orders import (
    Advanced,
    Begin,
    Failed,
    Flush,
    InFlight,
    Order,
    Ready,
    Setup,
    Wanted,
    Written,
    serve,
)
from btpipe.errors import MachineError
from btpipe.events import Report, Warned

STALL_SECONDS = 600.0
"""How long a worker may have nothing to say: a file server may be away for some minutes."""
FRUITLESS = 5
"""Workers lost in a row without an image between them, after which it is the machine."""
LOSSES = 10
"""Workers lost over one part, after which it is the machine, or a file that cannot be told."""
DEATHS = 3
"""Workers that were lost with a file in hand that is well alone, after which it is kept apart."""
_TURN_SECONDS = 0.5
Answer = Ready | Wanted | Advanced | Written | Failed
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy other threads' locks


def setups(setup: Setup, workers: int) -> list[Setup]:
    """One setup for each worker of this machine, with the cores and the GPU that are its own.

    Raises:
        UsageError: more workers than cores.
    """
    gpus = runtime.gpu_count() if setup.choice.device != "cpu" else 0
    groups = runtime.core_groups(workers or max(gpus, 1))
    return [
        dataclasses.replace(setup, cores=cores, gpu=i % gpus if gpus else None)
        for i, cores in enumerate(groups)
    ]


class Crew:
    """Processes that open the bundle at once and make parts when they are told which."""

    def __init__(
        self,
        setups: Sequence[Setup],
        limit_seconds: float,
        report: Report,
        signals: runtime.StopSignals,
    ) -> None:
        self._setups = setups
        self._limit_seconds, self._report, self._signals = limit_seconds, report, signals
        self._begin: Begin | None = None
        self._fruitless = 0
        self._deaths: collections.Counter[int] = collections.Counter()
        self._losses: collections.Counter[int] = collections.Counter()
        self._guilty: dict[int, str] = {}
        self._apart: set[int] = set()
        self._members: list[_Member] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the processes; parts that are not written are lost."""
        for member in self._members:
            member.end()

    def hire(self) -> None:
        """Starts a process for each setup, if that was not done yet."""
        if not self._members:
            self._members = [_Member(setup) for setup in self._setups]

    def _is_stopped(self) -> bool:
        return bool(self._signals.asked)

    def work(
        self, begin: Begin, index: Index, orders: Sequence[Order]
    ) -> Iterator[Written | Advanced]:
        """Has the parts made, and tells of each. When asked to stop, it ends within a second.

        It may be asked for more parts of the same plan later.

        Raises:
            BtpipeError: whatever ended a worker that could say so.
            MachineError: workers die one after the other, and no file is to blame.
        """
        self._waiting = collections.deque(orders)
        if self._begin is None:
            self._begin, self._index = begin, index
            for member in self._members:
                member.say(begin)
        while not self._is_stopped() and (self._waiting or any(m.orders for m in self._members)):
            for member in self._members:
                if self._waiting and member.is_idle:
                    self._hand_out(member)
            heard = [member.connection for member in self._members]
            connection.wait(heard, _TURN_SECONDS)
            for i, member in enumerate(self._members):
                yield from self._hear(member)
                how = member.lost(self._limit_seconds)
                if how:
                    self._members[i] = self._replace(member, how)

    def _hand_out(self, member: "_Member") -> None:
        """Gives a worker its next part, or says that there is none for now."""
        if not self._waiting:
            member.flush()
            return
        order = self._waiting.popleft()
        rows = range(order.first, order.end)
        guilty = {row: why for row, why in self._guilty.items() if row in rows}
        apart = frozenset(row for row in self._apart if row in rows)
        member.give(dataclasses.replace(order, excluded=guilty, apart=apart))

    def _hear(self, member: "_Member") -> Iterator[Written | Advanced]:
        for message in member.messages():
            match message:
                case Failed():
                    raise message.raised()
                case Ready():
                    self._check(message)
                case Wanted():
                    self._hand_out(member)
                case Advanced():
                    self._fruitless = 0
                    yield message
                case Written():
                    del member.orders[message.part]
                    yield message

    def _check(self, ready: Ready) -> None:
        """Raises MachineError where the worker computes otherwise than the plan says."""
        assert self._begin is not None
        footer = self._begin.footer
        planned = Ready(footer.engine, footer.precision, footer.dimension)
        if ready != planned:
            raise MachineError(
                f"a worker computes {ready}",
                expected=str(planned),
                fix="see that onnxruntime (or torch) can use the GPU, or hide the GPU from btpipe",
            )

    def _replace(self, member: "_Member", how: str) -> "_Member":
        """Finds out whether a file did it, and has another process go on."""
        member.end()
        rows = [row for row, _ in member.flying.rows()]
        self._waiting.extendleft(reversed(member.orders.values()))
        self._fruitless += 1
        self._losses.update(list(member.orders)[:1])  # parts are made in order
        if self._fruitless >= FRUITLESS or max(self._losses.values(), default=0) >= LOSSES:
            fix = "run the same command again: it goes on; if nobody killed it, memory is short"
            raise MachineError(f"workers are lost one after the other; the last {how}", fix=fix)
        self._report(Warned(f"a worker {how}: it is replaced, and its work done again"))
        self._judge(rows, member.setup, how)
        assert self._begin is not None
        fresh = _Member(member.setup)
        fresh.say(self._begin)
        return fresh

    def _judge(self, rows: Sequence[int], setup: Setup, how: str) -> None:
        """Refuses the files that end a process with the worker's decoder, out of those it had.

        Files that are well, but were there when workers were lost, are decoded apart from then on:
        one that was decoded apart, alone, is found when it takes another worker along.
        """
        contents = ((row, reading.read_file(self._index, row)) for row in rows)
        files = {row: found.tobytes() for row, found in contents if not isinstance(found, str)}
        try:
            limit, stop = self._limit_seconds, self._is_stopped
            self._guilty |= culprits.find(files, setup, limit_seconds=limit, should_stop=stop)
        except MachineError:
            if not self._is_stopped():  # what asks every process to stop ends one that starts
                raise
        if "SIGKILL" in how:  # that is somebody's, or want of memory
            return
        if len(rows) == 1 and rows[0] in self._apart:
            self._guilty.setdefault(rows[0], f"decoding it, {DEATHS + 1} workers {how}")
        self._deaths.update(rows)
        self._apart |= {row for row in rows if self._deaths[row] >= DEATHS} - self._guilty.keys()


class _Member:
    """One worker's process, and what is in its hands."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.connection, theirs = _CONTEXT.Pipe()
        memory = _CONTEXT.RawArray("q", 2 * InFlight.SLOTS)
        self.flying = InFlight(memory)
        self._process = _CONTEXT.Process(
            target=serve, args=(theirs, setup, memory, os.getpid()), daemon=True
        )
        # Held back until the process ignores them: a Ctrl-C reaches every process.
        signal.pthread_sigmask(signal.SIG_BLOCK, runtime.StopSignals.SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, runtime.StopSignals.SIGNALS)
        theirs.close()
        self.orders: dict[int, Order] = {}
        self._is_flushed, self._is_gone = True, False
        self._heard = time.monotonic()

    def say(self, message: Begin | Order | Flush) -> None:
        """Sends a message; that the process is dead is noticed by `lost`."""
        try:
            self.connection.send(message)
        except OSError:
            self._is_gone = True

    def give(self, order: Order) -> None:
        """Hands over a part."""
        if not self.orders:
            self._heard = time.monotonic()
        self.orders[order.part] = order
        self._is_flushed = False
        self.say(order)

    def flush(self) -> None:
        """Says that nothing follows for now."""
        self._is_flushed = True
        self.say(Flush())

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a part without having asked for one."""
        return self._is_flushed and not self.orders

    def messages(self) -> Iterator[Answer]:
        """What the worker has said since; never waits."""
        try:
            while self.connection.poll():
                message: Answer = self.connection.recv()
                self._heard = time.monotonic()
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
        if any(seconds > limit_seconds for _, seconds in self.flying.rows()):
            return f"took longer than {limit_seconds:g} s to decode a file"
        if self.orders and time.monotonic() - self._heard > STALL_SECONDS:
            return f"said nothing for {STALL_SECONDS:.0f} s"
        return ""

    def end(self) -> None:
        """Kills the process, if it is there."""
        self._process.kill()
        self._process.join()
        self.connection.close()
