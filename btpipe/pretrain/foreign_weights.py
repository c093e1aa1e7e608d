"""Weights that others made, as the encoder a run starts from: read without executing anything.

A PyTorch state dict (.pth, .pt, .ckpt), a .safetensors file, or the folder of a bundle, of a
checkpoint or of a run.
"""

import dataclasses
import hashlib
import io
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import safetensors
import safetensors.torch
import torch

from btpipe import artifact
from btpipe.artifact import MANIFEST
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.pretrain import checkpoint, network
from btpipe.recipe import Network
from btpipe.recipe.tables import Backbone

BUNDLE = "bundle"
"""The kind of what the export stage publishes."""
CONTAINERS = ("model", "state_dict")
"""Keys under which the published code, timm and Lightning keep a state dict among other things."""
PREFIX = re.compile(r"((module|model|backbone|encoder|encoder_q|_orig_mod)\.)*")
"""What a wrapper may have put before torchvision's names."""
FIRST = "conv1.weight"
INSIDE = re.compile(r"(conv1|bn1|layer\d+)\.")
"""Names that belong to a ResNet's body: none of them may be left over."""
COUNTER = ".num_batches_tracked"
"""Batch norm's count, which files from before PyTorch 0.4.1 lack; it starts at 0."""
EXAMPLES = 3
STEMS: tuple[Literal["imagenet"], Literal["small"]] = ("imagenet", "small")
PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""Names of torchvision's parts where they stand in a Sequential, as lightly's examples do it."""
NUMBERED = re.compile(rf"(?P<prefix>{PREFIX.pattern})(?P<part>[014567])\.(?P<rest>.+)")

State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Adopted:
    """An encoder from outside: float32 tensors under torchvision's names.

    `source` is the file they were read from, `sha256` its bytes' digest; `left_out` counts the
    tensors of the file that are no part of the encoder, by the first part of their names.
    """

    state: State
    source: Path
    sha256: str
    left_out: Mapping[str, int]

    def text(self) -> str:
        """What was adopted, in a sentence."""
        return f"the encoder starts from {self.source}: {self.matched}"

    @property
    def matched(self) -> str:
        """How many tensors were taken, and what of the file was not."""
        count = len(self.state)
        text = f"{count} of {count} tensors"
        left = ", ".join(f"{name} ({number})" for name, number in self.left_out.items())
        return f"{text}; left out: {left}" if left else text


def read_encoder(source: Path, settings: Network) -> Adopted:
    """The encoder that `source` holds, for this network; nothing of the file is executed.

    Raises:
        UsageError: no such file, or a folder that is no bundle, checkpoint or run.
        RefusedError: a pickle that names more than tensors and plain containers; no state dict; or
            the weights of another network: what is missing, what is left over, which one fits.
        IntegrityError: a file is cut, changed or not finite.
    """
    file = locate(source)
    content = file.read_bytes()
    tensors = _renamed(_parse(content, file))
    state, left_out = _match(tensors, settings, file)
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise IntegrityError(f"{broken[0]} holds numbers that are not finite", where=file)
    return Adopted(state, file.absolute(), hashlib.sha256(content).hexdigest(), left_out)


def recognise(source: Path) -> Network:
    """The backbone and stem whose encoder `source` holds, by its tensors' names and shapes.

    Raises:
        UsageError: no such file, or a folder that is no bundle, checkpoint or run.
        RefusedError: a pickle that names more than tensors and plain containers; no state dict; or
            the weights of a network that is none of these.
        IntegrityError: a file is cut or changed.
    """
    file = locate(source)
    tensors = _renamed(_parse(file.read_bytes(), file))
    inside = _inside(tensors, _prefix(tensors, file))
    share, network = _best(inside)
    if share == 1:
        return network
    near = f"; nearest, with {share:.0%} the same, is {network.backbone}, {network.stem} stem"
    raise RefusedError(
        f"no network has its tensors{near if share >= 0.5 else ''}",
        where=file,
        expected=f"the encoder of {', '.join(get_args(Backbone))}, under torchvision's names",
        fix=f"rename its tensors; it begins with {', '.join(list(inside)[:EXAMPLES])}",
    )


def locate(source: Path) -> Path:
    """The file with the weights that `source` means: itself, or one of an artifact that is whole.

    Raises:
        UsageError: there is none.
        IntegrityError: the artifact is damaged.
    """
    if source.is_file():
        return source
    expected = "a .pth, .pt, .ckpt or .safetensors file, a bundle, a checkpoint or a run folder"
    if not source.is_dir():
        raise UsageError("no such file or folder", where=source, expected=expected)
    if (source / MANIFEST).is_file():
        kind = checkpoint.KIND if (source / "state.json").exists() else BUNDLE
        artifact.verify(source, kind)
        return source / "model.safetensors"
    newest = checkpoint.newest(source)
    if newest is None:
        raise UsageError("holds no weights", where=source, expected=expected)
    return newest / "model.safetensors"


def _parse(content: bytes, file: Path) -> State:
    """The tensors of a file by what it is, not by what it is called."""
    if content[8:9] == b"{":
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise IntegrityError(f"no readable safetensors file ({error})", where=file) from error
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RefusedError(
            f"a pickle with more in it than tensors and plain containers; nothing of it ran"
            f" ({_named(error)})",
            where=file,
            expected="a state dict",
            fix="where you trust it, load it and save its state_dict() as .safetensors",
        ) from error
    except Exception as error:  # a damaged pickle may end in any of them
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"no readable PyTorch file ({what})", where=file) from error
    return _tensors(loaded, file)


def _named(error: pickle.UnpicklingError) -> str:
    """The name at which PyTorch stopped, from its long advice."""
    match = re.search(r"GLOBAL (\S+)", str(error))
    return match.group(1) if match else str(error).strip().splitlines()[-1][:100]


def _tensors(loaded: object, file: Path) -> State:
    """The state dict in what was loaded: itself, or under one of the usual keys."""
    content: list[str] = [type(loaded).__name__]
    if isinstance(loaded, Mapping):
        for value in (loaded, *(loaded.get(key) for key in CONTAINERS)):
            if isinstance(value, Mapping):
                tensors = {str(k): t for k, t in value.items() if isinstance(t, torch.Tensor)}
                if tensors:
                    return tensors
        content = [str(key) for key in loaded]
    raise RefusedError(
        f"no state dict in it: {', '.join(content[:10])}",
        where=file,
        expected=f"names and tensors, or those under {' or '.join(map(repr, CONTAINERS))}",
    )


def _renamed(tensors: State) -> State:
    """Torchvision's names for a body that stands in a Sequential; other names as they are."""
    matches = {key: NUMBERED.fullmatch(key) for key in tensors}
    bodies = {
        match["prefix"]
        for match in matches.values()
        if match and (match["part"], match["rest"]) == ("4", "0.conv1.weight")
    }
    return {
        f"{match['prefix']}{PARTS[match['part']]}.{match['rest']}"
        if (match := matches[key]) and match["prefix"] in bodies
        else key: tensor
        for key, tensor in tensors.items()
    }


