"""What was measured of a run's checkpoints, and which of them is the best by which measure."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

from btpipe.events import Finished, TextTable
from btpipe.plot import panels
from btpipe.plot.panels import Line, Panel, Sign

By = Literal["retrieval", "rank", "uniformity", "alignment", "knn"]
Z95 = 1.96


@dataclasses.dataclass(frozen=True)
class CheckpointRow:
    """One checkpoint, step 0 the network that the run started from; shares are 0 to 1."""

    step: int
    epoch: float
    retrieval: float
    rank: float
    uniformity: float
    alignment: float
    knn: float | None

    def value(self, by: By) -> float | None:
        """One of the measures."""
        values = {
            "retrieval": self.retrieval,
            "rank": self.rank,
            "uniformity": self.uniformity,
            "alignment": self.alignment,
            "knn": self.knn,
        }
        return values[by]


@dataclasses.dataclass(frozen=True)
class _Measure:
    by: By
    title: str
    about: str
    larger_is_better: bool
    digits: int
    factor: float = 1.0
    unit: str = ""


MEASURES = (
    _Measure(
        "retrieval",
        "View retrieval",
        "Images whose other view is the nearest of all images' other views: higher is better.",
        larger_is_better=True,
        digits=1,
        factor=100.0,
        unit="%",
    ),
    _Measure(
        "rank",
        "Effective rank",
        "RankMe of the encoder's vectors: near 1 is a collapse; otherwise no order by itself.",
        larger_is_better=True,
        digits=1,
    ),
    _Measure(
        "uniformity",
        "Uniformity",
        "log mean exp(-2 d^2) over pairs of images: lower is spread more evenly.",
        larger_is_better=False,
        digits=3,
    ),
    _Measure(
        "alignment",
        "Alignment",
        "Mean d^2 of an image's two views: lower is closer; a collapse has the lowest of all.",
        larger_is_better=False,
        digits=3,
    ),
    _Measure(
        "knn",
        "kNN",
        "Labelled images that their nearest others name rightly.",
        larger_is_better=True,
        digits=1,
        factor=100.0,
        unit="%",
    ),
)
_OF = {measure.by: measure for measure in MEASURES}


@dataclasses.dataclass(frozen=True)
class Selected(Finished):
    """The checkpoints' measures on `images` images, the run's `own` or others, and the choice.

    `step` is the best by `by`, `next_step` the second, `gap` how far that is behind (0 or more, in
    the measure's own unit), `error` the standard error of it over the images, where there is one.
    `best` is the step that is best by each measure; the network that the run started from is never
    the choice, and `start_is_better` says so where it would have been.
    """

    job = "select"

    run: str
    by: By
    step: int
    next_step: int | None
    gap: float | None
    error: float | None
    images: int
    own: bool
    best: dict[str, int]
    start_is_better: str
    rows: tuple[CheckpointRow, ...]

    @classmethod
    def choose(
        cls,
        run: str,
        by: By,
        rows: tuple[CheckpointRow, ...],
        *,
        images: int,
        own: bool,
        seconds: float,
        errors: Callable[[int, int], float | None],
    ) -> Self:
        """The best of the rows; of equal ones the later. `errors` are of two steps' difference."""
        ranked = {m.by: _ranked(rows, m) for m in MEASURES}
        order = ranked[by]
        second = order[1] if len(order) > 1 else None
        gap = abs(_value(order[0], by) - _value(second, by)) if second else None
        start = next((row for row in rows if row.step == 0), None)
        worse = start is not None and _goodness(start, _OF[by]) > _goodness(order[0], _OF[by])
        warning = (
            f"by {by} the network that the run started from is better than every checkpoint"
            f" ({_shown(start, _OF[by])} against {_shown(order[0], _OF[by])} at step"
            f" {order[0].step}): this measure does not see what training did"
            if start is not None and worse
            else ""
        )
        return cls(
            seconds=seconds,
            run=run,
            by=by,
            step=order[0].step,
            next_step=second.step if second else None,
            gap=gap,
            error=errors(order[0].step, second.step) if second else None,
            images=images,
            own=own,
            best={name: ranking[0].step for name, ranking in ranked.items() if ranking},
            start_is_better=warning,
            rows=rows,
        )

    def tables(self) -> list[TextTable]:
        """All numbers for people; the best of each column is marked."""
        shown = [m for m in MEASURES if any(row.value(m.by) is not None for row in self.rows)]
        rows = []
        for row in self.rows:
            cells = [
                _shown(row, m) + ("*" if self.best.get(m.by) == row.step else " ") for m in shown
            ]
            rows.append((f"{row.step}", f"{row.epoch:.1f}", *cells))
        columns = ("step", "epoch", *(f"{m.by} {m.unit}".strip() for m in shown))
        note = (
            f"* best checkpoint by that measure; {self.images:,} images {self._whose}, in two"
            f" training views each; retrieval among {self.images:,}; step 0: before training"
        )
        return [TextTable(self.title(), columns, tuple(rows), note)]

    @property
    def text(self) -> str:
        """Which checkpoint, by how much, and what the other measures say: a few sentences."""
        measure = _OF[self.by]
        value = _shown(next(row for row in self.rows if row.step == self.step), measure)
        sentence = f"Best by {self.by}: step {self.step} ({value}{' %' * bool(measure.unit)})"
        if self.next_step is None:
            sentence += ", the only checkpoint; keep more of the next run's: --set run.keep_every=N"
        elif self.gap is not None:
            sentence += f", {self._distance(measure)} ahead of step {self.next_step}"
            if self.error is not None and self.gap <= Z95 * self.error:
                sentence += ": within the noise of these images, take the later one"
        others = [f"step {step} by {name}" for name, step in self.best.items() if name != self.by]
        return f"{sentence}. Best by the others: {', '.join(others)}."

    def title(self) -> str:
        """Of the picture."""
        return f"Checkpoints of {self.run}"

    def panels(self) -> list[Panel]:
        """A diagram for each measure."""
        diagrams = []
        for i, measure in enumerate(MEASURES):
            rows = [row for row in self.rows if row.value(measure.by) is not None]
            if not rows:
                continue
            x = tuple(float(row.step) for row in rows)
            y = tuple(measure.factor * _value(row, measure.by) for row in rows)
            line = Line(measure.title, x, y, panels.color(i), "solid")
            best = f" Best: step {self.best[measure.by]:,}." if measure.by in self.best else ""
            about = f"{measure.about}{best}"
            diagrams.append(Panel(measure.title, measure.unit, about, (line,), from_zero=False))
        return diagrams

    def marks(self) -> list[Sign]:
        """Where the chosen checkpoint stands."""
        return [Sign(float(self.step), f"best by {self.by}: step {self.step:,}", "\N{BLACK STAR}")]

    @property
    def _whose(self) -> str:
        return "of the run's own" if self.own else "that the run may not have seen"

    def _distance(self, measure: _Measure) -> str:
        unit = " points" if measure.unit else ""
        text = f"{measure.factor * (self.gap or 0):.{measure.digits}f}"
        if self.error is not None:
            text += f" ± {measure.factor * Z95 * self.error:.{measure.digits}f}"
        return f"{text}{unit}"


def _ranked(rows: tuple[CheckpointRow, ...], measure: _Measure) -> list[CheckpointRow]:
    """The checkpoints that have the measure, the best first, of equal ones the later."""
    candidates = [row for row in rows if row.step and row.value(measure.by) is not None]
    return sorted(candidates, key=lambda row: (_goodness(row, measure), row.step), reverse=True)


def _goodness(row: CheckpointRow, measure: _Measure) -> float:
    value = row.value(measure.by)
    if value is None:
        return float("-inf")
    return value if measure.larger_is_better else -value


def _value(row: CheckpointRow, by: By) -> float:
    value = row.value(by)
    assert value is not None, "asked only of rows that have it"
    return value


def _shown(row: CheckpointRow, measure: _Measure) -> str:
    value = row.value(measure.by)
    return "-" if value is None else f"{measure.factor * value:.{measure.digits}f}"
