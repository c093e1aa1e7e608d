"""The tables of a recipe: typed, frozen, closed. Every default of btpipe stands here."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from btpipe.artifact import json_digest
from btpipe.recipe.steps import count_steps
from btpipe.recipe.toml import flatten, toml_lines

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[Positive, Positive]
MIN_SIZE = 16
"""Fewest pixels of a view's side."""

Backbone = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


@dataclasses.dataclass(frozen=True)
class Added:
    """Marks a key that older recipes do not have, by the version that brought it.

    `Annotated[int, Added("0.3")] = 0`: such a key enters a digest only where it differs from its
    default, so that runs, bundles and tables made before it keep theirs.
    """

    version: str


class Table(BaseModel):
    """A table of a recipe: frozen, typed, and closed to keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class Jitter(Table):
    """With `probability`, four colour factors in a random order (torchvision's ColorJitter)."""

    probability: Probability = 0.8
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.4
    """Factor from U(1 - b, 1 + b); likewise contrast and saturation."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.4
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Turn from U(-h, h), in turns of the colour circle."""


class Blur(Table):
    """Gaussian blur with sigma from U(low, high) pixels."""

    probability: Probability = 1.0
    sigma: Range = (0.1, 2.0)


class Solarize(Table):
    """Inverts the values at and above `threshold` (0 to 255)."""

    probability: Probability = 0.0
    threshold: Annotated[int, Field(ge=0, le=256)] = 128


class View(Table):
    """How one view of an image is drawn; the defaults are view A of the published main.py."""

    size: Annotated[int, Field(ge=0)] = 0
    """Height and width in pixels; 0: `data.image_size`. Less makes it a small view (multi-crop),
    which is compared with the views of full size only."""
    scale: Range = (0.08, 1.0)
    """Share of the image's area that the crop takes, from U(low, high)."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of the crop, log-uniform."""
    flip: Probability = 0.5
    """Left and right change places."""
    vertical_flip: Probability = 0.0
    rotate90: Probability = 0.0
    """A turn by 90, 180 or 270 degrees, each as likely: 0.75 for four equal directions."""
    jitter: Jitter = Jitter()
    gray: Probability = 0.2
    blur: Blur = Blur()
    solarize: Solarize = Solarize()


VIEW_A = View()
VIEW_B = View(blur=Blur(probability=0.1), solarize=Solarize(probability=0.2))


class Data(Table):
    """Which images, and how many make a batch."""

    train: str | tuple[str, ...] = ""
    """Folders of images, searched recursively (the names of class folders go unused), file lists,
    tar shards, parquet with image bytes, an index, URLs of these: one, or a list of them."""
    batch_size: Annotated[int, Field(ge=2)] = 2048
    """Images in one optimiser step, over all ranks. Divisible by the number of ranks."""
    image_size: Annotated[int, Field(ge=MIN_SIZE)] = 224
    """Height and width of a view, in pixels."""
    max_bad: Probability = 0.01
    """Share of the images that may be unreadable before the run ends with exit code 3."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Decoder threads for each rank; 0: the cores this rank may use."""
    shuffle: Literal["full", "blocks"] = "full"
    """"full": any order; "blocks": stretches of neighbours, for tar shards on slow storage."""
    block_images: Count = 128
    """With "blocks": consecutive images that stay in one pool."""
    mixed_blocks: Count = 128
    """With "blocks": how many blocks are one pool, within which the order is any."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What `train` names, one by one."""
        return tuple(filter(None, (self.train,) if isinstance(self.train, str) else self.train))


class Network(Table):
    """A torchvision ResNet without its classifier, and the projector behind it."""

    backbone: Backbone = "resnet50"
    stem: Literal["imagenet", "small"] = "imagenet"
    """"small": 3x3 first convolution with stride 1, no max-pool; for images of about 32 pixels."""
    projector: Annotated[tuple[Count, ...], Field(min_length=1)] = (8192, 8192, 8192)
    """Width of each Linear layer; the last one is D, the embedding's dimension in the loss."""
    init_from: str = ""
    """Weights the encoder starts from: a state dict, a bundle, a run; "": random ones by `seed`."""


class Loss(Table):
    """sum_i (1 - C_ii)^2 + lambd * sum_{i != j} C_ij^2 (arXiv 2103.03230, eq. 1 and 2)."""

    lambd: NotNegative = 0.0051
    scale: Positive = 1.0
    """Factor on the loss before its gradient: 1 as published, others have others."""
    form: Literal["auto", "gram", "cross"] = "auto"
    """"gram": two N x N matrices; "cross": the D x D one. Equal; "auto" takes the cheaper."""


class Optim(Table):
    """The optimiser and its schedule. Rates are for 256 images and scale with the batch."""

    name: Literal["lars", "adamw", "sgd"] = "lars"
    epochs: Annotated[int, Field(ge=0)] = 1000
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    lr: Positive | Literal["auto"] = 0.2
    """Rate of the weights for 256 images. "auto": the best of the author's trials at this batch
    (LARS only; facebookresearch/barlowtwins, issue 7)."""
    bias_lr: Positive = 0.0048
    """Rate of the biases and of batch norm's scale and shift, for 256 images."""
    final_lr_ratio: NotNegative = 0.001
    """The cosine ends at this share of the scaled rate, for weights and biases alike."""
    weight_decay: NotNegative = 1e-6
    """On weights only: biases and batch norm are excluded."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """LARS and SGD; AdamW's betas are 0.9 and 0.999."""
    eta: Positive = 0.001
    """LARS trust coefficient."""
    reference_world_size: Count = 1
    """The global loss's gradient is divided by this before the optimiser, at any number of ranks.

    The published code's gradient is 1/W of the true one on W GPUs; its run had W = 32.
    """


class Run(Table):
    """How the run is carried out.

    The keys in `BOOKKEEPING` may change on a resume, those in `ROUNDING` where `--accept-change`
    names them; `micro_batch` is part of what the run is.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """"auto": bf16 autocast on GPUs and on CPUs with AVX512-BF16 or AMX, float32 elsewhere.
    "fp16": autocast with a loss scale. The correlation is in float32 or more always."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the network; "auto": on for GPUs, off for CPUs, where it gains nothing."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """Images, over all ranks, that pass through the network together; 0: the whole batch. The loss
    is that of the whole batch all the same (cached gradients: the network runs twice forward,
    memory grows with the micro-batch). Batch norm sees one micro-batch at a time."""
    memory_budget: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the encoder's activations that is kept for the backward pass; the rest is computed
    again. Same gradient, less memory, up to a third more time."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between checkpoints; the end of the run always gets one."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints, beside the minutes; 0: by the minutes alone."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """How many of the newest checkpoints stay; two, so that one may turn out damaged."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints that stay for good; 0: none does."""
    log_steps: Count = 10
    """Steps between two logged ones."""


class Health(Table):
    """What is measured beside the loss. Nothing of it reaches the weights."""

    steps: Count = 100
    """Steps between two measurements of the effective ranks."""
    knn: str = ""
    """Labelled images to judge the encoder by (class folders or other labels); "": none."""
    knn_epochs: Count = 10
    """Epochs between two judgements."""


class Recipe(Table):
    """Everything that decides what a run computes, and how it is carried out."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data = Data()
    views: Annotated[tuple[View, ...], Field(min_length=2, max_length=64)] = (VIEW_A, VIEW_B)
    """Views of each image, two or more. The loss is the mean over all pairs of them in which one
    or both have full size."""
    network: Network = Network()
    loss: Loss = Loss()
    optim: Optim = Optim()
    run: Run = Run()
    health: Health = Health()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for i, view in enumerate(self.views):
            if view.size and not MIN_SIZE <= view.size <= self.data.image_size:
                raise ValueError(
                    f"views.{i}.size: {view.size} is not 0 or from {MIN_SIZE} to data.image_size"
                    f" {self.data.image_size}"
                )
            ranges = {"scale": view.scale, "ratio": view.ratio, "blur.sigma": view.blur.sigma}
            for name, (low, high) in ranges.items():
                if low > high:
                    raise ValueError(f"views.{i}.{name}: low {low} is above high {high}")
            if view.scale[1] > 1:
                raise ValueError(
                    f"views.{i}.scale: a crop cannot take {view.scale[1]} of the image"
                )
        if self.data.image_size not in self.view_sizes:
            raise ValueError(
                f"views: none has full size, data.image_size {self.data.image_size}: what small"
                " views are compared with"
            )
        micro, size = self.run.micro_batch, self.data.batch_size
        if micro and size % micro:
            raise ValueError(f"run.micro_batch {micro} does not divide data.batch_size {size}")
        if self.optim.lr == "auto" and self.optim.name != "lars":
            raise ValueError(f'optim.lr "auto" is known for lars, not for {self.optim.name}')
        if self.optim.warmup_epochs >= max(self.optim.epochs, 1) and self.optim.warmup_epochs > 0:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs} leaves nothing of"
                f" optim.epochs {self.optim.epochs}"
            )
        return self

    @property
    def view_sizes(self) -> tuple[int, ...]:
        """Pixels of each view's side."""
        return tuple(view.size or self.data.image_size for view in self.views)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The pairs of views that are compared: those in which one or both have full size."""
        full = [size == self.data.image_size for size in self.view_sizes]
        pairs = itertools.combinations(range(len(full)), 2)
        return tuple((i, j) for i, j in pairs if full[i] or full[j])

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps of one epoch of so many images."""
        return count_steps(images, self.data.batch_size)

    def steps(self, images: int) -> int:
        """Optimiser steps of a whole run on so many images."""
        return count_steps(images, self.data.batch_size, self.optim.epochs)

    @property
    def digest(self) -> str:
        """sha256 of what decides the result: everything but the bookkeeping."""
        return json_digest(self.decisive())

    def decisive(self) -> dict[str, object]:
        """Key path to value for every key that changes what is computed.

        Without keys that were `Added` later and have their default.
        """
        flat = dict(flatten(self.model_dump(mode="json")))
        unchanged = tuple(_unchanged_additions(self))
        return {
            key: value
            for key, value in flat.items()
            if key not in BOOKKEEPING and not f"{key}.".startswith(unchanged)
        }

    def to_toml(self) -> str:
        """The resolved recipe as TOML that `load` reads back to an equal value."""
        return "\n".join(toml_lines(self.model_dump(mode="json")))


def _unchanged_additions(table: Table, path: str = "") -> Iterator[str]:
    """Key paths, each with a dot behind it, of the `Added` keys that have their default."""
    for name, field in type(table).model_fields.items():
        value, key = getattr(table, name), f"{path}{name}."
        if value == field.default and any(isinstance(mark, Added) for mark in field.metadata):
            yield key
        elif isinstance(value, Table):
            yield from _unchanged_additions(value, key)
        elif isinstance(value, tuple):
            for i, entry in enumerate(value):
                if isinstance(entry, Table):
                    yield from _unchanged_additions(entry, f"{key}{i}.")


BOOKKEEPING = frozenset(
    {
        "data.max_bad",
        "data.threads",
        "health.knn",
        "health.knn_epochs",
        "health.steps",
        "run.checkpoint_minutes",
        "run.checkpoint_steps",
        "run.keep_every",
        "run.keep_last",
        "run.log_steps",
        "run.memory_budget",
    }
)
"""Keys that may change on a resume: none of them reaches the weights. `run.memory_budget` computes
the same operations again: the same bytes without a compiler, with one up to the rounding of how it
fuses them."""
ROUNDING = frozenset({"run.compile", "run.precision"})
"""Keys that decide only how numbers are rounded: a resume may change them on purpose, with
`--accept-change`."""
