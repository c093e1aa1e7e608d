"""What a compiler costs before the first step: with an empty cache, and at a second start."""

import multiprocessing
import tempfile
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from benchmarks.step_cases import Device, Sizes
from btpipe import runtime
from btpipe.errors import MachineError
from btpipe.events import TextTable
from btpipe.pretrain import step
from btpipe.recipe import Run
from btpipe.tools import measured_process


def cache_table(sizes: Sizes, device: Device) -> TextTable:
    """Seconds of the first compiled step, twice, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="btpipe-compile-") as folder:
        first, again = (first_step_seconds(sizes, device, Path(folder)) for _ in range(2))
    rows = (
        ("cache empty", "1.00", f"{first:.1f}"),
        ("cache filled: a second start", f"{first / again:.2f}", f"{again:.1f}"),
    )
    title = f"The first compiled step: {sizes.backbone} at {sizes.image_size}, {sizes.batch} pairs"
    note = "By the clock, compiler and step together; imports and building left out."
    return TextTable(title, ("compiled", "times faster", "seconds"), rows, note)


def first_step_seconds(sizes: Sizes, device: Device, cache: Path) -> float:
    """Seconds of the first compiled step of a new process that keeps its code in `cache`.

    Raises:
        MachineError: the process ended, for want of memory or of a compiler.
    """
    context = multiprocessing.get_context("spawn")
    seconds: SimpleQueue[float] = context.SimpleQueue()
    process = context.Process(target=_first_step, args=(seconds, sizes, device, cache))
    process.start()
    process.join()
    if process.exitcode:
        fix = "see its traceback above; -9: too little memory, take smaller sizes"
        raise MachineError(f"compiling ended with exit code {process.exitcode}", fix=fix)
    return seconds.get()


def _first_step(seconds: "SimpleQueue[float]", sizes: Sizes, device: Device, cache: Path) -> None:
    runtime.keep_compiled_code(cache)
    measured_process.compute_as_pretrain()
    core = step.build(sizes.recipe(Run(compile="on")), torch.device(device))
    step.compile(core)
    shape = (2, sizes.batch, sizes.image_size, sizes.image_size, 3)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    started = time.perf_counter()
    outcome = step.update(core, [*views], 0.1, 0.01)
    float(outcome.terms.on_diagonal)
    seconds.put(time.perf_counter() - started)
