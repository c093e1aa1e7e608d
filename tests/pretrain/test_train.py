"""Whole runs by the command line: repeatable, the same on two ranks, and not lost by a kill."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import event_schema
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_training import NETWORK, logged, weights
from tiny_run import draw_images

from btpipe import progress, recipe
from btpipe.errors import (
    BudgetError,
    MachineError,
    NumericsError,
    RecipeError,
    RefusedError,
    UsageError,
)
from btpipe.pretrain import launch

RECIPE = (
    NETWORK
    + """[optim]
name = "{optimizer}"
epochs = {epochs}
warmup_epochs = 1
[run]
precision = "{precision}"
log_steps = 1
"""
)
DOUBLE_CURVE = 1e-9  # relative, over 20 steps in float64: sums over ranks run in another order
SINGLE_CURVE = 1e-4  # the same in float32
STOP_SECONDS = 20  # the promise is 10 on an idle machine
WAIT_SECONDS = 120  # for a process to get so far, on a busy machine


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """34 drawn photographs: 4 steps of 8 an epoch, the last two dropped."""
    folder = tmp_path_factory.mktemp("train-images")
    draw_images(folder, 34)
    return folder


def write_recipe(
    folder: Path, *, optimizer: str = "lars", epochs: int = 5, precision: str = "fp32"
) -> Path:
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(optimizer=optimizer, epochs=epochs, precision=precision))
    return path


def command(recipe_path: Path, images: Path, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "btpipe", "pretrain", str(recipe_path)]
    return [*start, "--set", f"data.train={images}", *arguments]


def pretrain(
    recipe_path: Path,
    images: Path,
    *settings: str,
    name: str = "tiny",
    devices: str = "1",
    mode: progress.Mode = "auto",
) -> Path:
    """What the command does, in this process; returns the run's folder."""
    run = recipe_path.parent / "runs" / name
    tiny = recipe.load(recipe_path, (f"data.train={images}", *settings))
    launch.pretrain(run, tiny, devices=devices, mode=mode)
    return run


def curve(run: Path) -> list[float]:
    return [event["loss"] for event in logged(run, "StepDone")]


def wait_for(
    process: subprocess.Popen[str] | subprocess.Popen[bytes], happened: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        assert process.poll() is None, "ended before it happened"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("optimizer", ["lars", pytest.param("adamw", marks=pytest.mark.slow)])
def test_the_same_seed_twice_gives_the_same_bytes(
    tmp_path: Path, images: Path, optimizer: str
) -> None:
    recipe_path = write_recipe(tmp_path, optimizer=optimizer, epochs=2)
    one, two = (weights(pretrain(recipe_path, images, name=name)) for name in ("one", "two"))
    assert one == two
    assert weights(pretrain(recipe_path, images, "seed=6", name="three")) != one


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("fp64", DOUBLE_CURVE),
        pytest.param("fp32", SINGLE_CURVE, marks=pytest.mark.slow),
    ],
)
def test_two_processes_follow_the_loss_curve_of_one(
    tmp_path: Path, images: Path, precision: str, tolerance: float
) -> None:
    recipe_path = write_recipe(tmp_path, precision=precision)
    one = curve(pretrain(recipe_path, images, name="one"))
    two = curve(pretrain(recipe_path, images, name="two", devices="2"))
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=tolerance)
    assert len(set(one)) == 20


