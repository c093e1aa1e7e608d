"""Shows events: a live display for a terminal, JSON lines for machines, else only what matters.

The only user of rich.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from btpipe import events
from btpipe.events import Event, Report

Mode = Literal["auto", "json"]
NUMBER = re.compile(r"[-+<~]?\.?\d|nan|-?$")
"""How a cell begins that is lined up by its end."""
REJECTS_SHOWN = 5
WIDE = 100_000
"""Columns of what is no terminal: a file or a pipe takes every table as wide as it needs to be."""
ALARM_STYLE = "bold red"


@contextlib.contextmanager
def show(mode: Mode) -> Iterator[Report]:
    """A `Report` for the length of a command.

    "json" writes every event to standard output, a line each. "auto" draws on a terminal; elsewhere
    it writes warnings to standard error and results to standard output, and nothing in between.
    """
    if mode == "json":
        yield _write_line
        return
    display = _Display()
    with display:
        yield display.show


def _write_line(event: Event) -> None:
    sys.stdout.write(json.dumps(event.record()) + "\n")
    sys.stdout.flush()


class _Display:
    """Bars on standard error where that is a terminal; results on standard output."""

    def __init__(self) -> None:
        self._errors, self._results = Console(stderr=True), Console()
        if not self._results.is_terminal:
            self._results = Console(width=WIDE, soft_wrap=True)
        elif self._errors.is_terminal:
            self._results = self._errors  # which knows where the live lines are: above them
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self._errors,
        )
        self._tasks: dict[str, TaskID] = {}
        self._run: events.RunStarted | None = None
        self._training = Training()
        self._rejected = 0
        self._live = Live(get_renderable=self._picture, console=self._errors, transient=True)

    def __enter__(self) -> None:
        if self._errors.is_terminal:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _picture(self) -> Group:
        """The bars, and below them what a training says of itself; no line is wrapped."""
        lines = self._training.lines() if self._tasks else []
        texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(self._bars, *texts)

    def show(self, event: Event) -> None:
        """Draws or prints one event."""
        match event:
            case events.RunStarted():
                self._run, self._training = event, Training(event.batch_size)
                if self._errors.is_terminal:
                    self._print(run_text(event))
                self._bar("pretrain", event.step, event.steps, "")
            case events.StepDone():
                steps = self._run.steps if self._run else event.step
                self._bar("pretrain", event.step, steps, speed_text(event))
                self._training = dataclasses.replace(self._training, step=event)
            case events.RanksMeasured():
                self._training = dataclasses.replace(self._training, ranks=event)
            case events.KnnJudged():
                self._training = dataclasses.replace(self._training, knn=event)
                if self._errors.is_terminal:
                    self._print(knn_text(event))
            case events.Progressed():
                self._bar(event.job, event.done, event.total, pace_text(event))
            case events.Rejected():
                self._reject(event)
            case events.Compiled() | events.CheckpointSaved():
                if self._errors.is_terminal:
                    self._print(f"{event.name}: {event.seconds:.1f} s")
            case _:
                self._say(event)

    def _say(self, event: Event) -> None:
        """What is shown wherever the output goes."""
        match event:
            case events.Warned():
                self._print(f"warning: {event.text}")
            case events.Alarm():
                self._print(f"alarm: {event.about}, step {event.step}: {event.text}", ALARM_STYLE)
            case events.RecipeChanged():
                change = f"{event.key} {event.before} -> {event.after}"
                self._print(f"from step {event.step} on: {change}")
            case events.Note():
                self._results.print(Text(event.text))
            case _:
                self._result(event)

    def _print(self, text: str, style: str = "") -> None:
        # Off a terminal a line stays one, however long: it is for logs and for grep.
        self._errors.print(Text(text, style), soft_wrap=not self._errors.is_terminal)

    def _bar(self, job: str, done: int, total: int, rate: str) -> None:
        if job not in self._tasks:
            self._tasks[job] = self._bars.add_task(job, rate="")
        self._bars.update(self._tasks[job], completed=done, total=total, rate=rate)

    def _reject(self, event: events.Rejected) -> None:
        """The first few by name; the rest are in the rejects file."""
        self._rejected += 1
        if self._rejected <= REJECTS_SHOWN:
            self._print(f"rejected: {event.path} ({event.stage}): {event.reason}")
        elif self._rejected == REJECTS_SHOWN + 1:
            self._print("more rejected files are listed with their reasons in the rejects file")

    def _result(self, event: Event) -> None:
        """The tables of any event, and the line of a command's result."""
        for table in event.tables():
            self._results.print(_table(table))
            if table.note:
                self._results.print(Text(table.note))
        if not isinstance(event, events.Finished):
            return
        if event.job in self._tasks:
            self._bars.remove_task(self._tasks.pop(event.job))
        self._results.print(Text(f"{event.job}: {event.text} ({duration(event.seconds)})"))


