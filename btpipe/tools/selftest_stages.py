"""The way of an image on this machine: decoded and augmented, through a compiled step, exported.

What of it a GPU does is compared with the CPU, or with float64 there.
"""

import tempfile
import warnings
from pathlib import Path

import torch

from btpipe.export import onnx_model, weights
from btpipe.export.contract import Preprocessing
from btpipe.export.session import Session
from btpipe.pretrain import network, step
from btpipe.recipe import Network, Optim, Run
from btpipe.runtime import Precision
from btpipe.tools import gpu_pixels, tiny_recipe
from btpipe.tools.selftest_checks import Check, difference, relative, tried, worst

COMPILED = 1e-10
"""float64 against float64: a compiler only sums in another order (5e-15 on a CPU)."""
HALF = 0.5
"""The same in bf16, of the gradient's norm: its own error is 0.17, that of zeros 1."""
EXPORTED = 1e-4
"""float32 through 18 layers against float64, relative to the largest value (6e-7 on a CPU)."""
EVALUATION, TRAINING = 0.5, 1.5
"""Grey levels: decoders of GPUs and CPUs round otherwise, and training views stretch colours."""


def checks(device: torch.device) -> list[Check]:
    """All that apply to the device: compiling for a CPU takes minutes, and proves no GPU."""
    exported = exported_check(device)
    return [exported] if device.type == "cpu" else [exported, *_of_gpus(device)]


def _of_gpus(device: torch.device) -> list[Check]:
    on = f"on {device.type}"
    about = "gradient of a step against the eager one in float64 on the CPU, relative"
    grey = f"grey levels between {gpu_pixels.IMAGES} drawn JPEGs on the GPU and on the CPU, mean"

    def compiled(precision: Precision, tolerance: float) -> Check:
        name = f"compiled step, {precision} {on}"
        return tried(name, tolerance, about, lambda: _compiled_error(device, precision))

    return [
        compiled("fp64", COMPILED),
        compiled("bf16", HALF),
        tried(f"training views {on}", TRAINING, grey, lambda: _training_error(device)),
        tried(f"evaluation view {on}", EVALUATION, grey, lambda: _evaluation_error(device)),
    ]


def exported_check(device: torch.device) -> Check:
    """A small encoder as ONNX in onnxruntime, on this device and no other."""
    about = "embeddings of the exported encoder against torch in float64, relative"
    name = f"onnxruntime on {device.type}"
    return tried(name, EXPORTED, about, lambda: _exported_error(device))


def _exported_error(device: torch.device) -> float:
    images = gpu_pixels.evaluation_views(None)
    size = gpu_pixels.SIZE
    prepared = Preprocessing(size, size, "bilinear", network.MEAN, network.STD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = network.encoder(Network(backbone="resnet18"))
    encoder = weights.calibrate(encoder, prepared, images, len(images))
    with tempfile.TemporaryDirectory(prefix="btpipe-selftest-") as folder:
        model = Path(folder) / "encoder.onnx"
        onnx_model.write(encoder, prepared, model)
        vectors = Session(model, device="cpu" if device.type == "cpu" else "cuda").run(images)
    exact = onnx_model.Normalized(encoder.double(), prepared, torch.float64).double().eval()
    with torch.inference_mode():
        expected = exact(torch.from_numpy(images))
    return difference(torch.from_numpy(vectors), expected)


def _compiled_error(device: torch.device, precision: Precision) -> float:
    expected = _gradient(torch.device("cpu"), Run(precision="fp64", compile="off"))
    gradient = _gradient(device, Run(precision=precision, compile="on"))
    if precision == "fp64":
        return difference(gradient, expected)
    return relative(float((gradient - expected).norm()), float(expected.norm()))


def _gradient(device: torch.device, run: Run) -> torch.Tensor:
    """All gradients of one step, end to end, as float64 on the CPU."""
    # Plain SGD leaves the gradients as they are.
    described = tiny_recipe.recipe(run).model_copy(update={"optim": Optim(name="sgd")})
    core = step.build(described, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it compiles
        if core.compiled:
            step.compile(core)
        step.update(core, [*tiny_recipe.views().to(device)], 0.0, 0.0)
    gradients = [p.grad for p in core.network.parameters() if p.grad is not None]
    return torch.cat([gradient.double().cpu().flatten() for gradient in gradients])


def _training_error(device: torch.device) -> float:
    views, expected = (gpu_pixels.training_views(on) for on in (device, torch.device("cpu")))
    return worst(gpu_pixels.grey_levels(a, b) for a, b in zip(views, expected, strict=True))


def _evaluation_error(device: torch.device) -> float:
    pixels, expected = (gpu_pixels.evaluation_views(gpu) for gpu in (device.index or 0, None))
    return gpu_pixels.grey_levels(pixels, expected)
