"""What a decoder can do to its process, as the task asks. Workers import it."""

import os
import signal
import sys
import time
from pathlib import Path


def decode(task: str) -> str:
    """Does the deed that the task names; any other task is an image: its name in capitals.

    `first-DEED FILE` does it only while there is no FILE, and makes it. `log-DEED FILE` writes
    there when it begins and when it ends, and in which process.
    """
    deed, _, where = task.partition(" ")
    if deed.startswith("first-"):
        if Path(where).exists():
            return "well again"
        Path(where).touch()
    if deed.startswith("log"):
        _log(where, "begin", deed)
        time.sleep(0.05)
    match deed.rpartition("-")[2]:
        case "sleep":
            time.sleep(3600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            sys.exit(7)
        case "pid":
            time.sleep(0.05)
            return str(os.getpid())
        case "long":
            time.sleep(1.0)
            _log(where, "end", deed)
    return task.upper()


def _log(where: str, event: str, deed: str) -> None:
    with Path(where).open("a") as file:
        file.write(f"{event} {deed} {os.getpid()}\n")
