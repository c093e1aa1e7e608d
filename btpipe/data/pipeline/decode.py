"""Files into pixels: one file at a time on a CPU, a batch at a time into the memory of a GPU.

On a CPU every file is decoded alone by DALI, in the reading threads. On a GPU `BatchDecoder` takes
a batch to nvImageCodec, the library that DALI decodes with. In a DALI graph one file whose header
nvImageCodec cannot parse ends the process by SIGSEGV while others of its batch are decoded (DALI
2.4.0, on CPUs as well), and one that fails in decoding costs the batch; nvImageCodec itself gives
None for either. Even so nothing enters a batch that its parser refuses.
"""

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline
from nvidia.nvimgcodec import (
    NVIMGCODEC_DEVICE_CPU_ONLY,
    Backend,
    BackendKind,
    CodeStream,
    ColorSpec,
    DecodeParams,
    Decoder,
    Image,
    as_image,
)

from btpipe import runtime
from btpipe.data import header
from btpipe.data.pipeline import dali_graphs
from btpipe.data.rejects import BadInputError
from btpipe.errors import MachineError

Pixels: TypeAlias = NDArray[np.uint8] | Image
"""Upright RGB pixels (height, width, 3), in the memory of the host or of a GPU."""

OPTIONS = ":fancy_upsampling=1"  # as libjpeg, and as every decoder on a CPU
_threads = threading.local()


def decode(file: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Encoded bytes (n,) -> upright RGB pixels (height, width, 3).

    Each thread keeps a decoder, on the CPU.

    Raises:
        BadInputError: DALI makes no pixels of it.
    """
    if not len(file):
        raise header.damage(b"")
    kept: Pipeline | None = _threads.__dict__.pop("decoder", None)
    pipeline = kept or dali_graphs.decoding_pipeline()
    try:
        pipeline.feed_input("encoded", [file])
        pipeline.schedule_run()
        (output,) = pipeline.outputs()
    except RuntimeError as error:
        raise header.damage(file.tobytes()) from error
    _threads.decoder = pipeline
    return np.array(output.at(0))  # DALI uses its buffer again


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A file that may be decoded in a batch, and what nvImageCodec's parser makes of it."""

    file: NDArray[np.uint8]
    stream: CodeStream


def parse(file: NDArray[np.uint8]) -> Encoded | None:
    """The file (n,) for a batch; None if it is to be decoded alone, by `decode`, or is damaged.

    JPEG in grey or three colours and PNG of 8 bits: every decoder makes the same pixels of them. A
    JPEG without its end is none of them: on a GPU what is missing would be grey without a word.
    """
    try:
        stream = CodeStream(file)
        kind, channels = stream.codec_name, stream.num_channels
        is_plain = stream.precision <= 8
    except RuntimeError:
        return None
    if kind == "jpeg":
        is_plain &= channels in (1, 3) and header.has_end(file)
    return Encoded(file, stream) if is_plain and kind in ("jpeg", "png") else None


@functools.cache
def batch_decoder(gpu: int | None, threads: int) -> "BatchDecoder":
    """The decoder of this process for a GPU: one for each number of threads that is asked for."""
    return BatchDecoder(gpu, threads)


class BatchDecoder:
    """Files into the memory of a GPU, a batch at a time; it may be used by several threads.

    What it does is in order on `stream`, a CUDA stream of its own: no other work waits for it. With
    `gpu=None` the same library decodes on the CPU, into the memory of the host. `backends`: which
    of its decoders it may take, and how much each of them; None: all of them, as it likes.
    `rescued` counts the good files that failed in a batch and were decoded alone.
    """

    def __init__(
        self,
        gpu: int | None,
        threads: int,
        *,
        backends: Sequence[Backend] | None = None,
        options: str = OPTIONS,
    ) -> None:
        self._gpu = gpu
        self.rescued = 0
        self.stream = 0 if gpu is None else runtime.gpu_stream(gpu)
        self._decoder = Decoder(
            device_id=NVIMGCODEC_DEVICE_CPU_ONLY if gpu is None else gpu,
            max_num_cpu_threads=min(threads, runtime.cores()),  # of more it takes one
            backends=[Backend(BackendKind.CPU_ONLY)] if gpu is None and not backends else backends,
            options=options,
        )
        self._params = DecodeParams(apply_exif_orientation=True, color_spec=ColorSpec.SRGB)
        self._one_at_a_time = threading.Lock()

    def decode(
        self, contents: Sequence[Encoded | NDArray[np.uint8]]
    ) -> list[Pixels | BadInputError]:
        """The pixels of each, or why there are none; pixels of the host are copied to the GPU.

        A file that fails in the batch is decoded alone, on the CPU, whose word is the last one: a
        GPU that is short of memory is no reason to call a file damaged.

        Raises:
            MachineError: the GPU fails.
        """
        streams = [content.stream for content in contents if isinstance(content, Encoded)]
        try:
            if self._gpu is not None:
                runtime.use_gpu(self._gpu)  # whatever thread this is: copies go to the current one
            with self._one_at_a_time:
                images = iter(
                    self._decoder.decode(streams, params=self._params, cuda_stream=self.stream)
                    if streams
                    else ()
                )
                return [
                    self._or_alone(next(images), content.file)
                    if isinstance(content, Encoded)
                    else self._copied(content)
                    for content in contents
                ]
        except RuntimeError as error:
            fix = "see nvidia-smi: free some of its memory, or take a smaller batch"
            raise MachineError(f"nvImageCodec fails on the GPU: {error}", fix=fix) from error

    def _or_alone(self, image: Image | None, file: NDArray[np.uint8]) -> Pixels | BadInputError:
        if image is not None:
            return image
        try:
            pixels = decode(file)
        except BadInputError as error:
            return error
        self.rescued += 1
        return self._copied(pixels)

    def _copied(self, pixels: NDArray[np.uint8]) -> Pixels:
        return pixels if self._gpu is None else as_image(pixels, self.stream).cuda()