def _match(tensors: State, settings: Network, file: Path) -> tuple[State, dict[str, int]]:
    """The encoder's tensors by torchvision's names, and what else there is."""
    shapes = _shapes(settings)
    prefix = _prefix(tensors, file)
    inside = _inside(tensors, prefix)
    state: State = {}
    mismatches: list[str] = []
    for name, shape in shapes.items():
        tensor = inside.get(name)
        if tensor is None and name.endswith(COUNTER):
            state[name] = torch.zeros((), dtype=torch.int64)
        elif tensor is None:
            mismatches.append(f"{name} is missing")
        elif tuple(tensor.shape) != shape:
            mismatches.append(f"{name} is {tuple(tensor.shape)}, not {shape}")
        elif tensor.is_floating_point() == name.endswith(COUNTER):
            mismatches.append(f"{name} is of type {tensor.dtype}")
        else:
            kind = torch.int64 if name.endswith(COUNTER) else torch.float32
            state[name] = tensor.detach().to(kind, copy=True).contiguous()
    over = [f"{name} is left over" for name in inside if INSIDE.match(name) and name not in shapes]
    if mismatches or over:
        raise _another_network(inside, mismatches, over, settings, file)
    others = [key for key in tensors if key.removeprefix(prefix) not in shapes]
    return state, dict(Counter(_owner(key, prefix) for key in others))


def _prefix(tensors: State, file: Path) -> str:
    """What stands before torchvision's names in this state dict; "" also where none is found."""
    prefixes = [key.removesuffix(FIRST) for key in tensors if key.endswith(FIRST)]
    prefixes = [prefix for prefix in prefixes if PREFIX.fullmatch(prefix)]
    if len(prefixes) > 1:
        raise RefusedError(
            f"holds {len(prefixes)} encoders: under {', '.join(map(repr, prefixes))}",
            where=file,
            expected="one",
            fix="save the state dict of the one to start from",
        )
    return prefixes[0] if prefixes else ""


def _inside(tensors: State, prefix: str) -> State:
    """The tensors under a prefix, by their names without it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _owner(key: str, prefix: str) -> str:
    """The part of a model that a left-out tensor belongs to: fc, projector, ..."""
    name = key.removeprefix(prefix)
    return (PREFIX.sub("", name, count=1) or name).partition(".")[0]


def _shapes(settings: Network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder's state; nothing is allocated."""
    with torch.device("meta"):
        return {k: tuple(t.shape) for k, t in network.encoder(settings).state_dict().items()}


def _another_network(
    inside: State, mismatches: list[str], over: list[str], settings: Network, file: Path
) -> RefusedError:
    """Names what does not fit, and the network that fits best."""
    lines = [*mismatches[:EXAMPLES], *over[:EXAMPLES]]
    more = len(mismatches) + len(over) - len(lines)
    text = "; ".join(lines) + (f"; and {more} more" if more else "")
    keys = ", ".join(list(inside)[:EXAMPLES])
    return RefusedError(
        f"does not fit {settings.backbone} with the {settings.stem} stem: {text}",
        where=file,
        expected="every tensor of the encoder under torchvision's names, and none beside them",
        fix=_nearest(inside) or f"rename its tensors; it begins with {keys}",
    )


def _nearest(inside: State) -> str:
    """The backbone and stem with the most tensors of these names and shapes; "" if none fits."""
    share, network = _best(inside)
    if share < 0.5:
        return ""
    fit = "these are the weights of" if share == 1 else f"nearest, with {share:.0%} the same, is"
    return f"{fit} --set network.backbone={network.backbone} --set network.stem={network.stem}"


def _best(inside: State) -> tuple[float, Network]:
    """The network with the largest share of its tensors here, by name and shape, and that share."""
    file_shapes = {name: tuple(tensor.shape) for name, tensor in inside.items()}
    body = sum(bool(INSIDE.match(name)) and not name.endswith(COUNTER) for name in file_shapes)
    fits: list[tuple[float, Network]] = []
    for backbone in get_args(Backbone):
        for stem in STEMS:
            network = Network(backbone=backbone, stem=stem)
            shapes = _shapes(network)
            names = [name for name in shapes if not name.endswith(COUNTER)]
            same = sum(file_shapes.get(name) == shapes[name] for name in names)
            fits.append((same / max(len(names), body), network))
    return max(fits, key=lambda fit: fit[0])
