"""A training of 8 steps on a CPU, in this process, and what it leaves in its folder."""

import json
import shutil
from pathlib import Path

from btpipe import artifact, recipe
from btpipe.pretrain import launch

IMAGES = 34  # 4 steps of 8 an epoch, the last two images dropped
NETWORK = """
seed = 5
[data]
batch_size = 8
image_size = 16
[network]
backbone = "resnet18"
projector = [32, 32]
"""
RECIPE = f"""{NETWORK}[optim]
epochs = 2
warmup_epochs = 0
[run]
precision = "fp32"
log_steps = 1
checkpoint_steps = 3
keep_last = 9
"""


def pretrain(
    folder: Path,
    images: Path,
    *settings: str,
    name: str = "run",
    devices: str = "1",
    accepted: tuple[str, ...] = (),
) -> Path:
    """What the command does, in this process; returns the run's folder."""
    (folder / "tiny.toml").write_text(RECIPE)
    tiny = recipe.load(folder / "tiny.toml", (f"data.train={images}", *settings))
    launch.pretrain(folder / name, tiny, devices=devices, mode="auto", accepted=accepted)
    return folder / name


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").iterdir())


def rewind(run: Path, step: int) -> None:
    """As if the run had been killed soon after this step."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    (run / "events.jsonl").unlink()


def weights(run: Path) -> tuple[str, str]:
    """sha256 of the model's and the optimiser's tensors at the newest checkpoint."""
    newest = max((run / "checkpoints").iterdir())
    return tuple(artifact.file_digest(newest / f"{n}.safetensors") for n in ("model", "optim"))  # type: ignore[return-value]


def logged(run: Path, name: str) -> list[dict[str, float]]:
    """A run's events of this name so far; a line that is being written does not count."""
    log = run / "events.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]
