"""Makes the archive of what this version of btpipe writes: `python tests/old/make.py`.

Run once for a version whose formats later ones must read, and committed; `test_old.py` uses it. The
weights repeat small blocks and hardly move, so that they pack small. Times of files are whole
seconds: archives keep no more.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from btpipe import __version__, runtime
from btpipe.embed import job
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import Stopped
from btpipe.events import Event, Progressed

RECIPE = """
[data]
train = "images"
batch_size = 16
image_size = 32
[network]
backbone = "resnet18"
projector = [16, 16]
init_from = "start.safetensors"
[optim]
lr = 1e-30
bias_lr = 1e-30
weight_decay = 0.0
epochs = 4
warmup_epochs = 0
[run]
precision = "fp32"
checkpoint_steps = 2
log_steps = 1
"""
IMAGES = 32
PLACE = Path("/tmp/btpipe-old")
"""Where it is made and unpacked again: a run's index has the absolute place of its images."""
PART_ROWS = 4
HALF_DONE = 3
"""Parts of the half-done job."""


def draw_images(folder: Path) -> None:
    """Photographs of nothing, in two class folders, and two files that are no images."""
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
        path = folder / ("even", "odd")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((40, 36), Image.Resampling.BICUBIC).save(path, quality=80)
    (folder / "even" / "empty.jpg").write_bytes(b"")
    whole = (folder / "odd" / "01.jpg").read_bytes()
    (folder / "odd" / "torn.jpg").write_bytes(whole[: len(whole) // 2])


def write_weights(path: Path) -> None:
    """A ResNet-18 whose convolutions repeat a block of 16 x 8 filters."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, weight in resnet18().state_dict().items():
        if weight.ndim == 4:
            out, into, *kernel = weight.shape
            block = torch.randn(min(out, 16), min(into, 8), *kernel, generator=generator)
            block = (block * (2 / weight[0].numel()) ** 0.5).bfloat16().float()
            repeats = (out // block.shape[0], into // block.shape[1], 1, 1)
            state[name] = block.repeat(repeats)
        elif not name.startswith("fc."):
            state[name] = weight.clone()
    save_file(state, path)


def run(*words: str, stop_after: str = "") -> None:
    """A command of btpipe; with `stop_after`, asked to stop when its output has that."""
    command = [sys.executable, "-m", "btpipe", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if stop_after and stop_after in line:
                process.send_signal(signal.SIGTERM)
        code = process.wait()
    assert code == (75 if stop_after else 0), (words, code)


def half_a_job(bundle: Path, out: Path) -> None:
    """A job that is stopped after some of its parts."""

    def stop(event: Event) -> None:
        if isinstance(event, Progressed) and event.done >= HALF_DONE * PART_ROWS:
            os.kill(os.getpid(), signal.SIGTERM)

    options = job.JobOptions(part_rows=PART_ROWS, batch_size=PART_ROWS)
    try:
        job.embed("images", out, EncoderConfig(bundle, device="cpu"), stop, options)
    except Stopped:
        return
    raise AssertionError("the job was done before it could be stopped")


def make() -> None:
    """Everything, in the working folder."""
    draw_images(Path("images"))
    for path in Path("images").rglob("*.jpg"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    write_weights(Path("start.safetensors"))
    os.utime("start.safetensors", (1_700_000_000, 1_700_000_000))
    Path("old.toml").write_text(RECIPE)
    run("pretrain", "old.toml", "--set", "data.max_bad=0.1", stop_after='"step": 5')
    run("export", "runs/old")
    run("scan", "images", "--out", "index.parquet", "--depth", "decode")
    run("embed", "images", "--out", "vectors.parquet")
    for i in range(2):
        run("embed", "images", "--out", f"share-{i}.parquet", "--shard", f"{i}/2")
    half_a_job(Path("exports/old"), Path("half.parquet"))


def main() -> None:
    archive = Path(__file__).parent.resolve() / f"{__version__}.tar.xz"
    PLACE.mkdir()
    os.chdir(PLACE)
    make()
    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.PAX_FORMAT) as packed:
        packed.add(".", arcname=".")
    shutil.rmtree(PLACE)
    print(f"{archive}: {archive.stat().st_size:,} bytes, {runtime.environment()}")


if __name__ == "__main__":
    main()
