"""One thing that must hold, many of them in a table, and the error that names those that do not."""

import dataclasses
import math
from collections.abc import Iterable

import torch

from btpipe.errors import NumericsError
from btpipe.events import Tabled


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


def table(checks: Iterable[Check], device: torch.device) -> Tabled:
    """The checks for people."""
    rows = tuple(
        (c.name, f"{c.measured:.1e}", f"{c.tolerance:.0e}", "ok" if c.is_ok else "FAILED", c.about)
        for c in checks
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    title = f"Self-test on {name}, torch {torch.__version__}"
    return Tabled(title, ("check", "measured", "allowed", "", "what is measured"), rows)


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


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|; not a number where either holds one."""
    expected = expected.double().cpu()
    error = (found.double().cpu() - expected).abs().max()
    return float(error / expected.abs().max())


def worst(errors: Iterable[float]) -> float:
    """The largest, and not a number where one is none."""
    found = list(errors)
    return math.nan if any(math.isnan(error) for error in found) else max(found)
