"""One file at a time through DALI's decoder.

On a CPU every file is decoded here, alone, in the reading threads. With DALI 2.4.0 a file that
fails within a batch can end the process by SIGSEGV in the batch decoder: one damaged JPEG among 56
JPEG and PNG files did, in a bare graph as well, while damaged JPEGs among JPEGs alone did not. The
cause is not known; without a failing file no batch crashed (240 batches of 32 and 64), and alone
380 failures in 2,700 files did no harm.
"""

import threading

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe.data import header, views

_threads = threading.local()


def decode(file: NDArray[np.uint8], gpu: int | None) -> NDArray[np.uint8] | str:
    """Encoded bytes (n,) -> upright RGB pixels (height, width, 3), or why DALI has none.

    Each thread keeps a decoder. On a GPU the pixels stay there: what comes back is empty.
    """
    if not len(file):
        return "empty file"
    decoders: dict[int | None, Pipeline] = _threads.__dict__.setdefault("decoders", {})
    pipeline = decoders.pop(gpu, None) or views.decoding_pipeline(gpu=gpu)
    try:
        pipeline.feed_input("encoded", [file])
        pipeline.schedule_run()
        (output,) = pipeline.outputs()
    except RuntimeError:
        return header.damage(file.tobytes())
    decoders[gpu] = pipeline
    # DALI uses its buffer again.
    return np.array(output.at(0)) if gpu is None else np.zeros(0, np.uint8)
