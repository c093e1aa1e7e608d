"""Weights from outside: read by their names and shapes, refused with a reason, never executed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import draw_images, shared_home
from torch import Tensor
from torchvision.models import resnet

from btpipe import recipe
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import ignore
from btpipe.export import encoder_source
from btpipe.pretrain import foreign_weights, launch, network

RESNET18 = recipe.Network(backbone="resnet18", projector=(16, 16))
SMALL = recipe.Network(backbone="resnet18", stem="small", projector=(16, 16))
TENSORS = 120  # of a torchvision resnet18 without its classifier, batch norm's counters included


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """torchvision's resnet18, its classifier included, with weights of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(77)
        state: dict[str, Tensor] = resnet.resnet18().state_dict()
    return state


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def published(state: Mapping[str, Tensor]) -> dict[str, object]:
    """checkpoint.pth as the published main.py writes it, from DistributedDataParallel."""
    model = with_prefix(without_classifier(state), "module.backbone.")
    model |= {f"module.projector.{i}.weight": torch.zeros(4, 4) for i in (0, 1, 3, 4, 6)}
    model |= {"module.bn.running_mean": torch.zeros(4), "module.bn.running_var": torch.ones(4)}
    optimizer = {"state": {0: {"mu": torch.zeros(4)}}, "param_groups": [{"lr": 0, "params": [0]}]}
    return {"epoch": 1000, "model": model, "optimizer": optimizer}


