"""The encoder as ONNX files: uint8 pixels in, float32 embeddings out, normalisation inside."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
import torch
from torch import Tensor, nn

from btpipe import __version__
from btpipe.artifact import write_file
from btpipe.errors import MachineError
from btpipe.export import weights
from btpipe.export.contract import INPUT, OUTPUT, Preprocessing

OPSET = 20
IR_VERSION = 10
"""The newest that every onnxruntime since 1.18 reads; torch's exporter chose it too when pinned."""
EXAMPLE_BATCH = 2
"""A batch of 1 would be baked in as a constant (pytorch#157621)."""
COMPUTED = {"fp32": torch.float32, "fp16": torch.float16}


class Normalized(nn.Module):
    """uint8 `(n, S, S, 3)` -> float32 `(n, D)`: (pixels / 255 - mean) / std, then the encoder.

    The pixels are normalised in float32 and then cast to what the encoder computes in.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        preprocessing: Preprocessing,
        computed: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.encoder, self.computed = encoder, computed
        self.register_buffer("mean", torch.tensor(preprocessing.mean) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std) * 255)

    def forward(self, images: Tensor) -> Tensor:
        scaled = ((images.to(torch.float32) - self.mean) / self.std).to(self.computed)
        embedding: Tensor = self.encoder(scaled.permute(0, 3, 1, 2))
        return embedding


class Pooled(nn.Module):
    """The mean over all places, in float32: (n, C, H, W) -> (n, C, 1, 1).

    What the network's own pooling computes; that one leaves gathers and shapes in the graph.
    """

    def forward(self, places: Tensor) -> Tensor:
        return places.float().mean((2, 3), keepdim=True)


def write(
    encoder: nn.Module,
    preprocessing: Preprocessing,
    path: Path,
    *,
    precision: Literal["fp32", "fp16"] = "fp32",
    license_name: str = "",
) -> None:
    """Writes the encoder in evaluation mode; the same weights give the same bytes.

    "fp16": weights and arithmetic in half, but for the normalisation and the last mean.

    Raises:
        MachineError: no space, no permission, or an exporter that fails on this machine.
    """
    computed = COMPUTED[precision]
    network = Normalized(_folded(encoder).to(computed), preprocessing, computed).eval()
    size = preprocessing.size
    example = torch.zeros(EXAMPLE_BATCH, size, size, 3, dtype=torch.uint8)
    write_file(path, finished(_model(network, example), preprocessing, license_name))


def write_float(
    encoder: nn.Module, preprocessing: Preprocessing, path: Path, *, license_name: str = ""
) -> None:
    """Writes the encoder alone: float32 (n, 3, S, S) that is normalised already -> `(n, D)`.

    Raises:
        MachineError: no space, no permission, or an exporter that fails on this machine.
    """
    example = torch.zeros(EXAMPLE_BATCH, 3, preprocessing.size, preprocessing.size)
    model = _model(_folded(encoder).eval(), example)
    write_file(path, finished(model, preprocessing, license_name))


def finished(model: onnx.ModelProto, preprocessing: Preprocessing, license_name: str) -> bytes:
    """The checked model's bytes, in one file, with what it is and nothing of who made it."""
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "btpipe", __version__
    for part in _described(model):
        # Stack traces with the paths of the source files: another machine would give other bytes.
        del part.metadata_props[:]
    onnx.helper.set_model_props(
        model,
        {
            "btpipe_version": __version__,
            "preprocessing": preprocessing.text(),
            "license": license_name or "see README.md in the bundle",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _folded(encoder: nn.Module) -> nn.Module:
    """A copy without batch norm, and with a pooling that leaves no shapes in the graph."""
    folded = weights.folded(encoder)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    folded.avgpool = Pooled()
    return folded


def _model(network: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The traced network, for any batch size."""
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    if program is None:
        raise MachineError(
            "torch.onnx.export gave no model", fix="check that onnxscript is installed"
        )
    return program.model_proto


def _described(model: onnx.ModelProto) -> Iterator[onnx.NodeProto | onnx.ValueInfoProto]:
    """Every part of the graph on which the exporter leaves notes."""
    graph = model.graph
    yield from graph.node
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
    yield from graph.initializer
    yield graph
