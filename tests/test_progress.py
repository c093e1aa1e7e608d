"""What a person and a machine see of events."""

import json

import pytest

from btpipe import events, progress

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


def test_a_step_is_one_line_with_both_terms_rate_wait_and_time_left() -> None:
    assert progress.step_text(STEP) == (
        "epoch 1.5  loss 512.2 (on 300.5, off 41519)  lr 0.001  1,234 images/s"
        "  data wait 2%  1 h 02 min left"
    )


def test_json_lines_hold_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show("json") as report:
        report(STEP)
        report(events.Warned("careful"))
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {
        "event": "StepDone",
        **{k: v for k, v in STEP.record().items() if k != "event"},
    }
    assert second == {"event": "Warned", "text": "careful"}


def test_without_a_terminal_only_results_and_warnings_are_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress.show("auto") as report:
        report(STEP)
        report(events.Progressed("embed", 5, 10, 2.0, 0.1))
        report(events.Warned("careful"))
        report(events.Tabled("title", ("a", "b"), (("x", "1"),), "below"))
        report(events.Finished("embed", "10 vectors", 3.2))
    written = capsys.readouterr()
    assert written.err == "warning: careful\n"
    assert "10 vectors (3.2 s)" in written.out
    assert "below" in written.out
    assert "epoch" not in written.out


def test_many_rejects_are_counted_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show("auto") as report:
        for i in range(50):
            report(events.FileRejected(f"{i}.jpg", "decode", "empty file"))
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
