"""A small but real run and its bundle: a resnet18 at 32 pixels, on images that Pillow draws."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file, save

from btpipe import artifact, recipe
from btpipe.data.index import build, open_index
from btpipe.events import ignore
from btpipe.export import contract, golden
from btpipe.export.bundle import export_run
from btpipe.pretrain import checkpoint, step

SIZE = 32


def draw_images(folder: Path, count: int, labels: Sequence[str] = ("a", "b")) -> list[Path]:
    """JPEGs of several shapes with coarse random patterns, in a folder for each label."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        size = (40 + i % 17, 36 + i % 23)
        path = folder / labels[i % len(labels)] / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def make_run(
    run: Path, images: Path, *, stem: Literal["imagenet", "small"] = "small", seed: int = 3
) -> Path:
    """A run folder with one checkpoint: as initialised, but batch norm has seen pixels."""
    described = recipe.Recipe(
        seed=seed,
        data=recipe.Data(train=str(images), batch_size=8, image_size=SIZE),
        network=recipe.Network(backbone="resnet18", stem=stem, projector=(16, 16)),
    )
    run.mkdir(parents=True)
    index, _ = build(images)
    index.save(run / "index.parquet")
    (run / "recipe.toml").write_text(described.to_toml())
    core = step.build(described, torch.device("cpu"))
    model = core.network
    pixels = torch.randint(0, 256, (16, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        model(pixels[:8].to(torch.uint8), pixels[8:].to(torch.uint8))
    state = checkpoint.State(step=3, recipe=described.digest, data=index.fingerprint)
    checkpoint.save(run, state, core, described.run)
    return run


def add_checkpoint(run: Path, at: int, noise: float, *, keep_every: int = 0) -> None:
    """One more checkpoint: the newest one's weights, each moved by `noise` of its deviation."""
    described, index = recipe.load(run / "recipe.toml"), open_index(run / "index.parquet")
    core = step.build(described, torch.device("cpu"))
    newest = checkpoint.newest(run)
    assert newest is not None
    checkpoint.load(newest, core)
    random = torch.Generator().manual_seed(at)
    with torch.no_grad():
        for weight in core.network.parameters():
            if weight.ndim > 1:
                weight.add_(noise * weight.std() * torch.randn(weight.shape, generator=random))
    state = checkpoint.State(step=at, recipe=described.digest, data=index.fingerprint)
    settings = described.run.model_copy(update={"keep_every": keep_every})
    checkpoint.save(run, state, core, settings)


def other_bundle(bundle: Path, out: Path, factor: float = 0.0) -> Path:
    """The bundle of another encoder, without an export: half of its first filters multiplied."""
    opened = contract.open_bundle(bundle)
    origin = opened.manifest.origin
    with artifact.publish(out, contract.KIND, {**origin, "encoder": "another"}) as folder:
        left_out = shutil.ignore_patterns(artifact.MANIFEST, golden.FOLDER)
        shutil.copytree(bundle, folder, ignore=left_out, dirs_exist_ok=True)
        model = onnx.load(folder / contract.MODEL)
        weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        values = np.array(numpy_helper.to_array(weight))
        values[::2] *= factor
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, folder / contract.MODEL)
        golden.write(folder, opened.preprocessing, opened.precisions)
    return out


def drifted_bundle(bundle: Path, out: Path) -> Path:
    """The bundle with golden vectors of other images: as if decoded or resized otherwise here."""
    with artifact.publish(
        out, contract.KIND, artifact.read(bundle, contract.KIND).origin
    ) as folder:
        left_out = shutil.ignore_patterns(artifact.MANIFEST)
        shutil.copytree(bundle, folder, ignore=left_out, dirs_exist_ok=True)
        path = folder / golden.FOLDER / golden.VECTORS
        vectors = {name: rows[::-1].copy() for name, rows in load_file(path).items()}
        path.write_bytes(save(vectors))
    return out


def shared_home(factory: pytest.TempPathFactory) -> Path:
    """`images/` (24), `runs/tiny/` and `exports/tiny/`, made once for the whole session."""
    home = factory.getbasetemp() / "tiny-home"
    if not home.exists():
        draw_images(home / "images", 24)
        run = make_run(home / "runs" / "tiny", home / "images")
        export_run(run, home / "exports" / "tiny", ignore)
    return home
