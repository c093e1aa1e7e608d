"""What a step sends between ranks: its bytes on paper, and the error of sending fewer."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from btpipe import artifact, runtime
from btpipe.events import Tabled
from btpipe.pretrain import loss, step
from btpipe.recipe import Data, Loss, Network, Optim, Recipe, Run
from btpipe.road import published
from btpipe.road.benchmark_worker import Sizes

RANKS = (8, 32, 256)
MEGABYTE = 1e6
VIEWS = 2
FORMULA = (
    "Sent by each of W ranks, MB (10^6). Ring all-reduce of b bytes: 2 (W - 1) / W b; all-gather of"
    " b bytes in all: (W - 1) / W b. Left out: flags and scalars, under 2 kB."
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each rank sends in one step."""

    embeddings: float
    gradients: float
    batch_norm: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.embeddings + self.gradients + self.batch_norm


@dataclasses.dataclass(frozen=True)
class Counted:
    """Numbers of a network that decide what is sent: parameters, and channels of batch norm."""

    parameters: int
    channels: int
    dimension: int


def count(sizes: Sizes) -> Counted:
    """Of the network of these sizes; no memory is taken."""
    with torch.device("meta"):
        network = published.Network(sizes.backbone, sizes.widths, Recipe().loss.lambd)
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.affine]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Counted(parameters, sum(norm.num_features for norm in norms), sizes.dimension)


def all_reduce(size_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of a tensor."""
    return 2 * (ranks - 1) / ranks * size_bytes


def all_gather(total_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-gather of what all of them hold."""
    return (ranks - 1) / ranks * total_bytes


def published_traffic(counted: Counted, ranks: int) -> Traffic:
    """C and the gradients all-reduced in float32; SyncBatchNorm for each view.

    SyncBatchNorm (torch): mean, inverse deviation and count gathered in the forward pass, two sums
    all-reduced in the backward one; the batch norm on the embeddings is one of them.
    """
    channels = counted.channels + counted.dimension
    forward = all_gather(4 * ranks * (2 * channels + 1), ranks)
    backward = all_reduce(4 * 2 * channels, ranks)
    return Traffic(
        embeddings=all_reduce(4 * counted.dimension**2, ranks),
        gradients=all_reduce(4 * counted.parameters, ranks),
        batch_norm=VIEWS * (forward + backward),
    )


def core_traffic(
    counted: Counted, ranks: int, batch: int, form: loss.Form, wire: Literal["fp32", "bf16"]
) -> Traffic:
    """This core's: embeddings gathered ("gram") or C all-reduced ("cross"), gradients all-reduced.

    `wire` is that of embeddings ("gram" alone has one) and gradients. Batch norm: moments gathered
    in the forward pass, two sums all-reduced in the backward one; the same for the embeddings'.
    """
    width = {"fp32": 4, "bf16": 2}[wire]
    if form == "gram":
        embeddings = all_gather(VIEWS * batch * counted.dimension * width, ranks)
    else:
        embeddings = all_reduce(4 * counted.dimension**2, ranks)
    channels = counted.channels + counted.dimension
    forward = all_gather(4 * ranks * 2 * channels, ranks)
    backward = all_reduce(4 * 2 * channels, ranks)
    return Traffic(
        embeddings=embeddings,
        gradients=all_reduce(width * counted.parameters, ranks),
        batch_norm=VIEWS * (forward + backward),
    )


def paper_table(sizes: Sizes) -> Tabled:
    """Bytes of one step and rank for several numbers of ranks, at the published batch."""
    counted, batch = count(sizes), Recipe().data.batch_size
    form = loss.choose_form("auto", batch, sizes.dimension)
    rows = []
    for ranks in RANKS:
        base = published_traffic(counted, ranks)
        named = {
            "published": base,
            f"this core, {form}": core_traffic(counted, ranks, batch, form, "fp32"),
            f"this core, {form}, bf16": core_traffic(counted, ranks, batch, form, "bf16"),
        }
        for name, sent in named.items():
            parts = (sent.total, sent.embeddings, sent.gradients, sent.batch_norm)
            cells = [f"{part / MEGABYTE:,.1f}" for part in parts]
            rows.append((name, str(ranks), f"{sent.total / base.total:.2f}", *cells))
    title = (
        f"On the wire, on paper: batch {batch:,}, {sizes.backbone}, projector 3 x {sizes.dimension}"
    )
    columns = ("step", "W", "ratio", "all", "embeddings", "gradients", "batch norm")
    return Tabled(title, columns, tuple(rows), FORMULA)


def error_table() -> Tabled:
    """What fewer bytes do to the summed gradient of a small network, on two processes here."""
    errors = measure_errors()
    rows = tuple((name, f"{error:.1e}") for name, error in errors.items())
    note = "resnet18 at 32, 16 pairs, projector 3 x 64, against the same step in float64."
    title = "Error of the gradient, |g - exact| / |exact|, two processes"
    return Tabled(title, ("sent", "relative error"), rows, note)


def measure_errors() -> dict[str, float]:
    """Setting of the recipe -> relative L2 error of the gradient summed over two gloo ranks."""
    with tempfile.TemporaryDirectory(prefix="btpipe-wire-") as folder:
        file = Path(folder) / "errors.json"
        runtime.launch(2, _measure_errors, (file,))
        errors: dict[str, float] = json.loads(file.read_text())
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def _measure_errors(file: Path) -> None:
    """Runs on every rank; the first one writes what it found."""
    variants = {
        'loss.wire = "bf16"': (Loss(wire="bf16"), Run(precision="fp64")),
        'run.gradient_wire = "bf16"': (Loss(), Run(precision="fp64", gradient_wire="bf16")),
        "both": (Loss(wire="bf16"), Run(precision="fp64", gradient_wire="bf16")),
    }
    with runtime.start(on="cpu") as here:
        exact = _gradient(here, Loss(), Run(precision="fp64"))
        errors = {
            name: float((_gradient(here, *settings) - exact).norm() / exact.norm())
            for name, settings in variants.items()
        }
        if here.is_first:
            artifact.write_json(file, errors)


def _gradient(here: runtime.Runtime, loss_settings: Loss, run: Run) -> torch.Tensor:
    """The summed gradient of a batch of which each rank holds its rows, flat."""
    recipe = Recipe(
        data=Data(batch_size=16, image_size=32),
        network=Network(backbone="resnet18", projector=(64, 64, 64)),
        loss=loss_settings,
        optim=Optim(name="sgd"),  # leaves the gradients as they are
        run=run,
    )
    core = step.build(recipe, here.device)
    generator = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (2, 16, 32, 32, 3), dtype=torch.uint8, generator=generator)
    mine = views.chunk(here.world_size, dim=1)[here.rank]
    step.update(core, [*mine], 0.0, 0.0)
    return torch.cat([p.grad.flatten() for p in core.network.parameters() if p.grad is not None])