def numbered(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that a body has as nn.Sequential(*list(resnet.children())[:-1])."""
    parts = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    named = {
        f"backbone.{parts.index(part)}.{rest}": tensor
        for name, tensor in without_classifier(state).items()
        for part, _, rest in [name.partition(".")]
    }
    return named | {"projection_head.layers.0.weight": torch.zeros(4, 4)}


Pack = Callable[[dict[str, Tensor]], object]
PACKED: dict[str, tuple[Pack, dict[str, int]]] = {
    "torchvision": (dict, {"fc": 2}),
    "timm": (lambda s: {"state_dict": s, "arch": "resnet18", "epoch": 3}, {"fc": 2}),
    "published": (published, {"projector": 5, "bn": 2}),
    "compiled": (lambda s: with_prefix(s, "_orig_mod."), {"fc": 2}),
    "lightning": (
        lambda s: {"state_dict": with_prefix(s, "model.encoder."), "epoch": 3},
        {"fc": 2},
    ),
    "before counters": (
        lambda s: {k: t for k, t in s.items() if not k.endswith("num_batches_tracked")},
        {"fc": 2},
    ),
    "lightly's examples": (
        lambda s: {"state_dict": numbered(s), "epoch": 3},
        {"projection_head": 1},
    ),
    "solo-learn": (
        lambda s: {
            "state_dict": with_prefix(s, "backbone.")
            | with_prefix(s, "momentum_backbone.")
            | {"projector.0.weight": torch.zeros(4, 4)}
        },
        {"fc": 2, "momentum_backbone": 122, "projector": 1},
    ),
    "half": (
        lambda s: {k: t.half() if t.is_floating_point() else t for k, t in s.items()},
        {"fc": 2},
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_every_usual_container_gives_the_encoder_under_torchvision_s_names(
    tmp_path: Path, weights: dict[str, Tensor], kind: str
) -> None:
    pack, left_out = PACKED[kind]
    file = tmp_path / "weights.pth"
    torch.save(pack(weights), file)
    adopted = foreign_weights.read_encoder(file, RESNET18)
    assert adopted.left_out == left_out
    assert adopted.state.keys() == without_classifier(weights).keys()
    for name, tensor in adopted.state.items():
        expected = weights[name].half().float() if kind == "half" else weights[name]
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    network.encoder(RESNET18).load_state_dict(adopted.state)
    assert f"{TENSORS} of {TENSORS} tensors" in adopted.text()


def test_the_network_that_weights_belong_to_is_recognised(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    torch.save(published(weights), tmp_path / "checkpoint.pth")
    settings = foreign_weights.recognise(tmp_path / "checkpoint.pth")
    assert (settings.backbone, settings.stem) == ("resnet18", "imagenet")
    small = network.encoder(SMALL).state_dict()
    save_file(small, tmp_path / "small.safetensors")
    settings = foreign_weights.recognise(tmp_path / "small.safetensors")
    assert (settings.backbone, settings.stem) == ("resnet18", "small")
    torch.save(weights | {"conv1.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "odd.pth")
    with pytest.raises(RefusedError, match="99% the same, is resnet18, imagenet stem"):
        foreign_weights.recognise(tmp_path / "odd.pth")


def test_safetensors_and_an_old_pickle_are_known_by_content(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    save_file(weights, tmp_path / "a.bin")
    torch.save(weights, tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a.bin", "b.safetensors"):
        state = foreign_weights.read_encoder(tmp_path / name, RESNET18).state
        assert torch.equal(state["layer4.1.conv2.weight"], weights["layer4.1.conv2.weight"])


def test_a_bundle_a_run_and_a_checkpoint_give_one_encoder(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = shared_home(tmp_path_factory)
    (checkpoint,) = (home / "runs" / "tiny" / "checkpoints").iterdir()
    folders = (home / "exports" / "tiny", home / "runs" / "tiny", checkpoint)
    bundle, *others = [foreign_weights.read_encoder(folder, SMALL) for folder in folders]
    assert bundle.left_out == {}
    for other in others:
        assert set(other.left_out) == {"projector"}
        assert all(torch.equal(other.state[name], t) for name, t in bundle.state.items())


def test_a_damaged_bundle_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(shared_home(tmp_path_factory) / "exports" / "tiny", bundle)
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (bundle / "model.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="bytes changed"):
        foreign_weights.read_encoder(bundle, SMALL)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (resnet.resnet34, RESNET18, r"layer1\.2\.conv1\.weight is left over.*resnet34 --set netw"),
        (
            resnet.resnet18,
            SMALL,
            r"conv1\.weight is \(64, 3, 7, 7\), not .*imagenet",
        ),
        (
            resnet.resnet18,
            recipe.Network(backbone="resnet50"),
            r"missing.*weights of --set network\.backbone=resnet18 --set network\.stem=imagenet",
        ),
    ],
)
def test_another_backbone_or_stem_is_refused_and_the_right_one_named(
    tmp_path: Path, build: Callable[[], torch.nn.Module], settings: recipe.Network, message: str
) -> None:
    torch.save(build().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(RefusedError, match=f"(?s){message}") as refused:
        foreign_weights.read_encoder(tmp_path / "weights.pth", settings)
    assert refused.value.exit_code == 4


def test_what_is_no_encoder_is_refused_with_what_it_is(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    file = tmp_path / "weights.pth"

    def refuse(content: object, match: str) -> None:
        torch.save(content, file)
        with pytest.raises(RefusedError, match=match):
            foreign_weights.read_encoder(file, RESNET18)

    refuse({"epoch": 3, "weights": weights}, "no state dict in it: epoch, weights")
    refuse(torch.zeros(3), "no state dict in it: Tensor")
    refuse(with_prefix(weights, "teacher."), "(?s)missing.*it begins with teacher.conv1.weight")
    refuse({**weights, **with_prefix(weights, "model.")}, "holds 2 encoders: under '', 'model.'")
    refuse({**weights, "bn1.weight": torch.full((64,), torch.nan)}, "bn1.weight.*not finite")
    refuse({**weights, "bn1.weight": torch.ones(64, dtype=torch.int32)}, "of type torch.int32")
    with pytest.raises(UsageError, match="no such file"):
        foreign_weights.read_encoder(tmp_path / "absent.pth", RESNET18)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="holds no weights"):
        foreign_weights.read_encoder(tmp_path / "folder", RESNET18)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_cut_file_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], kind: str, share: float
) -> None:
    file = tmp_path / f"weights.{kind}"
    torch.save(weights, file) if kind == "pth" else save_file(weights, file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(RefusedError):
        foreign_weights.read_encoder(file, RESNET18)


class Malicious:
    """A pickle that runs a command when it is loaded by plain pickle."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    marker, file = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"state_dict": weights, "more": Malicious(f"touch {marker}")}
    for zipped in (False, True):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(RefusedError, match=r"nothing of it ran \(posix.system\)"):
            foreign_weights.read_encoder(file, RESNET18)
    start = [sys.executable, "-m", "btpipe", "pretrain", "cifar10.toml", "--init-from", str(file)]
    ended = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 4, ended.stderr
    assert "nothing of it ran (posix.system)" in ended.stderr
    assert not marker.exists()
    assert not (tmp_path / "runs").exists()
    torch.load(file, weights_only=False)  # the trap is real
    assert marker.exists()


def start_run(run: Path, images: Path, init_from: str, settings: recipe.Network = RESNET18) -> None:
    described = recipe.Recipe(
        seed=3,
        data=recipe.Data(train=str(images), batch_size=8, image_size=32),
        network=settings.model_copy(update={"init_from": init_from}),
        optim=recipe.Optim(epochs=0, warmup_epochs=0),
        run=recipe.Run(precision="fp32"),
    )
    launch.pretrain(run, described, devices="1", mode="auto")


def test_a_run_starts_from_the_weights_and_needs_the_file_no_longer(
    tmp_path: Path, weights: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    images, file, run = tmp_path / "images", tmp_path / "weights.pth", tmp_path / "runs" / "warm"
    draw_images(images, 16)
    torch.save(weights, file)
    start_run(run, images, str(file))
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = load_file(checkpoint / "model.safetensors")
    for name, tensor in without_classifier(weights).items():
        assert torch.equal(state[f"encoder.{name}"], tensor), name
    line = f"starts from {file}: {TENSORS} of {TENSORS} tensors; left out: fc (2)"
    assert line in capsys.readouterr().out
    assert line in (run / "events.jsonl").read_text()
    origin = json.loads((run / "initial" / "manifest.json").read_text())["origin"]
    assert origin["source"] == str(file)
    before = encoder_source.of_run(run, ignore, untrained=True).encoder.state_dict()
    for name, tensor in without_classifier(weights).items():
        assert torch.equal(before[name], tensor), name

    # Killed before its first checkpoint, the file gone or another: the run's own copy counts.
    shutil.rmtree(checkpoint)
    file.unlink()
    start_run(run, images, str(file))
    again = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    torch.save({**weights, "bn1.weight": torch.zeros(64)}, file)
    with pytest.raises(RefusedError, match="other content than this run started"):
        start_run(run, images, str(file))
    with pytest.raises(RefusedError, match=r"network\.init_from is '.*' there"):
        start_run(run, images, "")


def test_a_run_that_trained_on_is_still_what_another_one_started_from(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home, first, second = shared_home(tmp_path_factory), tmp_path / "first", tmp_path / "second"
    shutil.copytree(home / "runs" / "tiny", first)
    start_run(second, home / "images", str(first), SMALL)
    (first / "checkpoints" / "step-00000003").rename(first / "checkpoints" / "step-00000009")
    start_run(second, home / "images", str(first), SMALL)


def test_a_damaged_copy_in_the_run_folder_is_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    images, file, run = tmp_path / "images", tmp_path / "weights.pth", tmp_path / "runs" / "warm"
    draw_images(images, 16)
    torch.save(weights, file)
    start_run(run, images, str(file))
    shutil.rmtree(run / "checkpoints")
    kept = run / "initial" / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"\x00")
    with pytest.raises(IntegrityError):
        start_run(run, images, str(file))
