"""Several processes on one machine, through torchrun's machinery."""

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from btpipe.errors import BtpipeError, MachineError, Stopped


def launch(count: int, entry: Callable[..., None], arguments: Sequence[object]) -> None:
    """Runs `entry(*arguments)` in `count` processes on this machine.

    Raises:
        BtpipeError: the error of the rank that failed first, with its exit code.
        Stopped: a signal arrived and was passed on to the ranks, which save their state.
        MachineError: a rank was lost.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    with tempfile.TemporaryDirectory(prefix="btpipe-ranks-") as folder:
        notes = Path(folder)
        try:
            elastic_launch(config, _rank)(notes, entry, *arguments)
        except SignalException as error:
            fix = "run the same command to go on"
            raise Stopped(f"stopped by {error.sigval.name}", fix=fix) from error
        except ChildFailedError as error:
            _raise_first(notes)
            rank, failure = error.get_first_failure()
            raise MachineError(
                f"rank {rank} was lost (exit code {failure.exitcode})",
                fix="run the same command again: it goes on from the last checkpoint",
            ) from error
        _raise_first(notes)


def _rank(notes: Path, entry: Callable[..., None], *arguments: object) -> None:
    """Notes this rank's own error and ends with its code: the others are ended after it.

    Ends, instead of returning: a rank that returns waits for the launcher, which may wait for it.
    """
    try:
        entry(*arguments)
    except BtpipeError as error:
        note = {"error": str(error), "exit_code": error.exit_code}
        path = notes / f"rank-{os.getpid()}.tmp"
        path.write_text(json.dumps(note))
        path.rename(path.with_suffix(".json"))
        sys.exit(error.exit_code)


def _raise_first(notes: Path) -> None:
    """Raises what the first rank to fail noted, if any did."""
    found = sorted(notes.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if found:
        note = json.loads(found[0].read_text())
        _raise(note["error"], note["exit_code"])


def _raise(message: str, exit_code: int) -> NoReturn:
    error = (Stopped if exit_code == Stopped.exit_code else BtpipeError)(message)
    error.exit_code = exit_code
    raise error
