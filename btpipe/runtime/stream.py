"""A GPU for threads that know no torch: its context, and a stream beside torch's.

Asked of the driver itself: embedding loads no torch.
"""

import ctypes
import functools

from btpipe.errors import MachineError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with the default stream, on which torch works


@functools.cache
def _context(gpu: int) -> ctypes.c_void_p:
    """The GPU's primary context, which CUDA's libraries share; it lives as long as the process."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _require(driver.cuInit(0), gpu)
    _require(driver.cuDeviceGet(ctypes.byref(device), gpu), gpu)
    _require(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), gpu)
    return context


def use_gpu(gpu: int) -> None:
    """Makes it the current GPU of the calling thread, as `torch.cuda.set_device` does."""
    _require(ctypes.CDLL("libcuda.so.1").cuCtxSetCurrent(_context(gpu)), gpu)


def gpu_stream(gpu: int) -> int:
    """A new stream of the GPU, as cudaStream_t; the GPU becomes the current one of this thread.

    Raises:
        MachineError: the driver makes none.
    """
    use_gpu(gpu)
    stream = ctypes.c_void_p()
    driver = ctypes.CDLL("libcuda.so.1")
    _require(driver.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING), gpu)
    return stream.value or 0


def _require(status: int, gpu: int) -> None:
    if status != 0:
        raise MachineError(
            f"the driver gives no context or stream (CUDA error {status})",
            where=f"GPU {gpu}",
            fix="see what nvidia-smi says of the GPU, or use the CPU",
        )
