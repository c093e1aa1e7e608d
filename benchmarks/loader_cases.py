"""What the processes of `bench loader` run: each function makes an action that can be repeated."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from btpipe.data.index import Index, open_index
from btpipe.data.pipeline import augment_params, dali_graphs, dali_runner, decode
from btpipe.data.pipeline.train_loader import ENDLESS, LoaderSettings, TrainingLoader
from btpipe.events import ignore
from btpipe.pretrain import network
from btpipe.recipe import VIEW_A, VIEW_B
from btpipe.reference import augmentations
from btpipe.tools import plan_cases
from btpipe.tools.measured_process import PeakMemory, Prepared

GPU = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class LoaderWork:
    """What a turn does: `batches` of `batch` pairs of `image_size` pixels, by `workers`.

    `index` is the index's file: each process opens it itself.
    """

    index: Path
    batch: int
    batches: int
    image_size: int
    workers: int

    def settings(self, steps: int) -> LoaderSettings:
        """The first `steps` batches, in the published views."""
        return LoaderSettings(
            seed=0,
            views=(VIEW_A, VIEW_B),
            view_sizes=(self.image_size, self.image_size),
            batch_size=self.batch,
            steps=steps,
            threads=self.workers,
        )


def published_loader(work: LoaderWork) -> Prepared:
    """The published transform in a DataLoader with `workers` processes."""
    index = open_index(work.index)
    pairs = augmentations.Pairs(index, work.image_size)
    batches = [rows.tolist() for rows in rows_of(work, index)]

    def action() -> None:
        for _ in augmentations.loader(pairs, batches, work.workers):
            pass

    return _prepared(action)


def core_loader(work: LoaderWork, normalised: bool) -> Prepared:
    """The loader that `pretrain` uses, on the same images; `normalised` adds the step's cast."""
    index = open_index(work.index)

    def action() -> None:
        with _open(work, index, torch.device("cpu")) as loader:
            for batch in loader:
                if normalised:
                    for view in batch.views:
                        network.normalise(view, torch.float32)

    return _prepared(action)


def published_gpu_loader(work: LoaderWork) -> Prepared:
    """`published_loader`, each batch copied to the GPU from pinned memory."""
    index = open_index(work.index)
    pairs = augmentations.Pairs(index, work.image_size)
    batches = [rows.tolist() for rows in rows_of(work, index)]

    def action() -> None:
        for batch in augmentations.loader(pairs, batches, work.workers, pinned=True):
            [view.to(GPU, non_blocking=True) for view in batch]

    return Prepared(action, PeakMemory(GPU), work.batches)


def core_gpu_loader(work: LoaderWork, normalised: bool) -> Prepared:
    """The loader that `pretrain` uses on a GPU, `batches` more batches in each action."""
    memory = PeakMemory(GPU)
    supply = plan_cases.supply(work.settings(ENDLESS), work.index, GPU)

    def action() -> None:
        for batch in itertools.islice(supply, work.batches):
            if normalised:
                [network.normalise(view, torch.float32) for view in batch.views]

    return Prepared(action, memory, work.batches)


def batch_decode(work: LoaderWork) -> Prepared:
    """A batch through the decoder that `pretrain` uses on a GPU."""
    memory = PeakMemory(GPU)
    files = [np.frombuffer(content, dtype=np.uint8) for content in _contents(work)]
    decoder = decode.batch_decoder(0, work.workers)
    stream = torch.cuda.ExternalStream(decoder.stream)  # type: ignore[no-untyped-call]

    def action() -> None:
        contents = (decode.parse(file) or decode.decode(file) for file in files)
        decoder.decode([content for content in contents if not isinstance(content, str)])
        stream.synchronize()

    return Prepared(action, memory)


def gpu_decode(work: LoaderWork, hw_decoder_load: float | None) -> Prepared:
    """A batch through DALI's decoder for a GPU; None decodes on the CPU and copies to the GPU.

    `hw_decoder_load`: the share of a batch that the hardware decoder takes, where there is one.
    """
    files = [np.frombuffer(content, dtype=np.uint8) for content in _contents(work)]

    def graph() -> DataNode:
        encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8)
        if hw_decoder_load is None:
            return fn.decoders.image(encoded, device="cpu", output_type=types.RGB).gpu()
        return fn.decoders.image(
            encoded, device="mixed", output_type=types.RGB, hw_decoder_load=hw_decoder_load
        )

    define = pipeline_def(
        graph, batch_size=len(files), num_threads=work.workers, device_id=0, prefetch_queue_depth=1
    )
    pipeline = define()

    def action() -> None:
        pipeline.feed_input("encoded", files)
        pipeline.schedule_run()
        pipeline.outputs()

    return Prepared(action, PeakMemory(GPU))


def published_decode(work: LoaderWork) -> Prepared:
    """Pillow's decoder, one file after the other, in one thread."""
    contents = _contents(work)

    def action() -> None:
        for content in contents * work.batches:
            augmentations.decode(content)

    return _prepared(action)


def core_decode(work: LoaderWork) -> Prepared:
    """This loader's decoder, one file after the other, in one thread."""
    files = [np.frombuffer(content, dtype=np.uint8) for content in _contents(work)]

    def action() -> None:
        for file in files * work.batches:
            decode.decode(file)

    return _prepared(action)


def published_augment(work: LoaderWork) -> Prepared:
    """Both published views of decoded images, in one thread."""
    images = [augmentations.decode(content) for content in _contents(work)]
    transform = augmentations.TwoViews(work.image_size)

    def action() -> None:
        for image in images * work.batches:
            transform(image)

    return _prepared(action)


def core_augment(work: LoaderWork) -> Prepared:
    """The draws and the graph alone, on decoded images, in one thread."""
    images = [np.asarray(augmentations.decode(content)) for content in _contents(work)]
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    drawn_views, rows = (VIEW_A, VIEW_B), np.arange(len(images))

    def build() -> Pipeline:
        return dali_graphs.training_pipeline(
            drawn_views, [work.image_size] * 2, batch_size=len(images), threads=1, gpu=None
        )

    def drawn(number: int) -> dali_runner.DaliBatch:
        draws = augment_params.draw_views(
            drawn_views, seed=0, epoch=number, images=rows, sizes=sizes
        )
        inputs = dali_graphs.training_inputs(draws, sizes)
        return dali_runner.DaliBatch(number, rows, [*images], inputs)

    def action() -> None:
        loads = (drawn(number) for number in range(work.batches))
        for _, outputs in dali_runner.run(loads, build):
            [dali_runner.copied(output) for output in outputs]

    return _prepared(action)


def _prepared(action: Callable[[], None]) -> Prepared:
    return Prepared(action, PeakMemory(torch.device("cpu")))


def _open(work: LoaderWork, index: Index, device: torch.device) -> TrainingLoader:
    """A loader that makes exactly `batches` batches."""
    return TrainingLoader(
        index,
        work.settings(work.batches),
        rank=0,
        world_size=1,
        start_step=0,
        device=device,
        on_event=ignore,
        rejected={},
    )


def rows_of(work: LoaderWork, index: Index) -> list[NDArray[np.int64]]:
    """The rows of the batches that `_open`'s loader makes."""
    with _open(work, index, torch.device("cpu")) as loader:
        return [loader.planned(step) for step in range(work.batches)]


def _contents(work: LoaderWork) -> list[bytes]:
    """The files of the first batch."""
    index = open_index(work.index)
    return [index.read_bytes(int(row)) for row in rows_of(work, index)[0]]
