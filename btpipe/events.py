"""What happened, as frozen records. Stages report them; `progress` shows them; nothing else prints.

A stage takes a `Report` and calls it with events; it never knows whether a person, a log file
or nobody is listening.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal


def _now() -> float:
    return round(time.time(), 3)


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened. `name` is how it is called in JSON lines.

    `time`: when, in seconds since 1970 (UTC). Set where the event is made, so that a run's log and
    the command's output have the same.
    """

    time: float = dataclasses.field(default_factory=_now, kw_only=True, compare=False)

    @property
    def name(self) -> str:
        return type(self).__name__

    def record(self) -> dict[str, object]:
        """The event as a record for JSON, `event` first; what is not finite is None there."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"event": self.name, **{name: _plain(value) for name, value in fields.items()}}

    def tables(self) -> Sequence["TextTable"]:
        """What of it people read as tables."""
        return ()


@dataclasses.dataclass(frozen=True)
class TextTable:
    """A table as people read it: one tuple of cells for each row; a machine reads the event."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def _plain(value: object) -> object:
    """A value as JSON has it: records, lists, text, numbers; None for what is not finite."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value


Report = Callable[[Event], None]


def ignore(_: Event) -> None:
    """A `Report` for when nobody listens."""


def per_second(count: int, seconds: float) -> float:
    """`count` over `seconds`; 0 for no time at all."""
    return count / seconds if seconds > 0 else 0.0


Kind = Literal["content", "gone", "machine"]
"""content: the file is damaged, or nothing that is decoded; gone: it vanished after it was listed;
machine: the disk, the network or a permission kept it away."""


@dataclasses.dataclass(frozen=True)
class Note(Event):
    """A sentence worth reading once; `values` are its numbers."""

    text: str
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Warned(Event):
    """Something the user should know and may have to act on; `values` are its numbers."""

    text: str
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Error(Event):
    """What ended the command: the exit code, the error's class, and its message in parts."""

    code: int
    kind: str
    what: str
    where: str = ""
    expected: str = ""
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected(Event):
    """An input that is not used, the stage that refused it and why.

    `bytes` and `mtime_ns` say which content it was, -1 where that is not known or it is to be tried
    again.
    """

    path: str
    stage: str
    kind: Kind
    reason: str
    bytes: int = -1
    mtime_ns: int = -1


@dataclasses.dataclass(frozen=True)
class Progressed(Event):
    """Where a counted job stands.

    `images_per_second` is over the time since the job (re)started; `data_wait` is the share of it,
    0 to 1, in which the consumer waited for data.
    """

    job: str
    done: int
    total: int
    images_per_second: float
    data_wait: float


@dataclasses.dataclass(frozen=True)
class RunStarted(Event):
    """A pretraining run, as it is about to go on from `step`."""

    run: str
    recipe: str
    step: int
    steps: int
    steps_per_epoch: int
    images: int
    batch_size: int
    world_size: int
    device: str
    precision: str
    parameters: int
    loss_floor: float


@dataclasses.dataclass(frozen=True)
class RecipeChanged(Event):
    """A run goes on from `step` with another value of a key that only rounding depends on."""

    step: int
    key: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Compiled(Event):
    """The first compiled step is done; its seconds are kept out of every rate."""

    seconds: float


@dataclasses.dataclass(frozen=True)
class StepDone(Event):
    """One logged optimiser step.

    `loss = on_diagonal + lambd * off_diagonal`, before `loss.scale`; rates are per second since the
    previous `StepDone`; `data_wait` is the share of that time spent waiting for the loader.
    `mean_diagonal` and `off_diagonal_rms` are of the cross-correlation matrix, `dead_dimensions`
    how many of its rows are constant over the batch; `overflows` counts the updates that the fp16
    loss scale has left out since the run began.
    """

    step: int
    epoch: float
    loss: float
    on_diagonal: float
    off_diagonal: float
    mean_diagonal: float
    off_diagonal_rms: float
    dead_dimensions: int
    overflows: int
    lr: float
    bias_lr: float
    images_per_second: float
    data_wait: float
    eta_seconds: float


@dataclasses.dataclass(frozen=True)
class RanksMeasured(Event):
    """Effective rank (RankMe) of `rows` encoder vectors and embeddings of one batch, all ranks'."""

    step: int
    encoder: float
    projector: float
    rows: int


@dataclasses.dataclass(frozen=True)
class KnnJudged(Event):
    """Nearest-neighbour accuracy (0 to 1) of the encoder on `images` labelled images."""

    step: int
    epoch: float
    accuracy: float
    images: int
    neighbours: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Alarm(Event):
    """A number of the training that calls for a person: what it is, what it means, what to do."""

    step: int
    about: str
    text: str


@dataclasses.dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint stands complete under its final name."""

    step: int
    path: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Finished(Event):
    """A command's result, in a kind for each command; `seconds` is what it took."""

    job: ClassVar[str]
    """What the line for people begins with, and the name of its bar."""

    seconds: float = dataclasses.field(compare=False)

    @property
    def text(self) -> str:
        """The result in a line, for people."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Link:
    """What an artifact was made from: its digest there, and what of it is found near by."""

    what: str
    digest: str
    where: str
    found: str


_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")


@dataclasses.dataclass(frozen=True)
class Inspected(Event):
    """What an artifact is, what it says about itself, and the chain of what it was made from.

    `facts` are for people, the longest cut; `values` are the same, whole, as numbers and records.
    """

    path: str
    kind: str
    facts: Mapping[str, str]
    chain: tuple[Link, ...]
    values: Mapping[str, object]

    def tables(self) -> list[TextTable]:
        """The same for people, with the first 12 digits of each digest."""
        facts = tuple((name, _DIGEST.sub(r"\1", text)) for name, text in self.facts.items())
        tables = [TextTable(f"{self.path}: {self.kind}", ("", ""), facts)]
        if self.chain:
            rows = tuple(
                (link.what, _DIGEST.sub(r"\1", link.digest), link.where, link.found)
                for link in self.chain
            )
            columns = ("made from", "digest", "where", "found")
            tables.append(TextTable("Where it is from, the nearest first", columns, rows))
        return tables
