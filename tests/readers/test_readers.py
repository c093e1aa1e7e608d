"""A bundle opens untouched in other libraries, which give btpipe's vectors. Run: make test-readers

Their environment is their own (build/readers): fastembed brings the onnxruntime for CPUs, which
would overwrite the one for GPUs.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import torchvision
from fastembed import ImageEmbedding  # type: ignore[import-not-found]
from fastembed.common.model_description import (  # type: ignore[import-not-found]
    DenseModelDescription,
    ModelSource,
)
from fastembed.image.onnx_embedding import (  # type: ignore[import-not-found]
    OnnxImageEmbedding,
)
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from btpipe.embed.encoder import load
from btpipe.events import ignore
from btpipe.export import bundle

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SIZE = 96
COUNT = 24
SAME_PIXELS = 1e-4
"""Of the largest value: float32 in another order of sums; seen 1e-6."""
SAME_FILES = 0.999
"""Cosine of what differs from the mean vector: another decoder and another resize; seen 0.9998."""
ONE_PIXEL = 0.95
"""The same where the centre lies between two pixels: fastembed and CLIP's processor round down,
torchvision to even, so that they are a pixel of 96 apart; seen 0.961."""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEGs of several shapes, upright: none of the readers but btpipe turns them as EXIF says."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    paths = []
    for i in range(COUNT):
        coarse = random.integers(0, 256, (3 + i % 5, 4 + i % 3, 3), dtype=np.uint8)
        shape = (200 + 11 * i, 150 + 17 * (i % 7))
        image = Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
        paths.append(folder / f"{i:02d}.jpg")
        image.save(paths[-1], quality=95)
    return paths


@pytest.fixture(scope="session")
def exported(images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle from a torchvision state dict whose batch norm has seen the images."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network(torch.stack([torchvision_pixels(path) for path in images]))
    torch.save(network.state_dict(), folder / "weights.pth")
    return bundle.export_file(
        folder / "weights.pth",
        folder / "bundle",
        ignore,
        images=images[0].parent,
        size=SIZE,
        options=bundle.BundleOptions(("fp32",), float_input=True),
    )


@pytest.fixture(scope="session")
def expected(exported: Path, images: list[Path]) -> NDArray[np.float32]:
    """btpipe's own vectors of the files."""
    return load(exported, precision="fp32").embed(images)


def opened(path: Path) -> Image.Image:
    """An image in memory, its file closed."""
    with Image.open(path) as image:
        image.load()
    return image


def torchvision_pixels(path: Path) -> torch.Tensor:
    """torchvision's own preset for evaluation, at this size."""
    prepare = v2.Compose(
        [
            v2.Resize(round(SIZE / 0.875), antialias=True),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pixels: torch.Tensor = prepare.forward(opened(path))
    return pixels


def resized(path: Path) -> tuple[int, int]:
    """Width and height of an image after its shorter side was resized."""
    width, height = opened(path).size
    short = round(SIZE / 0.875)
    return int(short * width / min(width, height)), int(short * height / min(width, height))


def require_same(
    actual: NDArray[np.floating], expected: NDArray[np.float32], least: float = SAME_FILES
) -> None:
    """The vectors are the same but for decoding: the direction from their mean, each of them."""
    mean = expected.mean(axis=0)
    a, b = actual - mean, expected - mean
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(f"least cosine about the mean {cosine.min():.6f}")
    assert cosine.min() > least


def require_same_but_for_the_crop(
    actual: NDArray[np.floating], expected: NDArray[np.float32], images: list[Path]
) -> None:
    """`require_same` where the crop's corner is no half pixel, and nearly so where it is one."""
    whole = np.array([sum(resized(path)) % 2 == 0 for path in images])
    assert 4 < whole.sum() < COUNT
    require_same(actual[whole], expected[whole])
    require_same(actual, expected, ONE_PIXEL)


def test_torchvision_loads_the_weights_and_gives_the_vectors(
    exported: Path, images: list[Path], expected: NDArray[np.float32]
) -> None:
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(safetensors.torch.load_file(exported / "model.safetensors"))
    with torch.inference_mode():
        actual = network.eval()(torch.stack([torchvision_pixels(path) for path in images]))
    require_same(actual.numpy(), expected)


def test_timm_makes_network_and_preprocessing_from_the_folder(
    exported: Path, images: list[Path], expected: NDArray[np.float32]
) -> None:
    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.inference_mode():
        actual = network(torch.stack([prepare(opened(path)) for path in images]))
    require_same(actual.numpy(), expected)


def test_onnxruntime_alone_gives_torchvision_s_vectors_of_the_same_pixels(exported: Path) -> None:
    assert "CUDAExecutionProvider" not in onnxruntime.get_available_providers()
    providers = ["CPUExecutionProvider"]
    pixels = np.random.default_rng(2).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(exported / "encoder.onnx", providers=providers)
    (actual,) = session.run(None, {"images": pixels})
    session = onnxruntime.InferenceSession(
        exported / "encoder-float-nchw.onnx", providers=providers
    )
    mean, std = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    scaled = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    (floats,) = session.run(None, {"images": np.ascontiguousarray(scaled)})
    network = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    with torch.inference_mode():
        expected = network(torch.from_numpy(scaled.copy())).numpy()
    for vectors in (actual, floats):
        assert np.abs(vectors - expected).max() < SAME_PIXELS * np.abs(expected).max()


class Bundle(OnnxImageEmbedding):  # type: ignore[misc]
    """How fastembed takes an image model of one's own: a description beside those it knows."""

    @classmethod
    def _list_supported_models(cls) -> list[DenseModelDescription]:
        return [
            DenseModelDescription(
                model="local/bundle",
                sources=ModelSource(hf="local/bundle"),
                model_file="encoder-float-nchw.onnx",
                description="a btpipe bundle",
                license="other",
                size_in_GB=0.05,
                dim=512,
            )
        ]


def test_fastembed_embeds_with_the_float_model_from_a_path(
    exported: Path, images: list[Path], expected: NDArray[np.float32]
) -> None:
    ImageEmbedding.EMBEDDINGS_REGISTRY.append(Bundle)
    model = ImageEmbedding("local/bundle", specific_model_path=str(exported), cuda=False)
    actual = np.stack(list(model.embed([str(path) for path in images])))
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    require_same_but_for_the_crop(actual * lengths, expected, images)  # fastembed's have length 1


@pytest.mark.parametrize("reader", ["AutoImageProcessor", "CLIPImageProcessor"])
def test_hugging_face_s_image_processors_prepare_pixels_for_the_float_model(
    exported: Path, images: list[Path], expected: NDArray[np.float32], reader: str
) -> None:
    """Auto takes config.json, as of any timm folder; CLIP's takes preprocessor_config.json."""
    processor = getattr(transformers, reader).from_pretrained(exported)
    pixels = processor([opened(path) for path in images], return_tensors="pt")["pixel_values"]
    session = onnxruntime.InferenceSession(
        exported / "encoder-float-nchw.onnx", providers=["CPUExecutionProvider"]
    )
    (actual,) = session.run(None, {"images": pixels.numpy()})
    if reader == "AutoImageProcessor":
        require_same(actual, expected)
    else:
        require_same_but_for_the_crop(actual, expected, images)
