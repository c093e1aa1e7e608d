"""What a person and a machine see of events."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from btpipe import events, progress
from btpipe.pretrain import folder
from btpipe.results import Pretrained
from btpipe.tools.measured_rows import Compared

STEP = events.StepDone(
    step=40,
    epoch=1.5,
    loss=512.25,
    on_diagonal=300.5,
    off_diagonal=41_519.0,
    mean_diagonal=0.25,
    off_diagonal_rms=0.11,
    dead_dimensions=3,
    overflows=0,
    lr=0.001,
    bias_lr=0.0005,
    images_per_second=1234.5,
    data_wait=0.021,
    eta_seconds=3723.0,
)


RANKS = events.RanksMeasured(step=40, encoder=80.75, projector=31.4, rows=128)
KNN = events.KnnJudged(40, epoch=1.5, accuracy=0.612, images=500, neighbours=20, seconds=8.1)
NARROW = 80  # columns of a terminal as it opens


def test_a_step_is_a_bar_and_short_lines_with_terms_correlation_ranks_and_neighbours() -> None:
    assert progress.speed_text(STEP) == "1,234 images/s  1 h 02 min left"
    assert progress.Training(2048, STEP, RANKS, KNN).lines() == [
        "epoch 1.5  loss 512.2 (on 300.5, off 41519)  lr 0.001  wait 2%",
        "diagonal 0.250  off-diagonal 0.110 (chance 0.022)  dead 3",
        "rank: encoder 81, projector 31 (of 128 images)  kNN 61.2% (epoch 2)",
    ]
    assert progress.Training().lines() == []


def test_the_lines_of_a_large_run_fit_a_narrow_terminal() -> None:
    large = dataclasses.replace(
        STEP,
        epoch=1000.0,
        loss=342_213.1,
        on_diagonal=8192.4,
        off_diagonal=67_100_672.0,
        lr=0.00012,
        data_wait=1.0,
        dead_dimensions=65_536,
        overflows=12_345,
    )
    ranks = events.RanksMeasured(step=1, encoder=1024.0, projector=1024.0, rows=1024)
    knn = events.KnnJudged(1, 1000.0, accuracy=1.0, images=20_000, neighbours=20, seconds=80.0)
    for line in progress.Training(2048, large, ranks, knn).lines():
        assert len(line) <= NARROW
    assert len(progress.knn_text(knn)) <= NARROW


def test_an_alarm_is_one_line_on_standard_error_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = "many words " * 30 + "end"
    with progress.show("auto") as report:
        report(events.Alarm(120, "collapse", text))
        report(RANKS)
        report(KNN)
    written = capsys.readouterr()
    assert written.err == f"alarm: collapse, step 120: {text}\n"
    assert written.out == ""


def test_json_lines_hold_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show("json") as report:
        report(STEP)
        report(events.Warned("3 rows", {"rows": 3}))
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {"event": "StepDone", **dataclasses.asdict(STEP)}
    assert second.pop("time") == pytest.approx(time.time(), abs=60)
    assert second == {"event": "Warned", "text": "3 rows", "values": {"rows": 3}}


def test_a_runs_log_has_the_lines_that_a_machine_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.show("json") as report, folder.log(tmp_path, report) as logged:
        logged(STEP)
        logged(events.Alarm(40, "collapse", "text"))
    assert (tmp_path / "events.jsonl").read_text() == capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null_in_json_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.show("json") as report:
        report(dataclasses.replace(STEP, loss=float("nan"), on_diagonal=float("inf")))
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["on_diagonal"] is None
    assert record["off_diagonal"] == STEP.off_diagonal


def test_without_a_terminal_only_results_and_warnings_are_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.show("auto") as report:
        report(STEP)
        report(events.Progressed("embed", 5, 10, 2.0, 0.1))
        report(events.Warned("careful"))
        report(Compared(events.TextTable("title", ("a", "b"), (("x[y]", "1"),), "below")))
        report(Pretrained(3.2, "runs/x", step=40, done=10))
    written = capsys.readouterr()
    assert written.err == "warning: careful\n"
    assert "pretrain: 10 steps, runs/x (3.2 s)" in written.out
    assert "below" in written.out
    assert "x[y]" in written.out  # no markup
    assert "epoch" not in written.out


def test_through_a_pipe_a_table_is_whole_however_wide(capsys: pytest.CaptureFixture[str]) -> None:
    cells = tuple(f"{'name' * 30}-{i}.onnx" for i in range(8))
    with progress.show("auto") as report:
        report(Compared(events.TextTable("title " * 60 + "end", cells, (cells,))))
    title, _, head, _, row, _ = capsys.readouterr().out.splitlines()
    assert title.rstrip().endswith(" end")
    for line in (head, row):
        assert [cell for cell in re.split(r"[\s\u2502\u2503]+", line) if cell] == list(cells)


def test_many_rejects_are_counted_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show("auto") as report:
        for i in range(50):
            report(events.Rejected(f"{i}.jpg", "decode", "content", "empty file"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == progress.REJECTS_SHOWN + 1
    assert lines[0] == "rejected: 0.jpg (decode): empty file"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.24, "3.2 s"), (75.0, "1 min 15 s"), (7384.0, "2 h 03 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_rates_are_a_function_of_count_and_seconds() -> None:
    assert events.per_second(30, 2.0) == 15.0
    assert events.per_second(30, 0.0) == 0.0


def test_on_a_terminal_a_result_stays_after_the_live_lines_are_gone() -> None:
    """In a real pseudo-terminal: what remains on the screen is the alarm and the result."""
    code = (
        "from btpipe import events, progress, results\n"
        "from test_progress import KNN, RANKS, STEP\n"
        "with progress.show('auto') as report:\n"
        "    report(STEP)\n    report(RANKS)\n"
        "    report(events.Alarm(40, 'collapse', 'text'))\n"
        "    report(results.Pretrained(3.2, 'runs/x', 40, 40))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm"}
    above, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        written = b"".join(iter(lambda: _read(above), b""))
    os.close(above)
    assert process.returncode == 0
    assert [line for line in screen(written.decode()) if line] == [
        "alarm: collapse, step 40: text",
        "pretrain: 40 steps, runs/x (3.2 s)",
    ]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def screen(written: str) -> list[str]:
    """What a terminal shows after these characters: the few controls that live lines use."""
    lines, row, column = [""], 0, 0
    for control, text in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(\r|\n|[^\x1b\r\n]+)", written):
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif control.endswith("A"):
            row -= int(control[:-1] or 1)
        elif control == "2K":
            lines[row] = ""
    return lines
