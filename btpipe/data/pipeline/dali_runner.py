"""Loads of decoded images through a DALI graph, some of them ahead, each output with its load."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from nvidia.dali.backend import TensorListCPU, TensorListGPU

from btpipe.data.pipeline import dali_graphs
from btpipe.data.pipeline.decode import Pixels
from btpipe.errors import MachineError

RUNS_AHEAD = 2
"""Loads that DALI works on at a time."""
_TRIES = 2
"""Of a load: DALI may fail for the machine's reasons, no file is left to blame."""

Output = TensorListCPU | TensorListGPU


@dataclasses.dataclass(frozen=True)
class DaliBatch:
    """The images of one run of the graph: index rows, pixels, and what the graph takes beside them.

    `number` tells the loads of one job apart.
    """

    number: int
    rows: NDArray[np.int64]
    images: list[Pixels]
    inputs: dali_graphs.Inputs

    @property
    def serials(self) -> NDArray[np.int64]:
        """(n, 1): a number for each sample that no other sample of the job has."""
        return (self.number << 32) + np.arange(len(self.rows), dtype=np.int64)[:, None]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Upright [height, width] of each image: (n, 2)."""
        return sizes_of(self.images)


def sizes_of(images: list[Pixels]) -> NDArray[np.int64]:
    """Upright [height, width] of decoded images: (n, 2)."""
    return np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)


def run(
    loads: Iterator[DaliBatch], build: Callable[[], Pipeline], stream: int | None = None
) -> Iterator[tuple[DaliBatch, list[Output]]]:
    """The outputs of every load but for the serials, in order; an empty load has none.

    `stream`: of the images, where they lie in the memory of a GPU. Outputs are valid until the next
    one is asked for.

    Raises:
        MachineError: the graph fails again and again.
    """
    pipeline, feed_count, tries = build(), 0, 0
    in_flight: collections.deque[DaliBatch] = collections.deque()
    while True:
        in_flight.extend(itertools.islice(loads, RUNS_AHEAD - len(in_flight)))
        if not in_flight:
            return
        if not len(in_flight[0].rows):
            yield in_flight.popleft(), []
            feed_count = max(feed_count - 1, 0)
            continue
        try:
            for load in itertools.islice(in_flight, feed_count, None):
                _feed(pipeline, load, stream)
                feed_count += 1
            *outputs, serials = pipeline.outputs()
        except RuntimeError as error:
            tries += 1
            if tries == _TRIES:
                fix = "try fewer threads or a smaller batch; the files themselves decode"
                raise MachineError(f"DALI failed: {last_words(error)}", fix=fix) from error
            pipeline, feed_count = build(), 0
            continue
        assert (serials.as_array() == in_flight[0].serials).all(), "DALI's outputs came out of step"
        tries, feed_count = 0, feed_count - 1
        yield in_flight.popleft(), outputs


def last_words(error: Exception) -> str:
    """What DALI says behind its traceback, in one line."""
    text = str(error).partition("encountered:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _feed(pipeline: Pipeline, load: DaliBatch, stream: int | None) -> None:
    """Starts a run; an empty load starts none."""
    if len(load.rows):
        pipeline.feed_input("image", load.images, cuda_stream=stream)
        pipeline.feed_input("serial", load.serials)
        for name, values in load.inputs.items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()


def copied(output: Output) -> NDArray[np.uint8]:
    """An array of its own, (n, H, W, 3): DALI uses its buffers again."""
    array: NDArray[np.uint8] = output.as_cpu().as_array()
    return array if array.flags.owndata else array.copy()
