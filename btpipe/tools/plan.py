"""What a run of a recipe will cost here: a minute's probe on its own images, and the whole from it.

The training loop runs at a small batch and at the recipe's own, or at one that takes seconds: time
and memory are then taken as a constant and a share for each image. The loader alone and the step
alone say which of them binds.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from btpipe import artifact, progress
from btpipe.data.index import Index, build
from btpipe.errors import UsageError
from btpipe.events import Finished, Note, Report, TextTable
from btpipe.pretrain import network
from btpipe.recipe import Recipe
from btpipe.tools import plan_cases, plan_probes
from btpipe.tools.measured_process import Timing

SAMPLE_IMAGES = 4096
"""Of a folder of more than `MOST_IMAGES`, so many are looked at."""
MOST_IMAGES = 50_000
STATES = {"lars": 1, "sgd": 1, "adamw": 2}
"""Tensors as large as the weights that a checkpoint holds beside them."""
MEMORY = {"cpu": "memory of a process", "cuda": "GPU memory of a process"}
NOT_IN_MEMORY = (
    " GPU memory: the peak of torch and DALI together; the CUDA context, some hundred MiB, is"
    " beside it."
)
SPARE_MEMORY = 0.9
LARGE = 1.5
"""Shorter side of an image over a view's side, from which smaller shards pay."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run costs, and what of its recipe should change.

    `step` is of one process and its share of the batch, `peak_bytes` its memory: on "cuda" the
    GPU's, beyond the CUDA context; `free_bytes` is what it may use. `seconds` of the whole run are
    by the clock, `cpu_seconds` over all processes. `shorter_side`: mean pixels of the images.
    `exact`: the recipe's own batch was looked at.
    """

    device: plan_cases.Device
    images: int
    steps: int
    batch_size: int
    world_size: int
    step: Timing
    peak_bytes: int
    disk_bytes: int
    exact: bool
    rates: plan_probes.Rates
    seconds: float
    cpu_seconds: float
    free_bytes: int
    shorter_side: float
    advice: dict[str, int]
    hints: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Planned(Finished):
    """The plan of a recipe, and where its advice was written as one."""

    job = "plan"

    recipe: str
    plan: Plan
    written: Path | None

    @property
    def text(self) -> str:
        advice = (f"--set {key}={value}" for key, value in self.plan.advice.items())
        text = ", ".join(advice) or "nothing in the recipe needs to change"
        return f"{text}; {self.written} is written" if self.written else text

    def tables(self) -> list[TextTable]:
        """What was measured, and what it means for the run."""
        plan = self.plan
        expected = (
            ("images", f"{plan.images:,}"),
            ("steps", f"{plan.steps:,}"),
            ("processes", str(plan.world_size)),
            ("time", progress.duration(plan.seconds)),
            ("CPU time", progress.duration(plan.cpu_seconds)),
            (MEMORY[plan.device], f"{plan.peak_bytes / 2**30:.1f} GiB"),
            ("disk for checkpoints", f"{plan.disk_bytes / 2**30:.1f} GiB"),
        )
        how = "the recipe's own batch" if plan.exact else "the line through two smaller batches"
        note = f"From {how}. What several processes send each other is not in it."
        if plan.device == "cuda":
            note += NOT_IN_MEMORY
        note = "\n".join((note, *plan.hints))
        run = TextTable(f"A run of {self.recipe}", ("", "expected"), expected, note)
        return [_parts(plan), run]


def _parts(plan: Plan) -> TextTable:
    rates, both, share = plan.rates, plan.step, plan.batch_size / plan.world_size
    together = share / both.seconds, both.cpu_seconds / share
    rows = tuple(
        (name, f"{rate:.1f}", f"{1000 * cpu_seconds:.2f}")
        for name, rate, cpu_seconds in (
            ("loader alone", rates.loader, rates.loader_cpu),
            ("step alone", rates.step, rates.step_cpu),
            ("together, at the recipe's batch", *together),
        )
    )
    columns = ("part", "images/s", "CPU ms an image")
    return TextTable("One process, images a second", columns, rows)


def make(recipe: Recipe, on_event: Report, *, devices: int) -> Plan:
    """Looks at this machine with the recipe's own images.

    Raises:
        UsageError: no images are named, or fewer than a batch.
    """
    if not recipe.data.inputs:
        fix = "name the images: --data DIR, or --data synthetic:1281167x400 for drawn ones"
        raise UsageError("no images are named", where="data.train", fix=fix)
    device: plan_cases.Device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="btpipe-plan-") as scratch:
        path = Path(scratch, "index.parquet")
        total, sample = _listed(recipe, Path(scratch), on_event)
        sample.save(path)
        if total < recipe.data.batch_size:
            shortage = f"{total} images do not fill a batch of {recipe.data.batch_size}"
            raise UsageError(shortage, fix="add images, or set data.batch_size")
        share = recipe.data.batch_size // devices
        looks = plan_probes.take(recipe, path, device, min(share, len(sample)), on_event)
        rates = plan_probes.rates(recipe, path, device, looks[-1], on_event)
    return _plan(recipe, device, total, devices, looks, rates, sample)


def _listed(recipe: Recipe, scratch: Path, on_event: Report) -> tuple[int, Index]:
    """How many images there are, and those to look at."""
    listed, _ = build(recipe.data.inputs, on_event, depth="list")
    files = all(not source.is_container for source in listed.sources)
    if len(listed) > MOST_IMAGES and files:
        rows = np.linspace(0, len(listed) - 1, SAMPLE_IMAGES).round().astype(np.int64)
        names = [str(listed.file(int(row)).resolve()) for row in rows]
        file = scratch / "sample.txt"
        file.write_text("\n".join(names))
        text = f"{len(listed):,} images; {SAMPLE_IMAGES:,} of them are looked at"
        on_event(Note(text, {"images": len(listed), "sample": SAMPLE_IMAGES}))
        return len(listed), build(file, on_event)[0]
    index, _ = build(recipe.data.inputs, on_event)
    return len(index), index


def _plan(
    recipe: Recipe,
    device: plan_cases.Device,
    total: int,
    devices: int,
    taken: list[plan_probes.Look],
    rates: plan_probes.Rates,
    sample: Index,
) -> Plan:
    share = recipe.data.batch_size // devices
    steps = recipe.steps(total)
    seconds = plan_probes.at(share, [(look.images, look.turn.seconds) for look in taken])
    cpu_seconds = plan_probes.at(share, [(look.images, look.turn.cpu_seconds) for look in taken])
    peak_bytes = plan_probes.at(share, [(look.images, look.peak_bytes) for look in taken])
    with torch.device("meta"):
        weights = sum(p.numel() for p in network.BarlowTwins(recipe.network).parameters())
    one_bytes = 4 * weights * (1 + STATES[recipe.optim.name])
    disk_bytes = one_bytes * (recipe.run.keep_last + 1)
    if recipe.run.keep_every:
        disk_bytes += one_bytes * (steps // recipe.run.keep_every)
    free, shorter = _free_bytes(devices), float(np.minimum(sample.widths, sample.heights).mean())
    advice, hints = _advice(recipe, devices, taken, peak_bytes, rates, free, shorter)
    return Plan(
        device=device,
        images=total,
        steps=steps,
        batch_size=recipe.data.batch_size,
        world_size=devices,
        step=Timing(seconds, cpu_seconds),
        peak_bytes=int(peak_bytes),
        disk_bytes=disk_bytes,
        exact=taken[-1].images == share,
        rates=rates,
        seconds=steps * seconds,
        cpu_seconds=steps * cpu_seconds * devices,
        free_bytes=int(free),
        shorter_side=shorter,
        advice=advice,
        hints=hints,
    )


def _advice(
    recipe: Recipe,
    devices: int,
    taken: list[plan_probes.Look],
    peak_bytes: float,
    rates: plan_probes.Rates,
    free: float,
    shorter: float,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Keys that should change, and what else would help."""
    advice: dict[str, int] = {}
    hints: list[str] = []
    points = [(look.images, float(look.peak_bytes)) for look in taken]
    if peak_bytes > free and not recipe.run.micro_batch:
        size = recipe.data.batch_size
        fitting = [m for m in range(devices, size, devices) if size % m == 0]
        fitting = [m for m in fitting if plan_probes.at(m // devices, points) <= free]
        if fitting:
            advice["run.micro_batch"] = fitting[-1]
            hints.append(
                f"{peak_bytes / 2**30:.0f} GiB would be needed, {free / 2**30:.0f} are there:"
                f" run.micro_batch = {fitting[-1]} fits, for one more forward pass"
            )
    large = shorter > LARGE * recipe.data.image_size
    if rates.loader < rates.step and large:
        smaller = round(recipe.data.image_size / 0.875 * LARGE)
        hints.append(
            f"the loader binds, on images of {shorter:.0f} pixels: btpipe shard INPUT --out small"
            f" --size {smaller} makes them faster to decode"
        )
    elif rates.loader < rates.step:
        hints.append("the loader binds: more CPU cores would help, a faster GPU would not")
    return advice, tuple(hints)


def _free_bytes(devices: int) -> float:
    """Of one process: most of what a CUDA context leaves of a GPU, or its share of the memory."""
    if torch.cuda.is_available():
        return SPARE_MEMORY * torch.cuda.mem_get_info(0)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return SPARE_MEMORY * free / devices


def run(recipe: Recipe, name: str, on_event: Report, *, devices: int, write: Path | None) -> None:
    """Plans, reports, and writes what it advises as a recipe that extends this one.

    Raises:
        UsageError: no images, or `write` stands there already.
    """
    started = time.monotonic()
    if write is not None and write.exists():
        raise UsageError("stands there already", where=write, fix="choose another --write")
    plan = make(recipe, on_event, devices=devices)
    if write is not None:
        _write(recipe, plan, write)
    on_event(Planned(time.monotonic() - started, name, plan, write))


def _write(recipe: Recipe, plan: Plan, path: Path) -> None:
    """The resolved recipe with what the plan advises."""
    tables = recipe.model_dump(mode="json")
    for key, value in plan.advice.items():
        table, leaf = key.split(".")
        tables[table][leaf] = value
    advised = Recipe.model_validate_json(json.dumps(tables))
    head = f"# Planned for {plan.images:,} images: {progress.duration(plan.seconds)} expected.\n"
    artifact.write_file(path, (head + advised.to_toml() + "\n").encode())
