"""What of its recipe a run may change on a resume, and what it and others then know of it."""

import json
import shutil
from pathlib import Path

import pytest
from small_training import IMAGES, checkpoints, logged, pretrain, rewind, weights
from tiny_run import draw_images
from typer.testing import CliRunner

from btpipe import recipe
from btpipe.cli import app
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import ignore
from btpipe.export import encoder_source
from btpipe.pretrain import changes, checkpoint
from btpipe.tools import inspect, verify

FP16 = ("optim.name=sgd", "optim.lr=0.001", "optim.bias_lr=0.001", "run.precision=fp16")
FP64 = (*FP16[:3], "run.precision=fp64")
TEXT = "run.precision fp16 -> fp64 at step 3"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A finished run of 8 steps with its checkpoints at 3, 6 and 8: to be copied."""
    return pretrain(tmp_path_factory.mktemp("trained"), images, "optim.name=sgd")


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run in fp16 for 3 steps, refused in fp64, and taken to its end in fp64 on two ranks."""
    home = tmp_path_factory.mktemp("changed")
    run = pretrain(home, images, *FP16, "optim.epochs=1")
    rewind(run, 3)
    before = (run / "recipe.toml").read_bytes()
    with pytest.raises(RefusedError, match=r"run\.precision is 'fp16' there") as refused:
        pretrain(home, images, *FP64, "optim.epochs=1")
    assert refused.value.exit_code == 4
    assert refused.value.fix.startswith("the same command with --accept-change run.precision")
    assert (run / "recipe.toml").read_bytes() == before
    accepted = ("run.compile", "run.precision")
    return pretrain(home, images, *FP64, "optim.epochs=1", devices="2", accepted=accepted)


def test_an_accepted_change_is_made_and_logged_once(changed: Path) -> None:
    assert checkpoints(changed) == [3, 4]
    assert recipe.load(changed / "recipe.toml").run.precision == "fp64"
    (event,) = logged(changed, "RecipeChanged")
    change = {key: event[key] for key in ("step", "key", "before", "after")}
    assert change == {"step": 3, "key": "run.precision", "before": "fp16", "after": "fp64"}
    (start,) = logged(changed, "RunStarted")
    expected = {"step": 3, "precision": "fp64", "world_size": 2}
    assert {key: start[key] for key in expected} == expected


def test_a_changed_run_is_whole_and_says_what_changed(changed: Path, tmp_path: Path) -> None:
    verify.verify(changed, ignore)
    assert inspect.inspect(changed).facts["changed on the way"] == TEXT
    before, after = (
        {link.what: link.found for link in inspect.inspect(folder).chain}
        for folder in (checkpoint.folder_of(changed, step) for step in (3, 4))
    )
    assert before["recipe"] == f"here, changed since: {TEXT}"
    assert after["recipe"] == "here, the same"
    unlogged = tmp_path / "run"
    shutil.copytree(changed, unlogged)
    (unlogged / "events.jsonl").unlink()
    with pytest.raises(IntegrityError, match="is of another recipe than the run's"):
        verify.verify(unlogged, ignore)


def test_a_bundle_has_the_recipe_of_its_checkpoint_and_the_changes_before_it(
    changed: Path,
) -> None:
    before, after = (encoder_source.of_run(changed, ignore, step=step) for step in (3, 4))
    assert 'precision = "fp16"' in before.recipe_toml
    assert 'precision = "fp64"' in after.recipe_toml
    assert before.origin["recipe"] == checkpoint.read_state(checkpoint.folder_of(changed, 3)).recipe
    assert after.origin["recipe"] == recipe.load(changed / "recipe.toml").digest
    assert "changes" not in before.origin
    assert after.origin["changes"] == TEXT


def test_a_change_there_and_back_is_two_and_a_torn_line_is_none(tmp_path: Path) -> None:
    first = recipe.Recipe()
    run = first.run.model_copy(update={"compile": "off"})
    second = first.model_copy(update={"run": run})
    (tmp_path / "recipe.toml").write_text(first.to_toml())
    (tmp_path / "events.jsonl").write_text('{"event": "RecipeChanged", "step": 1, "key\n')
    for resumed, step in ((second, 5), (first, 9)):
        before = changes.differences(tmp_path, resumed, ["run.compile"])
        with (tmp_path / "events.jsonl").open("a", buffering=1) as log:
            changes.write(
                tmp_path, resumed, before, step, lambda e: print(json.dumps(e.record()), file=log)
            )
    assert [version.recipe for version in changes.versions(tmp_path)] == [first, second, first]
    assert changes.version_at(tmp_path, 4, first.digest).text == ""
    assert changes.version_at(tmp_path, 7, second.digest).text.endswith("-> off at step 5")
    assert changes.version_at(tmp_path, 12, first.digest).text.endswith("-> auto at step 9")


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("optim.lr", "it would be another run"),
        ("run.memory_budget", "may change on every resume"),
        ("run.warp", "no key of a recipe"),
    ],
)
def test_any_other_key_is_refused_with_the_reason(key: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        changes.require_acceptable(["run.compile", key])
    result = CliRunner().invoke(app, ["pretrain", "folder", "--accept-change", key])
    assert isinstance(result.exception, UsageError)


def test_a_key_that_was_not_accepted_is_refused_with_the_others(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(RefusedError, match="seed is 5 there, 6 asked for") as refused:
        pretrain(
            tmp_path, images, "optim.name=sgd", "seed=6", "run.compile=off", accepted=("seed",)
        )
    assert "--accept-change" not in refused.value.fix


def test_a_finished_run_stays_what_it_was_trained_as(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    settings = ("optim.name=sgd", "run.compile=off")
    run = pretrain(tmp_path, images, *settings, accepted=("run.compile",))
    assert (run / "recipe.toml").read_bytes() == before
    assert not logged(run, "RecipeChanged")


def test_with_less_memory_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    rewind(tmp_path / "run", 6)
    run = pretrain(tmp_path, images, "optim.name=sgd", "run.memory_budget=0.3")
    assert checkpoints(run) == [3, 6, 8]
    assert weights(run) == weights(trained)
