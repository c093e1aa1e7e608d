"""What each GPU computes, by torch, DALI and onnxruntime, against the same on the CPU.

All that is computed is far from zero, so that a GPU which does nothing is seen. Libraries are
imported where they are used: one that cannot be loaded must not hide the others.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btpipe import runtime
from btpipe.errors import BtpipeError
from btpipe.tools.finding import MachineFinding, Value, readable_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

SINGLE = 1e-4
"""float32 sums of up to 256 positive terms in another order, relative to the largest."""
TENSOR_FLOAT = 4e-3
"""The same where TF32 is allowed, as torch lets cuDNN: ten bits of each factor's mantissa."""
GREY_LEVELS = 2.0
"""Mean difference of the evaluation view: decoders of GPUs and CPUs round otherwise."""
DRIVER = "see nvidia-smi and dmesg; update the driver, or leave the GPU out: CUDA_VISIBLE_DEVICES"
OTHER_DALI = (
    "for a driver below 580: pip uninstall nvidia-dali-cuda130; pip install nvidia-dali-cuda120"
)
OTHER_ENGINE = (
    "pip uninstall onnxruntime; pip install --force-reinstall onnxruntime-gpu, for a driver below"
    " 580 'onnxruntime-gpu<1.27'; it takes torch's CUDA and cuDNN: both for one version of CUDA"
)
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Wrong(Exception):
    """What was computed, and what was expected; what to do where the library is to blame."""

    def __init__(self, text: str, to_do: str = DRIVER, **values: Value) -> None:
        super().__init__(text)
        self.to_do, self.values = to_do, values


def gpus() -> MachineFinding:
    """The GPUs, and whether torch can use them."""
    driver = Path("/proc/driver/nvidia/version")
    counted = runtime.gpu_count()
    if not counted:
        if driver.exists():
            fix = "look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
            text = "a driver, but no GPU to use"
            return MachineFinding("GPU", text, "look", fix, {"gpus": 0})
        text = "none: training and embedding run on the CPU"
        return MachineFinding("GPU", text, values={"gpus": 0})
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        to_do = f"update the driver to one for CUDA {torch.version.cuda}, or install another torch"
        text = f"{counted}, which torch cannot use"
        return MachineFinding("GPU", text, "broken", to_do, {"gpus": counted})
    names = sorted({torch.cuda.get_device_name(i) for i in range(counted)})
    free, total = torch.cuda.mem_get_info(0)
    memory = f"{readable_bytes(free)} of {readable_bytes(total)} free on the first"
    values = {"gpus": counted, "names": tuple(names), "free_bytes": free, "bytes": total}
    return MachineFinding("GPU", f"{counted} x {', '.join(names)}; {memory}", values=values)


def computed() -> list[MachineFinding]:
    """What the libraries compute on all GPUs, a row for each library; none without a GPU."""
    steps = (
        ("torch on GPUs", _torch, DRIVER),
        ("DALI on GPUs", _dali, OTHER_DALI),
        ("onnxruntime on GPUs", _onnxruntime, OTHER_ENGINE),
    )
    return [_on_all(*step) for step in steps] if runtime.gpu_count() else []


def _on_all(name: str, compare: Callable[[int], None], to_do: str) -> MachineFinding:
    """Compares on one GPU after the other; the first that is wrong is told."""
    for number in range(runtime.gpu_count()):
        try:
            compare(number)
        except Wrong as error:
            text, values = f"GPU {number}: {error}", {"gpu": number, **error.values}
            return MachineFinding(name, text, "broken", error.to_do, values)
        except BtpipeError as error:
            text, fix = f"GPU {number}: {error.what}", error.fix or to_do
            return MachineFinding(name, text, "broken", fix, {"gpu": number})
        except Exception as error:
            lines = str(error).strip().splitlines()
            text = f"GPU {number}: {type(error).__name__}: {lines[0] if lines else ''}"
            return MachineFinding(name, text, "broken", to_do, {"gpu": number})
    compared = {"gpus": runtime.gpu_count()}
    return MachineFinding(name, "computes what the CPU computes", values=compared)


