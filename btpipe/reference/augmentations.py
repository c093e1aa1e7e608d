"""The published augmentation, to measure against: Pillow and torchvision in a DataLoader.

Written from the paper (arXiv 2103.03230, section 2 and appendix A) and what is known of the code
that its authors released. It shares nothing with `btpipe.data`'s draws and graphs.
"""

import io
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from btpipe.data.index import Index

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Views = tuple[torch.Tensor, torch.Tensor]


class Blur:
    """With a probability, Pillow's Gaussian blur with a radius from U(0.1, 2)."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if not _happens(self.probability):
            return image
        radius = float(torch.empty(1).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius))


class Solarization:
    """With a probability, Pillow's solarisation at 128."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if _happens(self.probability) else image


def _happens(probability: float) -> bool:
    return float(torch.rand(1)) < probability


def view(size: int, *, blur: float, solarization: float) -> Callable[[Image.Image], torch.Tensor]:
    """One view as the paper draws it: an upright image -> (3, size, size) normalised float32."""
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.RandomApply([jitter], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            Blur(blur),
            Solarization(solarization),
            transforms.ToTensor(),
            transforms.Normalize(mean=MEAN, std=STD),
        ]
    )

    def apply(image: Image.Image) -> torch.Tensor:
        tensor = steps(image)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    return apply


class TwoViews:
    """Both views of an image, as views A and B of the paper."""

    def __init__(self, size: int) -> None:
        self._first = view(size, blur=1.0, solarization=0.0)
        self._second = view(size, blur=0.1, solarization=0.2)

    def __call__(self, image: Image.Image) -> Views:
        return self._first(image), self._second(image)


def decode(content: bytes) -> Image.Image:
    """As torchvision's `pil_loader`: no orientation is applied."""
    return Image.open(io.BytesIO(content)).convert("RGB")


class Pairs(Dataset[Views]):
    """Both views of each image of an index."""

    def __init__(self, index: Index, size: int) -> None:
        self._index, self._views = index, TwoViews(size)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: int) -> Views:
        return self._views(decode(self._index.read_bytes(row)))


def loader(
    pairs: Pairs, batches: Sequence[list[int]], workers: int, *, pinned: bool = False
) -> DataLoader[Views]:
    """These batches of rows, in worker processes; their time is that of children, once ended.

    `pinned`: in memory from which a GPU copies by itself.
    """
    context = "fork" if workers else None
    return DataLoader(
        pairs,
        batch_sampler=batches,
        num_workers=workers,
        multiprocessing_context=context,
        pin_memory=pinned,
    )
