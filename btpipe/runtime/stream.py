"""A CUDA stream for work beside torch's, made by the driver itself: embedding loads no torch."""

import ctypes

from btpipe.errors import MachineError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with the default stream, on which torch works


def gpu_stream(gpu: int) -> int:
    """A stream of the GPU's primary context, as cudaStream_t; it lives as long as the process.

    Raises:
        MachineError: the driver makes none.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    for call, *arguments in (
        (driver.cuInit, 0),
        (driver.cuDeviceGet, ctypes.byref(device), gpu),
        (driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device),
        (driver.cuCtxPushCurrent_v2, context),
        (driver.cuStreamCreate, ctypes.byref(stream), _NON_BLOCKING),
        (driver.cuCtxPopCurrent_v2, ctypes.byref(context)),
    ):
        # The arguments are built before the calls: what they point to is read at each call.
        status = call(*arguments)
        if status != 0:
            raise MachineError(
                f"the driver makes no stream (CUDA error {status})",
                where=f"GPU {gpu}",
                fix="see what nvidia-smi says of the GPU, or use the CPU",
            )
    return stream.value or 0
