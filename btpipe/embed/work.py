"""`X.parquet.work/`: the plan of a job, its finished parts, and the lock that one process holds.

    lock  plan.json  commits.jsonl  part-000000.parquet ...

A part counts when its line stands in commits.jsonl; the line is written after the part has its
name and is on the disk. A line that was torn by a kill is no line.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from btpipe import artifact
from btpipe.errors import RefusedError
from btpipe.events import FileRejected, Report, Warned

FORMAT_VERSION = 1
LOCK = "lock"
PLAN = "plan.json"
COMMITS = "commits.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job computes: parts of `part_rows` rows of the listed input, with this bundle."""

    bundle: str
    input: str
    rows: int
    part_rows: int
    format_version: int = FORMAT_VERSION

    @property
    def parts(self) -> int:
        return -(-self.rows // self.part_rows)

    def part_size(self, part: int) -> int:
        """How many rows of the input the part answers for."""
        return min(self.part_rows, self.rows - part * self.part_rows)


@dataclasses.dataclass(frozen=True)
class Commit:
    """A part that is done: its file's sha256, its vectors, and the inputs that got none."""

    part: int
    sha256: str
    rows: int
    rejects: tuple[FileRejected, ...]

    def line(self) -> str:
        """The commit as one line of JSON."""
        rejects = [[reject.path, reject.stage, reject.reason] for reject in self.rejects]
        return json.dumps({**dataclasses.asdict(self), "rejects": rejects}) + "\n"


def folder_of(out: Path) -> Path:
    """Where the job that writes `out` keeps its parts."""
    return out.with_name(f"{out.name}.work")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The work folder, for this process alone; the lock of a process that died is free.

    Raises:
        RefusedError: another process works on the same output.
        MachineError: the folder cannot be written.
    """
    while True:
        with artifact.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RefusedError(
                "another process works on this output",
                where=folder,
                fix="wait for it, or choose another --out",
            ) from error
        if _is_still(folder / LOCK, descriptor):
            break
        os.close(descriptor)  # its owner finished and removed the folder just now
    try:
        yield
    finally:
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the name still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def open_plan(folder: Path, plan: Plan, report: Report, *, overwrite: bool) -> Plan:
    """The plan to follow in a locked folder: the one begun there if it is this job, else `plan`.

    Work for other inputs is dropped, with a warning.

    Raises:
        RefusedError: the work there is of another bundle, and `overwrite` was not asked for.
    """
    found = _read_plan(folder / PLAN)
    if found is not None and (found.bundle, found.input) == (plan.bundle, plan.input):
        return found
    if found is not None and found.bundle != plan.bundle and not overwrite:
        raise RefusedError(
            f"holds unfinished work of bundle {found.bundle}",
            where=folder,
            expected=f"bundle {plan.bundle}",
            fix="choose another --out, finish with that bundle, or drop its work with --overwrite",
        )
    if found is not None:
        why = "images changed" if found.bundle == plan.bundle else "bundle is another one"
        report(Warned(f"{folder}: the {why} since this job began; it starts afresh"))
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()
    artifact.write_json(folder / PLAN, dataclasses.asdict(plan))
    return plan


def _read_plan(path: Path) -> Plan | None:
    """The plan, or None where there is none that this version can follow."""
    try:
        content = json.loads(path.read_text())
        plan = Plan(**{field.name: content[field.name] for field in dataclasses.fields(Plan)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return plan if plan.format_version == FORMAT_VERSION else None


def part_path(folder: Path, part: int) -> Path:
    """The part's final name."""
    return folder / f"part-{part:06d}.parquet"


def commit(folder: Path, done: Commit, beside: Path) -> None:
    """Gives a written and fsynced part its name, then its line."""
    path = part_path(folder, done.part)
    os.replace(beside, path)
    artifact.fsync_path(folder)
    with (folder / COMMITS).open("a", encoding="utf-8") as file:
        file.write(done.line())
        file.flush()
        os.fsync(file.fileno())


def committed(folder: Path, plan: Plan, report: Report) -> dict[int, Commit]:
    """The parts that are done and whole; the others' lines and files are removed.

    A part whose bytes changed is computed again, with a warning.
    """
    done: dict[int, Commit] = {}
    for line in _lines(folder / COMMITS):
        found = _parse(line)
        if found is None or not 0 <= found.part < plan.parts:
            continue
        path = part_path(folder, found.part)
        if path.is_file() and artifact.file_digest(path) == found.sha256:
            done[found.part] = found
        else:
            report(Warned(f"{path}: changed or gone since it was written; computed again"))
    lines = "".join(done[part].line() for part in sorted(done))
    artifact.write_file(folder / COMMITS, lines.encode())
    keep = {LOCK, PLAN, COMMITS, *(part_path(folder, part).name for part in done)}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    return done


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _parse(line: str) -> Commit | None:
    try:
        content = json.loads(line)
        rejects = tuple(FileRejected(*reject) for reject in content["rejects"])
        return Commit(int(content["part"]), str(content["sha256"]), int(content["rows"]), rejects)
    except (ValueError, KeyError, TypeError):
        return None


def remove(folder: Path) -> None:
    """Removes the folder, its lock last: until then nobody else begins there."""
    for path in folder.iterdir():
        if path.name != LOCK:
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)
