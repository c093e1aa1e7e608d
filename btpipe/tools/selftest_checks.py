"""One thing that must hold, many of them in a table, and the error that names those that do not."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch

from btpipe.errors import NumericsError
from btpipe.events import Finished, TextTable


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must hold: what was measured, and how much of it is allowed."""

    name: str
    measured: float
    tolerance: float
    about: str

    @property
    def is_ok(self) -> bool:
        """Whether it holds; nothing that is not a number does."""
        return self.measured <= self.tolerance


def tried(name: str, tolerance: float, about: str, measure: Callable[[], float]) -> Check:
    """What `measure` finds; an error is a check that does not hold, and says what it was."""
    try:
        return Check(name, measure(), tolerance, about)
    except Exception as error:
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}"
        return Check(name, math.nan, tolerance, reason)


@dataclasses.dataclass(frozen=True)
class SelfTested(Finished):
    """What was checked on a device, and with which torch; the command fails where a check did."""

    job = "selftest"

    checks: tuple[Check, ...]
    device: str
    torch: str

    @property
    def text(self) -> str:
        return f"{len(self.checks)} checks"

    def tables(self) -> list[TextTable]:
        """A row for each check."""
        rows = tuple(
            (
                c.name,
                f"{c.measured:.1e}",
                f"{c.tolerance:g}",
                "ok" if c.is_ok else "FAILED",
                c.about,
            )
            for c in self.checks
        )
        title = f"Self-test on {self.device}, torch {self.torch}"
        columns = ("check", "measured", "allowed", "", "what is measured")
        return [TextTable(title, columns, rows)]


def require(checks: Iterable[Check]) -> None:
    """Returns where all checks hold.

    Raises:
        NumericsError: a check failed; it names all that did.
    """
    failed = [check.name for check in checks if not check.is_ok]
    if failed:
        raise NumericsError(
            f"the self-test failed: {'; '.join(failed)}",
            expected="every check within what is allowed",
            fix="train nothing here before it holds; try another torch, driver or precision",
        )


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """max |result - expected| / max |expected|; not a number where either holds one."""
    expected = expected.double().cpu()
    error = (result.double().cpu() - expected).abs().max()
    return relative(float(error), float(expected.abs().max()))


def relative(error: float, largest: float) -> float:
    """error / largest; not a number where all are zero, which is what a broken device leaves."""
    return error / largest if largest else math.nan


def worst(errors: Iterable[float]) -> float:
    """The largest, and not a number where one is none."""
    values = list(errors)
    return math.nan if any(math.isnan(error) for error in values) else max(values)
