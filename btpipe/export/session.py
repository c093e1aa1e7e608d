"""An ONNX encoder in onnxruntime, on the provider that was asked for and no other. No torch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto

from btpipe import runtime
from btpipe.errors import IntegrityError, MachineError, UsageError
from btpipe.export.contract import INPUT, OUTPUT, Preprocessing

Device = runtime.AskedDevice
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def is_built_for_gpus() -> bool:
    """Whether this onnxruntime has the CUDA provider."""
    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()


class Session:
    """uint8 `(n, S, S, 3)` -> float32 `(n, D)`. `device` is "cpu" or "cuda", as it really runs.

    `threads` are onnxruntime's own, within an operator; 0: one for each core. `tf32`: a GPU may
    round what it multiplies to ten bits of mantissa. `exact`: without graph optimisation, in which
    an int8 model sums in float32 what it would sum in integers, and clips nothing.

    Raises:
        IntegrityError: the model is not one, keeps data outside its file, or takes other input.
        MachineError: the device was asked for and cannot be used.
    """

    def __init__(
        self,
        model: Path,
        *,
        device: Device = "auto",
        threads: int = 0,
        tf32: bool = False,
        exact: bool = False,
    ) -> None:
        self.device: Literal["cpu", "cuda"] = runtime.resolve_device(device)
        self._model = model
        self._session = _opened(model, self.device, threads, tf32=tf32, exact=exact)
        self._check_provider()
        self.size, self.dimension = self._geometry(model)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The embeddings of the images, row for row.

        Raises:
            UsageError: pixels of another shape or type than the model takes.
            MachineError: onnxruntime, or a library that it calls, fails.
        """
        expected = (self.size, self.size, 3)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise UsageError(
                f"pixels are {pixels.dtype} {pixels.shape}",
                expected=f"uint8 (n, {self.size}, {self.size}, 3)",
            )
        if len(pixels) == 0:
            return np.zeros((0, self.dimension), np.float32)
        try:
            (embedding,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(pixels)})
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise _failed(error, self._model, self.device) from error
        return np.asarray(embedding, np.float32)

    def _check_provider(self) -> None:
        # onnxruntime falls back to the CPU with no more than a log line.
        provider = self._session.get_providers()[0]
        if provider != PROVIDERS[self.device]:
            raise MachineError(
                f"onnxruntime runs on {provider}",
                expected=PROVIDERS[self.device],
                fix="install the CUDA and cuDNN libraries of onnxruntime-gpu, or ask for the CPU",
            )

    def _geometry(self, model: Path) -> tuple[int, int]:
        """(image size, embedding dimension) as the model's input and output declare them."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        if set(inputs) != {INPUT} or OUTPUT not in outputs:
            raise IntegrityError(
                f"takes {sorted(inputs)} and gives {sorted(outputs)}",
                where=model,
                expected=f"{INPUT} and {OUTPUT}",
            )
        images, embedding = inputs[INPUT], outputs[OUTPUT]
        shape = list(images.shape)
        if images.type != "tensor(uint8)" or len(shape) != 4 or shape[3] != 3:
            raise IntegrityError(
                f"takes {images.type} {shape}", where=model, expected="tensor(uint8) (n, S, S, 3)"
            )
        return int(shape[1]), int(embedding.shape[1])


class FloatSession:
    """`Session` on the CPU for the model that takes normalised float32 (n, 3, S, S).

    Raises:
        IntegrityError: the model is not one, or keeps data outside its file.
    """

    def __init__(self, model: Path, preprocessing: Preprocessing) -> None:
        self._session = _opened(model, "cpu", 0)
        self._mean, self._std = (
            np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std)
        )

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The embeddings of uint8 (n, S, S, 3), normalised here: float32 (n, D)."""
        scaled = (pixels.astype(np.float32) / 255 - self._mean) / self._std
        images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
        (embedding,) = self._session.run([OUTPUT], {INPUT: images})
        return np.asarray(embedding, np.float32)


def _opened(
    model: Path,
    device: Literal["cpu", "cuda"],
    threads: int,
    *,
    tf32: bool = False,
    exact: bool = False,
) -> onnxruntime.InferenceSession:
    """A model in one file in onnxruntime."""
    refuse_external_data(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; warnings about graph placement help nobody
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Threads that wait spin: a fifth of an int8 network's CPU time on two cores, for nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if device == "cuda":
        if not is_built_for_gpus():
            raise MachineError(
                "this onnxruntime is built without CUDA",
                where="device cuda",
                fix="pip uninstall onnxruntime; pip install onnxruntime-gpu; or take --engine torch"
                " or --device cpu",
            )
        onnxruntime.preload_dlls()
    try:
        # Without `enable_fallback` the Python class goes on on the CPU where CUDA fails, here and
        # in `run`.
        return onnxruntime.InferenceSession(
            str(model), options, providers=_providers(device, tf32=tf32), enable_fallback=0
        )
    except Exception as error:  # as above
        if device == "cuda":
            raise _failed(error, model, device) from error
        raise IntegrityError(
            f"onnxruntime cannot load it ({error})", where=model, fix="export the run again"
        ) from error


def _failed(error: Exception, model: Path, device: str) -> MachineError:
    """onnxruntime's error in a sentence."""
    text = " ".join(str(error).split())
    what = f"onnxruntime fails on {'the GPU' if device == 'cuda' else 'the CPU'}: {text[:300]}"
    fix = (
        "see that its CUDA and cuDNN libraries fit (btpipe doctor), take a smaller --batch-size if"
        " memory is short, or --device cpu"
        if device == "cuda"
        else "free some memory, or take a smaller --batch-size"
    )
    return MachineError(what, where=model, fix=fix)


def _providers(
    device: Literal["cpu", "cuda"], *, tf32: bool
) -> list[str | tuple[str, dict[str, str]]]:
    if device == "cpu":
        return [PROVIDERS["cpu"]]
    # HEURISTIC: an exhaustive search for every new shape costs more than it gains here.
    options = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": str(int(tf32))}
    return [(PROVIDERS["cuda"], options), PROVIDERS["cpu"]]


def refuse_external_data(model: Path) -> None:
    """A model in one file may be run; one that reads other files by name may not.

    Raises:
        IntegrityError: not an ONNX model, or a tensor of it lies in another file.
    """
    try:
        proto = onnx.load(str(model), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError or OSError; either way no model
        raise IntegrityError(f"not an ONNX model ({error})", where=model) from error
    nodes = [node for function in proto.functions for node in function.node]
    for tensor in (*_graph_tensors(proto.graph), *_node_tensors(nodes)):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise IntegrityError(
                f"tensor {tensor.name!r} lies outside the file",
                where=model,
                expected="a model in one file",
                fix="save it with its data inside",
            )


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph, in its branches and loops too."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            if graph.node or graph.initializer:
                yield from _graph_tensors(graph)
