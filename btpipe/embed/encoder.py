"""A bundle, opened: images in, vectors out. Torch is loaded for its own engine alone."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact, neighbours, runtime
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.embed import files, precisions
from btpipe.embed.files import Image
from btpipe.embed.precisions import EncoderConfig, Engine, Layer, Precision, RequestedPrecision
from btpipe.errors import IntegrityError, UsageError
from btpipe.export import contract, golden
from btpipe.export.session import Device, Session

Interpolation = Literal["bilinear"]
Batch = TypeVar("Batch", bound="HasPixels")

CPU_BATCH_PIXELS = 8 * 224 * 224
"""What one call of the network is given at once: of 4, 8, 16 and 32 images of 224 pixels, 8 were
fastest in bf16 on a core of an EPYC and as fast as any in float32; more leave the caches."""
CPU_BATCH_IMAGES = 256
TORCH_CALL_IMAGES = 16
GPU_BATCH_IMAGES = 256


class HasPixels(Protocol):
    """What `Encoder.stream` takes: `pixels` are uint8 `(n, S, S, 3)`."""

    @property
    def pixels(self) -> NDArray[np.uint8]: ...


class Encoder:
    """The encoder of a bundle whose files are all as its manifest says.

    `precision` is what it computes in, `why` says so in a sentence. The vectors of an image are
    the same to the bit whatever the batch is that it comes in, and the number of threads.

    Raises:
        UsageError: no folder there, or settings that the bundle or an engine cannot serve.
        IntegrityError: no bundle, or one whose bytes changed, also while it was opened.
        MachineError: the device was asked for and cannot be used.
    """

    def __init__(self, config: EncoderConfig) -> None:
        if not config.bundle.is_dir():
            raise UsageError(
                "no bundle there", where=config.bundle, fix="make one first: btpipe export --onnx"
            )
        self.config = config
        self.bundle = contract.open_bundle(config.bundle)
        self.preprocessing = self.bundle.preprocessing
        self.geometry = _geometry(self.bundle)
        self.digest = self.bundle.digest
        self.layer, self.normalize = config.layer, config.normalize
        self.engine = precisions.engine(config.engine, config.layer)
        self.device = runtime.resolve_device(config.device)
        self.precision: Precision
        self.precision, self.why = precisions.choose(
            self.bundle, self.engine, config.precision, self.device, self._agrees
        )
        self._open()
        if artifact.read(config.bundle, contract.KIND).digest != self.digest:
            raise IntegrityError(
                "another bundle took its place while it was opened",
                where=config.bundle,
                expected=f"digest {self.digest}",
                fix="run the same command again",
            )
        self.lanes = 1 if self.device == "cuda" else config.threads or runtime.cores()
        self._pool = ThreadPoolExecutor(self.lanes, "btpipe-network")

    def _agrees(self, precision: contract.Precision) -> bool:
        return golden.agrees(self.bundle, precision, device=self.device)

    def _open(self) -> None:
        if self.engine == "torch":
            # Here and not above: torch takes seconds, and onnxruntime's engine needs none of it.
            from btpipe.embed.torch_engine import TorchEngine  # noqa: PLC0415

            engine = TorchEngine(self.bundle, self.device, self.precision, self.layer)
            self._network: Session | TorchEngine = engine
            self.dimension = engine.dimension
            return
        model = precisions.model_of(self.bundle, self.precision)
        # One thread within a call: as many calls run at once as there are cores, and none waits
        # for the others in the middle of an operator (84 to 96 against 78 CPU-ms an image).
        tf32 = self.precision == "tf32"
        session = Session(model, device=self.device, threads=1, tf32=tf32)
        self.dimension = session.dimension
        shape = (session.size, session.dimension)
        if shape != (self.geometry.size, self.bundle.dimension):
            raise IntegrityError(
                f"takes images of {shape[0]} pixels and gives {shape[1]} numbers",
                where=model,
                expected=f"{self.geometry.size} and {self.bundle.dimension}, as config.json says",
            )
        self._network = session

    @property
    def batch_size(self) -> int:
        """How many images a call of the network should have, where nobody says otherwise."""
        if self.device == "cuda":
            return GPU_BATCH_IMAGES
        return max(1, min(CPU_BATCH_IMAGES, CPU_BATCH_PIXELS // self.geometry.size**2))

    @property
    def gpu(self) -> int | None:
        """The GPU that decodes, resizes and computes; None on a CPU."""
        return 0 if self.device == "cuda" else None

    def golden_cosine(self) -> dict[str, float]:
        """The least cosine of the golden images' vectors here with the shipped ones, by precision.

        Through this encoder's own decoder, resize and network; a precision in which none were
        shipped (tf32, bf16) is compared with fp32. Empty for a bundle without golden images.
        """
        shipped = golden.vectors(self.bundle)
        if not shipped:
            return {}
        images = golden.pixels(self.bundle, self.gpu)
        calls = _calls(images, self.batch_size if self.device == "cuda" else len(images))
        network = self._network
        run = network.run if isinstance(network, Session) else network.run_pooled
        vectors = np.concatenate([run(call) for call in calls])[: len(images)]
        expected = shipped.get(self.precision, shipped["fp32"])
        return {self.precision: golden.least_cosine(vectors, expected)}

    def embed(self, images: NDArray[np.uint8] | Iterable[Image]) -> NDArray[np.float32]:
        """Images -> float32 `(n, D)`, row for row.

        Pixels uint8 `(n, S, S, 3)` that are the evaluation view already, or files, their bytes,
        Pillow images and upright RGB arrays uint8 `(H, W, 3)` of any size, which are brought to it:
        a list of them, or an iterator. An image has one vector, however it comes.

        Raises:
            UsageError: pixels of another shape or type, or a file that is not a whole image.
        """
        if isinstance(images, np.ndarray):
            self._check(images)
            starts = range(0, len(images), self.batch_size)
            batches = (_Pixels(images[start : start + self.batch_size]) for start in starts)
        else:
            views = files.pixels(images, self.geometry, self.batch_size, self.gpu)
            batches = (_Pixels(pixels) for pixels in views)
        parts = [vectors for _, vectors in self.stream(batches, self.batch_size)]
        return np.concatenate([np.zeros((0, self.dimension), np.float32), *parts])

    def _check(self, images: NDArray[np.uint8]) -> None:
        size = self.geometry.size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise UsageError(
                f"pixels are {images.dtype} {images.shape}",
                expected=f"uint8 (n, {size}, {size}, 3), or a list of images of any size",
                fix="name one image so: embed([image])",
            )

    def stream(
        self, batches: Iterable[Batch], batch_size: int
    ) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
        """Each batch with its vectors `(n, D)`, in order.

        `batches` is asked for more while the network works: a batch for each core is in it, and one
        more is ready. A GPU gets `batch_size` images in every call, the last ones of a batch with
        black ones beside them.
        """
        running: collections.deque[tuple[Batch, Future[NDArray[np.float32]]]] = collections.deque()
        for batch in batches:
            running.append((batch, self._pool.submit(self._run, batch.pixels, batch_size)))
            # Not before another is there to take its place.
            if len(running) > self.lanes + 1:
                first, vectors = running.popleft()
                yield first, vectors.result()
        for first, vectors in running:
            yield first, vectors.result()

    def _run(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        """(n, S, S, 3) -> (n, D), in calls of one shape where another has other algorithms.

        torch's are seen to differ in the last bit; onnxruntime's on a CPU are not.
        """
        if self.device == "cuda":
            calls = _calls(pixels, batch_size)
        elif self.engine == "torch":
            calls = _calls(pixels, min(TORCH_CALL_IMAGES, self.batch_size))
        else:
            calls = iter([pixels])
        parts = [self._network.run(call) for call in calls]
        vectors = np.concatenate([np.zeros((0, self.dimension), np.float32), *parts])[: len(pixels)]
        return neighbours.normalize(vectors) if self.normalize else vectors


def _calls(pixels: NDArray[np.uint8], rows: int) -> Iterator[NDArray[np.uint8]]:
    """The images in batches of exactly `rows`, the last one filled up with black."""
    for start in range(0, len(pixels), rows):
        call = pixels[start : start + rows]
        missing = np.zeros((rows - len(call), *call.shape[1:]), np.uint8)
        yield np.concatenate([call, missing]) if len(missing) else call


@dataclasses.dataclass(frozen=True)
class _Pixels:
    pixels: NDArray[np.uint8]


def load(
    bundle: Path | str,
    *,
    device: Device = EncoderConfig.device,
    threads: int = EncoderConfig.threads,
    engine: Engine = EncoderConfig.engine,
    precision: RequestedPrecision = EncoderConfig.precision,
    layer: Layer = EncoderConfig.layer,
    normalize: bool = EncoderConfig.normalize,
) -> Encoder:
    """Opens a bundle: `btpipe.load("exports/NAME").embed(["a.jpg", "b.jpg"])` is `(2, D)` float32.

    With the same settings the vectors are those of `btpipe embed` to the bit.

    Raises:
        UsageError: no folder there, or settings that the bundle or an engine cannot serve.
        IntegrityError: no bundle, or one whose bytes changed.
    """
    return Encoder(
        EncoderConfig(Path(bundle), device, engine, precision, layer, normalize, threads)
    )


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
