"""What a user would write to embed images: an eager torchvision model behind a DataLoader."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from btpipe.data.index import Index, open_index
from btpipe.export import contract, weights
from btpipe.export.contract import Preprocessing
from btpipe.reference import augmentations
from btpipe.tools.bench_cases import Work, prepared
from btpipe.tools.measured_process import Prepared

USER_BATCH = {"cpu": 32, "cuda": 256}


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
        return self._transform(augmentations.decode(self._index.read_bytes(row)))


def user_vectors(work: Work, workers: int, *, half: bool = False) -> NDArray[np.float32]:
    """What a user would write: an eager torchvision model behind a DataLoader.

    In float32, or if `half` in fp16 autocast; `workers` are the DataLoader's.
    """
    index, bundle = open_index(work.index), contract.open_bundle(work.bundle)
    return _user_vectors(_model(work, bundle), _loader(work, workers, index, bundle), work, half)


def user(work: Work, workers: int, half: bool) -> Prepared:
    """`user_vectors`, again and again."""
    index, bundle = open_index(work.index), contract.open_bundle(work.bundle)
    model = _model(work, bundle)
    return prepared(
        work, lambda: _user_vectors(model, _loader(work, workers, index, bundle), work, half)
    )


def _model(work: Work, bundle: contract.Bundle) -> nn.Module:
    network = weights.load(bundle.folder / contract.WEIGHTS, weights.described(bundle))
    return network.to(work.device)


def _loader(
    work: Work, workers: int, index: Index, bundle: contract.Bundle
) -> DataLoader[torch.Tensor]:
    context = "fork" if workers else None
    return DataLoader(
        _Images(index, work.images, bundle.preprocessing),
        batch_size=USER_BATCH[work.device],
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=work.device == "cuda",
    )


def _user_vectors(
    model: nn.Module, loader: DataLoader[torch.Tensor], work: Work, half: bool
) -> NDArray[np.float32]:
    with torch.inference_mode(), torch.autocast(work.device, torch.float16, enabled=half):
        copied = (images.to(work.device, non_blocking=True) for images in loader)
        vectors: NDArray[np.float32] = torch.cat([model(x).float().cpu() for x in copied]).numpy()
    return vectors
