"""Which engine computes, and in what: asked for, or chosen and told."""

from typing import Literal, get_args

from btpipe import runtime
from btpipe.errors import UsageError
from btpipe.export import contract

Engine = Literal["auto", "onnx", "torch"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Asked = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Layer = Literal["pooled", "layer1", "layer2", "layer3", "layer4"]

LAYERS: tuple[Layer, ...] = get_args(Layer)


def engine(asked: Engine, layer: Layer) -> Literal["onnx", "torch"]:
    """ "auto" is onnxruntime, and torch for what only torch can do.

    Raises:
        UsageError: an earlier stage is asked of onnxruntime; the model has no such output.
    """
    if asked == "onnx" and layer != "pooled":
        raise UsageError(
            f"--layer {layer} with --engine onnx",
            expected="--layer pooled: the ONNX model has one output",
            fix="take --engine torch, which reads the weights beside it",
        )
    if asked == "auto":
        return "onnx" if layer == "pooled" else "torch"
    return asked


def dimension(bundle: contract.Bundle, layer: Layer) -> int:
    """Numbers in a vector: every stage of a ResNet has twice the channels of the one before."""
    stages = len(LAYERS) - 1
    return bundle.dimension >> (0 if layer == "pooled" else stages - LAYERS.index(layer))


def choose(
    bundle: contract.Bundle, engine: Literal["onnx", "torch"], asked: Asked, device: str
) -> tuple[Precision, str]:
    """The precision, and why.

    "auto" with onnxruntime: int8 on a CPU that multiplies in it, if the bundle holds an int8 model:
    who exported with `--precision int8` allowed it, and it passed its gate. Else fp32. With torch:
    bf16 where the hardware has it, else fp32.

    Raises:
        UsageError: the engine does not compute in it, or the bundle has no such model.
    """
    if engine == "torch":
        return _of_torch(asked, device)
    if asked == "bf16":
        raise UsageError(
            "--precision bf16 with --engine onnx",
            expected=f"--precision {' or '.join(bundle.precisions)}",
            fix="take --engine torch for bf16",
        )
    if asked != "auto":
        bundle.model_of(asked)
        return asked, f"{asked}: asked for"
    if "int8" not in bundle.precisions:
        return "fp32", "fp32: the bundle has no int8 model (btpipe export --precision fp32,int8)"
    if device == "cuda":
        return "fp32", "fp32: the int8 model is for CPUs"
    if not runtime.cpu_has_int8():
        return "fp32", "fp32: this CPU has no int8 instructions, in which int8 is faster"
    return "int8", "int8: the bundle was exported with it, it passed its gate, and this is a CPU"


def _of_torch(asked: Asked, device: str) -> tuple[Precision, str]:
    if asked == "int8":
        raise UsageError(
            "--precision int8 with --engine torch",
            expected="fp32 or bf16",
            fix="take --engine onnx: the int8 model is ONNX",
        )
    if asked == "fp16" and device != "cuda":
        raise UsageError(
            "--precision fp16 with --engine torch on a CPU",
            expected="fp32 or bf16",
            fix="take bf16, or --engine onnx for the bundle's fp16 model",
        )
    if asked != "auto":
        return asked, f"{asked}: asked for"
    if device == "cuda" or runtime.cpu_has_bf16():
        return "bf16", "bf16: the hardware multiplies in it"
    return "fp32", "fp32: this CPU has no bf16 instructions"
