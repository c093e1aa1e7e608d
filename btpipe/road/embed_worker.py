"""What the processes of `bench embed` run: each function makes an action that can be repeated."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from btpipe import recipe, runtime
from btpipe.data.evaluation import EvaluationBatch, evaluation_batches
from btpipe.data.index import Index, open_index
from btpipe.embed import outputs, table
from btpipe.embed.encoder import Encoder, Settings
from btpipe.embed.precisions import Precision
from btpipe.export import contract, weights
from btpipe.export.contract import Preprocessing
from btpipe.road import published_views
from btpipe.road.seat import PeakMemory, Prepared

Engine = Literal["onnx", "torch"]
USER_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Load:
    """What a turn does: the first `images` of an index, with a bundle.

    `index` is the index's file: each process opens it itself. `workers` are the DataLoader's.
    """

    index: Path
    bundle: Path
    images: int
    workers: int


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


def user_vectors(load: Load) -> NDArray[np.float32]:
    """What a user would write: an eager torchvision model behind a DataLoader, in float32."""
    index, bundle = open_index(load.index), contract.open_bundle(load.bundle)
    return _user_vectors(_model(bundle), _loader(load, index, bundle))


def user(load: Load) -> Prepared:
    """`user_vectors`, again and again."""
    index, bundle = open_index(load.index), contract.open_bundle(load.bundle)
    model = _model(bundle)
    return _prepared(lambda: _user_vectors(model, _loader(load, index, bundle)))


def _model(bundle: contract.Bundle) -> nn.Module:
    described = recipe.Network.model_validate(
        {"backbone": bundle.architecture, "stem": bundle.stem}
    )
    return weights.load(bundle.folder / contract.WEIGHTS, described)


def _loader(load: Load, index: Index, bundle: contract.Bundle) -> DataLoader[torch.Tensor]:
    context = "fork" if load.workers else None
    return DataLoader(
        _Images(index, load.images, bundle.preprocessing),
        batch_size=USER_BATCH,
        num_workers=load.workers,
        multiprocessing_context=context,
    )


def _user_vectors(model: nn.Module, loader: DataLoader[torch.Tensor]) -> NDArray[np.float32]:
    with torch.inference_mode():
        vectors: NDArray[np.float32] = torch.cat([model(images) for images in loader]).numpy()
    return vectors


def whole(load: Load, engine: Engine, precision: Precision) -> Prepared:
    """From files to a finished table, as a worker of `btpipe embed` does it."""
    index, encoder = open_index(load.index), _encoder(load, engine, precision)
    folder = tempfile.TemporaryDirectory(prefix="btpipe-")
    out = Path(folder.name) / "vectors.parquet"

    def action() -> None:
        assert folder.name, "the folder lives as long as the action"
        write_table(out, load, index, encoder)

    return _prepared(action)


def write_table(out: Path, load: Load, index: Index, encoder: Encoder) -> None:
    """The first images of the index as a table of vectors."""
    footer = table.Footer(
        bundle=encoder.digest,
        input="",
        preprocessing=encoder.preprocessing.text(),
        precision=encoder.precision,
        root="",
        dimension=encoder.dimension,
        engine=encoder.engine,
    )

    def parts() -> Iterator[pa.Table]:
        for batch, vectors in encoder.stream(_batches(load, index, encoder)):
            yield table.rows(footer, index.table.take(batch.rows), batch.digests, vectors)

    outputs.write(out, out, footer, parts())


def decode_alone(load: Load) -> Prepared:
    """The evaluation view of the images, and nothing done with it."""
    index, encoder = open_index(load.index), _encoder(load, "onnx", "fp32")

    def action() -> None:
        for _ in _batches(load, index, encoder):
            pass

    return _prepared(action)


def forward_alone(load: Load, engine: Engine, precision: Precision) -> Prepared:
    """The network on pixels that are in memory."""
    index, encoder = open_index(load.index), _encoder(load, engine, precision)
    pixels = np.concatenate([batch.pixels for batch in _batches(load, index, encoder)])
    return _prepared(lambda: encoder.embed(pixels))


def _encoder(load: Load, engine: Engine, precision: Precision) -> Encoder:
    settings = Settings(load.bundle, device="cpu", engine=engine, precision=precision)
    return Encoder(settings)


def _batches(load: Load, index: Index, encoder: Encoder) -> Iterator[EvaluationBatch]:
    return evaluation_batches(
        index,
        np.arange(load.images),
        encoder.geometry,
        batch_size=encoder.batch_size,
        threads=runtime.cores(),
    )


def _prepared(action: Callable[[], object]) -> Prepared:
    return Prepared(action, PeakMemory(torch.device("cpu")))
