"""The picture of runs as one page of HTML: plotly.js, the numbers and what happened."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from btpipe.events import TextTable
from btpipe.pages import frame, plotly_bundle
from btpipe.plot import history
from btpipe.plot.correlation import Matrix
from btpipe.plot.history import History
from btpipe.plot.panels import By, Panel, Sign, axis_position, diagrams

ALARM, RESTART = "\N{BLACK UP-POINTING TRIANGLE}", "\N{CLOCKWISE OPEN CIRCLE ARROW}"
SCRIPT = Path(__file__).with_name("plots.js")
STYLE = """
body { max-width: 1320px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr));
  gap: 26px 24px; margin-bottom: 28px; }
.panel p { margin: 2px 0 0; color: var(--muted); font-size: 12.5px; }
.plot { height: 300px; } .square .plot { height: 470px; }
h2.part { margin: 8px 0 12px; }
.marks td { padding: 2px 16px 2px 0; vertical-align: top; } .marks { margin: 0 0 24px; }
.numbers { margin: 0 0 8px; }
.numbers td { padding: 1px 18px 1px 0; text-align: right; white-space: pre; }
.numbers th { text-align: right; padding-right: 18px; }
.marks .alarm { color: var(--mark); white-space: nowrap; }
"""


def write(
    path: Path,
    runs: Sequence[History],
    matrices: Sequence[Matrix],
    by: By,
    *,
    reload_seconds: int = 0,
) -> None:
    """Writes the page; with `reload_seconds` it reads itself again after as many.

    Raises:
        MachineError: no space, or no permission.
    """
    panels, missing = diagrams(runs, by)
    names = history.names(runs)
    script = _script(panels, _marks(runs, names, by), matrices, by, reload_seconds)
    title = "Runs: " + ", ".join(names) if len(runs) > 1 else f"Run {names[0]}"
    body = _body(runs, panels, missing, matrices)
    frame.write(path, title, about(runs), body, style=STYLE, script=script)


def write_panels(
    path: Path,
    title: str,
    about: str,
    panels: Sequence[Panel],
    marks: Sequence[Sign],
    numbers: TextTable,
) -> None:
    """Writes a page of diagrams over steps, and the numbers that are in them.

    Raises:
        MachineError: no space, or no permission.
    """
    body = f"{_drawn(panels)}\n{_table(numbers)}"
    frame.write(path, title, about, body, style=STYLE, script=_script(panels, marks, (), "step", 0))


def _script(
    panels: Sequence[Panel],
    marks: Sequence[Sign],
    matrices: Sequence[Matrix],
    by: By,
    reload_seconds: int,
) -> str:
    content = {
        "by": by,
        "reload": reload_seconds,
        "panels": [dataclasses.asdict(panel) for panel in panels],
        "marks": [dataclasses.asdict(mark) for mark in marks],
        "matrices": [_matrix(matrix) for matrix in matrices],
    }
    text = json.dumps(content, allow_nan=False).replace("</", "<\\/")
    return f"{plotly_bundle.script('heatmap')}\nconst CONTENT = {text};\n{SCRIPT.read_text()}"


def about(runs: Sequence[History]) -> str:
    """How far the runs are."""
    states = []
    for name, run in zip(history.names(runs), runs, strict=True):
        epochs = run.step / run.steps_per_epoch
        state = f"step {run.step:,} of {run.steps:,} (epoch {epochs:.1f})"
        states.append(f"{name}: {state}" if len(runs) > 1 else state)
    return "; ".join(states)


def _body(
    runs: Sequence[History],
    panels: Sequence[Panel],
    missing: Sequence[str],
    matrices: Sequence[Matrix],
) -> str:
    parts = [_drawn(panels), _happened(runs)]
    if missing:
        parts.append(
            f'<p class="sub">Nothing was logged for: {frame.text(", ".join(missing))}.</p>'
        )
    if matrices:
        squares = "\n".join(
            _panel(f"matrix{i}", f"{matrix.run}, step {matrix.step:,}", matrix.about, " square")
            for i, matrix in enumerate(matrices)
        )
        parts.append(
            '<h2 class="part">Cross-correlation of the two views</h2>\n'
            f'<div class="panels">\n{squares}\n</div>'
        )
    return "\n".join(part for part in parts if part)


def _drawn(panels: Sequence[Panel]) -> str:
    sections = "\n".join(
        _panel(f"panel{i}", f"{panel.title}{f', {panel.unit}' if panel.unit else ''}", panel.about)
        for i, panel in enumerate(panels)
    )
    return f'<div class="panels">\n{sections}\n</div>'


def _table(numbers: TextTable) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{frame.text(cell)}</{tag}>' for cell in cells)}</tr>"

    rows = "".join(line(row, "td") for row in numbers.rows)
    note = f'<p class="sub">{frame.text(numbers.note)}</p>'
    return f'<table class="numbers">{line(numbers.columns, "th")}{rows}</table>\n{note}'


def _panel(name: str, title: str, about: str, kind: str = "") -> str:
    return (
        f'<section class="panel{kind}"><h2>{frame.text(title)}</h2><p>{frame.text(about)}</p>'
        f'<div class="plot" id="{name}"></div></section>'
    )


def _happened(runs: Sequence[History]) -> str:
    """A table of alarms, restarts and what was unreadable."""
    rows = []
    for name, run in zip(history.names(runs), runs, strict=True):
        for mark in sorted((*run.alarms, *run.starts), key=lambda mark: mark.step):
            kind = "" if mark in run.starts else ' class="alarm"'
            cells = (f"{name}, step {mark.step:,}", mark.about, mark.text)
            first, about, text = (frame.text(cell) for cell in cells)
            rows.append(f"<tr><td>{first}</td><td{kind}>{about}</td><td>{text}</td></tr>")
        if run.damaged_lines:
            text = f"{run.damaged_lines} lines of events.jsonl could not be read"
            rows.append(
                f"<tr><td>{frame.text(name)}</td><td>damaged</td><td>{frame.text(text)}</td></tr>"
            )
    return f'<table class="marks">{"".join(rows)}</table>' if rows else ""


def _marks(runs: Sequence[History], names: Sequence[str], by: By) -> list[Sign]:
    return [
        Sign(
            axis_position(run, mark.step, by),
            f"{mark.about} ({name}, step {mark.step:,})",
            ALARM if mark in run.alarms else RESTART,
            alarm=mark in run.alarms,
        )
        for name, run in zip(names, runs, strict=True)
        for mark in (*run.alarms, *run.starts)
    ]


def _matrix(matrix: Matrix) -> dict[str, object]:
    return {"cells": np.round(matrix.cells, 3).tolist(), "block": matrix.block}
