"""A classifier on an encoder: what it learns, on any number of ranks, stopped and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import event_schema
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from btpipe import artifact, runtime
from btpipe.data.index import open_index
from btpipe.errors import RefusedError, UsageError
from btpipe.evaluate import finetune, finetune_job
from btpipe.events import ignore
from btpipe.export import contract
from btpipe.recipe.protocols import LINEAR, SEMISUP, Protocol

COLORS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
CLOSE = 1e-3  # float32 over three steps, relative to a tensor's largest: sums in another order
NOTHING = 1e-4  # momenta below it are noise: the encoder's first gradients are 1e-7


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ (36) and test/ (18): a class for each colour, which any encoder can tell."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, color in COLORS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = random.normal(0, 12, (40, 48, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def request(
    kind: finetune_job.Kind,
    bundle: Path,
    images: Path,
    out: Path,
    protocol: Protocol,
    **more: object,
) -> finetune_job.FinetuneRequest:
    train, test = (str(images / "train"),), (str(images / "test"),)
    return finetune_job.FinetuneRequest(kind, bundle, train, test, out, protocol, **more)  # type: ignore[arg-type]


def short(protocol: Protocol, **values: object) -> Protocol:
    return protocol.model_copy(update={"batch_size": 12, "epochs": 6, **values})


def test_a_linear_classifier_learns_and_leaves_the_bundle_alone(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    before = artifact.verify(bundle, contract.KIND).digest
    out = tmp_path / "score.json"
    job = request("linear", bundle, images, out, short(LINEAR, lr=5.0))
    finetune_job.judge(job, devices="1", mode="json")
    score = json.loads(out.read_text())
    assert score["top1"] > 0.9
    assert score["top5"] == 1.0
    assert (score["train images"], score["test images"], score["bundle"]) == (36, 18, before)
    assert artifact.verify(bundle, contract.KIND).digest == before
    assert not out.with_name("score.json.work").exists()
    written = out.stat().st_mtime_ns
    finetune_job.judge(job, devices="1", mode="json")
    assert out.stat().st_mtime_ns == written
    other = request("linear", bundle, images, out, short(LINEAR, lr=1.0))
    with pytest.raises(RefusedError, match="something else"):
        finetune_job.judge(other, devices="1", mode="json")


def train_on_rank(job: finetune.FinetuneJob) -> None:
    with runtime.start() as process:
        finetune.fit(job, process, ignore)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [LINEAR, SEMISUP])
def test_the_number_of_ranks_does_not_change_what_is_learnt(
    tmp_path: Path, bundle: Path, images: Path, protocol: Protocol
) -> None:
    """Each stopped after one epoch, so that the state is there to be compared."""
    states = []
    for ranks in (1, 2):
        work = tmp_path / str(ranks)
        work.mkdir()
        job = request("linear", bundle, images, work / "s.json", short(protocol, epochs=1))
        runtime.launch(ranks, train_on_rank, (finetune_job.prepare(job, ignore),))
        states.append(load_file(work / "s.json.work" / finetune.STATE / finetune.TENSORS))
    one, two = states
    assert one.keys() == two.keys()
    assert ("model.encoder.conv1.weight" in one) == (protocol is SEMISUP)
    for name, tensor in one.items():
        largest = max(float(tensor.abs().max()), NOTHING)
        assert float((two[name] - tensor).abs().max()) < CLOSE * largest, name


def test_a_batch_that_ranks_cannot_share_is_made_smaller(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    out = tmp_path / "score.json"
    odd = short(LINEAR, epochs=1, batch_size=13)
    finetune_job.judge(request("linear", bundle, images, out, odd), devices="2", mode="json")
    assert json.loads(out.read_text())["train images"] == 36


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_weights(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    command = [sys.executable, "-m", "btpipe", "eval", "linear", str(bundle), "--json"]
    command += [str(images / "train"), "--test", str(images / "test"), "--epochs", "40"]
    out, whole = tmp_path / "stopped.json", tmp_path / "whole.json"
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if b"Progressed" in line)
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
    assert process.returncode == os.EX_TEMPFAIL
    work = out.with_name("stopped.json.work")
    assert (work / finetune.STATE / artifact.MANIFEST).is_file()
    for path in (out, whole):
        words = [*command, "--out", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert event_schema.read(done.stdout)[-1]["event"] == "ClassifierJudged"
    assert json.loads(out.read_text()) == json.loads(whole.read_text())


def test_two_ranks_of_torchrun_are_one_evaluation(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "-m", "btpipe", "eval", "linear"]
    command += [str(bundle), str(images / "train"), "--test", str(images / "test")]
    command += ["--epochs", "2", "--out", "score.json", "--json"]
    results = []
    for _ in range(2):  # the second start finds the score
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        events = event_schema.read(done.stdout)
        results += [event for event in events if event["event"] == "ClassifierJudged"]
    first, second = results
    unlike = {name: second[name] for name in ("seconds", "time")}
    assert second == {**first, **unlike, "nothing_to_do": True}
    assert json.loads((tmp_path / "score.json").read_text())["test images"] == 18
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def test_a_second_evaluation_into_the_same_file_is_refused(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    out = tmp_path / "score.json"
    command = [sys.executable, "-m", "btpipe", "eval", "semisup", str(bundle), "--json"]
    command += [str(images / "train"), "--test", str(images / "test"), "--epochs", "500"]
    command += ["--percent", "100", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        next(line for line in first.stdout if "Progressed" in line)
        second = subprocess.run(command, check=False, capture_output=True, text=True)
        first.send_signal(signal.SIGTERM)
        first.stdout.read()
    assert second.returncode == 4
    assert "another process judges here" in second.stdout + second.stderr
    assert first.returncode == os.EX_TEMPFAIL
    assert (tmp_path / "score.json.work" / finetune.STATE).is_dir()


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, bundle: Path, images: Path) -> None:
    job = request("linear", bundle, images, tmp_path / "s.json", LINEAR)
    with pytest.raises(UsageError, match="no image in 0 files"):
        finetune_job.judge(
            dataclasses.replace(job, train=(str(tmp_path),)), devices="1", mode="json"
        )
    assert not list(tmp_path.iterdir())


def test_a_share_of_the_labels_is_of_each_class_and_by_the_seed(
    tmp_path: Path, bundle: Path, images: Path
) -> None:
    chosen = []
    for seed in (0, 0, 1):
        job = request("semisup", bundle, images, tmp_path / "s.json", short(SEMISUP, seed=seed))
        job = dataclasses.replace(job, percent=25.0)
        index = open_index(finetune_job.prepare(job, ignore).train)
        chosen.append(index.table["path"].to_pylist())
        assert sorted(map(str, index.labels)) == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3
    assert chosen[0] == chosen[1] != chosen[2]
    named = tmp_path / "split.txt"
    named.write_text("\n".join(chosen[2]))
    job = dataclasses.replace(job, split=named, percent=100.0)
    index = open_index(finetune_job.prepare(job, ignore).train)
    assert index.table["path"].to_pylist() == chosen[2]
    named.write_text("nobody.png\n")
    with pytest.raises(UsageError, match="not among the images"):
        finetune_job.prepare(job, ignore)


def test_images_without_labels_are_refused(tmp_path: Path, bundle: Path, images: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (40, 40)).save(flat / "a.png")
    job = request("linear", bundle, images, tmp_path / "s.json", LINEAR)
    job = dataclasses.replace(job, train=(str(flat),))
    with pytest.raises(UsageError, match="have no label"):
        finetune_job.judge(job, devices="1", mode="json")
