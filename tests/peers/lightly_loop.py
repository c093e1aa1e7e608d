"""This core against lightly's BarlowTwinsLoss in a plain torch loop, on the same images and views.

    make peers                                        # an environment with lightly, in build/peers
    build/peers/bin/python tests/peers/lightly_loop.py IMAGES [--steps 250]

IMAGES: a folder of class folders. Both start from the same weights and see the same batches. Every
50 steps the plain loop's loss and gradient are computed from this core's weights on its batch, in
float32 and in float64; at the end both encoders are judged by nearest neighbours, with labels that
took no part in the training.
Ends with 1 when a loss or gradient differs by more than 1e-5 of its norm, or the plain loop's
accuracy is more than two points better.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightly.loss import BarlowTwinsLoss  # type: ignore[import-not-found]
from numpy.typing import NDArray
from torch import nn

from btpipe import neighbours, recipe
from btpipe.data.index import Index, build
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.train_loader import (
    Batch,
    LoaderSettings,
    TrainingLoader,
    evaluation_batches,
)
from btpipe.events import ignore
from btpipe.pretrain import network, schedule, step

TOLERANCE = 1e-5
POINTS = 0.02
FEW = 16  # images that are compared in float64, whose convolutions are slow
NEIGHBOURS, JUDGED = 2000, 1000
CPU = torch.device("cpu")


class Plain(nn.Module):
    """Encoder and projector of torch's own modules; one pass for each view."""

    def __init__(self, described: recipe.Network) -> None:
        super().__init__()
        self.encoder = network.encoder(described)
        widths = [network.features(described), *described.projector]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out)]
            layers += [nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        dtype = self.projector[-1].weight.dtype
        z: torch.Tensor = self.projector(self.encoder(network.normalise(view, dtype)))  # type: ignore[arg-type]
        return z


def loss_and_gradient(
    plain: Plain, criterion: BarlowTwinsLoss, view1: torch.Tensor, view2: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor]]:
    plain.zero_grad()
    value = criterion(plain(view1), plain(view2))
    value.backward()
    return value.item(), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}


def difference(core: step.Core, gradients: dict[str, torch.Tensor]) -> float:
    """|ours - theirs| / |theirs| over all parameters."""
    ours = {n: p.grad for n, p in core.network.named_parameters() if p.grad is not None}
    scale = core.recipe.optim.reference_world_size / core.recipe.loss.scale
    between = sum(
        float((ours[n] * scale - g).double().square().sum()) for n, g in gradients.items()
    )
    return float(
        (between / sum(float(g.double().square().sum()) for g in gradients.values())) ** 0.5
    )


def compare(core: step.Core, batch: Batch, criterion: BarlowTwinsLoss) -> list[float]:
    """Relative differences of loss and gradient at the core's present weights, both precisions."""
    differences = []
    whole = len(batch.images)
    for precision, dtype, count in (("fp32", torch.float32, whole), ("fp64", torch.float64, FEW)):
        view1, view2 = batch.views[0][:count], batch.views[1][:count]
        described = core.recipe.model_copy(
            update={"run": core.recipe.run.model_copy(update={"precision": precision})}
        )
        ours = step.build(described, CPU)
        ours.network.load_state_dict(core.network.state_dict())
        plain = Plain(described.network).to(dtype)
        plain.load_state_dict(core.network.state_dict())
        value, gradients = loss_and_gradient(plain.train(), criterion, view1, view2)
        outcome = step.update(ours, [view1, view2], 0.0, 0.0)
        total = float(outcome.terms.total(described.loss.lambd))
        differences += [abs(total - value) / value, difference(ours, gradients)]
    return differences


