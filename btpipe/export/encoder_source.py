"""What a bundle is made from: a checkpoint of a run, its beginning, or the weights of others."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from btpipe import artifact
from btpipe.data.index import Index, open_index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.errors import UsageError
from btpipe.events import Note, Report
from btpipe.export import samples, weights
from btpipe.export.contract import Preprocessing
from btpipe.pretrain import changes, checkpoint, foreign_weights, init_from, network
from btpipe.recipe import Network, Recipe, load

STATISTICS_IMAGES = 1024
BATCH = 64


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """An encoder in evaluation mode, and where it is from.

    `origin` is what the manifest says of that, `provenance` the same in half a sentence. `index`:
    the training images, and `recipe_toml` the recipe, where they are known.
    """

    described: Network
    preprocessing: Preprocessing
    encoder: nn.Module
    origin: dict[str, object]
    provenance: str
    index: Index | None = None
    recipe_toml: str = ""


def of_run(
    run: Path, on_event: Report, *, untrained: bool = False, step: int | None = None
) -> EncoderSource:
    """The newest checkpoint of a run, or that of a step; `untrained`: what it started from.

    A network that starts from nothing gets batch norm's statistics from its training images. The
    recipe is the one that the run had at that checkpoint.

    Raises:
        UsageError: no run there, no checkpoint yet, or none of that step.
        IntegrityError: its index, the checkpoint of that step, or all of them are damaged.
    """
    if not (run / "recipe.toml").is_file():
        fix = "name a run folder, or train one: btpipe pretrain recipes/folder.toml"
        raise UsageError("no run there", where=run, expected="a folder with recipe.toml", fix=fix)
    recipe, index = load(run / "recipe.toml"), open_index(run / "index.parquet")
    prepared = preprocessing_of(recipe.data.image_size)
    done, digest, known_changes = 0, "", ""
    if untrained:
        encoder = _first(run, recipe, index, prepared, on_event)
        provenance = (
            "as it was before training, with batch norm's statistics measured on training images:"
            " a baseline to compare trained encoders with"
        )
    else:
        folder = _newest(run, on_event) if step is None else _of_step(run, step)
        state = checkpoint.read_state(folder)
        done = state.step
        version = changes.version_at(run, done, state.recipe)
        recipe, known_changes = version.recipe, version.text
        digest = artifact.read(folder, checkpoint.KIND).digest
        encoder = weights.from_state(checkpoint.encoder_state(folder), recipe.network)
        provenance = f"trained by Barlow Twins for {done} steps on {len(index)} images"
    origin: dict[str, object] = {
        "run": run.name,
        "step": done,
        "trained": not untrained,
        "recipe": recipe.digest,
        "images": len(index),
        "data": index.fingerprint,
        "checkpoint": digest,
    }
    if known_changes:
        origin["changes"] = known_changes
    toml = _without_folders(recipe).to_toml()
    return EncoderSource(recipe.network, prepared, encoder, origin, provenance, index, toml)


def _newest(run: Path, on_event: Report) -> Path:
    newest = checkpoint.newest(run, on_event)
    if newest is None:
        fix = "let btpipe pretrain write one, or use --untrained"
        raise UsageError("no checkpoint yet", where=run, fix=fix)
    return newest


def _of_step(run: Path, step: int) -> Path:
    steps = checkpoint.steps(run)
    if step not in steps:
        raise UsageError(
            f"no checkpoint of step {step}",
            where=run,
            expected=f"of {', '.join(map(str, steps)) or 'those that pretrain writes: none yet'}",
            fix="keep more of the next run's checkpoints: --set run.keep_every=N",
        )
    folder = checkpoint.folder_of(run, step)
    artifact.verify(folder, checkpoint.KIND)
    return folder


def of_file(file: Path, size: int, on_event: Report) -> EncoderSource:
    """The encoder in a file of others, of whatever network its tensors fit; nothing is executed.

    Prepared as torchvision, timm and the published code do: ImageNet's mean and deviation, and
    `size` pixels of the centre.

    Raises:
        UsageError: no such file.
        RefusedError: a pickle with more than tensors in it, or the weights of no known network.
        IntegrityError: a file is cut, changed or not finite.
    """
    described = foreign_weights.recognise(file)
    adopted = foreign_weights.read_encoder(file, described)
    kind = f"{described.backbone} with the {described.stem} stem"
    on_event(Note(f"{adopted.source.name} is a {kind}: {adopted.matched}"))
    origin: dict[str, object] = {
        "source": adopted.source.name,
        "sha256": adopted.sha256,
        "trained": True,
        "matched": len(adopted.state),
        "left_out": dict(adopted.left_out),
    }
    provenance = f"adopted from {adopted.source.name} (sha256 {adopted.sha256})"
    encoder = weights.from_state(adopted.state, described)
    return EncoderSource(described, preprocessing_of(size), encoder, origin, provenance)


def preprocessing_of(size: int) -> Preprocessing:
    """The evaluation view at an image size, at the field of view of 256 to 224."""
    geometry = Geometry.for_size(size)
    return Preprocessing(
        geometry.size, geometry.resize, geometry.interpolation, network.MEAN, network.STD
    )


def _first(
    run: Path, recipe: Recipe, index: Index, prepared: Preprocessing, on_event: Report
) -> nn.Module:
    """The encoder that the run started from."""
    if recipe.network.init_from:
        return weights.from_state(init_from.encoder_state(run), recipe.network)
    first: dict[str, torch.Tensor] = network.initialise(recipe).encoder.state_dict()
    rows = samples.spread(len(index), STATISTICS_IMAGES)
    pixels = samples.read(index, rows, prepared, on_event).pixels
    if not len(pixels):
        fix = "bring the images back: batch norm's statistics are measured on them"
        raise UsageError("none of its images can be read", where=index.root, fix=fix)
    encoder = weights.from_state(first, recipe.network)
    return weights.calibrate(encoder, prepared, pixels, BATCH)


def _without_folders(recipe: Recipe) -> Recipe:
    """The recipe with the last part of its inputs' names: a card is read on other machines."""
    names = [Path(name).name for name in recipe.data.inputs]
    train = names[0] if len(names) == 1 else tuple(names) or ""
    data = recipe.data.model_copy(update={"train": train})
    return recipe.model_copy(update={"data": data})
