"""A worker's own process, from its first line: what its supervisor starts.

Nothing heavy is imported before it is there.
"""

import ctypes
import os
import signal
import sys
import traceback
from ctypes import Array
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from btpipe import runtime
from btpipe.data import retry
from btpipe.embed.messages import Failed, InFlight, WorkerConfig
from btpipe.errors import BtpipeError

_PR_SET_PDEATHSIG = 1  # prctl(2)


def start_with_signals_held(process: SpawnProcess) -> None:
    """Starts it with the stop signals blocked, until it decides: a Ctrl-C reaches every process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, runtime.StopSignals.SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, runtime.StopSignals.SIGNALS)


def serve(
    ours: Connection, config: WorkerConfig, memory: Array[ctypes.c_longlong], parent: int
) -> None:
    """The life of a worker's process: it ends with its parent, and its errors are messages."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before this process could ask to follow
        return
    for number in runtime.StopSignals.SIGNALS:  # they may reach every process; one decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, runtime.StopSignals.SIGNALS)
    # Decoders in C complain on file descriptor 2 and name no file; Python still has its own.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    runtime.keep_to(config.cores, config.gpu)
    try:
        from btpipe.embed import worker  # noqa: PLC0415 - DALI and the network are the worker's

        with retry.waiting_at_most(config.patience_seconds):
            worker.work_for(ours, config, InFlight(memory))
    except (EOFError, ConnectionError):  # the supervisor is gone
        return
    except BtpipeError as error:
        ours.send(Failed.of(error))
    except Exception:
        text = f"a bug, met by a worker:\n{traceback.format_exc()}"
        ours.send(Failed(BtpipeError, text, "", "", ""))