def _torch(number: int) -> None:
    """A copy there and back, a float32 product, a convolution; and no TF32 in the product."""
    torch = importlib.import_module("torch")
    device, generator = torch.device("cuda", number), torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> "Tensor":
        return torch.rand(shape, generator=generator) + 0.5  # type: ignore[no-any-return]

    product, convolved = torch.matmul, torch.nn.functional.conv2d
    factors = drawn(256, 256), drawn(256, 256)
    images, kernels = drawn(2, 16, 32, 32), drawn(16, 16, 3, 3)
    for what, compute, operands, tolerance in (
        ("a copy there and back", lambda x: x, factors[:1], 0.0),
        ("a float32 product", product, factors, SINGLE),
        ("a convolution", convolved, (images, kernels), TENSOR_FLOAT),
    ):
        result = compute(*(one.to(device) for one in operands)).cpu().numpy()
        require(what, result, compute(*operands).numpy(), tolerance)
    runtime.require_float32_products(device)


def _dali(number: int) -> None:
    """The evaluation view of a few drawn JPEGs."""
    decode = importlib.import_module("btpipe.data.pipeline.decode")
    gpu_pixels = importlib.import_module("btpipe.tools.gpu_pixels")
    views, expected = (gpu_pixels.evaluation_views(gpu) for gpu in (number, None))
    if rescued := decode.batch_decoder(number, runtime.cores()).rescued:
        text = f"{rescued} of {gpu_pixels.IMAGES} drawn JPEGs are decoded by the CPU alone"
        raise Wrong(text, OTHER_DALI, rescued=rescued, images=gpu_pixels.IMAGES)
    difference = gpu_pixels.grey_levels(views, expected)
    if not difference <= GREY_LEVELS:
        raise Wrong(
            f"the evaluation view of drawn JPEGs is {views.mean():.1f} on average,"
            f" {expected.mean():.1f} expected; pixels are {difference:.1f} apart,"
            f" {GREY_LEVELS} allowed",
            mean=float(views.mean()),
            expected_mean=float(expected.mean()),
            difference=difference,
            allowed=GREY_LEVELS,
        )


def _onnxruntime(number: int) -> None:
    """A convolution on the CUDA provider, which must not fall back to the CPU."""
    engine = importlib.import_module("onnxruntime")
    numpy = importlib.import_module("numpy")
    if CUDA not in engine.get_available_providers():
        raise Wrong("this onnxruntime is built without CUDA", OTHER_ENGINE)
    with contextlib.redirect_stdout(sys.stderr):  # what it cannot load it prints
        engine.preload_dlls()
    engine.set_default_logger_severity(4)  # a provider that fails is told below
    generator = numpy.random.default_rng(0)
    images, kernels = (
        generator.uniform(0.5, 1.5, shape).astype(numpy.float32)
        for shape in ((2, 16, 32, 32), (16, 16, 3, 3))
    )
    content = model("Conv", {"kernels": kernels}, (2, 16, 32, 32), (2, 16, 30, 30))
    results = []
    for name, settings in ((CUDA, {"device_id": str(number), "use_tf32": "0"}), (CPU, {})):
        session = engine.InferenceSession(content, providers=[(name, settings)], enable_fallback=0)
        if (provider := session.get_providers()[0]) != name:
            raise Wrong(f"onnxruntime runs on {provider}, {name} expected", OTHER_ENGINE)
        results.append(session.run(None, {"x": images})[0])
    require("a convolution", results[0], results[1], SINGLE)


def model(
    operator: str,
    weights: "Mapping[str, NDArray[np.float32]]",
    input_shape: Sequence[int],
    output_shape: Sequence[int],
) -> bytes:
    """An ONNX model of one operator of float32 `x` and the weights, of these shapes."""
    helper = importlib.import_module("onnx.helper")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    ends = [
        helper.make_tensor_value_info("x", 1, input_shape),
        helper.make_tensor_value_info("y", 1, output_shape),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    node = helper.make_node(operator, ["x", *weights], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], tensors)
    opset = [helper.make_opsetid("", 17)]
    built = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return bytes(built.SerializeToString())


def require(
    what: str, result: "NDArray[np.float32]", expected: "NDArray[np.float32]", tolerance: float
) -> None:
    """Returns where a result is the expected one, relative to the largest number.

    Raises:
        Wrong: it is another one, or not a number.
    """
    error = float(abs(result - expected).max() / abs(expected).max())
    if not error <= tolerance:
        raise Wrong(
            f"{what} is {result.mean():.4g} on average, {expected.mean():.4g} expected;"
            f" largest difference {error:.1e}, {tolerance:.0e} allowed",
            mean=float(result.mean()),
            expected_mean=float(expected.mean()),
            difference=error,
            allowed=tolerance,
        )
