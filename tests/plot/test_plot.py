"""The picture of runs: what it takes from their logs, and that a browser draws it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser, needs_chromium
from PIL import Image
from tiny_run import shared_home
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.errors import UsageError
from btpipe.events import Alarm, Event, KnnJudged, RanksMeasured, RunStarted, StepDone, ignore
from btpipe.plot import correlation, history, plot
from btpipe.plot.panels import COLORS, diagrams
from btpipe.pretrain import loss
from btpipe.recipe import Recipe
from btpipe.results import Pretrained

STEPS = 40
FLOOR = 12.5
FLOAT32 = 2e-5
"""Sums of a few hundred products in float32, in another order."""


def started(step: int = 0) -> RunStarted:
    return RunStarted(
        run="runs/r",
        recipe="",
        step=step,
        steps=STEPS,
        steps_per_epoch=10,
        images=80,
        batch_size=8,
        world_size=1,
        device="cpu",
        precision="fp32",
        parameters=1,
        loss_floor=FLOOR,
    )


def stepped(step: int, value: float) -> StepDone:
    return StepDone(
        step=step,
        epoch=step / 10,
        loss=value,
        on_diagonal=value / 2,
        off_diagonal=9 * value,
        mean_diagonal=0.5,
        off_diagonal_rms=0.4,
        dead_dimensions=0,
        overflows=0,
        lr=0.1,
        bias_lr=0.01,
        images_per_second=100.0,
        data_wait=0.02,
        eta_seconds=1.0,
    )


def write_run(run: Path, events: Sequence[Event]) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(Recipe().to_toml())
    lines = [json.dumps(event.record()) + "\n" for event in events]
    (run / "events.jsonl").write_text("".join(lines))
    return run


def whole_run(run: Path) -> Path:
    events: list[Event] = [started()]
    events += [stepped(step, 300 / step) for step in range(1, STEPS + 1)]
    events += [RanksMeasured(step, 20.0, 9.0, 64) for step in range(5, STEPS + 1, 5)]
    events += [KnnJudged(20, 2.0, 0.4, 50, 20, 1.0), KnnJudged(40, 4.0, 0.6, 50, 20, 1.0)]
    events += [Alarm(30, "collapse", "lower optim.lr"), Pretrained(1.0, "r", 40, 40)]
    return write_run(run, events)


def test_steps_that_a_restart_did_again_are_drawn_once_as_they_came_out_last(
    tmp_path: Path,
) -> None:
    run = write_run(
        tmp_path / "r",
        [
            started(),
            *(stepped(step, 100.0) for step in (10, 20, 30)),
            Alarm(30, "collapse", "of steps that were done again"),
            started(20),
            *(stepped(step, 50.0) for step in (30, 40)),
            Pretrained(1.0, "r", 40, 40),
        ],
    )
    run_history = history.read(run)
    assert run_history.series["loss"] == ((10, 100.0), (20, 100.0), (30, 50.0), (40, 50.0))
    assert [(mark.step, mark.text) for mark in run_history.starts] == [
        (20, "went on from step 20; 10 steps were done again")
    ]
    assert run_history.alarms == ()
    assert run_history.ended


def test_a_line_that_is_being_written_and_a_damaged_one_cost_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [started(), stepped(1, 3.0)])
    with (run / "events.jsonl").open("a") as log:
        log.write('\0\0\0{"event"\n')
        log.write(json.dumps(stepped(2, float("nan")).record()) + "\n")
        log.write('{"event": "StepDone", "step": 3, "lo')
    run_history = history.read(run)
    assert run_history.series["loss"] == ((1, 3.0),)
    assert run_history.series["lr"] == ((1, 0.1), (2, 0.1))
    assert (run_history.damaged_lines, run_history.ended) == (1, False)


def test_a_log_of_an_older_btpipe_is_drawn_without_what_it_does_not_tell(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [started()])
    with (run / "events.jsonl").open("a") as log:
        log.write('{"event": "StepDone", "step": 1, "loss": 5.0, "lr": 0.1}\n')
    panels, missing = diagrams([history.read(run)], "step")
    assert [panel.title for panel in panels] == ["Loss", "Learning rates"]
    assert "kNN" in missing


def test_a_thinned_line_keeps_its_peaks() -> None:
    line = tuple((step, 5000.0 if step == 777 else float(step % 7)) for step in range(10_000))
    thinned = history.thin(line, 200)
    assert len(thinned) <= 202
    assert (777, 5000.0) in thinned
    assert thinned[0][0] == 0
    assert thinned[-1] == line[-1]


def test_panels_hold_terms_with_lambda_the_floor_and_chance(tmp_path: Path) -> None:
    run = history.read(whole_run(tmp_path / "r"))
    panels = {panel.title: panel for panel in diagrams([run], "epoch")[0]}
    lines = {line.name: line for panel in panels.values() for line in panel.lines}
    assert set(lines["floor"].y) == {FLOOR}
    assert lines["chance"].y == pytest.approx((8**-0.5, 8**-0.5))
    assert lines["loss"].x[-1] == 4.0
    off = np.array(lines["off"].y)
    np.testing.assert_allclose(off, Recipe().loss.lambd * 9 * np.array(lines["loss"].y))
    assert lines["accuracy"].y == (40.0, 60.0)
    assert "Dead dimensions" not in panels


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / parent / "runs" / "r") for parent in ("one", "two")]
    assert history.names([history.read(run) for run in runs]) == ["one/runs/r", "two/runs/r"]


@pytest.mark.parametrize("out", ["run.svg", "run"])
def test_another_kind_of_picture_is_refused(tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match=r"\.html or \.png"):
        plot.make([whole_run(tmp_path / "r")], tmp_path / out, ignore)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_event_files_without_tensorboard_say_what_to_install(tmp_path: Path) -> None:
    run, board = whole_run(tmp_path / "r"), tmp_path / "board"
    with pytest.raises(UsageError, match=r"pip install 'btpipe\[tensorboard\]'"):
        app(["plot", str(run), "--tensorboard", str(board)], standalone_mode=False)
    assert not board.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run there"):
        history.read(tmp_path)


def test_a_png_is_drawn(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / name) for name in ("one", "two")]
    plot.make(runs, tmp_path / "run.png", ignore)
    pixels = np.array(Image.open(tmp_path / "run.png").convert("RGB")).reshape(-1, 3)
    for color in COLORS[:2]:
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).max(axis=1) < 8).sum() > 200, color


@needs_chromium
def test_a_browser_draws_every_panel_without_a_request_or_an_error(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "r")
    plot.make([run], tmp_path / "run.html", ignore)
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "run.html")
        lines = tab.ask("document.querySelectorAll('.scatterlayer .trace').length")
        titles = tab.ask("[...document.querySelectorAll('.panel h2')].map((h) => h.textContent)")
        text = str(tab.ask("document.body.innerText"))
        assert (tab.problems, tab.requests) == ([], [])
    assert isinstance(titles, list)
    assert titles[0] == "Loss"
    assert {"kNN, %", "Effective rank", "Speed, images/s", "Wait for data, %"} <= set(titles)
    assert lines == 14
    assert "lower optim.lr" in text
    assert "collapse" in text


def test_blocks_keep_the_diagonal_apart() -> None:
    matrix = np.full((10, 10), -0.5, np.float32)
    np.fill_diagonal(matrix, 1.0)
    cells, side = correlation.blocks(matrix, most=4)
    assert side == 3
    np.testing.assert_allclose(np.diagonal(cells), 1.0)
    np.testing.assert_allclose(cells[~np.eye(4, dtype=bool)], 0.5)
    whole, one = correlation.blocks(matrix, most=10)
    assert (one, whole is matrix) == (1, True)


def test_the_correlation_is_of_the_checkpoint_and_of_the_beginning(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(shared_home(tmp_path_factory) / "runs" / "tiny", run)
    text = (run / "recipe.toml").read_text()
    # The checkpoint's weights are those of seed 3: with another seed the beginning differs.
    assert "seed = 3" in text
    (run / "recipe.toml").write_text(text.replace("seed = 3", "seed = 4"))
    matrices = correlation.measure(run, "first,last", ignore)
    assert [(matrix.step, matrix.block, matrix.cells.shape) for matrix in matrices] == [
        (0, 1, (16, 16)),
        (3, 1, (16, 16)),
    ]
    assert not np.allclose(matrices[0].cells, matrices[1].cells, atol=0.1)
    for matrix in matrices:
        assert np.abs(matrix.cells).max() <= 1 + FLOAT32
        off = matrix.cells[~np.eye(16, dtype=bool)]
        assert matrix.off_diagonal_rms == pytest.approx(np.sqrt(np.square(off).mean()), FLOAT32)
        assert matrix.mean_diagonal == pytest.approx(np.diagonal(matrix.cells).mean(), FLOAT32)


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = shared_home(tmp_path_factory) / "runs" / "tiny"
    with pytest.raises(UsageError, match="of 0, 3"):
        correlation.measure(run, "0,7", ignore)


def test_the_matrix_agrees_with_the_terms_of_the_loss() -> None:
    random = torch.Generator().manual_seed(0)
    z = [torch.randn(32, 24, generator=random) for _ in range(2)]
    terms, _ = loss.value_and_gradient(z, 0.0051, "cross")
    first, second = (loss.Standardised(one).local_block(slice(0, 24)) for one in z)
    matrix = (first.T @ second / 32).numpy()
    assert float(terms.on_diagonal) == pytest.approx(
        np.square(1 - np.diagonal(matrix)).sum(), FLOAT32
    )


def test_the_command_draws_the_newest_run_with_its_correlation(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shared_home(tmp_path_factory) / "runs" / "tiny"
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(source, run)
    with (run / "events.jsonl").open("w") as log:
        log.writelines(json.dumps(e.record()) + "\n" for e in (started(), stepped(3, 5.0)))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["plot", "--out", "run.html", "--correlation", "0,3"])
    assert result.exit_code == 0, result.output
    assert '"block": 1' in (tmp_path / "run.html").read_text()


def test_live_shows_what_is_new_and_ends_with_the_run(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "r", [started(), stepped(1, 3.0)]), tmp_path / "run.html"
    command = [sys.executable, "-m", "btpipe", "plot", str(run), "--out", str(out), "--live"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        try:
            wait_for(out.exists)
            assert f'"reload": {plot.RELOAD_SECONDS}' in out.read_text()
            with (run / "events.jsonl").open("a") as log:
                for event in (stepped(2, 77.5), Pretrained(1.0, "r", 40, 40)):
                    log.write(json.dumps(event.record()) + "\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "77.5" in out.read_text()
    assert '"reload": 0' in out.read_text()


def test_live_ends_when_the_process_that_trained_is_gone(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "r", [started(), stepped(1, 3.0)]), tmp_path / "run.html"
    code = (
        "from pathlib import Path; from btpipe.plot import plot;"
        f"plot.make([Path({str(run)!r})], Path({str(out)!r}), lambda event: print(event),"
        " live=True, patience_seconds=0.5)"
    )
    trainer = os.open(run, os.O_RDONLY)
    fcntl.flock(trainer, fcntl.LOCK_EX)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_for(out.exists)
            time.sleep(1)
            assert process.poll() is None, "it is trained still"
            os.close(trainer)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert f"its process is gone; it stands at step 1 of {STEPS}" in output
    assert '"reload": 0' in out.read_text()


@pytest.mark.slow
def test_a_signal_ends_live_with_a_page_that_stays(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "r", [started(), stepped(1, 3.0)]), tmp_path / "run.html"
    command = [sys.executable, "-m", "btpipe", "plot", str(run), "--out", str(out), "--live"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        try:
            wait_for(out.exists)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert '"reload": 0' in out.read_text()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
