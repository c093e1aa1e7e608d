"""The encoder's weights as safetensors under torchvision's names, and an encoder from them."""

import copy
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from btpipe import artifact, recipe
from btpipe.errors import IntegrityError
from btpipe.export import contract
from btpipe.export.contract import Preprocessing
from btpipe.pretrain import network


def digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write(state: Mapping[str, Tensor], preprocessing: Preprocessing, path: Path) -> None:
    """Writes the tensors; the header says how pixels are prepared.

    Raises:
        MachineError: no space, or no permission.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # One key only: safetensors keeps its metadata in a hash map, whose order differs by process.
    header = {"preprocessing": preprocessing.text()}
    artifact.write_file(path, safetensors.torch.save(tensors, metadata=header))


def load(path: Path, described: recipe.Network) -> nn.Module:
    """The encoder that the weights in `path` belong to, in evaluation mode and float32.

    Raises:
        IntegrityError: not a safetensors file, or the weights of another network.
    """
    try:
        state = safetensors.torch.load_file(path)
        return from_state(state, described)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise IntegrityError(
            f"does not fit the network ({error})",
            where=path,
            expected=f"{described.backbone} with the {described.stem} stem",
        ) from error


def from_state(state: Mapping[str, Tensor], described: recipe.Network) -> nn.Module:
    """The encoder with these weights, in evaluation mode."""
    encoder: nn.Module = network.encoder(described)
    encoder.load_state_dict(dict(state))
    return encoder.float().eval()


def described(bundle: contract.Bundle) -> recipe.Network:
    """The network that a bundle's weights are of.

    Raises:
        IntegrityError: one that this version does not know.
    """
    try:
        return recipe.Network.model_validate({"backbone": bundle.architecture, "stem": bundle.stem})
    except ValueError as error:
        raise IntegrityError(
            f"architecture {bundle.architecture!r}, stem {bundle.stem!r}",
            where=bundle.folder / contract.CONFIG,
            expected="a ResNet of torchvision, stem imagenet or small",
        ) from error


def folded(encoder: nn.Module) -> nn.Module:
    """A copy with batch norm inside the convolutions, which half precision would else round twice.

    w' = w g / sqrt(v + e), b' = b - m g / sqrt(v + e), for batch norm's g, b, m, v and e.
    """
    clone = copy.deepcopy(encoder).eval()
    for parent in list(clone.modules()):
        children = list(parent.named_children())
        for (name, first), (next_name, second) in itertools.pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, next_name, nn.Identity())
    return clone


def calibrate(
    encoder: nn.Module, preprocessing: Preprocessing, pixels: NDArray[np.uint8], batch_size: int
) -> nn.Module:
    """Sets batch norm's running statistics to their average over batches of `pixels` (n, S, S, 3).

    A network that was never trained has none; without them its vectors are near to constant. The
    last batch is dropped when it is short, so that every batch weighs the same.
    """
    layers = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (preprocessing.mean, preprocessing.std)
    )
    encoder.train()
    stop = max(len(pixels) // batch_size * batch_size, min(len(pixels), batch_size))
    with torch.inference_mode():
        for start in range(0, stop, batch_size):
            images = torch.from_numpy(pixels[start : start + batch_size]).permute(0, 3, 1, 2)
            encoder((images.float() / 255 - mean) / std)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    return encoder.eval()
