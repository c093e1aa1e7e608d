"""`X.parquet.work/`: the plan of a job, its finished parts, and the lock that one process holds.

    lock  plan.json  index.parquet  commits.jsonl  part-000000.parquet ...  known-*

A part counts when its line stands in commits.jsonl; the line is written after the part has its
name and is on the disk. A line that was torn by a kill is no line.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path

from btpipe import artifact
from btpipe.embed import table, vector_cache
from btpipe.errors import RefusedError
from btpipe.events import Rejected, Report, Warned

FORMAT_VERSION = 3
LOCK = "lock"
PLAN = "plan.json"
INDEX = "index.parquet"
COMMITS = "commits.jsonl"
MIXABLE = (
    table.BUNDLE,
    "btpipe.precision",
    "btpipe.engine",
    "btpipe.layer",
    "btpipe.normalize",
    "btpipe.dtype",
    table.SHARD,
)
"""What must be the same of two tables for one to take the other's place unasked."""


@dataclasses.dataclass(frozen=True)
class JobPlan:
    """What a job computes: parts of `part_rows` rows of the listed input, with these settings.

    `settings` is a table's footer without what is the input's. The rows are those from `first` on.
    `dropped`: how many rows of an earlier table are not listed any more; -1 without one.
    """

    settings: Mapping[str, str]
    input: str
    first: int
    rows: int
    part_rows: int
    dropped: int = -1
    format_version: int = FORMAT_VERSION

    @property
    def parts(self) -> int:
        return -(-self.rows // self.part_rows)

    def part_range(self, part: int) -> range:
        """The rows of the input that the part answers for."""
        first = self.first + part * self.part_rows
        return range(first, min(first + self.part_rows, self.first + self.rows))

    @property
    def digest(self) -> str:
        """What the lines of its parts are marked with."""
        return artifact.json_digest([*sorted(self.settings.items()), self.input, self.part_rows])

    def is_of(self, other: "JobPlan") -> bool:
        """Whether both compute the same rows; parts may differ."""
        return (self.settings, self.input) == (other.settings, other.input)


@dataclasses.dataclass(frozen=True)
class Commit:
    """A part that is done: its file's sha256, its vectors, and the inputs that got none.

    `reused` of the vectors were known and not computed.
    """

    plan: str
    part: int
    sha256: str
    rows: int
    reused: int
    rejects: tuple[Rejected, ...]

    def line(self) -> str:
        """The commit as one line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def locked(folder: Path) -> AbstractContextManager[None]:
    """The work folder, for this process alone; the lock of a process that died is free.

    Raises:
        RefusedError: another process works on the same output.
        MachineError: the folder cannot be written, or knows no locks.
    """
    fix = "wait for it, or choose another --out"
    return artifact.locked(folder, "another process works on this output", fix, name=LOCK)


def refuse_other(
    theirs: Mapping[str, str], ours: Mapping[str, str], what: str, where: Path, fix: str
) -> None:
    """Raises RefusedError where vectors were made with another bundle, or with other settings."""
    differing = [key for key in MIXABLE if theirs.get(key, "") != ours.get(key, "")]
    if differing:
        raise RefusedError(
            f"holds {what} of {_shown(theirs, differing)}",
            where=where,
            expected=_shown(ours, differing),
            fix=fix,
        )


def _shown(settings: Mapping[str, str], keys: Sequence[str]) -> str:
    """`bundle 3f..., precision int8`."""
    return ", ".join(f"{key.partition('.')[2]} {settings.get(key) or 'none'}" for key in keys)


def read_plan(folder: Path) -> JobPlan | None:
    """The plan, or None where there is none that this version can follow."""
    try:
        content = json.loads((folder / PLAN).read_text())
        plan = JobPlan(**{field.name: content[field.name] for field in dataclasses.fields(JobPlan)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return plan if plan.format_version == FORMAT_VERSION else None


def write_plan(folder: Path, plan: JobPlan) -> None:
    """Makes a plan the one that is followed: parts of any other are void from now on."""
    artifact.write_json(folder / PLAN, dataclasses.asdict(plan))


def part_path(folder: Path, part: int) -> Path:
    """The part's final name."""
    return folder / f"part-{part:06d}.parquet"


def commit(folder: Path, done: Commit, temporary: Path) -> None:
    """Gives a written and fsynced part its name, then its line."""
    path = part_path(folder, done.part)
    os.replace(temporary, path)
    artifact.fsync_path(folder)
    with (folder / COMMITS).open("a", encoding="utf-8") as file:
        file.write(done.line())
        file.flush()
        os.fsync(file.fileno())


def committed(folder: Path, plan: JobPlan, on_event: Report) -> dict[int, Commit]:
    """The parts that are done and whole; the others' lines and files are removed.

    A part whose bytes changed is computed again, with a warning.
    """
    done: dict[int, Commit] = {}
    for line in _lines(folder / COMMITS):
        entry = _parse(line)
        if entry is None or entry.plan != plan.digest:
            continue
        path = part_path(folder, entry.part)
        if path.is_file() and artifact.file_digest(path) == entry.sha256:
            done[entry.part] = entry
        else:
            on_event(Warned(f"{path}: changed or gone since it was written; computed again"))
    lines = "".join(done[part].line() for part in sorted(done))
    artifact.write_file(folder / COMMITS, lines.encode())
    sweep(folder, {part_path(folder, part).name for part in done})
    return done


def committed_paths(folder: Path, plan: JobPlan) -> list[Path]:
    """The parts of the plan that were done and are there; nothing is looked at or removed."""
    commits = map(_parse, _lines(folder / COMMITS))
    paths = {part_path(folder, c.part) for c in commits if c is not None and c.plan == plan.digest}
    return sorted(path for path in paths if path.is_file())


def sweep(folder: Path, parts: Set[str]) -> None:
    """Removes parts but these, and what a kill left behind."""
    keep = {LOCK, PLAN, COMMITS, INDEX, Path(INDEX).stem + ".arrow", *vector_cache.FILES, *parts}
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _parse(line: str) -> Commit | None:
    try:
        content = json.loads(line)
        rejects = tuple(Rejected(**reject) for reject in content["rejects"])
        numbers = [int(content[name]) for name in ("part", "rows", "reused")]
        part, rows, reused = numbers
        return Commit(str(content["plan"]), part, str(content["sha256"]), rows, reused, rejects)
    except (ValueError, KeyError, TypeError):
        return None


def remove(folder: Path) -> None:
    """Removes the folder, its lock last: until then nobody else begins there."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
