"""What a path is, of the things that btpipe writes; told by content, not by name."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from btpipe import artifact
from btpipe.embed import table
from btpipe.errors import IntegrityError, UsageError

Kind = Literal[
    "run",
    "checkpoint",
    "initial",
    "bundle",
    "shards",
    "index",
    "vectors",
    "rejects",
    "embed work",
    "shard work",
    "recipe",
]
"""initial: the weights that a run with `network.init_from` keeps. work: a job that is not done."""
MANIFESTED: tuple[Kind, ...] = ("checkpoint", "initial", "bundle", "shards")
_IDS = ".ids.parquet"
KINDS = "a run, checkpoint, bundle, index, table of vectors, folder of shards or work of a job"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A thing of btpipe's and its kind; `path` is the folder where a file of it was named."""

    kind: Kind
    path: Path


def recognise(path: Path) -> Artifact:
    """What `path` is, or the folder with a manifest that it is a file of.

    Raises:
        UsageError: nothing is there, or nothing that btpipe wrote.
        IntegrityError: a manifest or a parquet file that cannot be read.
    """
    if not path.exists():
        raise UsageError("no such file or folder", where=path, expected=KINDS)
    if path.is_file():
        around = _kind_of_folder(path.absolute().parent)
        if around is not None and not _stands_alone(path, around):
            return Artifact(around, path.parent)
        if path.name.endswith(_IDS):
            path = path.with_name(path.name.removesuffix(_IDS))
    kind = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    if kind is not None:
        return Artifact(kind, path)
    raise UsageError("nothing that btpipe wrote", where=path, expected=KINDS)


def _stands_alone(path: Path, around: Kind) -> bool:
    """Whether a file in such a folder is a thing of its own: an index, or a neighbour of parts."""
    is_part = around == "vectors" and not path.name.startswith("part-")
    return is_part or (around in {"run", "shards"} and path.suffix == ".parquet")


def _kind_of_folder(folder: Path) -> Kind | None:
    if (folder / artifact.MANIFEST).is_file():
        return _kind_of_manifest(folder)
    if (folder / "recipe.toml").is_file():
        return "run"
    if (folder / "plan.json").is_file():
        return (
            "shard work" if b"shard_bytes" in (folder / "plan.json").read_bytes() else "embed work"
        )
    is_vectors = folder.suffix == ".lance" or any(folder.glob("part-*.parquet"))
    return "vectors" if is_vectors else None


def _kind_of_manifest(folder: Path) -> Kind | None:
    try:
        named = json.loads((folder / artifact.MANIFEST).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"no readable {artifact.MANIFEST} ({error!r})"
        raise IntegrityError(what, where=folder, fix="restore it, or make it again") from error
    return next((kind for kind in get_args(Kind) if kind == named), None)


def _kind_of_file(path: Path) -> Kind | None:
    if path.suffix == ".toml":
        return "recipe"
    if path.suffix in {".npy", ".safetensors"}:
        return "vectors" if path.with_name(path.name + _IDS).is_file() else None
    if path.suffix != ".parquet":
        return None
    try:
        schema = pq.read_schema(path.absolute())
    except (OSError, pa.ArrowException) as error:
        what = f"not a readable parquet file ({str(error).splitlines()[0]})"
        raise IntegrityError(what, where=path, fix="restore it from a copy") from error
    keys = (schema.metadata or {}).keys()
    if {b"root", b"format_version"} <= keys:
        return "index"
    if table.FORMAT.encode() in keys:
        return "rejects" if "reason" in schema.names else "vectors"
    return None
