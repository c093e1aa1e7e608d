"""The weights of a bundle in torch: the reference in fp32, the fast float engine in bf16."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from btpipe.embed.precisions import LAYERS, Layer, Precision
from btpipe.errors import MachineError
from btpipe.export import contract, weights

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class TorchEngine:
    """uint8 `(n, S, S, 3)` -> float32 `(n, D)`, like `Session`. A call computes in one thread.

    fp32 is the very network that the gate compares with. In bf16 and fp16 batch norm is folded into
    the convolutions and memory lies channels last. On a GPU tf32 switches TF32 on in the process,
    and fp32 off.

    Raises:
        IntegrityError: weights that do not fit what the bundle says.
        MachineError: a GPU was asked for and torch sees none.
    """

    def __init__(
        self,
        bundle: contract.Bundle,
        device: Literal["cpu", "cuda"],
        precision: Precision,
        layer: Layer,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            fix = "install a torch for this driver (btpipe doctor), or use the CPU"
            raise MachineError("torch sees no GPU", where="device cuda", fix=fix)
        self.device = device
        torch.backends.cudnn.benchmark = device == "cuda"  # all calls have one shape
        self.layer, self._dtype = layer, DTYPES[precision]
        network = weights.load(bundle.folder / contract.WEIGHTS, weights.described(bundle))
        assert isinstance(network, ResNet)
        stages = [network.layer1, network.layer2, network.layer3, network.layer4]
        depth = LAYERS.index(layer) if layer != "pooled" else len(stages)
        # Every stage of a ResNet has twice the channels of the one before.
        self.dimension = bundle.dimension >> (len(stages) - depth)
        stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        whole: nn.Module = nn.Sequential(
            nn.Sequential(stem, *stages[:depth]), nn.Sequential(*stages[depth:])
        )
        if self._dtype != torch.float32:
            whole = weights.folded(whole).to(self._dtype).to(memory_format=torch.channels_last)
        elif self.device == "cuda":
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self._to_layer, self._behind = whole.to(self.device).children()
        prepared = bundle.preprocessing
        # As in the ONNX model: onnx.Normalized.
        self._mean, self._std = (
            (torch.tensor(values) * 255).to(self.device) for values in (prepared.mean, prepared.std)
        )

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The embeddings of the images, row for row."""
        return self._run(pixels, self._to_layer)

    def run_pooled(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """`run` with the last stage, whichever `layer` is."""
        return self._run(pixels, nn.Sequential(self._to_layer, self._behind))

    def _run(self, pixels: NDArray[np.uint8], network: nn.Module) -> NDArray[np.float32]:
        if len(pixels) == 0:
            return np.zeros((0, self.dimension), np.float32)
        if self.device == "cpu" and torch.get_num_threads() != 1:
            torch.set_num_threads(1)  # of the calling thread: several calls run at once instead
        with torch.inference_mode():
            images = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
            scaled = (images.to(torch.float32) - self._mean) / self._std
            maps: Tensor = network(scaled.to(self._dtype).permute(0, 3, 1, 2))
            vectors = nn.functional.adaptive_avg_pool2d(maps.float(), 1).flatten(1)
            array: NDArray[np.float32] = vectors.cpu().numpy()
            return array
