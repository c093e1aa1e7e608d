"""Runs killed, damaged, moved between ranks or given other images: never lost, never mixed.

A run that saves every third step is rewound by taking its later checkpoints away: what a kill after
that step leaves behind.
"""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_training import IMAGES, RECIPE, checkpoints, logged, pretrain, rewind, weights
from tiny_run import draw_images, shared_home

from btpipe import artifact, events
from btpipe.data.pipeline import sampler
from btpipe.errors import BtpipeError, IntegrityError, MachineError, NewerError, RefusedError
from btpipe.pretrain import checkpoint

DOUBLE = 1e-9  # relative, in float64: sums over ranks run in another order
WAIT_SECONDS = 120  # for a process to get so far, on a busy machine


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume-images")
    draw_images(folder, IMAGES)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A finished run of 8 steps with its checkpoints at 3, 6 and 8: to be copied."""
    return pretrain(tmp_path_factory.mktemp("trained"), images, "optim.name=sgd")


def losses(run: Path) -> dict[int, float]:
    return {int(event["step"]): event["loss"] for event in logged(run, "StepDone")}


@pytest.mark.parametrize(
    "settings",
    [
        ("optim.name=lars",),
        pytest.param(("optim.name=adamw",), marks=pytest.mark.slow),
        pytest.param(
            ("optim.name=sgd", "optim.lr=0.001", "optim.bias_lr=0.001", "run.precision=fp16"),
            marks=pytest.mark.slow,
        ),
        ("optim.name=lars", "run.precision=fp16", "run.micro_batch=4"),
    ],
    ids=" ".join,
)
def test_a_resume_in_the_middle_of_an_epoch_ends_with_the_same_bytes(
    tmp_path: Path, images: Path, settings: tuple[str, ...]
) -> None:
    run = pretrain(tmp_path, images, *settings)
    assert checkpoints(run) == [3, 6, 8]
    whole, curve = weights(run), losses(run)
    rewind(run, 3)
    pretrain(tmp_path, images, *settings)
    assert weights(run) == whole
    assert losses(run) == {step: loss for step, loss in curve.items() if step > 3}


def test_a_run_moved_from_one_rank_to_two_and_back_follows_the_same_curve(
    tmp_path: Path, images: Path
) -> None:
    settings = ("run.precision=fp64", "run.micro_batch=4", "optim.epochs=3")
    run = pretrain(tmp_path, images, *settings)
    curve, final = (
        losses(run),
        load_file(run / "checkpoints" / "step-00000012" / "model.safetensors"),
    )
    rewind(run, 3)
    pretrain(tmp_path, images, *settings, devices="2")
    assert checkpoints(run) == [3, 6, 9, 12]  # two ranks save at the very step
    two = losses(run)
    rewind(run, 6)
    pretrain(tmp_path, images, *settings)
    one = losses(run)
    assert (min(two), min(one), max(two), max(one)) == (4, 7, 12, 12)
    for part in (two, one):
        assert part == pytest.approx({step: curve[step] for step in part}, rel=DOUBLE)
    moved = load_file(run / "checkpoints" / "step-00000012" / "model.safetensors")
    for name, tensor in final.items():
        np.testing.assert_allclose(moved[name], tensor, rtol=DOUBLE, atol=DOUBLE, err_msg=name)


def test_every_nth_checkpoint_stays_for_good(tmp_path: Path, images: Path) -> None:
    settings = ("optim.name=sgd", "run.checkpoint_steps=1", "run.keep_last=2", "run.keep_every=3")
    assert checkpoints(pretrain(tmp_path, images, *settings)) == [3, 6, 7, 8]
    alone = ("optim.name=sgd", "run.checkpoint_steps=0", "run.keep_last=2", "run.keep_every=2")
    assert checkpoints(pretrain(tmp_path, images, *alone, name="alone")) == [2, 4, 6, 8]


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def flip(folder: Path) -> None:
    content = bytearray((folder / "optim.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "optim.safetensors").write_bytes(content)


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def scribble(folder: Path) -> None:
    (folder / "state.json").write_text("{}")


def scribble_and_list(folder: Path) -> None:
    """Junk under a manifest that lists it: nothing but its content tells."""
    replace_listed(folder, "state.json", b'{"step": "many"}')


def replace_listed(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = artifact.file_digest(folder / name)
    manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "flipped": flip,
    "file missing": lose("model.safetensors"),
    "manifest missing": lose("manifest.json"),
    "junk state": scribble,
    "listed junk state": scribble_and_list,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_warning_that_names_both(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, damage: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(shared_home(tmp_path_factory) / "runs" / "tiny", run)
    older, newer = (run / "checkpoints" / f"step-0000000{i}" for i in (3, 5))
    shutil.copytree(older, newer)
    DAMAGES[damage](newer)
    warnings: list[events.Event] = []
    assert checkpoint.newest(run, warnings.append) == older
    (warning,) = warnings
    assert isinstance(warning, events.Warned)
    assert "step-00000005 is damaged" in warning.text
    assert "step-00000003 is taken instead" in warning.text
    DAMAGES[damage](older)
    with pytest.raises(IntegrityError, match="none of 2 checkpoints is whole") as refused:
        checkpoint.newest(run, warnings.append)
    assert refused.value.exit_code == 4


def test_a_run_goes_on_from_the_one_before_and_the_damaged_one_is_gone(
    tmp_path: Path, images: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = weights(run)
    rewind(run, 6)
    flip(run / "checkpoints" / "step-00000006")
    pretrain(tmp_path, images, "optim.name=sgd", "run.checkpoint_steps=4")
    assert capsys.readouterr().err.count("is damaged") == 1
    assert logged(run, "RunStarted")[0]["step"] == 3
    assert weights(run) == whole
    assert checkpoints(run) == [3, 4, 8]  # 6 was not waited for: it went when 4 stood


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for folder in (run / "checkpoints").iterdir():
        cut(folder)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(IntegrityError, match="none of 3 checkpoints is whole"):
        pretrain(tmp_path, images, "optim.name=sgd")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_checkpoint_of_a_newer_btpipe_is_refused_and_not_passed_over(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = run / "checkpoints" / "step-00000008" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format_version": 99, "btpipe_version": "7.0"}))
    with pytest.raises(NewerError, match=r"format_version 99[\s\S]*install btpipe 7\.0"):
        pretrain(tmp_path, images, "optim.name=sgd")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json"])
def test_a_pickle_as_a_checkpoint_is_refused_and_nothing_runs(
    tmp_path: Path, images: Path, trained: Path, name: str
) -> None:
    run, marker = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(trained, run)
    rewind(run, 3)
    content = pickle.dumps(Malicious(marker))
    replace_listed(run / "checkpoints" / "step-00000003", name, content)
    with pytest.raises(IntegrityError) as refused:
        pretrain(tmp_path, images, "optim.name=sgd")
    assert refused.value.exit_code == 4
    assert not marker.exists()
    pickle.loads(content)  # the trap is real
    time.sleep(0.1)
    assert marker.exists()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("data.batch_size=16", r"data\.batch_size is 8 there, 16 asked for"),
        ("seed=6", "seed is 5 there, 6 asked for"),
        ("views=[{gray=0.5}, {}]", r"views\.0\.gray is 0\.2 there, 0\.5 asked for"),
        ("loss.lambd=0.01", r"loss\.lambd is"),
    ],
)
def test_a_resume_under_another_recipe_is_refused_and_the_key_named(
    tmp_path: Path, images: Path, trained: Path, setting: str, named: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rewind(run, 6)
    with pytest.raises(RefusedError, match=named) as refused:
        pretrain(tmp_path, images, "optim.name=sgd", setting)
    assert refused.value.exit_code == 4
    assert checkpoints(run) == [3, 6]


def test_a_resume_with_other_images_is_refused_with_what_came_and_went(tmp_path: Path) -> None:
    images, aside = tmp_path / "images", tmp_path / "aside.jpg"
    paths = draw_images(images, 20)
    (images / "a" / "broken.jpg").write_bytes(b"no image at all")
    sgd = "optim.name=sgd"
    run = pretrain(tmp_path, images, sgd)
    assert checkpoints(run) == [3, 4]
    rewind(run, 3)

    def refused(*texts: str) -> None:
        with pytest.raises(RefusedError) as error:
            pretrain(tmp_path, images, sgd)
        assert error.value.exit_code == 4
        for text in (r"data.train", "20 images of its index.parquet", *texts):
            assert text in str(error.value)

    paths[3].rename(aside)
    refused("1 removed (b/003.jpg)")
    shutil.copy(aside, images / "a" / "new.jpg")
    shutil.copy(aside, images / "a" / "new2.dat")
    refused("2 added (a/new.jpg), 1 removed (b/003.jpg)")
    (images / "a" / "new.jpg").unlink()
    (images / "a" / "new2.dat").unlink()
    aside.rename(paths[3])
    content = paths[4].read_bytes()
    paths[4].write_bytes(content + b"\0")
    refused("1 of another size (a/004.jpg)")
    paths[4].write_bytes(content)
    (images / "notes.txt").write_text("not an image")

    images.rename(tmp_path / "elsewhere")
    with pytest.raises(MachineError, match="the training images are not there"):
        pretrain(tmp_path, images, sgd)
    images.mkdir()
    with pytest.raises(MachineError, match="is empty"):
        pretrain(tmp_path, images, sgd)
    images.rmdir()
    (tmp_path / "elsewhere").rename(images)
    pretrain(tmp_path, images, sgd)  # all is as it was: it goes on
    assert checkpoints(run) == [3, 4]
    shutil.rmtree(images)
    pretrain(tmp_path, images, sgd)  # a finished run needs no images


def test_an_index_put_in_from_another_run_is_refused(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    more = tmp_path / "more"
    shutil.copytree(images, more)
    shutil.copy(next(more.rglob("*.jpg")), more / "a" / "more.jpg")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    rewind(run, 6)
    from btpipe.data import index  # noqa: PLC0415

    index.build(more)[0].save(run / "index.parquet")
    with pytest.raises(RefusedError, match="other images than index"):
        pretrain(tmp_path, images, "optim.name=sgd")


def spoil(path: Path) -> None:
    """Takes the end of an image away: its header stays whole, its pixels do not."""
    path.write_bytes(path.read_bytes()[:-400])


def test_unusable_images_are_counted_over_the_ranks(tmp_path: Path) -> None:
    images = tmp_path / "images"
    sorted_paths = sorted(draw_images(images, IMAGES))
    first, second = (sampler.permutation(5, 0, IMAGES, 8 * i, 8 * i + 8) for i in (0, 1))
    spoil(sorted_paths[first[1]])  # the first rank's
    settings = ("optim.name=sgd", "optim.epochs=1", "data.max_bad=0.03")  # one of 34
    pretrain(tmp_path, images, *settings, name="one-bad", devices="2")
    spoil(sorted_paths[second[6]])  # the second rank's
    with pytest.raises(BtpipeError, match="2 of 34 images cannot be used") as failed:
        pretrain(tmp_path, images, *settings, devices="2")
    assert failed.value.exit_code == 3
    assert (tmp_path / "run" / "rejects.csv").read_text().count("decode") == 2
    assert checkpoints(tmp_path / "run") == []
    # The same command ends the same way, at once; with a larger budget the run goes on.
    steps = len(losses(tmp_path / "run"))
    with pytest.raises(BtpipeError, match="2 of 34") as failed:
        pretrain(tmp_path, images, *settings)
    assert failed.value.exit_code == 3
    assert len(losses(tmp_path / "run")) == steps
    pretrain(tmp_path, images, *settings, "data.max_bad=0.06")
    assert checkpoints(tmp_path / "run") == [3, 4]


def test_an_image_that_both_ranks_meet_counts_once(tmp_path: Path) -> None:
    images = tmp_path / "images"
    paths = sorted(draw_images(images, IMAGES))
    epochs = [sampler.permutation(5, epoch, IMAGES, 0, 32) for epoch in (0, 1)]
    rank_of = [{int(row): at % 8 // 4 for at, row in enumerate(rows)} for rows in epochs]
    met = next(row for row, rank in rank_of[0].items() if rank_of[1].get(row, rank) != rank)
    spoil(paths[met])
    run = pretrain(tmp_path, images, "optim.name=sgd", "data.max_bad=0.03", devices="2")
    assert checkpoints(run)[-1] == 8
    assert (run / "rejects.csv").read_text().count("decode") == 1


def kill_and_resume(folder: Path, images: Path, kills: int, *settings: str) -> tuple[Path, int]:
    """Runs the command, kills it at random, again and again, then lets it end.

    Returns the run's folder, and how many of the kills met a checkpoint that was being written.
    """
    (folder / "tiny.toml").write_text(RECIPE)
    options = [word for s in (f"data.train={images}", *settings) for word in ("--set", s)]
    start = [sys.executable, "-m", "btpipe", "pretrain", "tiny.toml", "--name", "killed", *options]
    run, chance, had, writing = folder / "runs" / "killed", random.Random(8), False, 0
    for _ in range(kills):
        starts, done = len(logged(run, "RunStarted")), len(logged(run, "StepDone"))
        goal = done + chance.randrange(1, 4)
        with subprocess.Popen(start, cwd=folder, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + WAIT_SECONDS
            while len(logged(run, "RunStarted")) == starts or len(logged(run, "StepDone")) < goal:
                assert process.poll() is None, "ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        writing += bool(list(run.glob("checkpoints/*.tmp-*")))
        complaints: list[events.Event] = []
        newest = checkpoint.newest(run, complaints.append)
        assert not complaints
        assert newest is not None or not had, "there was one before"
        had = had or newest is not None
    subprocess.run(start, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return run, writing


def test_a_run_killed_twice_ends_with_the_same_bytes(
    tmp_path: Path, images: Path, trained: Path
) -> None:
    settings = ("optim.name=sgd", "run.checkpoint_steps=2", "run.keep_last=2")
    run, _ = kill_and_resume(tmp_path, images, 2, *settings)
    assert weights(run) == weights(trained)
    assert not list(run.rglob("*.tmp-*"))


@pytest.mark.slow
def test_twenty_kills_and_one_bad_image_in_a_hundred_change_nothing(tmp_path: Path) -> None:
    images = tmp_path / "images"
    paths = draw_images(images, 100)  # 12 steps an epoch
    spoil(paths[31])
    (images / "junk.jpg").write_bytes(b"\xff\xd8 and nothing more")
    settings = (
        "optim.epochs=10",
        "data.max_bad=0.01",
        "data.image_size=16",
        "run.checkpoint_steps=2",
        "run.keep_last=2",
    )
    whole = pretrain(tmp_path, images, *settings)
    run, writing = kill_and_resume(tmp_path, images, 20, *settings)
    assert writing, "no kill met a checkpoint that was being written"
    assert weights(run) == weights(whole)
    rejected = [sorted((r / "rejects.csv").read_text().splitlines()) for r in (run, whole)]
    assert rejected[0] == rejected[1]
    assert [line.split(",")[1] for line in rejected[0]] == ["decode", "index", "stage"]
