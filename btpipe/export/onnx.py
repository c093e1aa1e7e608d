"""The encoder as one ONNX file: uint8 pixels in, float32 embeddings out, normalisation inside."""

from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from btpipe import __version__
from btpipe.artifact import write_file
from btpipe.errors import MachineError
from btpipe.export.contract import INPUT, OUTPUT, Preprocessing

OPSET = 20
IR_VERSION = 10
"""The newest that every onnxruntime since 1.18 reads; torch's exporter chose it too when pinned."""
EXAMPLE_BATCH = 2
"""A batch of 1 would be baked in as a constant (pytorch#157621)."""


class Normalized(nn.Module):
    """uint8 `(n, S, S, 3)` -> float32 `(n, D)`: (pixels / 255 - mean) / std, then the encoder."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(preprocessing.mean) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std) * 255)

    def forward(self, images: Tensor) -> Tensor:
        scaled = (images.to(torch.float32) - self.mean) / self.std
        embedding: Tensor = self.encoder(scaled.permute(0, 3, 1, 2))
        return embedding


def write(encoder: nn.Module, preprocessing: Preprocessing, path: Path) -> None:
    """Writes the encoder in evaluation mode; the same weights give the same bytes.

    Raises:
        MachineError: no space, no permission, or an exporter that fails on this machine.
    """
    model = _model(Normalized(encoder, preprocessing).eval(), preprocessing.size)
    onnx.helper.set_model_props(
        model,
        {
            "btpipe_version": __version__,
            "preprocessing": preprocessing.text(),
            "license": "see README.md in the bundle",
        },
    )
    onnx.checker.check_model(model, full_check=True)
    write_file(path, model.SerializeToString(deterministic=True))


def _model(network: nn.Module, size: int) -> onnx.ModelProto:
    """The traced network, without what names the machine that traced it."""
    example = torch.zeros(EXAMPLE_BATCH, size, size, 3, dtype=torch.uint8)
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
    model = program.model_proto
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "btpipe", __version__
    for part in _described(model):
        # Stack traces with the paths of the source files: another machine would give other bytes.
        del part.metadata_props[:]
    return model


def _described(model: onnx.ModelProto) -> Iterator[onnx.NodeProto | onnx.ValueInfoProto]:
    """Every part of the graph on which the exporter leaves notes."""
    graph = model.graph
    yield from graph.node
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
    yield from graph.initializer
    yield graph
