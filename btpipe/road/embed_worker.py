"""What the processes of `bench embed` run: each function makes an action that can be repeated."""

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
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from btpipe import runtime
from btpipe.data import reading
from btpipe.data.evaluation import EvaluationBatch, evaluation_batches
from btpipe.data.index import Index, open_index
from btpipe.embed import outputs, table
from btpipe.embed.encoder import Encoder
from btpipe.embed.precisions import EncoderConfig, Precision
from btpipe.export import contract, weights
from btpipe.export.contract import Preprocessing
from btpipe.road import published_views
from btpipe.road.benchmark_worker import Device
from btpipe.road.seat import PeakMemory, Prepared

Engine = Literal["onnx", "torch"]
USER_BATCH = {"cpu": 32, "cuda": 256}


@dataclasses.dataclass(frozen=True)
class Load:
    """What a turn does: the first `images` of an index, with a bundle.

    `index` is the index's file: each process opens it itself. `workers` are the DataLoader's.
    """

    index: Path
    bundle: Path
    images: int
    workers: int
    device: Device = "cpu"


class _Images(Dataset[torch.Tensor]):
    """The images of an index, as torchvision's documentation prepares them."""

    def __init__(self, index: Index, count: int, prepared: Preprocessing) -> None:
        self._index, self._count = index, count
        self._transform: Callable[[Image.Image], torch.Tensor] = transforms.Compose(
            [
                transforms.Resize(prepared.resize),
                transforms.CenterCrop(prepared.size),
                transforms.ToTensor(),
                transforms.Normalize(prepared.mean, prepared.std),
            ]
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._transform(published_views.decode(self._index.read_bytes(row)))


def user_vectors(load: Load, *, half: bool = False) -> NDArray[np.float32]:
    """What a user would write: an eager torchvision model behind a DataLoader.

    In float32, or if `half` in fp16 autocast.
    """
    index, bundle = open_index(load.index), contract.open_bundle(load.bundle)
    return _user_vectors(_model(load, bundle), _loader(load, index, bundle), load, half)


def user(load: Load, half: bool) -> Prepared:
    """`user_vectors`, again and again."""
    index, bundle = open_index(load.index), contract.open_bundle(load.bundle)
    model = _model(load, bundle)
    return _prepared(load, lambda: _user_vectors(model, _loader(load, index, bundle), load, half))


def _model(load: Load, bundle: contract.Bundle) -> nn.Module:
    network = weights.load(bundle.folder / contract.WEIGHTS, weights.described(bundle))
    return network.to(load.device)


def _loader(load: Load, index: Index, bundle: contract.Bundle) -> DataLoader[torch.Tensor]:
    context = "fork" if load.workers else None
    return DataLoader(
        _Images(index, load.images, bundle.preprocessing),
        batch_size=USER_BATCH[load.device],
        num_workers=load.workers,
        multiprocessing_context=context,
        pin_memory=load.device == "cuda",
    )


def _user_vectors(
    model: nn.Module, loader: DataLoader[torch.Tensor], load: Load, half: bool
) -> NDArray[np.float32]:
    with torch.inference_mode(), torch.autocast(load.device, torch.float16, enabled=half):
        copied = (images.to(load.device, non_blocking=True) for images in loader)
        vectors: NDArray[np.float32] = torch.cat([model(x).float().cpu() for x in copied]).numpy()
    return vectors


def whole(load: Load, engine: Engine, precision: Precision) -> Prepared:
    """From files to a finished table, as a worker of `btpipe embed` does it."""
    index, encoder = open_index(load.index), _encoder(load, engine, precision)
    folder = tempfile.TemporaryDirectory(prefix="btpipe-")

    def action() -> None:
        # The folder lives as long as the action.
        write_table(Path(folder.name) / "vectors.parquet", load, index, encoder)

    return _prepared(load, action)


def write_table(out: Path, load: Load, index: Index, encoder: Encoder) -> None:
    """The first images of the index as a table of vectors."""
    _write(out, index, encoder, encoder.stream(_batches(load, index, encoder), encoder.batch_size))


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


def read_alone(load: Load) -> Prepared:
    """The files of the images and their sha256, in as many threads as embedding reads with."""
    index = open_index(load.index)

    def read(row: int) -> None:
        content = reading.read_file(index, row)
        assert not isinstance(content, str), content
        hashlib.sha256(content.data).hexdigest()

    def action() -> None:
        with ThreadPoolExecutor(runtime.cores() + 2) as pool:
            list(pool.map(read, range(load.images)))

    return _prepared(load, action)


def decode_alone(load: Load) -> Prepared:
    """The evaluation view of the images, from their files, and nothing done with it."""
    index, encoder = open_index(load.index), _encoder(load, "onnx", "fp32")

    def action() -> None:
        for _ in _batches(load, index, encoder):
            pass

    return _prepared(load, action)


def forward_alone(load: Load, engine: Engine, precision: Precision) -> Prepared:
    """The network on pixels that are in memory."""
    index, encoder = open_index(load.index), _encoder(load, engine, precision)
    pixels = np.concatenate([batch.pixels for batch in _batches(load, index, encoder)])
    return _prepared(load, lambda: encoder.embed(pixels))


def write_alone(load: Load) -> Prepared:
    """The table of vectors that are in memory."""
    index, encoder = open_index(load.index), _encoder(load, "onnx", "fp32")
    made = [*encoder.stream(_batches(load, index, encoder), encoder.batch_size)]
    folder = tempfile.TemporaryDirectory(prefix="btpipe-")

    def action() -> None:
        _write(Path(folder.name) / "vectors.parquet", index, encoder, made)

    return _prepared(load, action)


def _encoder(load: Load, engine: Engine, precision: Precision) -> Encoder:
    return Encoder(EncoderConfig(load.bundle, load.device, engine, precision))


def _batches(load: Load, index: Index, encoder: Encoder) -> Iterator[EvaluationBatch]:
    return evaluation_batches(
        index,
        np.arange(load.images),
        encoder.geometry,
        batch_size=encoder.batch_size,
        threads=runtime.cores(),
        gpu=encoder.gpu,
    )


def _prepared(load: Load, action: Callable[[], object]) -> Prepared:
    return Prepared(action, PeakMemory(torch.device(load.device)))
