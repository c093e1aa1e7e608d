"""How a bundle is opened: which engine computes, on which device and in which precision.

One rule for both engines: fp32 is float32 throughout, tf32 is float32 whose products a GPU rounds
to ten bits of mantissa.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from btpipe import runtime
from btpipe.data import supervisor
from btpipe.errors import UsageError
from btpipe.export import contract

Engine = Literal["auto", "onnx", "torch"]
Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8"]
RequestedPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "int8"]
Layer = Literal["pooled", "layer1", "layer2", "layer3", "layer4"]

LAYERS: tuple[Layer, ...] = get_args(Layer)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """How a bundle is opened; picklable, so that another process opens it alike.

    `layer`: the vector is the mean over the last (or an earlier) stage's positions. `normalize`:
    vectors of length 1. `threads`: how many batches are in the network at a time, each on a core of
    its own, and how many threads of a job's worker read and decode; 0: one for each core.
    """

    bundle: Path
    device: runtime.AskedDevice = "auto"
    engine: Engine = "auto"
    precision: RequestedPrecision = "auto"
    layer: Layer = "pooled"
    normalize: bool = False
    threads: int = 0


def engine(requested: Engine, layer: Layer) -> Literal["onnx", "torch"]:
    """ "auto" is onnxruntime, and torch for what only torch can do.

    Raises:
        UsageError: an earlier stage is asked of onnxruntime; the model has no such output.
    """
    if requested == "onnx" and layer != "pooled":
        raise UsageError(
            f"--layer {layer} with --engine onnx",
            expected="--layer pooled: the ONNX model has one output",
            fix="take --engine torch, which reads the weights beside it",
        )
    if requested == "auto":
        return "onnx" if layer == "pooled" else "torch"
    return requested


def dimension(bundle: contract.Bundle, layer: Layer) -> int:
    """Numbers in a vector: every stage of a ResNet has twice the channels of the one before."""
    stages = len(LAYERS) - 1
    return bundle.dimension >> (0 if layer == "pooled" else stages - LAYERS.index(layer))


def model_of(bundle: contract.Bundle, precision: Precision) -> Path:
    """The ONNX model that is run to compute in a precision.

    Raises:
        UsageError: the bundle was exported without it, or no ONNX model computes in it.
    """
    if precision == "bf16":
        raise UsageError(
            "--precision bf16 with --engine onnx",
            expected=f"--precision {' or '.join(bundle.precisions)}",
            fix="take --engine torch for bf16",
        )
    return bundle.model_of("fp32" if precision == "tf32" else precision)


def choose(
    bundle: contract.Bundle,
    engine: Literal["onnx", "torch"],
    requested: RequestedPrecision,
    device: Literal["cpu", "cuda"],
    agrees: Callable[[contract.Precision], bool],
) -> tuple[Precision, str]:
    """The precision, and why.

    "auto" with onnxruntime: on a GPU fp16, where the bundle holds such a model and it `agrees`,
    which says that this machine gives the bundle's golden vectors in it, else tf32; on a CPU in the
    same way int8, where that is faster, else fp32. With torch: bf16 where the hardware has it, else
    fp32.

    Raises:
        UsageError: the engine or the device does not compute in it, or the bundle has no such
            model.
    """
    if requested == "tf32" and device == "cpu":
        raise UsageError(
            "--precision tf32 on a CPU", expected="a GPU, or --precision fp32", fix="take fp32"
        )
    if engine == "torch":
        return _of_torch(requested, device)
    if requested != "auto":
        model_of(bundle, requested)
        return requested, f"{requested}: asked for"
    if device == "cuda":
        return _of_gpu(bundle, agrees)
    return _of_cpu(bundle, agrees)


def _of_cpu(
    bundle: contract.Bundle, agrees: Callable[[contract.Precision], bool]
) -> tuple[Precision, str]:
    if "int8" not in bundle.precisions:
        return "fp32", "fp32: the bundle has no int8 model (btpipe export --precision fp32,int8)"
    if not runtime.cpu_is_faster_in_int8():
        return "fp32", "fp32: on this CPU int8 is not known to be faster"
    if not (bundle.has_exact_gate or runtime.cpu_sums_int8()):
        return "fp32", "fp32: this CPU may clip sums of the bundle's int8 model (export it again)"
    if not agrees("int8"):
        return "fp32", "fp32: in int8 this CPU does not give the bundle's golden vectors"
    return "int8", "int8: faster on this CPU, which gives the bundle's golden vectors in it"


def _of_gpu(
    bundle: contract.Bundle, agrees: Callable[[contract.Precision], bool]
) -> tuple[Precision, str]:
    rounded = "tf32: float32 whose products the GPU rounds to ten bits"
    if "fp16" not in bundle.precisions:
        fix = "btpipe export --precision fp32,fp16"
        return "tf32", f"{rounded}; the bundle has no fp16 model ({fix})"
    if not agrees("fp16"):
        return "tf32", f"{rounded}; in fp16 this GPU does not give the bundle's golden vectors"
    return "fp16", "fp16: in it this GPU gives the bundle's golden vectors"


GOLDEN_SECONDS = 180.0
"""For the golden images: CUDA's libraries are loaded, a decoder and a model opened."""


def agrees_apart(
    bundle: Path, device: Literal["cpu", "cuda"], precision: contract.Precision
) -> bool:
    """`golden.agrees` in a process of its own."""
    work = functools.partial(_agrees, bundle, device, precision)
    answers = supervisor.supervise(work, iter([(0, 0)]), processes=1, limit_seconds=GOLDEN_SECONDS)
    return any(answer is True for _, answer in answers)


def _agrees(
    bundle: Path, device: Literal["cpu", "cuda"], precision: contract.Precision, _: int
) -> bool:
    # DALI and onnxruntime are this process's business, not the job's.
    from btpipe.export import golden  # noqa: PLC0415

    return golden.agrees(contract.open_bundle(bundle), precision, device=device)


def _of_torch(requested: RequestedPrecision, device: str) -> tuple[Precision, str]:
    if requested == "int8":
        raise UsageError(
            "--precision int8 with --engine torch",
            expected="fp32 or bf16",
            fix="take --engine onnx: the int8 model is ONNX",
        )
    if requested == "fp16" and device != "cuda":
        raise UsageError(
            "--precision fp16 with --engine torch on a CPU",
            expected="fp32 or bf16",
            fix="take bf16, or --engine onnx for the bundle's fp16 model",
        )
    if requested != "auto":
        return requested, f"{requested}: asked for"
    if device == "cuda" or runtime.cpu_has_bf16():
        return "bf16", "bf16: the hardware multiplies in it"
    return "fp32", "fp32: this CPU has no bf16 instructions"
