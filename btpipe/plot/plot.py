"""`btpipe plot`: where runs went, in one picture; while they go on, again and again."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from btpipe import runtime
from btpipe.errors import UsageError
from btpipe.events import Finished, Note, Report
from btpipe.plot import history, html
from btpipe.plot.correlation import Matrix
from btpipe.plot.history import History
from btpipe.plot.panels import By

RELOAD_SECONDS = 5
PATIENCE_SECONDS = 60.0
"""How long a run may be nobody's: its processes may be starting again."""
KINDS = (".html", ".png")
Write = Callable[[Sequence[History], bool], None]


@dataclasses.dataclass(frozen=True)
class Plotted(Finished):
    """The picture of runs, TensorBoard's folder, or both; `alarms` are those of all runs."""

    job = "plot"

    out: Path | None
    tensorboard: Path | None
    runs: int
    alarms: int

    @property
    def text(self) -> str:
        paths = ", ".join(str(path) for path in (self.out, self.tensorboard) if path)
        runs = f"{self.runs} run{'s' * (self.runs > 1)}"
        return f"{paths}: {runs}, {self.alarms} alarm{'s' * (self.alarms != 1)}"


def make(
    runs: Sequence[Path],
    out: Path | None,
    on_event: Report,
    *,
    tensorboard: Path | None = None,
    by: By = "step",
    correlation: str = "",
    live: bool = False,
    patience_seconds: float = PATIENCE_SECONDS,
) -> None:
    """Writes the picture of the runs; `live`: until they ended, or a signal comes, or a run that a
    process of this machine trained is nobody's for `patience_seconds`.

    `tensorboard`: also its event files, below that folder; without `out` nothing else.

    Raises:
        UsageError: no such run, a name that is neither X.html nor X.png, or a PNG that should live.
        UsageError: `correlation` names a step without a checkpoint, or tensorboard is missing.
        MachineError: no space, or no permission.
    """
    started = time.monotonic()
    _require_picture(out, live=live, correlation=correlation)
    histories = [history.read(run) for run in runs]
    matrices = [] if not correlation else _matrices(runs, correlation, on_event)
    with contextlib.ExitStack() as ends:
        writers = [_writer(out, matrices, by)] if out else []
        if tensorboard:
            writers.append(_board(tensorboard, ends))

        def write(histories: Sequence[History], live: bool) -> None:
            for one in writers:
                one(histories, live)

        if live:
            if out:
                text = f"{out}: open it; it shows what is new every {RELOAD_SECONDS} seconds"
                on_event(Note(text))
            histories = _follow(histories, write, on_event, patience_seconds)
        write(histories, False)
    if tensorboard:
        on_event(Note(f"tensorboard --logdir {tensorboard}"))
    alarms = sum(len(run.alarms) for run in histories)
    on_event(Plotted(time.monotonic() - started, out, tensorboard, len(histories), alarms))


def _require_picture(out: Path | None, *, live: bool, correlation: str) -> None:
    if out is None:
        if correlation:
            raise UsageError("--correlation without a picture", fix="--out X.html")
        return
    if out.suffix.lower() not in KINDS:
        raise UsageError(f"--out {out}", expected="a name that ends in .html or .png")
    if live and out.suffix.lower() != ".html":
        raise UsageError(
            f"--live with --out {out}",
            expected="a page, which reads itself again",
            fix="--out X.html",
        )


def _writer(out: Path, matrices: Sequence[Matrix], by: By) -> Write:
    """What writes `out`; matplotlib is loaded for a PNG alone."""
    if out.suffix.lower() == ".png":
        from btpipe.plot import png  # noqa: PLC0415 - an extra

        return lambda runs, _: png.write(out, runs, matrices, by)
    return lambda runs, live: html.write(
        out, runs, matrices, by, reload_seconds=RELOAD_SECONDS if live else 0
    )


def _board(folder: Path, ends: contextlib.ExitStack) -> Write:
    """What writes event files; they end with `ends`."""
    from btpipe.plot import tensorboard  # noqa: PLC0415 - an extra

    board = tensorboard.Board(folder)
    ends.callback(board.close)
    return lambda runs, _: board.write(runs)


def _follow(
    histories: list[History], write: Write, on_event: Report, patience_seconds: float
) -> list[History]:
    """Writes pages that read themselves again, until no run goes on or a signal came."""
    runs, watch = [run.path for run in histories], _ProcessWatch(patience_seconds)
    with runtime.StopSignals() as signals:
        write(histories, True)
        looked = time.monotonic()
        for run in histories:
            if not run.ended and not watch.holds(run.path):
                text = "no process of this machine trains it now; Ctrl-C ends looking at it"
                on_event(Note(f"{run.path}: {text}"))
        while not signals.first and not all(
            run.ended or watch.is_gone(run.path) for run in histories
        ):
            time.sleep(0.1)
            if time.monotonic() - looked < RELOAD_SECONDS:
                continue
            looked, now = time.monotonic(), [history.read(run) for run in runs]
            if now != histories:
                histories = now
                write(histories, True)
    for run in histories:
        if not run.ended and watch.is_gone(run.path):
            text = f"its process is gone; it stands at step {run.step:,} of {run.steps:,}"
            on_event(Note(f"{run.path}: {text}"))
    return histories


class _ProcessWatch:
    """Which runs lost the process that trained them. One that no process of this machine was seen
    to hold is not told to be gone: another machine may train it.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience, self._held = patience_seconds, dict[Path, float]()

    def holds(self, run: Path) -> bool:
        """Whether a process holds the run now."""
        held = history.is_held(run)
        if held:
            self._held[run] = time.monotonic()
        return held

    def is_gone(self, run: Path) -> bool:
        """Whether it was held, and has not been for long enough."""
        if self.holds(run):
            return False
        return time.monotonic() - self._held.get(run, math.inf) > self._patience


def _matrices(runs: Sequence[Path], selection: str, on_event: Report) -> list[Matrix]:
    from btpipe.plot import correlation  # noqa: PLC0415 - torch, for those who ask for it

    return [matrix for run in runs for matrix in correlation.measure(run, selection, on_event)]
