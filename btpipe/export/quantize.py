"""The fp32 model in int8, for CPUs: static, per channel, calibrated on images.

Weights are int8 with a scale for each channel, activations uint8 with one for each tensor (the
pair that VNNI multiplies; int8 activations, or uint8 weights, ran no faster than float32 there).
Weights use seven of the eight bits: CPUs without VNNI add two products in 16 bits and clip what
exceeds them, and 2 * 255 * 64 does not. Convolutions and what joins them are
quantised, so that the network runs in int8 from its first convolution to its last mean; the cast
and the normalisation before it stay in float32.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from btpipe import artifact
from btpipe.export import onnx_model
from btpipe.export.contract import INPUT, Preprocessing

QUANTISED = ("Conv", "Relu", "Add", "MaxPool")
BATCH = 16
MARK = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Says that batch norm is folded and shapes are known, as they are; else onnxruntime warns."""


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Images for onnxruntime to see the range of every activation on: (n, S, S, 3) uint8."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        starts = range(0, len(pixels), BATCH)
        self._batches: Iterator[NDArray[np.uint8]] = (pixels[i : i + BATCH] for i in starts)

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch, or None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def write(
    model: Path,
    calibration: NDArray[np.uint8],
    preprocessing: Preprocessing,
    path: Path,
    *,
    license_name: str = "",
) -> None:
    """Writes the fp32 `model` in int8, with the ranges that `calibration` (n, S, S, 3) shows.

    Raises:
        MachineError: no space, or no permission.
    """
    proto = onnx.load(str(model), load_external_data=False)
    onnx.helper.set_model_props(proto, dict([MARK]))
    with tempfile.TemporaryDirectory(prefix="btpipe-int8-") as folder, artifact.disk_errors(path):
        temporary = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            temporary,
            Calibration(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        quantised = onnx.load(str(temporary), load_external_data=False)
    artifact.write_file(path, onnx_model.finished(quantised, preprocessing, license_name))