def run_text(event: events.RunStarted) -> str:
    """A run's opening lines, for people."""
    hardware = f"{event.world_size} x {event.device}, {event.precision}"
    parameters = f"{event.parameters / 1e6:.1f} M parameters"
    size = f"{event.images:,} images, batch {event.batch_size}, {parameters}"
    way = f"from step {event.step:,} of {event.steps:,}" if event.step else f"{event.steps:,} steps"
    floor = f"; the loss cannot go below {event.loss_floor:.1f}" if event.loss_floor else ""
    return f"{event.run}: {size}\n{hardware}, {way}{floor}"


@dataclasses.dataclass(frozen=True)
class Training:
    """The latest that is known of a run, as the lines below its bar."""

    batch_size: int = 0
    step: events.StepDone | None = None
    ranks: events.RanksMeasured | None = None
    knn: events.KnnJudged | None = None

    def lines(self) -> list[str]:
        """Loss, correlation and, once they are measured, ranks and neighbours; 80 columns each."""
        lines = []
        if self.step:
            lines += [step_text(self.step), correlation_text(self.step, self.batch_size)]
        quality = [ranks_text(self.ranks)] if self.ranks else []
        if self.knn:
            quality.append(f"kNN {self.knn.accuracy:.1%} (epoch {self.knn.epoch:.0f})")
        return [*lines, "  ".join(quality)] if quality else lines


def pace_text(event: events.Progressed) -> str:
    """How fast a counted job goes and, where that is known, how long it will take."""
    rate = f"{event.images_per_second:,.0f} images/s"
    if event.images_per_second <= 0 or event.done >= event.total:
        return rate
    return f"{rate}  {duration((event.total - event.done) / event.images_per_second)} left"


def speed_text(event: events.StepDone) -> str:
    """How fast a run goes and how long it will take, beside its bar."""
    return f"{event.images_per_second:,.0f} images/s  {duration(event.eta_seconds)} left"


def step_text(event: events.StepDone) -> str:
    """A logged step in one line: loss with its two terms, rate, share of time it waited."""
    return (
        f"epoch {event.epoch:.1f}  loss {event.loss:.1f} (on {event.on_diagonal:.1f},"
        f" off {event.off_diagonal:.0f})  lr {event.lr:.2g}  wait {event.data_wait:.0%}"
    )


def correlation_text(event: events.StepDone, batch_size: int) -> str:
    """The cross-correlation matrix in one line; what is as it should be is left out."""
    chance = f" (chance {1 / math.sqrt(batch_size):.3f})" if batch_size else ""
    text = f"diagonal {event.mean_diagonal:.3f}  off-diagonal {event.off_diagonal_rms:.3f}{chance}"
    if event.dead_dimensions:
        text += f"  dead {event.dead_dimensions:,}"
    if event.overflows:
        text += f"  overflows {event.overflows:,}"
    return text


def ranks_text(event: events.RanksMeasured) -> str:
    """Effective ranks of a batch in one line."""
    return (
        f"rank: encoder {event.encoder:.0f}, projector {event.projector:.0f}"
        f" (of {event.rows:,} images)"
    )


def knn_text(event: events.KnnJudged) -> str:
    """A judgement by neighbours in one line."""
    return (
        f"kNN {event.accuracy:.1%} at epoch {event.epoch:.0f} ({event.images:,} images,"
        f" k = {event.neighbours}, {duration(event.seconds)})"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.1 s, 3 min 20 s, 5 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _table(content: events.TextTable) -> Table:
    table = Table(title=content.title, title_justify="left", title_style="bold")
    for i, column in enumerate(content.columns):
        numbers = i > 0 and all(NUMBER.match(row[i]) for row in content.rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in content.rows:
        table.add_row(*map(Text, row))  # in plain text rich would take [brackets] for markup
    return table
