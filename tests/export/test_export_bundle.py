"""A bundle is what its run learnt, opens in other readers, and is only published if it agrees."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from tiny_run import SIZE, add_checkpoint, draw_images, make_run, other_bundle
from torch import Tensor, nn
from typer.testing import CliRunner

from btpipe import artifact, recipe, runtime
from btpipe.cli import app
from btpipe.errors import (
    IntegrityError,
    MachineError,
    NumericsError,
    RefusedError,
    UsageError,
)
from btpipe.events import Event, ignore
from btpipe.export import bundle, contract, encoder_source, onnx_model, verify
from btpipe.export.samples import Samples
from btpipe.export.session import Session, refuse_external_data
from btpipe.pretrain import network
from btpipe.results import Exported

RUNTIME_TOLERANCE = 1e-4
"""torch and onnxruntime sum in another order, and batch norm is folded: float32 rounding."""


@pytest.fixture(scope="session")
def exported(home: Path) -> Path:
    return home / "exports" / "tiny"


def pixels(count: int, seed: int = 0) -> np.ndarray:
    """Blurred noise, (count, S, S, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.repeat(np.repeat(coarse, SIZE // 8, axis=1), SIZE // 8, axis=2)


def torchvision_vectors(exported: Path, images: np.ndarray) -> np.ndarray:
    """What plain torchvision computes with the bundle's weights, as its card says."""
    plain = torchvision.models.resnet18()
    plain.fc = nn.Identity()
    plain.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.maxpool = nn.Identity()
    plain.load_state_dict(safetensors.torch.load_file(exported / "model.safetensors"), strict=True)
    config = json.loads((exported / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        vectors: np.ndarray = plain.eval()((scaled - mean) / std).numpy()
    return vectors


def test_the_weights_load_in_plain_torchvision_and_give_the_vectors_of_the_onnx_model(
    exported: Path,
) -> None:
    images = pixels(5)
    vectors = Session(exported / "encoder.onnx", device="cpu").run(images)
    assert np.abs(vectors - torchvision_vectors(exported, images)).max() < RUNTIME_TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size_gives_the_same_vectors_in_plain_onnxruntime(
    exported: Path, count: int
) -> None:
    plain = onnxruntime.InferenceSession(
        exported / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    images = pixels(7)
    (whole,) = plain.run(["embedding"], {"images": images})
    (some,) = plain.run(["embedding"], {"images": images[:count]})
    assert some.shape == (count, 512)
    assert some.dtype == np.float32
    assert np.array_equal(some, whole[:count])


def test_the_model_is_one_file_with_pinned_versions_and_no_path_of_the_machine(
    exported: Path,
) -> None:
    model = onnx.load(exported / "encoder.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert model.ir_version == 10
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["preprocessing"])["size"] == SIZE
    content = (exported / "encoder.onnx").read_bytes()
    for trace in (b"site-packages", b"stack_trace", b"forward", str(Path.cwd()).encode()):
        assert trace not in content


def test_the_projector_stays_behind(exported: Path) -> None:
    with safetensors.safe_open(exported / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert json.loads(file.metadata()["preprocessing"])["resize"] == 37
    assert "conv1.weight" in names
    assert not {name for name in names if "projector" in name or name.startswith("fc")}


def test_config_and_card_say_what_the_encoder_is_and_where_it_is_from(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert (config["num_classes"], config["num_features"], config["stem"]) == (0, 512, "small")
    assert config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]
    processor = json.loads((exported / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 37}
    assert processor["crop_size"] == {"height": SIZE, "width": SIZE}
    card = (exported / "README.md").read_text()
    origin = contract.open_bundle(exported).manifest.origin
    for fact in (
        "license: other",
        "mean cosine",
        "Intended use",
        "| run | tiny |",
        "| step | 3 |",
        str(origin["encoder"]),
    ):
        assert fact in card
    gates = origin["gates"]
    assert isinstance(gates, dict)
    gate = gates["fp32"]
    assert gate["images"] == 24
    assert gate["mean_cosine"] > 0.9999
    assert gate["agreement"] == 1.0


def test_the_same_export_again_touches_nothing(home: Path, exported: Path) -> None:
    before = {path: path.stat() for path in (exported, *exported.iterdir())}
    events: list[Event] = []
    bundle.export_run(home / "runs" / "tiny", exported, events.append)
    assert {path: path.stat().st_mtime_ns for path in (exported, *exported.iterdir())} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }
    (result,) = [event for event in events if isinstance(event, Exported)]
    assert result.nothing_to_do
    assert (result.out, result.size, result.models) == (exported, 32, ("encoder.onnx",))
    assert "nothing to do" in result.text


def test_another_encoder_is_replaced_when_asked_and_by_the_same_bytes_each_time(
    home: Path, exported: Path, tmp_path: Path
) -> None:
    run, out = home / "runs" / "tiny", other_bundle(exported, tmp_path / "tiny")
    before = contract.open_bundle(out).digest
    with pytest.raises(RefusedError, match="--overwrite"):
        bundle.export_run(run, out, ignore)
    assert contract.open_bundle(out).digest == before
    bundle.export_run(run, out, ignore, overwrite=True)
    first, second = (artifact.read(folder, contract.KIND).files for folder in (exported, out))
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_of_something_else_is_never_replaced(home: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(RefusedError, match="is no bundle"):
        bundle.export_run(home / "runs" / "tiny", tmp_path / "letters", ignore, overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "x"


def test_the_untrained_encoder_has_the_seeds_weights_and_calibrated_statistics(
    home: Path, exported: Path, tmp_path: Path
) -> None:
    run = home / "runs" / "tiny"
    out = bundle.export_run(run, tmp_path / "untrained", ignore, untrained=True)
    state = safetensors.torch.load_file(out / "model.safetensors")
    initial = network.initialise(recipe.load(run / "recipe.toml")).encoder.state_dict()
    assert torch.equal(state["layer1.0.conv1.weight"], initial["layer1.0.conv1.weight"])
    assert not torch.equal(state["bn1.running_mean"], initial["bn1.running_mean"])
    assert state["bn1.running_var"].min() > 0
    vectors = Session(out / "encoder.onnx", device="cpu").run(pixels(8))
    assert np.std(vectors, axis=0).max() > 0.01
    assert contract.open_bundle(out).manifest.origin["trained"] is False


class Liar(nn.Module):
    """No weights, so that no state tells; moves the vectors on their way out of the encoder."""

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding + torch.linspace(-1, 1, embedding.shape[1])


def samples_of(images: np.ndarray) -> Samples:
    """Images to judge with, of which no label is known."""
    return Samples(images, np.full(len(images), -1), images[:0])


def test_a_model_that_disagrees_with_its_weights_is_not_published(
    home: Path, tmp_path: Path
) -> None:
    source = encoder_source.of_run(home / "runs" / "tiny", ignore)
    source.encoder.fc = Liar()
    out = tmp_path / "exports" / "liar"
    events: list[Event] = []
    origin: dict[str, object] = {"encoder": "a liar", "license": "", "models": []}
    with pytest.raises(NumericsError, match="mean cosine") as refusal:
        bundle.publish(source, samples_of(pixels(24)), out, origin, events.append)
    assert refusal.value.exit_code == 6
    assert list(out.parent.iterdir()) == []
    (table,) = [table for event in events for table in event.tables()]
    assert table.rows[0][-1] == "NO"


def test_one_changed_weight_between_model_and_network_does_not_pass_the_gate(
    home: Path, tmp_path: Path
) -> None:
    source = encoder_source.of_run(home / "runs" / "tiny", ignore)
    encoder, prepared = source.encoder, source.preprocessing
    onnx_model.write(encoder, prepared, tmp_path / "encoder.onnx")
    session = Session(tmp_path / "encoder.onnx", device="cpu")

    def gates() -> verify.Gates:
        vectors = verify.reference(encoder, prepared, pixels(24))
        limits = verify.THRESHOLDS["fp32"]
        chosen = samples_of(pixels(24))
        gate = verify.compare(vectors, session.run, chosen, limits, model="x", provider="cpu")
        return verify.Gates((gate,), runtime.cpu())

    verify.require(gates(), tmp_path)
    with torch.no_grad():
        encoder.get_parameter("bn1.weight")[0] += 30
    with pytest.raises(NumericsError, match="network's vectors"):
        verify.require(gates(), tmp_path)


def test_images_that_are_gone_are_named_and_others_can_be_given(tmp_path: Path) -> None:
    draw_images(tmp_path / "images", 8)
    run = make_run(tmp_path / "runs" / "tiny", tmp_path / "images")
    shutil.move(tmp_path / "images", tmp_path / "moved")
    with pytest.raises(UsageError, match="--images"):
        bundle.export_run(run, tmp_path / "out", ignore)
    assert not (tmp_path / "out").exists()
    bundle.export_run(run, tmp_path / "out", ignore, images=tmp_path / "moved")
    assert contract.open_bundle(tmp_path / "out").dimension == 512


def test_a_run_without_a_checkpoint_says_what_to_do(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(home / "runs" / "tiny", run, ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(UsageError, match="no checkpoint yet"):
        bundle.export_run(run, tmp_path / "out", ignore)
    with pytest.raises(UsageError, match="no run there"):
        bundle.export_run(tmp_path / "nowhere", tmp_path / "out", ignore)


def test_a_checkpoint_of_choice_is_exported_under_its_own_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "runs" / "tiny", tmp_path / "runs" / "tiny")
    add_checkpoint(tmp_path / "runs" / "tiny", 6, 0.5)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["export", "runs/tiny", "--step", "3"])
    assert result.exit_code == 0, result.output
    opened = contract.open_bundle(tmp_path / "exports" / "tiny-step-3")
    chosen = artifact.read(tmp_path / "runs/tiny/checkpoints/step-00000003", "checkpoint")
    assert opened.manifest.origin["step"] == 3
    assert opened.manifest.origin["checkpoint"] == chosen.digest
    state = safetensors.torch.load_file(opened.folder / "model.safetensors")
    kept = safetensors.torch.load_file(
        tmp_path / "runs/tiny/checkpoints/step-00000003/model.safetensors"
    )
    assert all(torch.equal(tensor, kept[f"encoder.{name}"]) for name, tensor in state.items())
    with pytest.raises(UsageError, match="of 3, 6"):
        encoder_source.of_run(tmp_path / "runs" / "tiny", ignore, step=4)
    with pytest.raises(UsageError, match="one of the two"):
        app(["export", "--step", "3", "--untrained"], standalone_mode=False)


def test_the_newest_run_and_bundle_are_found_or_the_first_command_is_named(
    home: Path, exported: Path, tmp_path: Path
) -> None:
    assert contract.newest_run(home / "runs") == home / "runs" / "tiny"
    assert contract.newest_bundle(home / "exports") == exported
    with pytest.raises(UsageError, match="btpipe pretrain"):
        contract.newest_run(tmp_path / "runs")
    with pytest.raises(UsageError, match="btpipe export"):
        contract.newest_bundle(tmp_path / "exports")


def test_a_flipped_byte_in_a_bundle_is_found_when_it_is_opened(
    exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "copy")
    content = bytearray((tmp_path / "copy" / "encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "copy" / "encoder.onnx").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"encoder\.onnx"):
        contract.open_bundle(tmp_path / "copy")


def test_a_bundle_of_one_precision_from_before_there_were_several_still_opens(
    exported: Path, tmp_path: Path
) -> None:
    config = json.loads((exported / "config.json").read_text())
    del config["precisions"]
    with artifact.publish(tmp_path / "older", "bundle", {}) as folder:
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        (folder / "config.json").write_text(json.dumps(config | {"precision": "fp32"}))
    opened = contract.open_bundle(tmp_path / "older")
    assert opened.precisions == ("fp32",)
    assert opened.model_of("fp32") == tmp_path / "older" / "encoder.onnx"
    with pytest.raises(UsageError, match="--precision int8"):
        opened.model_of("int8")


def test_a_model_that_reads_other_files_is_refused(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported / "encoder.onnx")
    onnx.save(model, tmp_path / "split.onnx", save_as_external_data=True, location="data.bin")
    with pytest.raises(IntegrityError, match="outside the file"):
        refuse_external_data(tmp_path / "split.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"not a model")
    with pytest.raises(IntegrityError, match="not an ONNX model"):
        refuse_external_data(tmp_path / "junk.onnx")


def test_pixels_of_another_shape_are_refused_with_the_one_expected(exported: Path) -> None:
    session = Session(exported / "encoder.onnx", device="cpu")
    with pytest.raises(UsageError, match=r"uint8 \(n, 32, 32, 3\)"):
        session.run(np.zeros((2, 33, 32, 3), np.uint8))
    assert session.run(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 512)


def test_an_error_of_onnxruntime_is_a_sentence_and_an_exit_code(tmp_path: Path) -> None:
    """A model that takes the input of ours and fails when it is run."""
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 4, 4, 3])
    embedding = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["n", 7])
    shape = onnx.helper.make_tensor("shape", onnx.TensorProto.INT64, [2], [-1, 7])
    nodes = [
        onnx.helper.make_node("Cast", ["images"], ["cast"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Reshape", ["cast", "shape"], ["embedding"]),  # 48 is not 7 times
    ]
    graph = onnx.helper.make_graph(nodes, "fails", [images], [embedding], [shape])
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, tmp_path / "encoder.onnx")
    session = Session(tmp_path / "encoder.onnx", device="cpu")
    with pytest.raises(MachineError, match="onnxruntime fails on the CPU") as failure:
        session.run(np.zeros((1, 4, 4, 3), np.uint8))
    assert failure.value.exit_code == 5
    assert failure.value.fix


def test_opening_a_bundle_and_running_it_loads_no_torch(exported: Path) -> None:
    code = (
        "import sys, numpy\n"
        "from pathlib import Path\n"
        "from btpipe.export import contract, session\n"
        f"bundle = contract.open_bundle(Path({str(exported)!r}))\n"
        "session.Session(bundle.model, device='cpu').run(numpy.zeros((1, 32, 32, 3), 'uint8'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