def judge(encoder: nn.Module, images: Index, size: int) -> float:
    """kNN accuracy of `JUDGED` images by `NEIGHBOURS` others."""
    encoder.eval()
    train = min(NEIGHBOURS, len(images) * 4 // 5)
    rows = np.random.default_rng(0).permutation(len(images)).astype(np.int64)[: train + JUDGED]
    vectors: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for batch in evaluation_batches(
            images, rows, Geometry(size=size, resize=size), batch_size=256, threads=2
        ):
            pixels = network.normalise(torch.from_numpy(batch.pixels), torch.float32)
            vectors.append(encoder(pixels).numpy())
    embedded = np.concatenate(vectors)
    names = np.array(images.labels)[rows]
    classes, labels = np.unique(names, return_inverse=True)
    near, cosines = neighbours.nearest(embedded[train:], embedded[:train], 20)
    scores = neighbours.vote(near, cosines, labels[:train].astype(np.int64), len(classes))
    return float((scores.argmax(1) == labels[train:]).mean())


def settings(images: Path, batch_size: int, epochs: int, stem: str) -> recipe.Recipe:
    data = (f"data.train={images}", f"data.batch_size={batch_size}")
    others = (f"optim.epochs={epochs}", f"network.stem={stem}", "run.precision=fp32")
    return recipe.load(Path("cifar10"), (*data, *others))


def descent_of(plain: Plain, chosen: recipe.Optim) -> torch.optim.SGD:
    """Plain SGD as the recipe has it: no decay on biases and batch norm."""
    weights = [p for p in plain.parameters() if p.ndim > 1]
    vectors = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": chosen.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=chosen.momentum)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stem", default="small", help='"imagenet" takes a sixteenth of the time')
    arguments = parser.parse_args()
    images, _ = build(arguments.images, ignore)
    epochs = 1 + arguments.steps * arguments.batch // len(images)
    described = settings(arguments.images, arguments.batch, epochs, arguments.stem)
    core = step.build(described, CPU)
    plain = Plain(described.network).to(memory_format=torch.channels_last).train()
    plain.load_state_dict(core.network.state_dict())
    criterion = BarlowTwinsLoss(lambda_param=described.loss.lambd)
    descent = descent_of(plain, described.optim)
    loader = TrainingLoader(
        images,
        LoaderSettings.of(described, len(images)),
        rank=0,
        world_size=1,
        start_step=0,
        device=CPU,
        on_event=ignore,
        rejected={},
    )
    worst, seconds = 0.0, [0.0, 0.0]
    print("step  loss     |dloss|   |dgradient| (float32)  |dloss|   |dgradient| (float64)")
    with loader:
        for batch in loader:
            if batch.step >= arguments.steps:
                break
            if batch.step % 50 == 0:
                differences = compare(core, batch, criterion)
                worst = max(worst, *differences)
            rates = schedule.rates(described, batch.step, len(images))
            started = time.process_time()
            outcome = step.update(core, batch.views, *rates)
            seconds[0] += time.process_time() - started
            if batch.step % 50 == 0:
                total = float(outcome.terms.total(described.loss.lambd))
                print(
                    f"{batch.step:4d}  {total:7.2f}",
                    *(f"{value:10.1e}" for value in differences),
                    flush=True,
                )
            started = time.process_time()
            for group, rate in zip(descent.param_groups, rates, strict=True):
                group["lr"] = rate
            loss_and_gradient(plain, criterion, batch.views[0], batch.views[1])
            descent.step()
            seconds[1] += time.process_time() - started
    size = described.data.image_size
    raw = judge(network.initialise(described).encoder.train(), images, size)
    ours, theirs = (judge(net.encoder, images, size) for net in (core.network, plain))
    print(
        f"kNN after {arguments.steps} steps: this core {ours:.1%}, lightly's loss {theirs:.1%},"
        f" untrained {raw:.1%}"
    )
    print(f"CPU-seconds of the steps: this core {seconds[0]:.0f}, plain loop {seconds[1]:.0f}")
    return int(worst > TOLERANCE or theirs - ours > POINTS)


if __name__ == "__main__":
    sys.exit(main())
