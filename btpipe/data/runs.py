"""Loads of images through a DALI graph, one after the other, whatever a file does to the graph.

On a CPU the graph takes decoded images, so that no file can harm it (see `decoding`). On a GPU it
decodes: DALI raises on a bad file, names none, and promises nothing about the pipeline afterwards.
So every load in flight is kept until its output is out; after an error the pipeline is built anew,
the culprits are found one by one with the same decoder, the load is mended, and all go in again.
"""

import collections
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from nvidia.dali.backend import TensorListCPU, TensorListGPU

from btpipe.data import decoding, header, views
from btpipe.errors import MachineError

RUNS_AHEAD = 2
"""Loads that DALI works on at a time."""
_FRUITLESS_REBUILDS = 2
"""Errors in a row without a bad file, after which it is the machine that fails."""

Output = TensorListCPU | TensorListGPU


@dataclasses.dataclass(frozen=True)
class Load:
    """The images of one run: index rows, files, sizes they were drawn for, graph inputs.

    `files` are encoded bytes for a GPU, decoded images (height, width, 3) for a CPU.

    sizes (n, 2) are upright [height, width]. `number` tells the loads of one job apart.
    """

    number: int
    rows: NDArray[np.int64]
    files: list[NDArray[np.uint8]]
    sizes: NDArray[np.int64]
    inputs: views.Inputs

    @property
    def serials(self) -> NDArray[np.int64]:
        """(n, 1): a number for each sample that no other sample of the job has."""
        return (self.number << 32) + np.arange(len(self.rows), dtype=np.int64)[:, None]


def sizes_of(files: Sequence[NDArray[np.uint8]], listed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Upright [height, width] of files as a `Load` has them: (n, 2).

    A decoded image says it itself, an encoded one is as it was `listed`; where that was without a
    look at it (0), its header is read.
    """
    sizes = listed.copy()
    for i, file in enumerate(files):
        if file.ndim == 3:
            sizes[i] = file.shape[:2]
        elif not listed[i].all():
            content = file.tobytes()
            found = header.look(io.BytesIO(content), b"")
            sizes[i] = (1, 1) if isinstance(found, header.Refusal) else (found.height, found.width)
    return sizes


Mend = Callable[[Load, dict[int, str]], Load]
"""A load without its bad files: from position in the load to the reason."""
Resize = Callable[[Load, NDArray[np.int64]], Load]
"""The same load drawn for the sizes that its files really have."""


def run(
    loads: Iterator[Load],
    build: Callable[[], Pipeline],
    *,
    mend: Mend,
    resize: Resize,
    pool: Executor,
    gpu: int | None,
) -> Iterator[tuple[Load, list[Output]]]:
    """The outputs of every load but for serial and shape, in order; an empty load has none.

    Outputs are valid until the next one is asked for.

    Raises:
        MachineError: the graph fails again and again, and no file is to blame.
    """
    pipeline, fed, fruitless = build(), 0, 0
    flying: collections.deque[Load] = collections.deque()
    while True:
        flying.extend(itertools.islice(loads, RUNS_AHEAD - len(flying)))
        if not flying:
            return
        if not len(flying[0].rows):
            yield flying.popleft(), []
            fed = max(fed - 1, 0)
            continue
        try:
            for load in itertools.islice(flying, fed, None):
                _feed(pipeline, load)
                fed += 1
            *outputs, serials, shapes = pipeline.outputs()
        except RuntimeError as error:
            # On a CPU every file is decoded by then: no file is to blame.
            mended = gpu is not None and _mended(flying, mend, pool, gpu)
            fruitless = 0 if mended else fruitless + 1
            if fruitless >= _FRUITLESS_REBUILDS:
                fix = "try fewer threads or a smaller batch; the files themselves decode"
                raise MachineError(f"DALI failed: {last_words(error)}", fix=fix) from error
            pipeline, fed = build(), 0
            continue
        assert (serials.as_array() == flying[0].serials).all(), "DALI's outputs came out of step"
        sizes = shapes.as_array()[:, :2].astype(np.int64)
        if not np.array_equal(sizes, flying[0].sizes):
            flying[0] = resize(flying[0], sizes)
            pipeline, fed = build(), 0
            continue
        fruitless, fed = 0, fed - 1
        yield flying.popleft(), outputs


def last_words(error: Exception) -> str:
    """What DALI says behind its traceback, in one line."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _feed(pipeline: Pipeline, load: Load) -> None:
    """Starts a run; an empty load starts none."""
    if len(load.rows):
        pipeline.feed_input("image", load.files)
        pipeline.feed_input("serial", load.serials)
        for name, values in load.inputs.items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()


def _mended(flying: collections.deque[Load], mend: Mend, pool: Executor, gpu: int) -> bool:
    """Mends the first load in flight that has bad files; False where none has."""
    for i, load in enumerate(flying):
        contents = list(pool.map(lambda file: decoding.decode(file, gpu), load.files))
        bad = {position: c for position, c in enumerate(contents) if isinstance(c, str)}
        if bad:
            flying[i] = mend(load, bad)
            return True
    return False


def copied(output: Output) -> NDArray[np.uint8]:
    """An array of its own, (n, H, W, 3): DALI uses its buffers again."""
    array: NDArray[np.uint8] = output.as_cpu().as_array()
    return array if array.flags.owndata else array.copy()
