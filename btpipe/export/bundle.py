"""Makes bundles from runs: weights and model written, compared on real images, published."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import artifact, runtime
from btpipe.data.index import Index, build, open_index
from btpipe.data.loader import evaluation_batches
from btpipe.data.views import Geometry
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import FileRejected, Finished, Note, Report
from btpipe.export import contract, onnx, verify, weights
from btpipe.export.card import Card
from btpipe.export.contract import Preprocessing, newest_bundle, newest_run
from btpipe.export.session import Session
from btpipe.pretrain import checkpoint, initial, network
from btpipe.recipe import Recipe, load

__all__ = ["export_run", "newest_bundle", "newest_run", "publish"]

GATE_IMAGES = 256
CALIBRATION_IMAGES = 1024
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """What a bundle is made from; `checkpoint` is None for the network before training.

    `adopted` is what that was, where the run started from the weights of others.
    """

    run: str
    recipe: Recipe
    index: Index
    checkpoint: Path | None
    step: int
    checkpoint_digest: str
    adopted: dict[str, torch.Tensor] | None = None


def export_run(
    run: Path,
    out: Path,
    report: Report,
    *,
    untrained: bool = False,
    images: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """The bundle `out` from the newest checkpoint of `run`, checked on real images; returns `out`.

    `untrained`: the network the run started from instead, with batch norm's statistics measured on
    its training images. `images`: a folder for the check, where the training images are gone.

    Raises:
        UsageError: no run there, no checkpoint yet, or no image to check with.
        RefusedError: `out` holds something else, and `overwrite` was not asked for.
        NumericsError: the exported model disagrees with the network; nothing is published.
    """
    started = time.monotonic()
    source = read_run(run, report, untrained=untrained)
    preprocessing = preprocessing_of(source.recipe)
    encoder = encoder_of(source, preprocessing, report)
    origin: dict[str, object] = {
        "run": source.run,
        "step": source.step,
        "trained": source.checkpoint is not None,
        "recipe": source.recipe.digest,
        "data": source.index.fingerprint,
        "checkpoint": source.checkpoint_digest,
        "encoder": weights.digest(encoder.state_dict()),
        "preprocessing": preprocessing.record(),
    }
    if _stands(out, origin, overwrite=overwrite):
        report(Note(f"{out} holds this encoder already: nothing to do"))
        return out
    pixels = _gate_pixels(source.index, images, preprocessing, report)
    gate = publish(encoder, source, preprocessing, pixels=pixels, out=out, origin=origin)
    seconds = time.monotonic() - started
    report(gate.tabled())
    report(Finished("export", f"{out}: {preprocessing.size} pixels in, published", seconds))
    return out


def publish(
    encoder: nn.Module,
    source: Source,
    preprocessing: Preprocessing,
    *,
    pixels: NDArray[np.uint8],
    out: Path,
    origin: dict[str, object],
) -> verify.Gate:
    """Writes the bundle, reads it back, and gives it its name if its two models agree on `pixels`.

    Raises:
        NumericsError: they do not; nothing is published.
        MachineError: no space, or no permission.
    """
    described = source.recipe.network
    complete = dict(origin)  # the gate joins it before the manifest is written
    with artifact.publish(out, contract.KIND, complete) as folder:
        weights.write(encoder.state_dict(), preprocessing, folder / contract.WEIGHTS)
        onnx.write(encoder, preprocessing, folder / contract.MODEL)
        session = Session(folder / contract.MODEL, device="cpu")
        # The reference is the network that the published weights make, not the one at hand.
        reference = weights.load(folder / contract.WEIGHTS, described)
        gate = verify.compare(reference, session, preprocessing, pixels)
        verify.require(gate, out)
        complete["gates"] = {"fp32": gate.record()}
        config = contract.config(
            described.backbone, described.stem, session.dimension, preprocessing, ["fp32"]
        )
        artifact.write_json(folder / contract.CONFIG, config)
        artifact.write_json(folder / contract.PREPROCESSOR, contract.preprocessor(preprocessing))
        card = _card(
            source, preprocessing, out.name, session.dimension, gate, str(origin["encoder"])
        )
        artifact.write_file(folder / contract.CARD, card.text().encode())
    return gate


def _card(
    source: Source,
    preprocessing: Preprocessing,
    name: str,
    dimension: int,
    gate: verify.Gate,
    encoder_digest: str,
) -> Card:
    return Card(
        name=name,
        architecture=source.recipe.network.backbone,
        stem=source.recipe.network.stem,
        dimension=dimension,
        preprocessing=preprocessing,
        run=source.run,
        step=source.step,
        trained=source.checkpoint is not None,
        recipe_digest=source.recipe.digest,
        recipe_toml=_without_folders(source.recipe).to_toml(),
        data_fingerprint=source.index.fingerprint,
        images=len(source.index),
        checkpoint=source.checkpoint_digest,
        encoder_digest=encoder_digest,
        gate_table=gate.table(),
    )


def _without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the last part of its inputs' names: a card is read on other machines."""
    names = [Path(place).name for place in recipe.data.inputs]
    train = names[0] if len(names) == 1 else tuple(names) or ""
    data = recipe.data.model_copy(update={"train": train})
    return recipe.model_copy(update={"data": data})


