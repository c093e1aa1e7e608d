"""Whether this machine computes what the method is: each part against the published formulation.

On the device at hand and on two processes of the CPU, for new hardware, a new torch, or a doubt; in
under a minute on a CPU, in some minutes on a GPU, for which it compiles.
"""

import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from btpipe import runtime
from btpipe.events import Report
from btpipe.pretrain import loss, network, optim, schedule, step
from btpipe.recipe import Data, Loss, Optim, Recipe, Run
from btpipe.reference import barlow_twins
from btpipe.tools import selftest_stages, tiny_recipe
from btpipe.tools.selftest_checks import Check, SelfTested, difference, relative, require, worst

EXACT = 1e-10
"""float64 against float64, relative to the largest value: only the order of sums differs."""
RANKS = 1e-12
"""The same over one and two processes of one CPU."""
SINGLE = 1e-4
"""float32 sums of up to 256 x 256 terms against float64, relative to the largest value."""
SHAPES = ((48, 24), (32, 64), (64, 256))
"""N, D of the loss: more images than dimensions, and fewer."""
STEPS, TRIES = 3, 12
"""Updates that a precision must make, and may need for it."""
SCALE = 256.0
"""fp16's loss scale to begin with: a run's own 65536 is halved many times first."""


def run(on_event: Report) -> None:
    """Checks everything and reports it.

    Raises:
        NumericsError: a check failed.
    """
    started = time.perf_counter()
    with runtime.start() as process:
        checks = [
            *loss_checks(process.device),
            *lars_checks(process.device),
            *schedule_checks(),
            *step_checks(process.device),
            masked_check(process.device),
            *selftest_stages.checks(process.device),
        ]
    checks += rank_checks()
    name = torch.cuda.get_device_name() if process.device.type == "cuda" else "CPU"
    seconds = time.perf_counter() - started
    on_event(SelfTested(seconds, tuple(checks), name, torch.__version__))
    require(checks)


def loss_checks(device: torch.device) -> list[Check]:
    """Value and gradient in both forms against autograd through the D x D matrix in float64."""
    about = "loss and gradient against autograd, relative"
    checks = []
    forms: tuple[loss.Form, ...] = ("gram", "cross")
    for form in forms:
        for where, dtype, tolerance in (
            (torch.device("cpu"), torch.float64, EXACT),
            (device, torch.float32, SINGLE),
        ):
            error = worst(_loss_error(form, *shape, where, dtype) for shape in SHAPES)
            name = f"loss, {form}, {_short(dtype)} on {where.type}"
            checks.append(Check(name, error, tolerance, about))
    return checks


def _loss_error(
    form: loss.Form, count: int, dimension: int, device: torch.device, dtype: torch.dtype
) -> float:
    lambd = Recipe().loss.lambd
    generator = torch.Generator().manual_seed(count)
    shape = (2, count, dimension)
    drawn = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1
    # The same numbers for both, so that only the computation differs.
    drawn[1] += drawn[0]
    drawn = drawn.to(dtype).double()
    z1, z2 = (z.clone().requires_grad_() for z in drawn)
    value = barlow_twins.Loss(dimension, lambd).double()(z1, z2)
    value.backward()
    assert z1.grad is not None
    assert z2.grad is not None
    inputs = drawn.to(device, dtype)
    terms, (gradient1, gradient2) = loss.value_and_gradient([*inputs], lambd, form)
    return worst(
        (
            difference(terms.total(lambd), value.detach()),
            difference(gradient1, z1.grad),
            difference(gradient2, z2.grad),
        )
    )


def lars_checks(device: torch.device) -> list[Check]:
    """Six updates against the loop over parameters in float64."""
    about = "weights after six updates against the loop, relative"
    return [
        Check(f"LARS, {_short(dtype)} on {where.type}", _lars_error(where, dtype), tolerance, about)
        for where, dtype, tolerance in (
            (torch.device("cpu"), torch.float64, EXACT),
            (device, torch.float32, SINGLE),
        )
    ]


def _lars_error(device: torch.device, dtype: torch.dtype) -> float:
    settings = Optim(weight_decay=0.01)  # large, so that leaving it out shows
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        looped = network.projector((256, 256, 64), 128).double()
    with torch.no_grad():
        next(looped.parameters()).zero_()  # a norm of zero has a rule of its own
    ours = copy.deepcopy(looped).to(device, dtype)
    foreach = optim.build(settings, ours)
    loop = barlow_twins.optimizer_for(
        looped, settings.weight_decay, settings.momentum, settings.eta
    )
    generator = torch.Generator().manual_seed(0)
    for turn in range(1, 7):
        for group, rate in zip(loop.param_groups, (0.2 * turn, 0.005 * turn), strict=True):
            group["lr"] = rate
        optim.set_rates(foreach, 0.2 * turn, 0.005 * turn)
        for mine, theirs in zip(ours.parameters(), looped.parameters(), strict=True):
            drawn = torch.randn(theirs.shape, generator=generator).to(dtype)
            mine.grad, theirs.grad = drawn.to(device, copy=True), drawn.double()
        foreach.step()
        loop.step()
    pairs = zip(ours.parameters(), looped.parameters(), strict=True)
    return worst(difference(mine.detach(), theirs.detach()) for mine, theirs in pairs)


