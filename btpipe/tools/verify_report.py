"""What a check looked at, and what it found wrong."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from btpipe.errors import BtpipeError, NewerError, NumericsError
from btpipe.events import Event, Finished, TextTable
from btpipe.tools.artifact_kinds import Kind

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
    golden: Mapping[str, float] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def wrong(self, where: Path, what: str, fix: str = ANEW) -> None:
        self.problems.append(Problem(str(where), what, fix))

    def noting(self, where: Path) -> "Noting":
        """A block whose errors are taken down, and what is behind it goes on."""
        return Noting(self, where)


@dataclasses.dataclass(frozen=True)
class Noting:
    """Takes down what cannot be read as a problem.

    A newer format, and golden images with other vectors, are errors all the same.
    """

    account: Account
    where: Path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if isinstance(error, BtpipeError) and not isinstance(error, NewerError | NumericsError):
            what = f"{error.what} (expected: {error.expected})" if error.expected else error.what
            self.account.wrong(Path(error.where or self.where), what, error.fix or ANEW)
            return True
        if isinstance(error, OSError | ValueError | KeyError | TypeError | pa.ArrowException):
            reason = [*str(error).splitlines(), repr(error)][0]
            self.account.wrong(self.where, f"cannot be read: {reason}")
            return True
        return False


@dataclasses.dataclass(frozen=True)
class ProblemsFound(Event):
    """What of an artifact is not as it was written; the command ends with the first of them."""

    path: Path
    problems: tuple[Problem, ...]

    def tables(self) -> list[TextTable]:
        """A row for each."""
        rows = tuple((p.where, p.what, p.fix) for p in self.problems)
        return [TextTable(f"Wrong in {self.path}", ("where", "what", "to do"), rows)]


@dataclasses.dataclass(frozen=True)
class Verified(Finished):
    """An artifact is as it was written: so many of its files and rows were looked at.

    `golden`: for each precision of a bundle the least cosine of the vectors that its models make
    here of its golden images, with those that they made where it was exported.
    """

    job = "verify"

    path: Path
    kind: Kind
    files: int
    rows: int
    golden: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        rows = f", {self.rows:,} rows" if self.rows else ""
        golden = "".join(f", {name} {cosine:.6f}" for name, cosine in self.golden.items())
        golden = golden and f"; golden images, least cosine{golden[1:]}"
        return f"{self.path}: {self.kind}, {self.files:,} files{rows}: as they were written{golden}"
