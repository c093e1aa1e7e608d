"""One tar shard: images of an index made smaller, written whole or not at all, with its record.

The record, a JSON file beside the tar, is the commit: a shard without one is written again.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import numpy as np
from PIL import Image

from btpipe import artifact
from btpipe.data import header
from btpipe.data.index import Index
from btpipe.data.pipeline import decode, sampler
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import reading_threads
from btpipe.events import Rejected

ORDER_SEED = 0
"""Of the order in which images lie in shards: always the same."""
_COPIED_MODES = ("RGB", "L")
_AHEAD_IMAGES = 64
_EXTENSION = "jpg"


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    """Pixels of the shorter side (never enlarged), JPEG quality, most bytes of a shard."""

    shorter_side: int
    quality: int
    shard_bytes: int


@dataclasses.dataclass(frozen=True)
class ShardMember:
    """An image in a shard: its row in the index it came from, and what is there now."""

    row: int
    key: str
    offset: int
    bytes: int
    width: int
    height: int
    mode: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a finished shard holds: the images of positions [start, stop) of the order."""

    start: int
    stop: int
    members: list[ShardMember]
    rejected: list[Rejected]


@dataclasses.dataclass(frozen=True)
class Small:
    """An image as it goes into a shard: JPEG bytes, upright size, colour mode."""

    content: bytes
    width: int
    height: int
    mode: str


def name_of(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:05d}.tar"


def shrink(content: bytes, options: ShardOptions) -> Small:
    """An encoded image of any format -> a small upright JPEG.

    What is a JPEG already, upright and small enough, is kept byte for byte, once it has decoded.

    Raises:
        BadInputError: it cannot be used.
    """
    pixels = decode.decode(np.frombuffer(content, np.uint8))
    height, width = pixels.shape[:2]
    image_header = header.parse(io.BytesIO(content), content[:512])
    shorter = min(height, width)
    upright = (
        image_header.format == "JPEG"
        and image_header.orientation == 1
        and image_header.mode in _COPIED_MODES
    )
    if shorter <= options.shorter_side and upright:
        return Small(content, width, height, image_header.mode)
    image = Image.fromarray(pixels)
    if shorter > options.shorter_side:
        width, height = (side * options.shorter_side // shorter for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="JPEG", quality=options.quality)
    except (OSError, ValueError) as error:  # a JPEG has at most 65,535 pixels on a side
        what = f"cannot be written as a JPEG of {width} x {height}: {error}"
        raise BadInputError(what) from error
    return Small(buffer.getvalue(), width, height, "RGB")


class Maker:
    """The images of an index from a position of the order on, made small in threads, in order."""

    def __init__(self, index: Index, position: int, options: ShardOptions, threads: int) -> None:
        self.index = index
        self._options, self._positions = options, iter(range(position, len(index)))
        self._open = contextlib.ExitStack()
        self._pool = self._open.enter_context(reading_threads(threads))
        self._ahead: collections.deque[tuple[int, int, Future[Small | Rejected]]] = (
            collections.deque()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[tuple[int, int, Small | Rejected]]:
        """(position, row, image or reject); goes on where the last one stopped."""
        count = len(self.index)
        while True:
            for position in itertools.islice(self._positions, _AHEAD_IMAGES - len(self._ahead)):
                row = int(sampler.permutation(ORDER_SEED, 0, count, position, position + 1)[0])
                self._ahead.append((position, row, self._pool.submit(self._make, row)))
            if not self._ahead:
                return
            position, row, future = self._ahead.popleft()
            yield position, row, future.result()

    def _make(self, row: int) -> Small | Rejected:
        try:
            return shrink(self.index.read_bytes(row), self._options)
        except BadInputError as error:
            return self.index.reject(row, "shard", error)


def write(
    work: Path, number: int, maker: Maker, options: ShardOptions, advance: Callable[[int], None]
) -> Shard:
    """Fills the next shard of `work` from the maker, to `shard_bytes` or its end.

    Raises:
        MachineError: no space, or no permission.
    """
    path, index = work / name_of(number), maker.index
    members: list[ShardMember] = []
    rejected: list[Rejected] = []
    positions: list[int] = []
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with artifact.disk_errors(path):
        with temporary.open("wb") as file, tarfile.TarFile(fileobj=file, mode="w") as tar:
            for position, row, small in maker:
                positions.append(position)
                advance(position + 1)
                if isinstance(small, Rejected):
                    rejected.append(small)
                    continue
                members.append(_add(tar, row, f"{position:09d}", small, index))
                if tar.offset >= options.shard_bytes:
                    break
        artifact.fsync_path(temporary)
        os.utime(temporary, ns=(0, 0))  # the index holds it: the same shards, the same index
        temporary.replace(path)
    shard = Shard(positions[0], positions[-1] + 1, members, rejected)
    artifact.write_file(_record(path), json.dumps(dataclasses.asdict(shard)).encode())
    return shard


def _add(tar: tarfile.TarFile, row: int, key: str, small: Small, index: Index) -> ShardMember:
    label = index.table["label"][row].as_py()
    about: dict[str, object] = {"path": index.table["path"][row].as_py()}
    about |= {} if label is None else {"label": label}
    offset = _append(tar, f"{key}.{_EXTENSION}", small.content)
    _append(tar, f"{key}.json", json.dumps(about, sort_keys=True).encode())
    digest = hashlib.sha256(small.content).hexdigest()
    size = len(small.content)
    return ShardMember(row, key, offset, size, small.width, small.height, small.mode, digest)


def _append(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Adds a file without owner or time; where its data begins."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def read(work: Path, number: int) -> Shard | None:
    """A shard that an earlier start finished."""
    path = work / name_of(number)
    try:
        content = json.loads(_record(path).read_text())
    except FileNotFoundError:
        return None
    members = [ShardMember(**member) for member in content["members"]]
    rejected = [Rejected(**reject) for reject in content["rejected"]]
    return Shard(content["start"], content["stop"], members, rejected)


def changed(work: Path, number: int, shard: Shard) -> list[str]:
    """Keys of the images in a finished shard whose bytes are not those that were written.

    Raises:
        OSError: the shard is gone.
    """
    keys = []
    with (work / name_of(number)).open("rb") as file:
        for member in shard.members:
            file.seek(member.offset)
            content = file.read(member.bytes)
            if hashlib.sha256(content).hexdigest() != member.digest:
                keys.append(member.key)
    return keys


def _record(path: Path) -> Path:
    return path.with_suffix(".json")
