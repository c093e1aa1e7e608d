"""How a job ends whose table is there, by the rejects that it has."""

from collections.abc import Mapping
from pathlib import Path

from btpipe.embed import table
from btpipe.errors import BudgetError, MachineError
from btpipe.events import Rejected


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
