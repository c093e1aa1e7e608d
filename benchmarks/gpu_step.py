"""Stages of `benchmarks.gpu`: how fast a training step is, and a run from files to checkpoints."""

import dataclasses
import time
import traceback
from collections.abc import Sequence
from typing import Literal

import torch

from benchmarks import step_cases
from benchmarks.stage import (
    CommandResult,
    btpipe,
    compile_setting,
    device,
    judged,
    print_result,
    recipe_of,
    synchronize,
)
from benchmarks.workspace import PROJECT, Workspace
from btpipe.pretrain import nonfinite, norm, step
from btpipe.recipe import Recipe

WARM_UPS = 3
LR, BIAS_LR = 0.1, 0.01
STOPPED = 75
PROFILED_STEPS = 3

Views = Sequence[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step's milliseconds, on the GPU between events and of the host's thread; GiB at most."""

    gpu_ms: float
    host_ms: float
    peak_gib: float


def stage_resnet(workspace: Workspace) -> None:
    """ResNet-50 at 224 pixels, batch 256: compiled, eager, and the published step."""
    file, batch = "imagenet-1gpu.toml", "data.batch_size=256"
    with judged() as require:
        try:
            name = "ResNet-50, compiled"
            core, views = _measure(name, workspace, file, batch, compile_setting(workspace))
            _profile(core, views, workspace, "resnet")
            del core, views
        except Exception:  # what the compiler cannot do must not cost the other numbers
            print(traceback.format_exc(), flush=True)
            require(False, "the compiled step failed")
        _free()
        _measure("ResNet-50, eager", workspace, file, batch, "run.compile=off", steps=5)
        _free()
        _published(workspace)


def _published(workspace: Workspace) -> None:
    sizes = step_cases.Sizes("resnet18", 32, 8, 64) if workspace.small else _published_sizes()
    kind: Literal["cpu", "cuda"] = "cuda" if device().type == "cuda" else "cpu"
    prepared = step_cases.published_step(kind, sizes, "fp16" if kind == "cuda" else "fp32")
    for _ in range(WARM_UPS):
        prepared.action()
    synchronize()
    started, steps = time.perf_counter(), 5
    for _ in range(steps):
        prepared.action()
    synchronize()
    pairs = steps * sizes.batch / (time.perf_counter() - started)
    print_result("published step, eager, fp16 on a GPU", pairs_per_second=round(pairs))


def _published_sizes() -> step_cases.Sizes:
    return step_cases.Sizes("resnet50", 224, 256, 8192)


def stage_cifar(workspace: Workspace) -> None:
    """ResNet-18 at 32 pixels, where the host may be what binds."""
    compiled = compile_setting(workspace)
    for batch in (128, 512):
        size = f"data.batch_size={batch}"
        name = f"ResNet-18 at 32 pixels, batch {batch}, compiled"
        core, views = _measure(name, workspace, "cifar10.toml", size, compiled, steps=30)
        if batch == 128:
            _profile(core, views, workspace, "cifar")
    name = "ResNet-18 at 32 pixels, batch 128, eager"
    _measure(name, workspace, "cifar10.toml", "data.batch_size=128", "run.compile=off", steps=30)


def stage_grouped(workspace: Workspace) -> None:
    """The step with the statistics of both views in one pass, as several ranks have them."""
    plain = norm.ViewBatchNorm.forward

    def forward(self: norm.ViewBatchNorm, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return plain(self, x)
        if self.num_batches_tracked is not None and self.tracking:
            self.num_batches_tracked.add_(self.views)
        return self._across_replicas(x)

    # Of this process alone.
    norm.ViewBatchNorm.forward = forward  # type: ignore[method-assign]
    sizes = ("data.batch_size=256", compile_setting(workspace))
    _measure("ResNet-50, compiled, one pass", workspace, "imagenet-1gpu.toml", *sizes)


def _measure(
    name: str, workspace: Workspace, file: str, *overrides: str, steps: int = 10
) -> tuple[step.Core, Views]:
    """Tells of a step as `pretrain` takes it, on pixels that are on the device."""
    run_recipe = recipe_of(workspace, file, *overrides)
    on = device()
    torch.backends.cudnn.benchmark = True  # as runtime.start
    core = step.build(run_recipe, on)
    if core.compiled:
        step.compile(core)
    views = _views(run_recipe, on)
    started = time.perf_counter()
    float(step.update(core, views, LR, BIAS_LR).terms.on_diagonal)
    first = time.perf_counter() - started
    timing = _timed(core, views, 2 if workspace.small else steps)
    batch = run_recipe.data.batch_size
    print_result(
        f"{name}, batch {batch}, {core.precision}",
        pairs_per_second=round(1000 * batch / timing.gpu_ms),
        gpu_ms=round(timing.gpu_ms, 2),
        host_ms=round(timing.host_ms, 2),
        peak_GiB=round(timing.peak_gib, 2),
        first_step_seconds=round(first, 1),
    )
    return core, views


def _views(run_recipe: Recipe, on: torch.device) -> Views:
    shape = (run_recipe.data.batch_size, *2 * (run_recipe.data.image_size,), 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, device=on) for _ in range(2)]


def _timed(core: step.Core, views: Views, steps: int) -> Measured:
    watch = nonfinite.Watch()
    for i in range(WARM_UPS):
        watch.stepped(i, step.update(core, views, LR, BIAS_LR).flags, core.scale)
    synchronize()
    on_gpu = core.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host, started = 0.0, time.perf_counter()
    for i in range(steps):
        before = time.perf_counter()
        outcome = step.update(core, views, LR, BIAS_LR)
        host += time.perf_counter() - before
        watch.stepped(i, outcome.flags, core.scale)
    synchronize()
    # Many steps without a wait between them: the clock is the GPU's time.
    milliseconds = 1000 * (time.perf_counter() - started) / steps
    peak = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0
    return Measured(milliseconds, 1000 * host / steps, peak)


def _profile(core: step.Core, views: Views, workspace: Workspace, name: str) -> None:
    """The kernels of some steps, in a file; which share of the time a kernel runs."""
    if workspace.small or device().type != "cuda":
        return  # the profiler wants a real driver
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(PROFILED_STEPS):
            step.update(core, views, LR, BIAS_LR)
        synchronize()
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
    print(table)
    kernels = [
        event for event in profiler.events() or [] if str(event.device_type).endswith("CUDA")
    ]
    if kernels:
        span = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels)
        busy = sum(e.time_range.end - e.time_range.start for e in kernels)
        launched = round(len(kernels) / PROFILED_STEPS)
        print_result(f"{name}, kernels", a_step=launched, share_of_the_time=round(busy / span, 3))


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stage_pretrain(workspace: Workspace) -> None:
    """`btpipe pretrain recipes/imagenet.toml` on drawn images: SIGTERM, and the same command."""
    first, again = (15.0, 15.0) if workspace.small else (50.0, 25.0)
    with judged() as require:
        before = pretrain(workspace, first)
        _print_run("pretrain, first start", before)
        require(before.code == STOPPED, f"SIGTERM gave exit code {before.code}")
        after = pretrain(workspace, again)
        _print_run("pretrain, the same command again", after)
        require(after.code == STOPPED, f"SIGTERM gave exit code {after.code}")
        saved = [int(str(event["step"])) for event in before.of("CheckpointSaved")]
        started = [int(str(event["step"])) for event in after.of("RunStarted")]
        require(bool(saved) and started == saved[-1:], f"saved at {saved}, began at {started}")


def pretrain(workspace: Workspace, seconds: float) -> CommandResult:
    """As the README types it, in the work folder."""
    settings = [f"data.train={workspace.jpegs}", "optim.epochs=4000", "run.log_steps=5"]
    settings += ["data.batch_size=512", *workspace.sizes]
    settings += [compile_setting(workspace)]
    words = [word for setting in settings for word in ("--set", setting)]
    recipe = str(PROJECT / "recipes" / "imagenet.toml")
    return btpipe("pretrain", recipe, *words, folder=workspace.work, seconds=seconds)


def _print_run(name: str, result: CommandResult) -> None:
    steps = result.of("StepDone")
    last = steps[-1] if steps else {}
    print_result(
        name,
        exit_code=result.code,
        images_per_second=[round(float(str(s["images_per_second"]))) for s in steps[-3:]],
        data_wait=[round(float(str(s["data_wait"])), 3) for s in steps[-3:]],
        loss=last.get("loss"),
        step=last.get("step"),
        compile_seconds=[round(float(str(e["seconds"])), 1) for e in result.of("Compiled")],
    )
