"""What a bundle says about itself: how pixels are prepared, and what other readers need.

Nothing here needs torch: an embedding job opens a bundle on a machine that has none loaded.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from btpipe import artifact
from btpipe.errors import IntegrityError, UsageError

KIND = "bundle"
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MODEL = "encoder.onnx"
MODELS: dict[Precision, str] = {
    "fp32": MODEL,
    "fp16": "encoder-fp16.onnx",
    "int8": "encoder-int8.onnx",
}
"""uint8 pixels in, float32 vectors out, all of them; the precision is what is computed in."""
FLOAT_MODEL = "encoder-float-nchw.onnx"
"""The fp32 model behind the normalisation, for readers that do that themselves."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"

INPUT = "images"
OUTPUT = "embedding"

PILLOW_BILINEAR = 2
"""`PIL.Image.Resampling.BILINEAR`, as Hugging Face's `resample` counts."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From an image file to what the encoder was trained on.

    The image, in RGB and turned as its EXIF orientation says, has its shorter side resized to
    `resize` pixels (antialiased); the centre square of `size` is cut out. `mean` and `std` are of
    pixels / 255.
    """

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def record(self) -> dict[str, object]:
        """The JSON value that stands in the model, the manifest and a table's footer."""
        return {
            "size": self.size,
            "resize": self.resize,
            "interpolation": self.interpolation,
            "antialias": True,
            "crop": "center",
            "orientation": "exif",
            "color": "RGB",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def text(self) -> str:
        """`record` as JSON in canonical form."""
        return json.dumps(self.record(), sort_keys=True, separators=(",", ":"))


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An exported encoder on disk, found complete and unchanged.

    `precisions` are those whose models it holds, fp32 first: each of them passed its gate.
    """

    folder: Path
    manifest: artifact.Manifest
    architecture: str
    stem: str
    dimension: int
    preprocessing: Preprocessing
    precisions: tuple[Precision, ...]

    @property
    def model(self) -> Path:
        """The fp32 model, which every bundle holds."""
        return self.folder / MODEL

    def model_of(self, precision: Precision) -> Path:
        """The model that computes in `precision`.

        Raises:
            UsageError: the bundle was exported without it.
        """
        if precision not in self.precisions:
            raise UsageError(
                f"no {precision} model in the bundle",
                where=self.folder,
                expected=" or ".join(self.precisions),
                fix=f"export it again with --precision {precision} --overwrite",
            )
        return self.folder / MODELS[precision]

    @property
    def has_exact_gate(self) -> bool:
        """Whether int8 passed its gate with exact sums too: not judged so in older bundles."""
        gates = self.manifest.origin.get("gates")
        gate = gates.get("int8") if isinstance(gates, dict) else None
        return isinstance(gate, dict) and bool(gate.get("exact"))

    @property
    def digest(self) -> str:
        return self.manifest.digest


def open_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, with the sha256 of every file checked.

    Raises:
        IntegrityError: no bundle there, a newer one, or one whose bytes changed.
    """
    manifest = artifact.verify(folder, KIND)
    _require_files(manifest, folder, (MODEL, CONFIG))
    try:
        config = json.loads((folder / CONFIG).read_text())
        prepared = config["preprocessing"]
        mean, std = ([float(value) for value in prepared[key]] for key in ("mean", "std"))
        # Bundles from before there were several models hold one, of the precision that they name.
        precisions = config.get("precisions") or [config["precision"]]
        opened = Bundle(
            folder=folder,
            manifest=manifest,
            architecture=str(config["architecture"]),
            stem=str(config["stem"]),
            dimension=int(config["num_features"]),
            preprocessing=Preprocessing(
                size=int(prepared["size"]),
                resize=int(prepared["resize"]),
                interpolation=str(prepared["interpolation"]),
                mean=(mean[0], mean[1], mean[2]),
                std=(std[0], std[1], std[2]),
            ),
            precisions=tuple(name for name in PRECISIONS if name in precisions),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise IntegrityError(
            f"says nothing usable about the encoder ({error!r})",
            where=folder / CONFIG,
            expected="architecture, num_features, precisions and preprocessing",
            fix="export the run again",
        ) from error
    _require_files(manifest, folder, [MODELS[name] for name in opened.precisions])
    return opened


def _require_files(manifest: artifact.Manifest, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if name not in manifest.files:
            raise IntegrityError(f"its manifest lists no {name}", where=folder, expected="a bundle")


def config(
    architecture: str,
    stem: str,
    dimension: int,
    preprocessing: Preprocessing,
    precisions: Sequence[Precision],
) -> dict[str, object]:
    """`config.json`: what timm's `local-dir:` reads, and what `open_bundle` needs beside it."""
    size = preprocessing.size
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": dimension,
        "global_pool": "avg",
        "stem": stem,
        "precisions": list(precisions),
        "preprocessing": preprocessing.record(),
        "pretrained_cfg": {
            "tag": "btpipe",
            "input_size": [3, size, size],
            "interpolation": preprocessing.interpolation,
            "crop_pct": _crop_share(size, preprocessing.resize),
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }


def _crop_share(size: int, resize: int) -> float:
    """`size / resize`, such that timm's floor(size / share) is `resize` again."""
    share = size / resize
    return share if math.floor(size / share) == resize else math.nextafter(share, 0)


def preprocessor(preprocessing: Preprocessing) -> dict[str, object]:
    """`preprocessor_config.json`: what Hugging Face's image processors and fastembed read."""
    return {
        # Of the processors that do just this, the one that fastembed knows as well.
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize},
        "resample": PILLOW_BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.size, "width": preprocessing.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run that wrote a checkpoint last.

    Raises:
        UsageError: no run has a checkpoint yet.
    """
    manifests = [path for path in runs.glob("*/checkpoints/step-*/manifest.json") if _final(path)]
    if not manifests:
        raise UsageError(
            "no run with a checkpoint",
            where=runs,
            fix="train one first: btpipe pretrain recipes/folder.toml --set data.train=FOLDER",
        )
    return max(manifests, key=lambda path: (path.stat().st_mtime_ns, path)).parents[2]


def newest_bundle(exports: Path = Path("exports")) -> Path:
    """The bundle that was exported last.

    Raises:
        UsageError: nothing was exported yet.
    """
    manifests = [path for path in exports.glob(f"*/{artifact.MANIFEST}") if _final(path)]
    if not manifests:
        raise UsageError("no bundle", where=exports, fix="make one first: btpipe export --onnx")
    return max(manifests, key=lambda path: (path.stat().st_mtime_ns, path)).parent


def _final(manifest: Path) -> bool:
    """Whether the artifact has its final name; what a killed process left has not."""
    return ".tmp-" not in manifest.parent.name