def schedule_checks() -> list[Check]:
    """Both rates at every step of three runs."""
    settings = Optim(warmup_epochs=2, epochs=20)
    errors = []
    for steps_per_epoch, batch_size in ((1, 256), (7, 128), (50, 2048)):
        described = Recipe(data=Data(batch_size=batch_size), optim=settings)
        images = steps_per_epoch * batch_size
        for at in range(described.steps(images)):
            ours = schedule.rates(described, at, images)
            theirs = barlow_twins.learning_rates(
                at,
                epochs=settings.epochs,
                warmup_epochs=settings.warmup_epochs,
                steps_per_epoch=steps_per_epoch,
                batch_size=batch_size,
                lr=schedule.base_lr(settings, batch_size),
                bias_lr=settings.bias_lr,
                final_ratio=settings.final_lr_ratio,
            )
            errors += [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return [Check("schedule", worst(errors), EXACT, "rates of three runs, absolute")]


def step_checks(device: torch.device) -> list[Check]:
    """A few steps of a small network in every precision: finite, and the weights move."""
    about = "weights not finite, or not moved, after 3 updates"
    precisions: tuple[runtime.Precision, ...] = ("fp32", "bf16", "fp16")
    return [
        Check(f"step, {precision} on {device.type}", _faulty(device, precision), 0, about)
        for precision in precisions
    ]


def _faulty(device: torch.device, precision: runtime.Precision) -> float:
    """How many weights did not move, or are not finite, after `STEPS` updates.

    In fp16 the loss scale is halved until nothing overflows, and those updates are left out.
    """
    core = step.build(tiny_recipe.recipe(Run(precision=precision)), device)
    if core.scale:
        core.scale.scale.fill_(SCALE)
    weights = [p for p in core.network.parameters() if p.ndim > 1]
    before = [weight.detach().clone() for weight in weights]
    views = tiny_recipe.views().to(device)
    left_out, value = 0.0, math.nan
    for turn in range(1, TRIES + 1):
        outcome = step.update(core, [*views], 0.1, 0.01)
        left_out += float(outcome.flags.found_inf)
        value = float(outcome.terms.total(core.recipe.loss.lambd))
        if turn - left_out == STEPS:
            break
    moved = [
        bool(torch.isfinite(now).all()) and not torch.equal(now, then)
        for now, then in zip(weights, before, strict=True)
    ]
    finished = turn - left_out == STEPS and math.isfinite(value)
    return float(moved.count(False)) if finished else math.nan


def masked_check(device: torch.device) -> Check:
    """An update whose gradient overflows: weights and momenta stay as they are, bit for bit."""
    overflowing = tiny_recipe.recipe(Run(precision="fp32"), Loss(scale=1e300))
    core = step.build(overflowing, device)
    before = [parameter.detach().clone() for parameter in core.network.parameters()]
    views = tiny_recipe.views().to(device)
    flags = step.update(core, [*views], 0.1, 0.01).flags
    after = [parameter.detach() for parameter in core.network.parameters()]
    changed = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    changed += not bool(flags.found_inf)
    about = "parameters that an update that is not finite changed"
    return Check(f"masked update on {device.type}", float(changed), 0, about)


def rank_checks() -> list[Check]:
    """The gradient of one batch on one process and on several, of the CPU and of all GPUs."""
    checks = [_rank_check(2, "cpu", RANKS)]
    gpus = torch.cuda.device_count()
    if gpus > 1:
        checks.append(_rank_check(gpus, "auto", EXACT))
    return checks


def _rank_check(ranks: int, on: Literal["auto", "cpu"], tolerance: float) -> Check:
    with tempfile.TemporaryDirectory(prefix="btpipe-selftest-") as folder:
        paths = Path(folder) / "one.safetensors", Path(folder) / "several.safetensors"
        write_gradients(paths[0], tiny_recipe.BATCH * ranks, on)
        runtime.launch(ranks, write_gradients, (paths[1], tiny_recipe.BATCH * ranks, on))
        one, several = map(load_file, paths)
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    apart = worst(float((several[name] - one[name]).abs().max()) for name in one)
    where = "CPU processes" if on == "cpu" else "GPUs"
    about = "gradient of the same batch on 1 and several ranks, float64, relative"
    return Check(f"ranks, 1 and {ranks} {where}", relative(apart, largest), tolerance, about)


def write_gradients(path: Path, batch: int, on: Literal["auto", "cpu"]) -> None:
    """Runs on every rank: the summed gradient of its rows of the batch; the first one writes it."""
    with runtime.start(on) as process:
        # Plain SGD leaves the gradients as they are.
        described = tiny_recipe.recipe(Run(precision="fp64"), batch=batch)
        described = described.model_copy(update={"optim": Optim(name="sgd")})
        core = step.build(described, process.device)
        views = (
            tiny_recipe.views(batch)
            .chunk(process.world_size, dim=1)[process.rank]
            .to(process.device)
        )
        step.update(core, [*views], 0.0, 0.0)
        if process.is_first:
            named = core.network.named_parameters()
            save_file({n: p.grad.contiguous() for n, p in named if p.grad is not None}, path)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
