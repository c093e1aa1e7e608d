"""Shows events: a live display for a terminal, JSON lines for machines, else only what matters.

The only user of rich.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from btpipe import events
from btpipe.events import Event, Report

Mode = Literal["auto", "json"]
REJECTS_SHOWN = 5


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
            self._results = Console(width=100, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            console=self._errors,
            disable=not self._errors.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._run: events.RunStarted | None = None
        self._rejected = 0

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: Event) -> None:
        """Draws or prints one event."""
        match event:
            case events.RunStarted():
                self._run = event
                if self._errors.is_terminal:
                    self._print(run_text(event))
                self._bar("pretrain", event.step, event.steps, "")
            case events.StepDone():
                steps = self._run.steps if self._run else event.step
                self._bar("pretrain", event.step, steps, step_text(event))
            case events.Progressed():
                rate = f"{event.images_per_second:,.0f} images/s"
                self._bar(event.job, event.done, event.total, rate)
            case events.FileRejected():
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
            case events.Note():
                self._results.print(Text(event.text))
            case events.Tabled():
                self._results.print(_table(event))
                if event.note:
                    self._results.print(Text(event.note))
            case events.Finished():
                self._finish(event)

    def _print(self, text: str) -> None:
        self._bars.console.print(Text(text))

    def _bar(self, job: str, done: int, total: int, rate: str) -> None:
        if job not in self._tasks:
            self._tasks[job] = self._bars.add_task(job, rate="")
        self._bars.update(self._tasks[job], completed=done, total=total, rate=rate)

    def _reject(self, event: events.FileRejected) -> None:
        """The first few by name; the rest are in the rejects file."""
        self._rejected += 1
        if self._rejected <= REJECTS_SHOWN:
            self._print(f"rejected: {event.path} ({event.stage}): {event.reason}")
        elif self._rejected == REJECTS_SHOWN + 1:
            self._print("more rejected files are listed with their reasons in the rejects file")

    def _finish(self, event: events.Finished) -> None:
        if event.job in self._tasks:
            self._bars.remove_task(self._tasks.pop(event.job))
        self._results.print(Text(f"{event.job}: {event.text} ({duration(event.seconds)})"))


def run_text(event: events.RunStarted) -> str:
    """A run's opening lines, for people."""
    place = f"{event.world_size} x {event.device}, {event.precision}"
    parameters = f"{event.parameters / 1e6:.1f} M parameters"
    size = f"{event.images:,} images, batch {event.batch_size}, {parameters}"
    way = f"from step {event.step:,} of {event.steps:,}" if event.step else f"{event.steps:,} steps"
    floor = f"; the loss cannot go below {event.loss_floor:.1f}" if event.loss_floor else ""
    return f"{event.run}: {size}\n{place}, {way}{floor}"


def step_text(event: events.StepDone) -> str:
    """A logged step in one line: loss with its two terms, rate, speed, waiting, time left."""
    return (
        f"epoch {event.epoch:.1f}  loss {event.loss:.1f} (on {event.on_diagonal:.1f},"
        f" off {event.off_diagonal:.0f})  lr {event.lr:.2g}"
        f"  {event.images_per_second:,.0f} images/s  data wait {event.data_wait:.0%}"
        f"  {duration(event.eta_seconds)} left"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.1 s, 3 min 20 s, 5 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _table(event: events.Tabled) -> Table:
    table = Table(title=event.title, title_justify="left", title_style="bold")
    for i, column in enumerate(event.columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in event.rows:
        table.add_row(*row)
    return table