def read_run(run: Path, report: Report, *, untrained: bool) -> Source:
    """What is in a run's folder to make a bundle from.

    Raises:
        UsageError: no run there, or no checkpoint yet.
        IntegrityError: its index or all of its checkpoints are damaged.
    """
    if not (run / "recipe.toml").is_file():
        fix = "name a run folder, or train one: btpipe pretrain recipes/folder.toml"
        raise UsageError("no run there", where=run, expected="a folder with recipe.toml", fix=fix)
    recipe, index = load(run / "recipe.toml"), open_index(run / "index.parquet")
    if untrained:
        adopted = initial.encoder_state(run) if recipe.network.init_from else None
        return Source(run.name, recipe, index, None, 0, "", adopted)
    newest = checkpoint.newest(run, report)
    if newest is None:
        raise UsageError(
            "no checkpoint yet", where=run, fix="let btpipe pretrain write one, or use --untrained"
        )
    digest = artifact.read(newest, checkpoint.KIND).digest
    return Source(run.name, recipe, index, newest, checkpoint.read_state(newest).step, digest)


def preprocessing_of(recipe: Recipe) -> Preprocessing:
    """The evaluation view of a run: its image size, at the field of view of 256 to 224."""
    geometry = Geometry.for_size(recipe.data.image_size)
    return Preprocessing(
        geometry.size, geometry.resize, geometry.interpolation, network.MEAN, network.STD
    )


def encoder_of(source: Source, preprocessing: Preprocessing, report: Report) -> nn.Module:
    """The encoder in evaluation mode, from the checkpoint or calibrated."""
    described = source.recipe.network
    if source.checkpoint is not None:
        return weights.from_state(checkpoint.encoder_state(source.checkpoint), described)
    if source.adopted is not None:
        return weights.from_state(source.adopted, described)
    first = network.initialise(source.recipe).encoder.state_dict()
    pixels = _pixels(source.index, CALIBRATION_IMAGES, preprocessing, report)
    return weights.calibrate(weights.from_state(first, described), preprocessing, pixels, BATCH)


def _gate_pixels(
    index: Index, images: Path | None, preprocessing: Preprocessing, report: Report
) -> NDArray[np.uint8]:
    """Pixels of the images that the gate runs on."""
    if images is not None:
        index, _ = build(images)
    return _pixels(index, GATE_IMAGES, preprocessing, report)


def _pixels(
    index: Index, count: int, preprocessing: Preprocessing, report: Report
) -> NDArray[np.uint8]:
    """Up to `count` images, evenly over the index, in the evaluation view: (n, S, S, 3)."""
    rows = np.unique(np.linspace(0, len(index) - 1, count).round().astype(np.int64))
    geometry = Geometry.for_size(preprocessing.size)
    cores = runtime.cores()
    parts = []
    for batch in evaluation_batches(index, rows, geometry, batch_size=BATCH, threads=cores):
        parts.append(batch.pixels)
        for row, reason in batch.rejected:
            path = str(index.table["path"][row].as_py())
            report(FileRejected(path, "export", reason))
    pixels = np.concatenate(parts)
    if len(pixels) < 2:
        raise UsageError(
            f"{len(pixels)} of {len(rows)} images can be read",
            where=index.root,
            expected="two at least, to compare the exported model with the network on",
            fix="bring the images back, or name a folder with others: --images FOLDER",
        )
    return pixels


def _stands(out: Path, origin: dict[str, object], *, overwrite: bool) -> bool:
    """Whether `out` is this very export already.

    Raises:
        RefusedError: it is something else that must not be replaced.
    """
    if not out.exists():
        return False
    if not (out / artifact.MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RefusedError(
            "exists and is no bundle", where=out, fix="export under another name with --out"
        )
    try:
        found = dict(contract.open_bundle(out).manifest.origin)
    except IntegrityError as error:
        if overwrite:
            return False
        fix = "export under another name with --out, or replace it with --overwrite"
        raise RefusedError(f"is damaged or no bundle: {error.what}", where=out, fix=fix) from error
    if all(found.get(key) == value for key, value in origin.items()):
        return True
    if overwrite:
        return False
    raise RefusedError(
        f"holds run {found.get('run')} at step {found.get('step')}, encoder {found.get('encoder')}",
        where=out,
        expected=f"run {origin['run']} at step {origin['step']}, encoder {origin['encoder']}",
        fix="export under another name with --out, or replace it with --overwrite",
    )
