"""Weights and models of others: adopted with where they are from, or refused unread."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file
from tiny_run import draw_images, shared_home
from torchvision.models import resnet
from typer.testing import CliRunner

from btpipe import artifact
from btpipe.cli import app
from btpipe.embed.encoder import load
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import Event, Note, ignore
from btpipe.export import bundle, contract, golden
from btpipe.export.session import Session

SIZE = 48


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's resnet18 with weights of its own, as its authors publish them."""
    file = tmp_path_factory.mktemp("others") / "resnet18-others.pth"
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = resnet.resnet18()
        network(torch.randn(8, 3, SIZE, SIZE))  # batch norm has seen something
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def adopted(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """A bundle from them, with what was told meanwhile."""
    folder = tmp_path_factory.mktemp("adopted")
    draw_images(folder / "images", 16)
    events: list[Event] = []
    path = bundle.export_file(
        weights, folder / "bundle", events.append, images=folder / "images", size=SIZE
    )
    return path, events


def test_the_bundle_holds_their_tensors_and_says_where_they_are_from(
    weights: Path, adopted: tuple[Path, list[Event]]
) -> None:
    path, events = adopted
    state, original = load_file(path / "model.safetensors"), torch.load(weights)
    assert len(state) == 120
    assert all(torch.equal(tensor, original[name]) for name, tensor in state.items())
    note = (
        f"{weights.name} is a resnet18 with the imagenet stem: 120 of 120 tensors; left out: fc (2)"
    )
    assert note in [event.text for event in events if isinstance(event, Note)]
    opened = contract.open_bundle(path)
    origin, digest = opened.manifest.origin, artifact.file_digest(weights)
    assert (origin["source"], origin["sha256"]) == (weights.name, digest)
    assert (origin["matched"], origin["left_out"]) == (120, {"fc": 2})
    assert (opened.architecture, opened.preprocessing.size) == ("resnet18", SIZE)
    assert opened.preprocessing.resize == round(SIZE / 0.875)
    card = (path / "README.md").read_text()
    assert f"adopted from {weights.name} (sha256 {digest})" in card
    assert "| file | resnet18-others.pth |" in card
    assert "## Recipe" not in card
    assert "barlow-twins" not in card
    assert "pixels / 255 minus [0.485, 0.456, 0.406], over [0.229, 0.224, 0.225]" in card


def test_it_embeds_images_and_fits_its_golden_ones(adopted: tuple[Path, list[Event]]) -> None:
    path, _ = adopted
    images = sorted((path.parent / "images").rglob("*.jpg"))[:3]
    vectors = load(path).embed(images)
    assert vectors.shape == (3, 512)
    assert np.isfinite(vectors).all()
    golden.require(golden.compare(opened := contract.open_bundle(path)), opened)


def test_the_command_wants_images_and_one_source(weights: Path, tmp_path: Path) -> None:
    command = ["export", "--from", str(weights), "--out", str(tmp_path / "out")]
    for more, message in (([], "--images FOLDER"), (["run", "--images", "x"], "one of the two")):
        result = CliRunner().invoke(app, [command[0], *more, *command[1:]])
        assert isinstance(result.exception, UsageError)
        assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


class Bomb:
    """Leaves a mark where it is unpickled by whoever runs what a pickle says."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (os.fspath(self.mark),)


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "weights.pth"
    torch.save({"state_dict": resnet.resnet18().state_dict(), "hyper": Bomb(mark)}, file)
    draw_images(tmp_path / "images", 4)
    with pytest.raises(RefusedError, match="more in it than tensors") as refusal:
        bundle.export_file(file, tmp_path / "out", ignore, images=tmp_path / "images")
    assert refusal.value.exit_code == 4
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    file.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(RefusedError):
        bundle.export_file(file, tmp_path / "out", ignore, images=tmp_path / "images")
    assert not mark.exists()


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """A file that lets nobody go who opens it to read."""
    path = tmp_path / "secret"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("way", ["above", "absolute", "link", "hardlink"])
def test_a_model_with_data_outside_its_file_is_refused_and_nothing_is_read(
    tmp_path: Path, pipe: Path, tmp_path_factory: pytest.TempPathFactory, way: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(shared_home(tmp_path_factory) / "exports" / "tiny", folder)
    location = {"above": "../secret", "absolute": str(pipe)}.get(way, "data.bin")
    if way == "link":
        (folder / location).symlink_to(pipe)
    if way == "hardlink":
        os.link(pipe, folder / location)
    point_outside(folder / "encoder.onnx", location)
    with pytest.raises(IntegrityError, match="outside the file"):
        Session(folder / "encoder.onnx", device="cpu")


def test_a_whole_bundle_with_such_a_model_embeds_nothing(
    tmp_path: Path, pipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with artifact.publish(tmp_path / "bundle", contract.KIND, {}) as folder:
        shutil.copytree(
            shared_home(tmp_path_factory) / "exports" / "tiny", folder, dirs_exist_ok=True
        )
        (folder / artifact.MANIFEST).unlink()
        point_outside(folder / "encoder.onnx", str(pipe))
    images, out = tmp_path / "images", tmp_path / "v.parquet"
    draw_images(images, 2)
    command = ["embed", str(images), "--out", str(out), "--model", str(tmp_path / "bundle")]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, IntegrityError)
    assert result.exception.exit_code == 4
    assert not out.exists()


def point_outside(path: Path, location: str) -> None:
    """The model, with its first tensor in another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.append(onnx.StringStringEntryProto(key="location", value=location))
    path.write_bytes(model.SerializeToString())


def test_a_model_that_hides_its_data_in_a_branch_is_refused(tmp_path: Path) -> None:
    hidden = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1])
    hidden.data_location = onnx.TensorProto.EXTERNAL
    hidden.external_data.append(onnx.StringStringEntryProto(key="location", value="../x"))
    value = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [1])
    branch = helper.make_graph([], "branch", [], [value], [hidden])
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [1])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([choice], "whole", [condition], [output]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="outside the file"):
        Session(tmp_path / "m.onnx", device="cpu")
