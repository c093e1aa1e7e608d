"""The picture of runs as a PNG, drawn by matplotlib; needs no browser."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from btpipe import artifact
from btpipe.errors import UsageError
from btpipe.plot import history
from btpipe.plot.correlation import Matrix
from btpipe.plot.history import History
from btpipe.plot.panels import By, Panel, Sign, axis_position, diagrams

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError as error:  # pragma: no cover - an extra
    raise UsageError(
        "a PNG needs matplotlib",
        fix="pip install 'btpipe[png]', or write a page: --out X.html",
    ) from error

INK, MUTED, GRID, MARK = "#1a1a1a", "#666666", "#e4e4e4", "#b3261e"
DASHES = {"solid": "-", "dash": "--", "dot": ":"}
COLUMNS = 2
PANEL_INCHES = (6.4, 3.1)
SQUARE_INCHES = 5.0
DOTS_PER_INCH = 110


def write(path: Path, runs: Sequence[History], matrices: Sequence[Matrix], by: By) -> None:
    """Writes the picture.

    Raises:
        MachineError: no space, or no permission.
    """
    panels, _ = diagrams(runs, by)
    marks = [
        Sign(axis_position(run, mark.step, by), "", "v" if alarm else "|", alarm)
        for run in runs
        for mark in (*run.starts, *run.alarms)
        for alarm in (mark in run.alarms,)
    ]
    _write(path, ", ".join(history.names(runs)), panels, marks, matrices, by)


def write_panels(path: Path, title: str, panels: Sequence[Panel], marks: Sequence[Sign]) -> None:
    """Writes diagrams over steps.

    Raises:
        MachineError: no space, or no permission.
    """
    _write(path, title, panels, [dataclasses.replace(m, sign="*") for m in marks], (), "step")


def _write(
    path: Path,
    title: str,
    panels: Sequence[Panel],
    marks: Sequence[Sign],
    matrices: Sequence[Matrix],
    by: By,
) -> None:
    """The signs are matplotlib's markers."""
    rows, squares = -(-len(panels) // COLUMNS), -(-len(matrices) // COLUMNS)
    height = rows * PANEL_INCHES[1] + squares * SQUARE_INCHES + 0.5
    figure = Figure((COLUMNS * PANEL_INCHES[0], height), DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13)
    ratios = [PANEL_INCHES[1]] * rows + [SQUARE_INCHES] * squares
    grid = figure.add_gridspec(rows + squares, COLUMNS, height_ratios=ratios)
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(grid[i // COLUMNS, i % COLUMNS]), panel, marks, by)
    for i, matrix in enumerate(matrices):
        axes = figure.add_subplot(grid[rows + i // COLUMNS, i % COLUMNS])
        _draw_matrix(figure, axes, matrix)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    artifact.write_file(path, content.getvalue())


def _draw(axes: Axes, panel: Panel, marks: Sequence[Sign], by: By) -> None:
    for line in panel.lines:
        marker = "o" if len(line.x) < 12 and not line.bound else ""
        axes.plot(
            line.x,
            line.y,
            DASHES[line.dash],
            color=line.color,
            label=line.name,
            linewidth=1.0 if line.bound else 1.5,
            marker=marker,
            markersize=3.5,
        )
    for mark in marks:
        color = MARK if mark.alarm else MUTED
        axes.axvline(mark.x, color=color, linewidth=0.8, linestyle=":")
        axes.plot(
            [mark.x],
            [1.0],
            mark.sign,
            color=color,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            markersize=5,
        )
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    unit = f", {panel.unit}" if panel.unit else ""
    axes.set_title(f"{panel.title}{unit}", loc="left", fontsize=11, color=INK)
    axes.set_xlabel(by, fontsize=9, color=MUTED)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(colors=MUTED, labelsize=8, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(panel.lines) > 1:
        axes.legend(fontsize=8, frameon=False)


def _draw_matrix(figure: Figure, axes: Axes, matrix: Matrix) -> None:
    whole = matrix.block == 1
    picture = axes.imshow(
        matrix.cells,
        cmap="RdBu_r" if whole else "Oranges",
        vmin=-1 if whole else 0,
        vmax=1,
        extent=(0, matrix.dimension, matrix.dimension, 0),
        interpolation="nearest",
    )
    figure.colorbar(picture, ax=axes, shrink=0.8)
    title = f"{matrix.run}, step {matrix.step:,}: mean diagonal {matrix.mean_diagonal:.3f}"
    block = f", mean |C| of {matrix.block} x {matrix.block}" if not whole else ""
    axes.set_title(f"{title}{block}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("view 2", fontsize=9, color=MUTED)
    axes.set_ylabel("view 1", fontsize=9, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=8)
