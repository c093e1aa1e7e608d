"""What a run wrote down of itself: events.jsonl and recipe.toml, as lines over its steps.

Each start of a run appends to one file. A start that goes on from step s does the steps after s
again, so what an earlier one wrote of those is left out, as its weights were.
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from btpipe import recipe
from btpipe.errors import IntegrityError, UsageError

FIELDS: Mapping[str, tuple[str, ...]] = {
    "StepDone": (
        "loss",
        "on_diagonal",
        "off_diagonal",
        "mean_diagonal",
        "off_diagonal_rms",
        "dead_dimensions",
        "overflows",
        "lr",
        "bias_lr",
        "images_per_second",
        "data_wait",
    ),
    "RanksMeasured": ("encoder", "projector"),
    "KnnJudged": ("accuracy",),
}
"""The numbers that are drawn, by the event that tells them."""

Series = tuple[tuple[int, float], ...]
"""(step, value), steps rising; what was not finite is missing."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    about: str
    text: str


@dataclasses.dataclass(frozen=True)
class History:
    """One run, as far as it went. `floor` is the loss's; `starts` are the steps it went on from.

    `times`: step to seconds since 1970, when it was last told of; empty for an older btpipe's log.
    `steps` is where it ends; `ended` says whether its last start got there or ended otherwise.
    """

    name: str
    path: Path
    series: Mapping[str, Series]
    alarms: tuple[Mark, ...]
    starts: tuple[Mark, ...]
    times: Mapping[int, float]
    floor: float
    lambd: float
    batch_size: int
    steps: int
    steps_per_epoch: int
    ended: bool
    damaged_lines: int

    @property
    def step(self) -> int:
        """The last step that was told."""
        return max((line[-1][0] for line in self.series.values() if line), default=0)


def read(run: Path) -> History:
    """The history of a run folder, of one that is being written too.

    Raises:
        UsageError: no run there, or one that has not begun.
        IntegrityError: its recipe or its events cannot be read.
    """
    if not (run / "recipe.toml").is_file():
        fix = "name a run folder: runs/NAME"
        raise UsageError("no run there", where=run, expected="a folder with recipe.toml", fix=fix)
    run_recipe = recipe.load(run / "recipe.toml")
    log = run / "events.jsonl"
    if not log.is_file():
        raise UsageError(
            "has not begun: no events.jsonl", where=run, fix="start it: btpipe pretrain"
        )
    records, damaged = _records(log)
    reader = _EventReader()
    for record in records:
        reader.add(record)
    if reader.begun is None:
        raise UsageError("has not begun: its events.jsonl tells of no start", where=run)
    try:
        return History(
            name=run.resolve().name,
            path=run,
            series={name: tuple(sorted(line.items())) for name, line in reader.lines.items()},
            alarms=tuple(reader.alarms),
            starts=tuple(reader.starts),
            times=reader.times,
            floor=float(str(reader.begun["loss_floor"])),
            lambd=run_recipe.loss.lambd,
            batch_size=int(str(reader.begun["batch_size"])),
            steps=int(str(reader.begun["steps"])),
            steps_per_epoch=max(1, int(str(reader.begun["steps_per_epoch"]))),
            ended=reader.ended,
            damaged_lines=damaged,
        )
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"a start without its numbers ({error!r})", where=log) from error


def is_held(run: Path) -> bool:
    """Whether a process of this machine trains in the run folder: pretraining locks it.

    What is taken to find out is let go at once; a start that meets it waits that long.
    """
    handle = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _records(log: Path) -> tuple[list[dict[str, object]], int]:
    """The events of a log, and how many of its whole lines are none (a crash of the machine)."""
    records, damaged = [], 0
    try:
        lines = log.read_bytes().split(b"\n")
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=log) from error
    for line in lines[:-1]:  # what follows the last line break is being written
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            damaged += 1
    return records, damaged


class _EventReader:
    """Collects what the events of a log say, in their order."""

    def __init__(self) -> None:
        self.begun: Mapping[str, object] | None = None
        self.ended = False
        self.lines: dict[str, dict[int, float]] = {
            name: {} for names in FIELDS.values() for name in names
        }
        self.times: dict[int, float] = {}
        self.alarms: list[Mark] = []
        self.starts: list[Mark] = []

    def add(self, record: Mapping[str, object]) -> None:
        """Takes one event."""
        event, step = record.get("event"), record.get("step")
        at = step if isinstance(step, int) else 0
        time = record.get("time")
        if isinstance(time, int | float):
            self.times[at] = float(time)
        if event == "RunStarted":
            self._start(record, at)
        elif event in ("Pretrained", "Finished"):
            self.ended = True
        elif event == "Alarm":
            self.alarms.append(Mark(at, str(record.get("about")), str(record.get("text"))))
        for name in FIELDS.get(str(event), ()):
            value = record.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self.lines[name][at] = float(value)

    def _start(self, record: Mapping[str, object], at: int) -> None:
        self.ended = False
        if self.begun is not None:
            left_out = max((step for line in self.lines.values() for step in line), default=0) - at
            text = f"went on from step {at}"
            if left_out > 0:
                text += f"; {left_out} steps were done again"
            self.starts.append(Mark(at, "restart", text))
        self.begun = record
        for line in self.lines.values():
            for step in [step for step in line if step > at]:
                del line[step]
        self.alarms = [alarm for alarm in self.alarms if alarm.step <= at]


def thin(line: Series, most: int) -> Series:
    """At most about `most` points of a line: the least and the largest of each stretch, and the
    last one, so that no peak is lost."""
    if len(line) <= most:
        return line
    length = -(-len(line) // max(1, most // 2))
    points: set[tuple[int, float]] = {line[0], line[-1]}
    for start in range(0, len(line), length):
        stretch = line[start : start + length]
        points |= {min(stretch, key=_value), max(stretch, key=_value)}
    return tuple(sorted(points))


def _value(point: tuple[int, float]) -> float:
    return point[1]


def names(runs: Iterable[History]) -> list[str]:
    """A name for each run that no other has: its folder's, or as much of its path as differs."""
    histories = list(runs)
    short = [run.name for run in histories]
    if len(set(short)) == len(short):
        return short
    paths = [run.path.resolve() for run in histories]
    common = Path(os.path.commonpath(paths))
    return [path.relative_to(common).as_posix() if path != common else path.name for path in paths]
