"""What the processes of a benchmark run: each function makes one action, ready to be repeated."""

import dataclasses
import functools
from typing import Literal, get_args

import torch
from torch import nn

from btpipe.pretrain import loss, network, optim, schedule, step
from btpipe.recipe import Data, Network, Recipe, Run
from btpipe.recipe.tables import Backbone
from btpipe.reference import barlow_twins
from btpipe.tools.measured_process import PeakMemory, Prepared

TINY = (4, 16)  # N, D of the first call, which loads code that is no one's memory
SINGLE_BYTES = 4

Device = Literal["cpu", "cuda"]
CorePrecision = Literal["fp32", "bf16"]
CORE_PRECISIONS: tuple[CorePrecision, ...] = get_args(CorePrecision)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a step is measured at: `batch` pairs of views of `image_size` pixels, three layers of
    `dimension` behind the backbone."""

    backbone: Backbone
    image_size: int
    batch: int
    dimension: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of the projector's layers."""
        return (self.dimension,) * 3

    def recipe(self, run: Run | None = None) -> Recipe:
        """The recipe of such a step: every number else is its default."""
        return Recipe(
            data=Data(batch_size=self.batch, image_size=self.image_size),
            network=Network(backbone=self.backbone, projector=self.widths),
            run=run or Run(),
        )


def published_step(device: Device, sizes: Sizes, precision: barlow_twins.Precision) -> Prepared:
    """The eager step of the published formulation."""
    torch_device = torch.device(device)
    memory = PeakMemory(torch_device)
    recipe = sizes.recipe()
    torch.manual_seed(recipe.seed)
    model = barlow_twins.Network(sizes.backbone, sizes.widths, recipe.loss.lambd).to(torch_device)
    trainer = barlow_twins.Trainer(model, _looped_lars(recipe, model), precision)
    views = _views(torch_device, sizes)
    lr, bias_lr = _rates(recipe)
    return Prepared(functools.partial(trainer.step, *views, lr, bias_lr), memory)


def core_step(device: Device, sizes: Sizes, precision: CorePrecision, compiled: bool) -> Prepared:
    """This core's step, as `btpipe pretrain` runs it."""
    torch_device = torch.device(device)
    memory = PeakMemory(torch_device)
    recipe = sizes.recipe(Run(precision=precision, compile="on" if compiled else "off"))
    core = step.build(recipe, torch_device)
    if compiled:
        step.compile(core)
    views = _views(torch_device, sizes)
    lr, bias_lr = _rates(recipe)
    return Prepared(functools.partial(step.update, core, views, lr, bias_lr), memory)


def published_loss(device: Device, count: int, dimension: int) -> Prepared:
    """The D x D loss and autograd's gradient, of (N, D) embeddings."""
    torch_device = torch.device(device)
    lambd = Recipe().loss.lambd

    def backward(criterion: nn.Module, z1: torch.Tensor, z2: torch.Tensor) -> None:
        z1.grad = z2.grad = None
        criterion(z1, z2).backward()

    backward(barlow_twins.Loss(TINY[1], lambd).to(torch_device), *_embeddings(torch_device, *TINY))
    embeddings = _embeddings(torch_device, count, dimension)
    memory = PeakMemory(torch_device, beside_bytes=_bytes_of(embeddings))
    criterion = barlow_twins.Loss(dimension, lambd).to(torch_device)
    return Prepared(functools.partial(backward, criterion, *embeddings), memory)


def core_loss(device: Device, count: int, dimension: int, form: loss.Form) -> Prepared:
    """This core's loss with its gradient in closed form, of (N, D) embeddings."""
    torch_device = torch.device(device)
    lambd = Recipe().loss.lambd
    loss.value_and_gradient(_embeddings(torch_device, *TINY), lambd, form)
    embeddings = _embeddings(torch_device, count, dimension)
    memory = PeakMemory(torch_device, beside_bytes=_bytes_of(embeddings))
    return Prepared(functools.partial(loss.value_and_gradient, embeddings, lambd, form), memory)


def published_lars(device: Device, sizes: Sizes) -> Prepared:
    """LARS in a loop over the parameters of a network, with gradients at hand."""
    torch_device = torch.device(device)
    memory = PeakMemory(torch_device)
    recipe = sizes.recipe()
    model = _with_gradients(network.initialise(recipe).to(torch_device))
    optimizer = _looped_lars(recipe, model)
    optim.set_rates(optimizer, *_rates(recipe))
    return Prepared(optimizer.step, memory)


def core_lars(device: Device, sizes: Sizes) -> Prepared:
    """This core's LARS, on the same parameters and gradients."""
    torch_device = torch.device(device)
    memory = PeakMemory(torch_device)
    recipe = sizes.recipe()
    model = _with_gradients(network.initialise(recipe).to(torch_device))
    optimizer = optim.build(recipe.optim, model)
    optim.set_rates(optimizer, *_rates(recipe))
    return Prepared(optimizer.step, memory)


def _looped_lars(recipe: Recipe, model: nn.Module) -> barlow_twins.LARS:
    settings = recipe.optim
    return barlow_twins.optimizer_for(model, settings.weight_decay, settings.momentum, settings.eta)


def _rates(recipe: Recipe) -> tuple[float, float]:
    """The peak rates of the weights and of biases and batch norm."""
    scale = recipe.data.batch_size / 256
    lr = schedule.base_lr(recipe.optim, recipe.data.batch_size)
    return lr * scale, recipe.optim.bias_lr * scale


def _views(device: torch.device, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of random pixels, as the loader hands them out: (N, H, W, 3) uint8 each."""
    shape = (2, sizes.batch, sizes.image_size, sizes.image_size, 3)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    return pixels[0], pixels[1]


def _embeddings(
    device: torch.device, count: int, dimension: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(count, dimension, generator=generator).to(device) for _ in range(2))
    return z1.requires_grad_(), z2.requires_grad_()


def _bytes_of(embeddings: tuple[torch.Tensor, torch.Tensor]) -> int:
    """What the gradients of embeddings take."""
    return sum(z.numel() * SINGLE_BYTES for z in embeddings)


def _with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model
