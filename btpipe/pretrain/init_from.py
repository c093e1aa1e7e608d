"""The encoder that a run with `network.init_from` starts from: adopted once, then the run's own.

    runs/NAME/initial/   model.safetensors  manifest.json (origin: the file and its sha256)

From then on the run depends on nothing outside, whatever becomes of the file.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from btpipe import artifact
from btpipe.errors import IntegrityError, RefusedError
from btpipe.events import Note, Report
from btpipe.pretrain import foreign_weights
from btpipe.pretrain.network import BarlowTwins
from btpipe.recipe import Network

KIND = FOLDER = "initial"
WEIGHTS = "model.safetensors"


def adopt(run: Path, adopted: foreign_weights.Adopted) -> None:
    """Keeps the encoder in the run folder, with where it came from.

    Raises:
        MachineError: no space, or no permission.
    """
    origin = {
        "source": str(adopted.source),
        "sha256": adopted.sha256,
        "tensors": len(adopted.state),
        "left_out": dict(adopted.left_out),
        "text": adopted.text(),
    }
    with artifact.publish(run / FOLDER, KIND, origin) as temporary:
        save_file(adopted.state, temporary / WEIGHTS)


def require_same(run: Path, network: Network) -> None:
    """Makes sure that `network.init_from`, if it is still there, is what this run started from.

    A run folder that it names may have trained on since: it is known by its place.

    Raises:
        RefusedError: it has other content now.
        IntegrityError: what the run folder kept is damaged.
    """
    source = Path(network.init_from)
    if not network.init_from or not source.exists():
        return
    origin = artifact.read(run / FOLDER, KIND).origin
    if (source / "checkpoints").is_dir():
        same = Path(str(origin["source"])).is_relative_to(source.absolute())
    else:
        same = artifact.file_digest(foreign_weights.locate(source)) == origin["sha256"]
    if not same:
        raise RefusedError(
            f"network.init_from = {network.init_from!r} has other content than this run started"
            f" from ({origin['source']}, sha256 {str(origin['sha256'])[:12]})",
            where=run,
            fix="choose another --name for a run from the new weights; to go on with this one, put"
            " the old ones back or move the new ones away: the run keeps a copy of its own",
        )


def load(run: Path, settings: Network, network: BarlowTwins, on_event: Report) -> None:
    """Puts the adopted encoder into a fresh network; without `network.init_from` does nothing.

    Raises:
        IntegrityError: what the run folder kept is missing or damaged.
    """
    if not settings.init_from:
        return
    folder = run / FOLDER
    try:
        network.encoder.load_state_dict(encoder_state(run))
    except RuntimeError as error:
        raise IntegrityError(f"does not fit the network: {error}", where=folder) from error
    on_event(Note(str(artifact.read(folder, KIND).origin["text"])))


def encoder_state(run: Path) -> dict[str, torch.Tensor]:
    """The adopted encoder's tensors, under torchvision's names.

    Raises:
        IntegrityError: what the run folder kept is missing or damaged.
    """
    artifact.verify(run / FOLDER, KIND)
    return load_file(run / FOLDER / WEIGHTS)
