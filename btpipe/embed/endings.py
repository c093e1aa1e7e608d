"""How a job ends whose table is there, by the rejects that it has."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe.data.rejects import BadInputError
from btpipe.embed import table
from btpipe.errors import BudgetError, MachineError, NumericsError
from btpipe.events import Rejected

ENCODE = "encode"
"""The stage of a reject whose vector is not finite."""


def not_finite(footer: table.Footer, vector: NDArray[np.float32]) -> BadInputError:
    """Why a vector is not written: it is the same another time."""
    what = footer.dtype if np.isfinite(vector).all() else f"precision {footer.precision}"
    return BadInputError(f"its vector is not finite in {what}")


def require_finite(rejects: Iterable[Rejected], inputs: int, where: Path) -> None:
    """Raises NumericsError where vectors of the inputs were not finite."""
    bad = [reject for reject in rejects if reject.stage == ENCODE]
    if bad:
        raise NumericsError(
            f"{len(bad)} of {inputs} vectors are not finite; the first: {bad[0].path}:"
            f" {bad[0].reason}",
            where=where,
            expected="finite numbers; no other vector is written",
            fix="embed with --precision fp32 and --dtype float32 to another --out; where that does"
            " not help, the weights are at fault",
        )


def unread(out: Path) -> list[Rejected]:
    """The inputs that have no vector because of the machine: another time they may."""
    return [bad for bad in table.read_rejects(out) if bad.kind == "machine"]


def require_read(out: Path, inputs: int) -> None:
    """Raises MachineError where inputs of the table `out` could not be read."""
    bad = unread(out)
    if bad:
        raise MachineError(
            _sentence(bad, f"{len(bad)} of {inputs} inputs"),
            where=table.rejects_path(out),
            fix="run the same command again: it makes just those; the table holds the others",
        )


def require_shards_read(shards: Mapping[str, Path], out: Path) -> None:
    """Raises MachineError where inputs of any of the shards, by their names, could not be read."""
    bad = {name: rejects for name, path in shards.items() if (rejects := unread(path))}
    if bad:
        rejects = [reject for each in bad.values() for reject in each]
        names = ", ".join(bad)
        raise MachineError(
            _sentence(rejects, f"{len(rejects)} inputs of shard {names}"),
            where=table.rejects_path(out),
            fix=f"run embed --shard for {names} again, it makes just those, and then this command",
        )


def _sentence(bad: list[Rejected], subject: str) -> str:
    first = f"the first is {bad[0].path} ({bad[0].reason})"
    return f"{subject} could not be read: the machine's fault, not theirs; {first}"


def keep_budget(out: Path, rejects: int, inputs: int, max_bad: float | None) -> None:
    """Raises BudgetError when more of the inputs were rejected than allowed."""
    if max_bad is None:
        return
    bad = rejects if isinstance(max_bad, int) else rejects / max(inputs, 1)
    if bad > max_bad:
        raise BudgetError(
            f"{rejects} of {inputs} inputs are bad",
            where=table.rejects_path(out),
            expected=f"max_bad {max_bad}",
            fix="read the reasons there; the table is finished and holds the others",
        )
