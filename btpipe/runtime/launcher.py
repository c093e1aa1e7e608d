"""Several processes on one machine, through torchrun's machinery."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence

from btpipe.errors import BtpipeError, MachineError, Stopped


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a rank ended: None, or the error it raised, in words that cross a process border."""

    error: str | None = None
    exit_code: int = 0


def launch(count: int, entry: Callable[..., None], arguments: Sequence[object]) -> None:
    """Runs `entry(*arguments)` in `count` processes on this machine, through torchrun's machinery.

    Raises:
        BtpipeError: the error of the first rank that failed, with its exit code.
        Stopped: a signal arrived; the ranks were told and had saved their state.
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
    try:
        outcomes = elastic_launch(config, _rank)(entry, *arguments)
    except SignalException as error:
        raise Stopped(f"stopped by {error.sigval.name}; run the same command to go on") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise MachineError(
            f"rank {rank} was lost (exit code {failure.exitcode})",
            fix="run the same command again: it goes on from the last checkpoint",
        ) from error
    for outcome in outcomes.values():
        if outcome.error is not None:
            _raise(outcome)


def _rank(entry: Callable[..., None], *arguments: object) -> Outcome:
    try:
        entry(*arguments)
    except BtpipeError as error:
        return Outcome(str(error), error.exit_code)
    return Outcome()


def _raise(outcome: Outcome) -> None:
    stopped = outcome.exit_code == Stopped.exit_code
    error = (Stopped if stopped else BtpipeError)(outcome.error or "")
    error.exit_code = outcome.exit_code
    raise error
