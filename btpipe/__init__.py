"""btpipe: from a folder of unlabelled images to an encoder and a table of vectors.

encoder = btpipe.load("exports/NAME")
vectors = encoder.embed(["a.jpg", "b.jpg"])  # (2, D) float32
"""

import importlib

from btpipe.runtime.nvjpeg import prefer_nvidias

__version__ = "0.2.0"
__all__ = ["__version__", "load"]

prefer_nvidias()  # here: in every process before anything of ours imports torchvision


def __getattr__(name: str) -> object:
    """`load` when it is asked for: onnxruntime and DALI take a second that --help must not wait."""
    if name == "load":
        return importlib.import_module("btpipe.embed.encoder").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
