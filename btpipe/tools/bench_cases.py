"""What the processes of `bench` run: each function makes an action that can be repeated."""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from btpipe import runtime
from btpipe.data.index import Index, open_index
from btpipe.data.pipeline.eval_loader import EvaluationBatch, evaluation_batches
from btpipe.embed import outputs, table
from btpipe.embed.encoder import Encoder
from btpipe.embed.precisions import EncoderConfig, Precision
from btpipe.tools.measured_process import PeakMemory, Prepared
from btpipe.tools.measured_rows import Device

Engine = Literal["onnx", "torch"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a turn does: the first `images` of an index, with a bundle.

    `index` is the index's file: each process opens it itself.
    """

    index: Path
    bundle: Path
    images: int
    device: Device = "cpu"


def whole(work: Work, engine: Engine, precision: Precision) -> Prepared:
    """From files to a finished table, as a worker of `btpipe embed` does it."""
    index, encoder = open_index(work.index), _encoder(work, engine, precision)
    folder = tempfile.TemporaryDirectory(prefix="btpipe-")

    def action() -> None:
        # The folder lives as long as the action.
        write_table(Path(folder.name) / "vectors.parquet", work, index, encoder)

    return prepared(work, action)


def write_table(out: Path, work: Work, index: Index, encoder: Encoder) -> None:
    """The first images of the index as a table of vectors."""
    _write(out, index, encoder, encoder.stream(_batches(work, index, encoder), encoder.batch_size))


def _write(
    out: Path,
    index: Index,
    encoder: Encoder,
    embedded: Iterable[tuple[EvaluationBatch, NDArray[np.float32]]],
) -> None:
    footer = table.Footer(
        bundle=encoder.digest,
        input="",
        preprocessing=encoder.preprocessing.text(),
        precision=encoder.precision,
        root="",
        dimension=encoder.dimension,
        engine=encoder.engine,
    )
    parts = (
        table.rows(footer, index.table.take(batch.rows), batch.digests, vectors)
        for batch, vectors in embedded
    )
    outputs.write(out, out, footer, parts)


def read_alone(work: Work) -> Prepared:
    """The files of the images and their sha256, in as many threads as embedding reads with."""
    index = open_index(work.index)

    def read(row: int) -> None:
        hashlib.sha256(index.read_bytes(row)).hexdigest()

    def action() -> None:
        with ThreadPoolExecutor(runtime.cores() + 2) as pool:
            list(pool.map(read, range(work.images)))

    return prepared(work, action)


def decode_alone(work: Work) -> Prepared:
    """The evaluation view of the images, from their files, and nothing done with it."""
    index, encoder = open_index(work.index), _encoder(work, "onnx", "fp32")

    def action() -> None:
        for _ in _batches(work, index, encoder):
            pass

    return prepared(work, action)


def forward_alone(work: Work, engine: Engine, precision: Precision) -> Prepared:
    """The network on pixels that are in memory."""
    index, encoder = open_index(work.index), _encoder(work, engine, precision)
    pixels = np.concatenate([batch.pixels for batch in _batches(work, index, encoder)])
    return prepared(work, lambda: encoder.embed(pixels))


def write_alone(work: Work) -> Prepared:
    """The table of vectors that are in memory."""
    index, encoder = open_index(work.index), _encoder(work, "onnx", "fp32")
    vectors = [*encoder.stream(_batches(work, index, encoder), encoder.batch_size)]
    folder = tempfile.TemporaryDirectory(prefix="btpipe-")

    def action() -> None:
        _write(Path(folder.name) / "vectors.parquet", index, encoder, vectors)

    return prepared(work, action)


def _encoder(work: Work, engine: Engine, precision: Precision) -> Encoder:
    return Encoder(EncoderConfig(work.bundle, work.device, engine, precision))


def _batches(work: Work, index: Index, encoder: Encoder) -> Iterator[EvaluationBatch]:
    return evaluation_batches(
        index,
        np.arange(work.images),
        encoder.geometry,
        batch_size=encoder.batch_size,
        threads=runtime.cores(),
        gpu=encoder.gpu,
    )


def prepared(work: Work, action: Callable[[], object]) -> Prepared:
    """The action, and the memory that it is charged for."""
    return Prepared(action, PeakMemory(torch.device(work.device)))
