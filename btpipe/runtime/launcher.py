"""Several processes on one machine, each with torchrun's variables of its rank."""

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from typing import NoReturn

from btpipe.errors import BtpipeError, LostRankError, MachineError, Stopped
from btpipe.runtime.signals import REPEAT_SECONDS, StopSignals

END_SECONDS = 30.0
"""How long ranks may take to end after one has failed; then they are killed."""

NOTE_SECONDS = 2.0
"""How long they may take before that, to end by themselves and say what they met."""

NOTE_CHARACTERS = 4000  # so that the notes of many ranks fit a pipe that nobody reads yet
AGAIN = "run the same command again: it goes on from the last checkpoint"
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclasses.dataclass(frozen=True)
class _Note:
    """What a rank says before it ends with an error."""

    rank: int
    error: BtpipeError


def launch(count: int, entry: Callable[..., None], arguments: Sequence[object]) -> None:
    """Runs `entry(*arguments)` in `count` processes on this machine.

    SIGTERM, SIGUSR1 and Ctrl-C are passed on to the ranks, which save their state. A launcher that
    is killed takes its ranks along: they save, too.

    Raises:
        BtpipeError: the error of the rank that failed first, with its exit code.
        Stopped: a signal came before a rank had anything to save.
        MachineError: a rank was lost; the others are ended within half a minute.
        KeyboardInterrupt: a second Ctrl-C.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    notes: SimpleQueue[_Note] = context.SimpleQueue()
    ranks = []
    for rank in range(count):
        variables = _variables(rank, count, store.port)
        ranks.append(context.Process(target=_rank, args=(variables, notes, entry, *arguments)))
    signals = _Signals(ranks)
    with signals.passed_on():
        try:
            failed = _first_to_fail(ranks)
            if failed is not None:
                _end(ranks)
        finally:
            _kill(ranks)
    if failed is not None:
        _raise(_read(notes), signals, ranks, failed)


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    """torchrun's variables for one rank; the last two say that the launcher holds the store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


class _Signals:
    """What the launcher was asked by signals; they reach the ranks, whoever sent them to whom."""

    def __init__(self, ranks: Sequence[SpawnProcess]) -> None:
        self.first, self.twice = "", False
        self._ranks, self._seconds = ranks, 0.0

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Starts the ranks, and passes signals on for the length of a `with`."""
        before = {number: signal.signal(number, self._handle) for number in StopSignals.SIGNALS}
        # Held back until every rank is there; a rank begins with them held back, too.
        signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.SIGNALS)
        try:
            for rank in self._ranks:
                rank.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.SIGNALS)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.SIGNALS)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if not self.first:
            self.first, self._seconds = signal.Signals(number).name, time.monotonic()
            _send(self._ranks, signal.SIGTERM)
        elif number == signal.SIGINT and time.monotonic() - self._seconds > REPEAT_SECONDS:
            self.twice = True
            _kill(self._ranks)


def _rank(
    variables: dict[str, str],
    notes: "SimpleQueue[_Note]",
    entry: Callable[..., None],
    *arguments: object,
) -> None:
    """One rank's process: its variables, its work, and a note of its own error."""
    os.environ.update(variables)
    # A launcher that is killed takes its ranks along: they are asked to stop.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, StopSignals.SIGNALS)
    rank = int(variables["RANK"])
    try:
        entry(*arguments)
    except BtpipeError as error:
        _leave(notes, _Note(rank, error))
    except Exception:
        text = traceback.format_exc()[-NOTE_CHARACTERS:]
        _leave(notes, _Note(rank, BtpipeError(f"a bug, met by rank {rank}:\n{text}")))
    # Its work is done: threads of a process group that are torn down at the end of the interpreter
    # have ended a rank by SIGABRT ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _leave(notes: "SimpleQueue[_Note]", note: _Note) -> NoReturn:
    try:
        notes.put(note)
    except OSError:  # the launcher is gone
        sys.stderr.write(f"{note.error}\n")
    sys.exit(note.error.exit_code)


def _first_to_fail(ranks: Sequence[SpawnProcess]) -> int | None:
    """Waits until every rank is done, or one ended with an error: that one.

    Of several that ended together it is the one that a signal killed.
    """
    running = list(range(len(ranks)))
    while running:
        ready = connection.wait([ranks[number].sentinel for number in running])
        ended = [number for number in running if ranks[number].sentinel in ready]
        codes = {_exit_code(ranks[number]): number for number in ended}
        failed = [code for code in codes if code != 0]
        if failed:
            return codes[min(failed)]
        running = [number for number in running if number not in ended]
    return None


def _exit_code(rank: SpawnProcess) -> int:
    rank.join()
    assert rank.exitcode is not None
    return rank.exitcode


def _end(ranks: Sequence[SpawnProcess]) -> None:
    """Lets the other ranks say what they met, then asks those that are left to end."""
    for seconds in (NOTE_SECONDS, END_SECONDS):
        until = time.monotonic() + seconds
        for rank in ranks:
            rank.join(max(0, until - time.monotonic()))
        _send(ranks, signal.SIGTERM)


def _kill(ranks: Sequence[SpawnProcess]) -> None:
    _send(ranks, signal.SIGKILL)


def _send(ranks: Sequence[SpawnProcess], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.pid is not None and rank.exitcode is None:
            os.kill(rank.pid, number)  # not reaped: the number is still its own


def _read(notes: "SimpleQueue[_Note]") -> list[_Note]:
    messages = []
    while not notes.empty():
        messages.append(notes.get())
    return messages


def _raise(
    notes: list[_Note], signals: _Signals, ranks: Sequence[SpawnProcess], failed: int
) -> NoReturn:
    """The cause: a second Ctrl-C, what a rank met itself, a first signal, else a lost rank."""
    if signals.twice:
        raise KeyboardInterrupt
    for note in notes:
        if not isinstance(note.error, LostRankError):  # else another rank is the cause
            raise note.error
    if signals.first:
        raise Stopped(f"stopped by {signals.first}", fix="run the same command to go on")
    lost_ranks, how, fix = [failed], "", AGAIN
    exit_code = _exit_code(ranks[failed])
    if exit_code < 0:
        how = f"killed by {signal.Signals(-exit_code).name}"
        if exit_code == -signal.SIGKILL:
            fix = (
                f"if nobody killed it, the machine ran out of memory: lower what needs it; {AGAIN}"
            )
    elif notes:
        answering = {note.rank for note in notes}
        silent = [number for number in range(len(ranks)) if number not in answering]
        lost_ranks = silent or lost_ranks
        how = "it does not answer" if failed not in lost_ranks else str(notes[0].error)
    else:
        how = f"it ended with exit code {exit_code}"
    raise MachineError(f"rank {', '.join(map(str, lost_ranks))} was lost ({how})", fix=fix)
