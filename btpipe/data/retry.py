"""Patience with a disk or a server that fails: who is to blame is found out before a file is.

A file is given up when it failed again and again while its source gave others. A source is given
up, and with it the job, when it gave nothing for five minutes.
"""

import contextlib
import errno
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from btpipe import runtime
from btpipe.data import rejects
from btpipe.data.rejects import BadInputError
from btpipe.errors import MachineError, Stopped

Content = TypeVar("Content")

OUTAGE_SECONDS = 300.0
"""How long a source may give nothing."""
CONTACT_SECONDS = 10.0
"""The same before it gave anything at all: its name may be wrong."""
TRIES = 5
"""After so many failures, between which the source gave others, the file is to blame."""
_FIRST_PAUSE_SECONDS, _GROWTH = 0.1, 3
_PAUSES_IN_OUTAGE = 30  # the longest pause is 10 s
_TURN_SECONDS = 0.25  # between two looks whether to go on waiting
_AGO = float("-inf")
_LASTING = frozenset(
    {errno.EACCES, errno.EPERM, errno.EOPNOTSUPP, socket.EAI_NONAME, socket.EAI_NODATA}
)
"""What does not pass while one waits: no permission, no such server."""

_limits = [OUTAGE_SECONDS]
_thread = threading.local()


@contextlib.contextmanager
def waiting_at_most(seconds: float) -> Iterator[None]:
    """Within it, sources that are opened by this process may give nothing for so long."""
    _limits.append(seconds)
    try:
        yield
    finally:
        _limits.pop()


@contextlib.contextmanager
def reading_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for reading. When it is left early, those that wait for a source wait no more."""
    left = threading.Event()

    def enter() -> None:
        _thread.left = left

    with ThreadPoolExecutor(count, "btpipe-read", initializer=enter) as pool:
        try:
            yield pool
        finally:
            left.set()
            pool.shutdown(wait=False, cancel_futures=True)


class Patience:
    """Has reads of one source tried again; all threads that read it share this.

    `place` names the source in messages. `most_seconds`: less than the usual time for an outage.
    """

    def __init__(self, place: str, most_seconds: float = OUTAGE_SECONDS) -> None:
        self._place, self._limit_seconds = place, min(most_seconds, _limits[-1])
        self._good_reads, self._last_good = 0, _AGO
        self._failing_since: float | None = None
        self._known_good: Callable[[], object] | None = None
        self._changing, self._probing = threading.Lock(), threading.Lock()

    def read(
        self, read: Callable[[], Content], probe: Callable[[], object] | None = None
    ) -> Content:
        """What `read` returns; after a transient error it is asked again.

        `probe` reads something else of the source, which says whether that is alive where nothing
        else is being read. Without it the last thing that could be read is.

        Raises:
            Exception: whatever `read` raised last: it will not pass, or it is this file's fault.
            MachineError: the source gave nothing for too long.
            Stopped: a signal, while it waited.
        """
        begun, failures, strikes, good_reads = time.monotonic(), 0, 0, -1
        while True:
            started = time.monotonic()
            try:
                content = read()
            except Exception as error:
                if not is_transient(error):
                    self._answered(isinstance(error, BadInputError))
                    raise
                failures += 1
                strikes += self._good_reads != good_reads
                good_reads = self._good_reads
                is_late = time.monotonic() - begun > self._limit_seconds
                if strikes >= TRIES or (strikes > 1 and is_late):
                    raise
                self._wait(failures, started, error)
            else:
                self._answered(is_good=True)
                self._known_good = read
                return content
            probe = probe or self._known_good
            if probe and self._good_reads == good_reads and self._probing.acquire(blocking=False):
                with contextlib.suppress(OSError, LookupError):
                    self._probe(probe)
                self._probing.release()

    def _probe(self, probe: Callable[[], object]) -> None:
        with contextlib.suppress(BadInputError):  # it was read, after all
            probe()
        self._answered(is_good=True)

    def _answered(self, is_good: bool) -> None:
        """The source is there: it gave something, or said that it will not."""
        with self._changing:
            self._failing_since = None
            if is_good:
                self._good_reads += 1
                self._last_good = time.monotonic()

    def _wait(self, failures: int, started: float, error: Exception) -> None:
        """Pauses, the longer the more often a read failed."""
        with self._changing:
            if self._failing_since is None:
                self._failing_since = max(started, self._last_good)
            rest = self._failing_since + self._limit_seconds - time.monotonic()
        if rest <= 0:
            raise MachineError(
                f"the source has given nothing for {self._limit_seconds:g} s"
                f" ({rejects.reason_of(error)})",
                where=self._place,
                fix="see that it can be read, and run the same command again: it goes on",
            ) from error
        pause = _FIRST_PAUSE_SECONDS * _GROWTH ** min(failures - 1, 9)
        pause = min(pause, self._limit_seconds / _PAUSES_IN_OUTAGE)
        # Not all at the same moment: what is overloaded must not be asked by all threads at once.
        self._sleep(min(pause * random.uniform(0.5, 1.0), rest))  # noqa: S311

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        left: threading.Event | None = getattr(_thread, "left", None)
        while (rest := end - time.monotonic()) > 0:
            signal = runtime.StopSignals.asked
            if signal or (left and left.is_set()):
                what = f"stopped by {signal or 'an error'} while the source could not be read"
                fix = "run the same command again: it goes on"
                raise Stopped(what, where=self._place, fix=fix)
            time.sleep(min(rest, _TURN_SECONDS))


def is_transient(error: Exception) -> bool:
    """Whether it is the disk's or the network's failure, which may pass, and not the file's."""
    return isinstance(error, OSError) and error.errno not in _LASTING and rejects.is_machine(error)
