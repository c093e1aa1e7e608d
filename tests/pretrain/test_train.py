"""Whole runs by the command line: repeatable, the same on two ranks, and not lost by a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny_run import draw_images

from btpipe import artifact

RECIPE = """
seed = 5
[data]
batch_size = 8
image_size = 32
[network]
backbone = "resnet18"
projector = [32, 32]
[optim]
name = "{optimizer}"
epochs = {epochs}
warmup_epochs = 1
[run]
precision = "{precision}"
log_steps = 1
"""
DOUBLE_CURVE = 1e-9  # relative, over 20 steps in float64: sums over ranks run in another order
SINGLE_CURVE = 1e-4  # the same in float32


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


def command(recipe: Path, images: Path, *arguments: str) -> list[str]:
    start = [sys.executable, "-m", "btpipe", "pretrain", str(recipe)]
    return [*start, "--set", f"data.train={images}", *arguments]


def pretrain(
    recipe: Path, images: Path, *arguments: str, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(recipe, images, *arguments),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def curve(run: Path) -> list[float]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "StepDone"]


def newest_weights(run: Path) -> tuple[str, str]:
    """sha256 of the model's and the optimiser's tensors at the newest checkpoint."""
    newest = max((run / "checkpoints").iterdir())
    return tuple(artifact.file_digest(newest / f"{n}.safetensors") for n in ("model", "optim"))  # type: ignore[return-value]


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_the_same_seed_twice_gives_the_same_bytes(
    tmp_path: Path, images: Path, optimizer: str
) -> None:
    recipe = write_recipe(tmp_path, optimizer=optimizer, epochs=2)
    for name in ("one", "two"):
        pretrain(recipe, images, "--name", name)
    one, two = (newest_weights(tmp_path / "runs" / name) for name in ("one", "two"))
    assert one == two
    pretrain(recipe, images, "--name", "three", "--set", "seed=6")
    assert newest_weights(tmp_path / "runs" / "three") != one


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp64", DOUBLE_CURVE), ("fp32", SINGLE_CURVE)]
)
def test_two_processes_follow_the_loss_curve_of_one(
    tmp_path: Path, images: Path, precision: str, tolerance: float
) -> None:
    recipe = write_recipe(tmp_path, precision=precision)
    pretrain(recipe, images, "--name", "one")
    pretrain(recipe, images, "--name", "two", "--devices", "2")
    one, two = (curve(tmp_path / "runs" / name) for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=tolerance)
    assert len(set(one)) == 20


def test_a_killed_run_started_again_ends_with_the_same_weights(
    tmp_path: Path, images: Path
) -> None:
    recipe = write_recipe(tmp_path, epochs=4)
    pretrain(recipe, images, "--name", "whole")
    often = ("--set", "run.checkpoint_steps=3")
    killed = tmp_path / "runs" / "killed"
    process = subprocess.Popen(command(recipe, images, "--name", "killed", *often), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(curve(killed)) < 16
    pretrain(recipe, images, "--name", "killed", *often)
    assert newest_weights(killed) == newest_weights(tmp_path / "runs" / "whole")
    assert not list(killed.rglob("*.tmp-*"))
    assert len(list((killed / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("devices", ["1", "2"])
def test_sigterm_saves_and_the_same_command_goes_on(
    tmp_path: Path, images: Path, devices: str
) -> None:
    recipe = write_recipe(tmp_path, epochs=200)
    run = tmp_path / "runs" / "tiny"
    start = command(recipe, images, "--devices", devices)
    process = subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "events.jsonl").exists() or len(curve(run)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "run the same command" in errors
    (folder,) = (run / "checkpoints").iterdir()
    step = json.loads((folder / "state.json").read_text())["step"]
    assert step >= 2
    process = subprocess.Popen(start, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while f'"step": {step + 1},' not in (run / "events.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    starts = [line for line in (run / "events.jsonl").read_text().splitlines() if "RunSt" in line]
    assert json.loads(starts[-1])["step"] == step


def test_a_finished_run_is_left_alone(tmp_path: Path, images: Path) -> None:
    recipe = write_recipe(tmp_path, epochs=2)
    pretrain(recipe, images)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")}
    assert "nothing to do" in pretrain(recipe, images).stdout
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*")} == before


def test_another_recipe_does_not_go_into_a_run_folder(tmp_path: Path, images: Path) -> None:
    recipe = write_recipe(tmp_path, epochs=2)
    pretrain(recipe, images)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    refused = pretrain(recipe, images, "--set", "optim.epochs=3", expect=4)
    assert "optim.epochs is 2 there, 3 asked for" in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    pretrain(recipe, images, "--set", "run.log_steps=7")  # bookkeeping may change


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, images: Path
) -> None:
    recipe = write_recipe(tmp_path, epochs=2)
    pretrain(recipe, images, "--set", "run.checkpoint_steps=4")
    run = tmp_path / "runs" / "tiny"
    whole = newest_weights(run)
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    again = pretrain(recipe, images)
    assert "step-00000008" in again.stderr
    assert newest_weights(run) == whole


def test_missing_images_are_said_before_anything_is_made(tmp_path: Path, images: Path) -> None:
    recipe = write_recipe(tmp_path)
    missing = pretrain(recipe, tmp_path / "nowhere", expect=2)
    assert "nowhere" in missing.stderr
    assert "--set data.train=DIR" in missing.stderr
    few = pretrain(recipe, images, "--set", "data.batch_size=64", expect=2)
    assert "34 readable images are less than one batch of 64" in few.stderr
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, images: Path) -> None:
    recipe = write_recipe(tmp_path)
    refused = pretrain(recipe, images, "--devices", "2", "--set", "data.batch_size=9", expect=2)
    assert "data.batch_size = 9 on 2 ranks" in refused.stderr


def test_a_diverging_run_ends_with_6_and_keeps_its_good_checkpoint(
    tmp_path: Path, images: Path
) -> None:
    recipe = write_recipe(tmp_path, optimizer="sgd", epochs=4)
    wild = ("--set", "optim.lr=1e30", "--set", "run.checkpoint_steps=1")
    failed = pretrain(recipe, images, *wild, expect=6)
    assert "not finite" in failed.stderr
    for folder in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir():
        for tensor in load_file(folder / "model.safetensors").values():
            assert abs(tensor).max() < float("inf")


def test_unreadable_images_are_replaced_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    paths = draw_images(folder, 34)
    paths[7].write_bytes(paths[7].read_bytes()[:-400])  # the header is whole, the pixels are not
    recipe = write_recipe(tmp_path, epochs=2)
    pretrain(recipe, folder, "--set", "data.max_bad=0.1")
    quarantine = (tmp_path / "runs" / "tiny" / "quarantine.csv").read_text()
    assert paths[7].name in quarantine
    pretrain(recipe, folder, "--set", "data.max_bad=0", "--name", "strict", expect=3)
