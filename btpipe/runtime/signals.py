"""Being asked to stop."""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

REPEAT_SECONDS = 2.0


class StopSignals:
    """`first` is the name of the SIGTERM, SIGUSR1 or Ctrl-C that came first, "" until one does.

    A second Ctrl-C ends the process with 130.

    A signal within two seconds of the first one is the same request: a terminal sends Ctrl-C to
    every process, and the launcher passes it on.
    """

    asked: ClassVar[str] = ""
    """`first` of the one that is being listened to, for whoever waits in another thread."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.first: str = ""
        self._seconds = 0.0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        StopSignals.asked = ""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        if not self.first:
            self.first, self._seconds = signal.Signals(number).name, time.monotonic()
            StopSignals.asked = self.first
        elif number == signal.SIGINT and time.monotonic() - self._seconds > REPEAT_SECONDS:
            os._exit(130)
