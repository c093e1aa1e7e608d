"""What a check looked at, and what it found wrong."""

import dataclasses
from pathlib import Path

import pyarrow as pa

from btpipe.errors import BtpipeError, NewerError

ANEW = "restore it from a copy, or make it again"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong, where, and what to do."""

    where: str
    what: str
    fix: str


@dataclasses.dataclass
class Account:
    """What was looked at, and what of it is not as it should be."""

    files: int = 0
    rows: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def wrong(self, where: Path, what: str, fix: str = ANEW) -> None:
        self.problems.append(Problem(str(where), what, fix))

    def noting(self, where: Path) -> "Noting":
        """A block whose errors are taken down, and what is behind it goes on."""
        return Noting(self, where)


@dataclasses.dataclass(frozen=True)
class Noting:
    """Takes down what cannot be read as a problem; a newer format is an error all the same."""

    account: Account
    where: Path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, BtpipeError) and not isinstance(error, NewerError):
            what = f"{error.what} (expected: {error.expected})" if error.expected else error.what
            self.account.wrong(Path(error.where or self.where), what, error.fix or ANEW)
            return True
        if isinstance(error, OSError | ValueError | KeyError | TypeError | pa.ArrowException):
            said = [*str(error).splitlines(), repr(error)][0]
            self.account.wrong(self.where, f"cannot be read: {said}")
            return True
        return False
