"""Which device "auto" means, asked of the driver itself: nothing here loads torch."""

from typing import Literal

from btpipe.errors import MachineError
from btpipe.runtime.machine import gpu_count

AskedDevice = Literal["auto", "cpu", "cuda"]


def resolve_device(device: AskedDevice) -> Literal["cpu", "cuda"]:
    """ "auto" is the GPU where the driver shows one.

    Raises:
        MachineError: "cuda" was asked for and the driver shows none.
    """
    has_gpu = device != "cpu" and gpu_count() > 0
    if device == "cuda" and not has_gpu:
        raise MachineError(
            "the driver shows no GPU",
            where="device cuda",
            fix="use the CPU; if there is a GPU: see nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    return "cuda" if has_gpu else "cpu"
