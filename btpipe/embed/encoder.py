"""A bundle, opened: images in, vectors out. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from btpipe.data.views import Geometry
from btpipe.embed import files
from btpipe.errors import IntegrityError, UsageError
from btpipe.export import contract
from btpipe.export.session import Device, Session

Interpolation = Literal["bilinear"]


class Encoder:
    """The encoder of a bundle whose files are all as its manifest says.

    `threads` are onnxruntime's; 0: one for each core.

    Raises:
        UsageError: no folder there.
        IntegrityError: no bundle, or one whose bytes changed.
        MachineError: the device was asked for and cannot be used.
    """

    def __init__(self, bundle: Path, *, device: Device = "auto", threads: int = 0) -> None:
        if not bundle.is_dir():
            raise UsageError(
                "no bundle there", where=bundle, fix="make one first: btpipe export --onnx"
            )
        self.bundle = contract.open_bundle(bundle)
        self.preprocessing = self.bundle.preprocessing
        self.geometry = _geometry(self.bundle)
        self.digest = self.bundle.digest
        self.precision: contract.Precision = "fp32"
        self._session = Session(
            self.bundle.model_of(self.precision), device=device, threads=threads
        )
        self.device = self._session.device
        self.dimension = self._session.dimension
        found = (self._session.size, self.dimension)
        if found != (self.geometry.size, self.bundle.dimension):
            raise IntegrityError(
                f"takes images of {found[0]} pixels and gives {found[1]} numbers",
                where=self.bundle.model,
                expected=f"{self.geometry.size} and {self.bundle.dimension}, as config.json says",
            )

    def embed(self, images: NDArray[np.uint8] | Sequence[Path | str]) -> NDArray[np.float32]:
        """Pixels uint8 `(n, S, S, 3)` in the evaluation view, or n image files -> float32 `(n, D)`.

        Raises:
            UsageError: pixels of another shape or type, or a file that is not a whole image.
        """
        if isinstance(images, np.ndarray):
            return self._session.run(images)
        batches = files.pixels([Path(path) for path in images], self.geometry) if images else ()
        parts = [self._session.run(pixels) for pixels in batches]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *parts])


def load(bundle: Path | str, *, device: Device = "auto", threads: int = 0) -> Encoder:
    """Opens a bundle: `btpipe.load("exports/NAME").embed(["a.jpg", "b.jpg"])` is `(2, D)` float32.

    Raises:
        UsageError: no folder there.
        IntegrityError: no bundle, or one whose bytes changed.
    """
    return Encoder(Path(bundle), device=device, threads=threads)


def _geometry(bundle: contract.Bundle) -> Geometry:
    prepared = bundle.preprocessing
    if prepared.interpolation not in get_args(Interpolation):
        raise IntegrityError(
            f"interpolation {prepared.interpolation!r}",
            where=bundle.folder,
            expected=f"one of {', '.join(get_args(Interpolation))}",
            fix="install the btpipe that made it",
        )
    return Geometry(size=prepared.size, resize=prepared.resize, interpolation="bilinear")
