"""The panels of a picture of runs, as data: which lines, in which unit, beside which bound."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from btpipe.plot import history
from btpipe.plot.history import History, Series

By = Literal["step", "epoch"]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that colour-blind people tell apart (Okabe and Ito), best ones first."""
DASHES = ("solid", "dash", "dot")
MOST_POINTS = 3000
"""Points of a line: twice the pixels that a panel is wide."""
POSITIVE_DECADES = 0.3
"""Decades that a positive number must span to be drawn on a logarithmic axis."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line with its name; `bound` ones are what a number is judged by, drawn thin."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    color: str
    dash: str
    bound: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram. `about` says in a sentence how to read it."""

    title: str
    unit: str
    about: str
    lines: tuple[Line, ...]
    log: bool = False
    from_zero: bool = True


@dataclasses.dataclass(frozen=True)
class Sign:
    """A line across every diagram at `x`, `sign` above it; `text` is shown when pointed at."""

    x: float
    text: str
    sign: str
    alarm: bool = False


@dataclasses.dataclass(frozen=True)
class _Curve:
    """One number of a panel: its field, the factor from how it is logged to how it is drawn."""

    label: str
    field: str
    factor: Callable[[History], float] = lambda _: 1.0
    bound: tuple[str, Callable[[History], float]] | None = None


@dataclasses.dataclass(frozen=True)
class _Plan:
    title: str
    unit: str
    about: str
    parts: tuple[_Curve, ...]
    log: bool = False
    rare: bool = False
    """Drawn only where something else than zero was logged."""


def _percent(_: History) -> float:
    return 100.0


PLANS = (
    _Plan(
        "Loss",
        "",
        "Judge it by its floor: no encoder gets below it with this batch and width.",
        (_Curve("loss", "loss", bound=("floor", lambda run: run.floor)),),
        log=True,
    ),
    _Plan(
        "Terms of the loss",
        "",
        "on: sum of (1 - C_ii)^2; off: lambda times the sum of C_ij^2. The loss is their sum.",
        (_Curve("on", "on_diagonal"), _Curve("off", "off_diagonal", lambda run: run.lambd)),
        log=True,
    ),
    _Plan(
        "Learning rates",
        "",
        "Of the weights, and of biases and batch norm.",
        (_Curve("weights", "lr"), _Curve("biases", "bias_lr")),
    ),
    _Plan(
        "Effective rank",
        "",
        "RankMe of one batch's vectors: higher tends to be better; near 1 is a collapse.",
        (_Curve("encoder", "encoder"), _Curve("projector", "projector")),
    ),
    _Plan(
        "Mean diagonal",
        "",
        "Mean C_ii: how alike the two views of an image are to the network; rises towards 1.",
        (_Curve("mean diagonal", "mean_diagonal"),),
    ),
    _Plan(
        "Off-diagonal RMS",
        "",
        "How much dimensions repeat each other; independent ones give chance, 1 / sqrt(N).",
        (
            _Curve(
                "off-diagonal",
                "off_diagonal_rms",
                bound=("chance", lambda run: 1 / math.sqrt(run.batch_size)),
            ),
        ),
    ),
    _Plan(
        "kNN",
        "%",
        "Labelled images that their nearest others name rightly.",
        (_Curve("accuracy", "accuracy", _percent),),
    ),
    _Plan("Speed", "images/s", "Pairs of views a second.", (_Curve("speed", "images_per_second"),)),
    _Plan(
        "Wait for data",
        "%",
        "Share of the time in which the step waited for the loader.",
        (_Curve("wait", "data_wait", _percent),),
    ),
    _Plan(
        "Dead dimensions",
        "",
        "Dimensions of the embedding that are constant over a batch.",
        (_Curve("dead", "dead_dimensions"),),
        rare=True,
    ),
    _Plan(
        "Overflows",
        "",
        "Updates that the fp16 loss scale has left out since the run began.",
        (_Curve("overflows", "overflows"),),
        rare=True,
    ),
)


def diagrams(runs: Sequence[History], by: By) -> tuple[list[Panel], list[str]]:
    """The diagrams that there are numbers for, and the titles of those without.

    One run has a colour for each number, several have a colour each and a dash for each number.
    """
    panels, missing = [], []
    for plan in PLANS:
        lines = [line for i, run in enumerate(runs) for line in _lines(plan, run, runs, i, by)]
        curves = [line for line in lines if not line.bound]
        if plan.rare and not any(any(line.y) for line in curves):
            continue
        if not curves:
            missing.append(plan.title)
            continue
        log = plan.log and _spans_decades([y for line in lines for y in line.y])
        panels.append(Panel(plan.title, plan.unit, plan.about, tuple(lines), log))
    return panels, missing


def axis_position(run: History, step: int, by: By) -> float:
    """Where a step stands on the axis."""
    return step / run.steps_per_epoch if by == "epoch" else float(step)


def color(number: int) -> str:
    """The colour of a run, 0 for the first; from the seventh on they come again."""
    return COLORS[number % len(COLORS)]


def _lines(plan: _Plan, run: History, runs: Sequence[History], number: int, by: By) -> list[Line]:
    several, name = len(runs) > 1, history.names(runs)[number]
    lines = []
    for i, part in enumerate(plan.parts):
        points: Series = history.thin(run.series[part.field], MOST_POINTS)
        if not points:
            continue
        x = tuple(axis_position(run, step, by) for step, _ in points)
        y = tuple(value * part.factor(run) for _, value in points)
        name_parts = [name] if several else []
        if not several or len(plan.parts) > 1:
            name_parts.append(part.label)
        paint = color(number if several else i)
        dash = DASHES[i] if several else "solid"
        lines.append(Line(", ".join(name_parts), x, y, paint, dash))
        if part.bound:
            label, bound = part.bound
            value = bound(run)
            if value > 0:
                called = f"{name}, {label}" if several else label
                ends = (0.0, x[-1])
                lines.append(Line(called, ends, (value, value), paint, "dot", bound=True))
    return lines


def _spans_decades(values: Sequence[float]) -> bool:
    positive = min(values, default=0) > 0
    return positive and math.log10(max(values) / min(values)) > POSITIVE_DECADES
