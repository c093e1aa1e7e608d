"""TensorBoard reads the event files of a run, by its own reader. Run: make test-readers"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from btpipe import events
from btpipe.events import Event, ignore
from btpipe.plot import plot
from btpipe.recipe import Recipe
from btpipe.results import Pretrained

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

FLOAT32 = 1e-6
"""Event files hold float32."""


def started(step: int = 0) -> Event:
    return events.RunStarted("r", "", step, 40, 10, 80, 8, 1, "cpu", "fp32", 1, loss_floor=12.5)


def stepped(step: int, loss: float) -> Event:
    return events.StepDone(
        step, step / 10, loss, 1.5, 200.0, 0.5, 0.4, 0, 0, 0.1, 0.01, 99.0, 0.02, 1.0
    )


def write_run(run: Path, events: Sequence[Event]) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(Recipe().to_toml())
    add(run, events)
    return run


def add(run: Path, events: Sequence[Event]) -> None:
    with (run / "events.jsonl").open("a") as log:
        log.writelines(json.dumps(event.record()) + "\n" for event in events)


def whole() -> list[Event]:
    return [
        started(),
        *(stepped(step, 300 / step) for step in range(1, 41)),
        events.RanksMeasured(20, 33.0, 9.0, 64),
        events.KnnJudged(20, 2.0, 0.625, 50, 20, 1.0),
        events.Alarm(30, "collapse", "lower optim.lr"),
        Pretrained(1.0, "r", 40, 40),
    ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard_reads_every_number_and_alarm(tmp_path: Path) -> None:
    run, board = write_run(tmp_path / "runs" / "r", whole()), tmp_path / "board"
    plot.make([run], None, ignore, tensorboard=board)
    logged = scalars(board / "r")
    assert [step for step, _ in logged["loss/total"]] == list(range(1, 41))
    losses = [value for _, value in logged["loss/total"]]
    assert losses == pytest.approx([300 / step for step in range(1, 41)], FLOAT32)
    assert logged["loss/off_diagonal"][0][1] == pytest.approx(200 * Recipe().loss.lambd, FLOAT32)
    when = accumulators.EventAccumulator(str(board / "r")).Reload().Scalars("loss/total")
    events = [json.loads(line)["time"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert [point.wall_time for point in when] == events[1:41]
    assert set(logged["loss/floor"]) == {(step, 12.5) for step in range(1, 41)}
    assert logged["rank/encoder"] == [(20, 33.0)]
    assert logged["knn/accuracy"] == [(20, 0.625)]
    read = accumulators.EventAccumulator(str(board / "r"))
    read.Reload()
    assert read.Tags()["tensors"] == ["alarms/collapse/text_summary"]
    alarm = read.Tensors("alarms/collapse/text_summary")[0]
    assert (alarm.step, alarm.tensor_proto.string_val[0]) == (30, b"lower optim.lr")


def test_a_second_call_writes_no_point_twice_and_leaves_others_files(tmp_path: Path) -> None:
    run, board = write_run(tmp_path / "runs" / "r", whole()), tmp_path / "board"
    (board / "r").mkdir(parents=True)
    (board / "r" / "events.out.tfevents.1.others").write_bytes(b"")
    for _ in range(2):
        plot.make([run], tmp_path / "run.html", ignore, tensorboard=board)
    assert [point[0] for point in scalars(board / "r")["loss/total"]] == list(range(1, 41))
    assert len(list((board / "r").iterdir())) == 2
    assert (tmp_path / "run.html").is_file()


def test_several_runs_have_a_folder_each(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, whole()) for name in ("one", "two")]
    plot.make(runs, None, ignore, tensorboard=tmp_path / "board")
    assert scalars(tmp_path / "board" / "one") == scalars(tmp_path / "board" / "two")


def test_live_appends_what_is_new_and_begins_anew_after_a_restart(tmp_path: Path) -> None:
    run, board = write_run(tmp_path / "r", [started(), stepped(1, 3.0)]), tmp_path / "board"
    # The reader of this environment is not in .venv: the same interpreter goes on.
    command = [sys.executable, "-m", "btpipe", "plot", str(run), "--tensorboard", str(board)]
    with subprocess.Popen([*command, "--live"], cwd=tmp_path, env=dict(os.environ)) as process:
        try:
            first = wait_for(board / "r", [(1, 3.0)])
            add(run, [stepped(2, 2.0), stepped(3, 1.0)])
            assert wait_for(board / "r", [(1, 3.0), (2, 2.0), (3, 1.0)]) == first
            add(run, [started(1), stepped(2, 8.0), Pretrained(1.0, "r", 40, 40)])
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert scalars(board / "r")["loss/total"] == [(1, 3.0), (2, 8.0)]
    assert len(list((board / "r").iterdir())) == 1


def wait_for(folder: Path, expected: list[tuple[int, float]]) -> set[str]:
    """The files' names as soon as they hold these losses."""
    deadline = time.monotonic() + 60
    while not folder.is_dir() or scalars(folder).get("loss/total") != expected:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return {path.name for path in folder.iterdir()}
