"""Checkpoints: tensors as safetensors, the rest as JSON, complete under their final name or absent.

    checkpoints/step-00001200/   model.safetensors  optim.safetensors  state.json  manifest.json

There is no random state to keep: views and order are functions of seed, epoch and image.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from btpipe import artifact
from btpipe.errors import IntegrityError, NewerError, RefusedError
from btpipe.events import Report, Warned, ignore
from btpipe.pretrain.step import Core
from btpipe.recipe import Run

KIND = "checkpoint"
PREFIX = "step-"
SCALE = "scale"


@dataclasses.dataclass(frozen=True)
class State:
    """Where a run stands: `step` updates are done, under the recipe and data of these digests."""

    step: int
    recipe: str
    data: str


def save(run: Path, state: State, core: Core, settings: Run) -> Path:
    """Writes the checkpoint of this step, then removes those that `settings` does not keep.

    Those of later steps go too: they were damaged, or the run would have gone on from them.

    Raises:
        MachineError: no space, or no permission; the checkpoints before it stay.
    """
    folder = folder_of(run, state.step)
    with artifact.publish(folder, KIND, dataclasses.asdict(state)) as temporary:
        save_file(_dense(core.network.state_dict()), temporary / "model.safetensors")
        save_file(_dense(_other_tensors(core)), temporary / "optim.safetensors")
        (temporary / "state.json").write_text(
            json.dumps(dataclasses.asdict(state), indent=2) + "\n"
        )
    folders = _folders(run)
    later = [old for old in folders if _step(old) > state.step]
    beyond = folders[len(later) + settings.keep_last :]
    interval = settings.keep_every
    for old in [*later, *(old for old in beyond if not interval or _step(old) % interval)]:
        _remove(old)
    return folder


def newest(run: Path, on_event: Report = ignore) -> Path | None:
    """The newest undamaged checkpoint of a run; None where there is none at all.

    Damaged ones are passed over with one warning that names them and the one taken.

    Raises:
        IntegrityError: there are checkpoints, and none is whole.
        NewerError: the newest whole one was written by a newer btpipe.
    """
    damaged: list[str] = []
    for folder in _folders(run):
        try:
            artifact.verify(folder, KIND)
            read_state(folder)
        except NewerError:
            raise
        except IntegrityError as error:
            damaged.append(f"{folder.name} is damaged ({'; '.join(str(error).splitlines())})")
            continue
        if damaged:
            on_event(Warned(f"{'; '.join(damaged)}: passed over, {folder.name} is taken instead"))
        return folder
    if damaged:
        raise IntegrityError(
            f"none of {len(damaged)} checkpoints is whole: {'; '.join(damaged)}",
            where=run / "checkpoints",
            fix="restore one from a copy, or move the run folder away and start afresh",
        )
    return None


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, rising; damaged ones too."""
    return [_step(folder) for folder in reversed(_folders(run))]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step stands, or would stand."""
    return run / "checkpoints" / f"{PREFIX}{step:08d}"


def read_state(folder: Path) -> State:
    """Where the run stood at this checkpoint.

    Raises:
        IntegrityError: its state.json says nothing of the kind.
    """
    try:
        content = json.loads((folder / "state.json").read_text())
        return State(int(content["step"]), str(content["recipe"]), str(content["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"no readable state.json ({error})", where=folder) from error


def position(folder: Path, data: str) -> int:
    """Updates done at this checkpoint of a run over the data of this fingerprint.

    Raises:
        RefusedError: it was trained on other data: the run's index is not the one it had.
    """
    state = read_state(folder)
    if state.data != data:
        raise RefusedError(
            "was trained on other images than index.parquet lists",
            where=folder,
            expected=f"data fingerprint {state.data[:12]}, not {data[:12]}",
            fix="put the run's own index.parquet back, or choose another --name",
        )
    return state.step


def load(folder: Path, core: Core) -> None:
    """Puts a checkpoint's tensors into a network, its optimiser and loss scale, bit for bit.

    Raises:
        IntegrityError: a tensor is missing, left over, or of another shape.
    """
    try:
        core.network.load_state_dict(load_file(folder / "model.safetensors"))
        _load_others(core, load_file(folder / "optim.safetensors"))
    except (RuntimeError, LookupError, ValueError, SafetensorError) as error:
        raise IntegrityError(f"does not fit the recipe's network: {error}", where=folder) from error


def model_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the whole network, encoder and projector.

    Raises:
        IntegrityError: the checkpoint is damaged.
    """
    artifact.verify(folder, KIND)
    return load_file(folder / "model.safetensors")


def encoder_state(folder: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors of a checkpoint under torchvision's names."""
    state = load_file(folder / "model.safetensors")
    return {
        key.removeprefix("encoder."): tensor
        for key, tensor in state.items()
        if key.startswith("encoder.")
    }


def _folders(run: Path) -> list[Path]:
    """Checkpoints by their final names, newest first."""
    folders = [
        p for p in (run / "checkpoints").glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()
    ]
    return sorted(folders, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[len(PREFIX) :])


def _remove(folder: Path) -> None:
    """Takes the final name away first, so that a kill leaves nothing half removed under it."""
    doomed = folder.with_name(f"{folder.name}.tmp-old")
    folder.rename(doomed)
    artifact.sweep(folder.parent)


def _dense(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies where a tensor is laid out otherwise (channels_last)."""
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _other_tensors(core: Core) -> dict[str, torch.Tensor]:
    """The optimiser's as `INDEX.NAME`, INDEX counting parameters through the groups; the loss
    scale's as `scale.NAME`."""
    tensors = {
        f"{index}.{name}": tensor
        for index, parameter in enumerate(_parameters(core.optimizer))
        for name, tensor in core.optimizer.state[parameter].items()
        if isinstance(tensor, torch.Tensor)
    }
    scale = core.scale.tensors() if core.scale else {}
    return tensors | {f"{SCALE}.{name}": tensor for name, tensor in scale.items()}


def _load_others(core: Core, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = list(_parameters(core.optimizer))
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner == SCALE:
            if core.scale:  # none where the run has left fp16
                core.scale.tensors()[name].copy_(tensor)
            continue
        parameter = parameters[int(owner)]
        # The parameter's own memory layout, so that sums run in the same order as before.
        alike = tensor.shape == parameter.shape
        buffer = (
            torch.empty_like(parameter)
            if alike
            else torch.empty_like(tensor, device=parameter.device)
        )
        core.optimizer.state[parameter][name] = buffer.copy_(tensor)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