@pytest.mark.slow
def test_a_killed_run_started_again_ends_with_the_same_weights(
    tmp_path: Path, images: Path
) -> None:
    recipe_path = write_recipe(tmp_path, epochs=4)
    whole = pretrain(recipe_path, images, name="whole")
    often = "run.checkpoint_steps=3"
    killed = tmp_path / "runs" / "killed"
    start = command(recipe_path, images, "--name", "killed", "--set", often)
    third = killed / "checkpoints" / "step-00000003"
    with subprocess.Popen(start, cwd=tmp_path) as process:
        wait_for(process, third.exists)
        process.kill()
    assert len(curve(killed)) < 16
    pretrain(recipe_path, images, often, name="killed")
    assert weights(killed) == weights(whole)
    assert not list(killed.rglob("*.tmp-*"))
    assert len(list((killed / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("devices", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_sigterm_saves_and_the_same_command_goes_on(
    tmp_path: Path, images: Path, devices: str
) -> None:
    recipe_path = write_recipe(tmp_path, epochs=200)
    run = tmp_path / "runs" / "tiny"
    start = command(recipe_path, images, "--devices", devices)
    with subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        wait_for(process, lambda: len(curve(run)) >= 2)
        process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - signalled < STOP_SECONDS
    assert process.returncode == 75, errors
    assert "run the same command" in errors
    (folder,) = (run / "checkpoints").iterdir()
    step = json.loads((folder / "state.json").read_text())["step"]
    assert step >= 2
    with subprocess.Popen(start, cwd=tmp_path) as again:
        wait_for(again, lambda: len(logged(run, "RunStarted")) == 2)
        again.kill()
    assert logged(run, "RunStarted")[1]["step"] == step


def test_a_finished_run_is_left_alone(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_path = write_recipe(tmp_path, epochs=2)
    pretrain(recipe_path, images)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}
    capsys.readouterr()
    pretrain(recipe_path, images, mode="json")
    (result,) = event_schema.read(capsys.readouterr().out)
    assert (result["event"], result["done"], result["nothing_to_do"]) == ("Pretrained", 0, True)
    assert result["step"] == 8
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")} == before


def test_another_recipe_does_not_go_into_a_run_folder(tmp_path: Path, images: Path) -> None:
    recipe_path = write_recipe(tmp_path, epochs=2)
    pretrain(recipe_path, images)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(RefusedError, match=r"optim\.epochs is 2 there, 3 asked for"):
        pretrain(recipe_path, images, "optim.epochs=3")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    pretrain(recipe_path, images, "run.log_steps=7")  # bookkeeping may change


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_path = write_recipe(tmp_path, epochs=2)
    run = pretrain(recipe_path, images, "run.checkpoint_steps=4")
    whole = weights(run)
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    pretrain(recipe_path, images)
    assert "step-00000008" in capsys.readouterr().err
    assert weights(run) == whole


def test_missing_images_are_said_before_anything_is_made(tmp_path: Path, images: Path) -> None:
    recipe_path = write_recipe(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere.*\n.*\n.*--set data\.train=DIR"):
        pretrain(recipe_path, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="34 readable images are less than one batch of 64"):
        pretrain(recipe_path, images, "data.batch_size=64")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (("data.batch_size=9",), r"data\.batch_size = 9 on 2 processes\nexpected: a multiple of 2"),
        (
            ("data.batch_size=6", "run.micro_batch=3"),
            r"run\.micro_batch = 3 on 2 processes\nexpected: a multiple of 2\nto do: set run",
        ),
    ],
)
def test_a_batch_or_micro_batch_that_ranks_cannot_share_is_refused_before_they_start(
    tmp_path: Path, images: Path, settings: tuple[str, ...], refusal: str
) -> None:
    recipe_path = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=refusal):
        pretrain(recipe_path, images, *settings, devices="2")
    assert not (tmp_path / "runs").exists()


def test_a_diverging_run_ends_and_keeps_its_good_checkpoint(tmp_path: Path, images: Path) -> None:
    recipe_path = write_recipe(tmp_path, optimizer="sgd", epochs=4)
    with pytest.raises(NumericsError, match="not finite") as failed:
        pretrain(recipe_path, images, "optim.lr=1e30", "run.checkpoint_steps=1")
    assert failed.value.exit_code == 6
    (*_, newest) = sorted((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    for tensor in load_file(newest / "model.safetensors").values():
        assert np.isfinite(tensor).all()


def test_unreadable_images_are_replaced_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    paths = draw_images(folder, 34)
    paths[7].write_bytes(paths[7].read_bytes()[:-400])  # the header is whole, the pixels are not
    recipe_path = write_recipe(tmp_path, epochs=2)
    run = pretrain(recipe_path, folder, "data.max_bad=0.1")
    assert paths[7].name in (run / "rejects.csv").read_text()
    two = pretrain(recipe_path, folder, "data.max_bad=0.1", name="two", devices="2")
    assert paths[7].name in (two / "rejects.csv").read_text()
    assert curve(two) == pytest.approx(curve(run), rel=SINGLE_CURVE)
    with pytest.raises(BudgetError):
        pretrain(recipe_path, folder, "data.max_bad=0", name="strict")
    # One of two ranks meets the file: its error is told, not that the other one lost it.
    with pytest.raises(BudgetError, match=r"data\.max_bad") as failed:
        pretrain(recipe_path, folder, "data.max_bad=0", name="strict-two", devices="2")
    assert (failed.value.where, failed.value.exit_code) == (str(folder), 3)


def test_a_full_disk_ends_with_5_and_the_same_command_goes_on_when_there_is_space(
    tmp_path: Path, images: Path, disk: Callable[[str], Path]
) -> None:
    recipe_path = write_recipe(tmp_path, epochs=2)
    whole = weights(pretrain(recipe_path, images, name="whole"))
    runs = disk("120m")  # a checkpoint is 90 MB: the second one does not fit
    settings = (f"data.train={images}", "run.checkpoint_steps=4")
    tiny = recipe.load(recipe_path, settings)
    with pytest.raises(MachineError, match="no space left") as failed:
        launch.pretrain(runs / "tiny", tiny, devices="1", mode="auto")
    assert failed.value.exit_code == 5
    assert [p.name for p in (runs / "tiny" / "checkpoints").iterdir()] == ["step-00000004"]
    disk("400m")
    launch.pretrain(runs / "tiny", tiny, devices="1", mode="auto")
    assert weights(runs / "tiny") == whole
