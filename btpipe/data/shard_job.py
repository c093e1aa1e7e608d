"""A data set rewritten as tar shards of smaller JPEGs: for network disks and faster epochs.

DIR/ shard-00000.tar ... index.parquet rejects.csv manifest.json, in WebDataset's layout: `KEY.jpg`
and `KEY.json` (original path, label). Images lie in a seeded random order, so that neighbours in a
shard are any images: `data.shuffle = "blocks"` is near to a full shuffle then. The same inputs and
settings give the same bytes. Until all is done the shards lie in DIR.work/, each with its record.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from btpipe import artifact, runtime
from btpipe.data import rejects, shard_writer
from btpipe.data.index import SCHEMA, Index, open_index
from btpipe.data.pipeline import decode
from btpipe.data.rejects import BadInputError
from btpipe.data.shard_writer import Maker, Shard, ShardMember, ShardOptions
from btpipe.data.sources import Source
from btpipe.data.sources.source import SHARDS
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.events import Progressed, Rejected, Report, per_second
from btpipe.results import Sharded

__all__ = ["ShardOptions", "parse_bytes", "write"]

KIND = SHARDS
INDEX, REJECTS, PLAN = "index.parquet", "rejects.csv", "plan.json"
_SAMPLE_IMAGES = 128
_PROGRESS_SECONDS = 1.0

Plan = dict[str, object]


def write(
    index: Index,
    index_rejects: Sequence[Rejected],
    out: Path,
    options: ShardOptions,
    on_event: Report,
) -> None:
    """Writes the images of an index as shards into the folder `out`; run again, it goes on.

    `index_rejects`: what the index left out, for the rejects.

    Raises:
        RefusedError: `out` or its work folder holds something else, or other settings' shards, or
            another process is writing there.
        UsageError: no image can be used.
        MachineError: no space, or no permission.
    """
    started, out = time.monotonic(), out.absolute()
    plan: Plan = {"data": index.fingerprint, **dataclasses.asdict(options)}
    if _is_done(out, plan):
        on_event(_standing(index, out, started))
        shutil.rmtree(_work_of(out), ignore_errors=True)  # what a kill at the very end left
        return
    with _work(out, plan) as work:
        shards = list(_shards(index, work, options, on_event))
        if not any(shard.members for shard in shards):
            raise UsageError("no image can be used", where=index.root)
        _publish(index, index_rejects, out, work, plan, shards)
        shutil.rmtree(work)
    on_event(_account(index, out, shards, started))


def _is_done(out: Path, plan: Plan) -> bool:
    """Whether `out` holds the shards of this plan already."""
    if not out.exists():
        return False
    fix = "choose another --out, or remove that folder"
    try:
        manifest = artifact.read(out, KIND)
    except IntegrityError as error:
        raise RefusedError("is there, and holds no finished shards", where=out, fix=fix) from error
    _require_same(dict(manifest.origin), plan, out, fix)
    return True


def _require_same(previous: Plan, plan: Plan, where: Path, fix: str) -> None:
    keys = [key for key in plan if previous.get(key) != plan[key]]
    if keys:
        differences = "; ".join(
            f"{key} is {previous.get(key)!r}, asked for {plan[key]!r}" for key in keys
        )
        raise RefusedError(f"holds other shards: {differences}", where=where, fix=fix)


def _work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.work")


@contextlib.contextmanager
def _work(out: Path, plan: Plan) -> Iterator[Path]:
    """The work folder of this plan, new or as an interrupted start left it; held by one process."""
    work = _work_of(out)
    fix = "wait for it, or choose another --out"
    with artifact.locked(work, "another process is writing these shards", fix):
        if (work / PLAN).is_file():
            previous = json.loads((work / PLAN).read_text())
            _require_same(previous, plan, work, "remove that folder, or choose another --out")
        else:
            artifact.write_json(work / PLAN, plan)
        artifact.sweep(work)
        artifact.sweep(out.parent, out.name)
        yield work


def _shards(index: Index, work: Path, options: ShardOptions, on_event: Report) -> Iterator[Shard]:
    """The finished shards that are there, then new ones until every image is in one."""
    position, number = 0, 0
    while (shard := shard_writer.read(work, number)) is not None:
        yield shard
        position, number = shard.stop, number + 1
    first = position
    started = last_event = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last_event
        now = time.monotonic()
        if now - last_event > _PROGRESS_SECONDS:
            last_event, rate = now, per_second(done - first, now - started)
            on_event(Progressed("shard", done, len(index), rate, 0.0))

    with Maker(index, position, options, runtime.cores()) as maker:
        while position < len(index):
            shard = shard_writer.write(work, number, maker, options, advance)
            for event in shard.rejected:
                on_event(event)
            yield shard
            position, number = shard.stop, number + 1


def _publish(
    index: Index,
    index_rejects: Sequence[Rejected],
    out: Path,
    work: Path,
    plan: Plan,
    shards: Sequence[Shard],
) -> None:
    """Puts shards, index and rejects under their final name; the work folder keeps its shards."""
    with artifact.publish(out, KIND, plan) as temporary:
        sources = []
        for number in range(len(shards)):
            name = shard_writer.name_of(number)
            os.link(work / name, temporary / name)
            size = (temporary / name).stat().st_size
            sources.append(Source("tar", str(out / name), f"{name}::", size, 0))
        Index(out, _table(index, shards), tuple(sources)).save(temporary / INDEX)
        bad = [*index_rejects, *(reject for shard in shards for reject in shard.rejected)]
        rejects.write(temporary / REJECTS, bad)


def _table(index: Index, shards: Sequence[Shard]) -> pa.Table:
    """The index of the shards, in the order in which the images lie there."""
    members = [(number, member) for number, shard in enumerate(shards) for member in shard.members]
    names = [f"{shard_writer.name_of(number)}::{member.key}.jpg" for number, member in members]
    rows = pa.array([member.row for _, member in members], pa.int64())
    ones = np.ones(len(members), np.int64)
    columns = {
        "path": names,
        "path_bytes": pa.nulls(len(members), pa.binary()),
        "source": [number for number, _ in members],
        "offset": [member.offset for _, member in members],
        "bytes": [member.bytes for _, member in members],
        "mtime_ns": 0 * ones,
        "width": [member.width for _, member in members],
        "height": [member.height for _, member in members],
        "orientation": ones.astype(np.int8),
        "format": ["JPEG"] * len(members),
        "mode": [member.mode for _, member in members],
        "digest": [member.digest for _, member in members],
        "label": index.table["label"].take(rows),
    }
    return pa.table(columns, schema=SCHEMA)


def _account(index: Index, out: Path, shards: Sequence[Shard], started: float) -> Sharded:
    """How many, how much smaller, how much faster."""
    members = [member for shard in shards for member in shard.members]
    bytes_before = int(np.array(index.table["bytes"])[[member.row for member in members]].sum())
    bytes_after = sum(
        (out / shard_writer.name_of(number)).stat().st_size for number in range(len(shards))
    )
    slow, fast = _decode_rates(index, out, shards)
    return Sharded(
        seconds=time.monotonic() - started,
        out=out,
        images=len(members),
        shards=len(shards),
        rejects=sum(len(shard.rejected) for shard in shards),
        bytes=bytes_after,
        bytes_before=bytes_before,
        decoded_per_cpu_second=fast,
        decoded_per_cpu_second_before=slow,
        share_of_bytes=bytes_after / bytes_before,
        times_faster=fast / slow,
    )


def _standing(index: Index, out: Path, started: float) -> Sharded:
    """The account of finished shards, but for the speeds; `index` is what they were made of."""
    shards = open_index(out / INDEX)
    rejected = {bad.path for bad in rejects.read(out / REJECTS) if bad.stage == "shard"}
    sizes = zip(index.table["path"].to_pylist(), index.table["bytes"].to_pylist(), strict=True)
    before = sum(size for path, size in sizes if path not in rejected)
    after = sum(path.stat().st_size for path in out.glob("shard-*.tar"))
    return Sharded(
        seconds=time.monotonic() - started,
        out=out,
        images=len(shards),
        shards=len(shards.sources),
        rejects=len(index) - len(shards),
        bytes=after,
        bytes_before=before,
        decoded_per_cpu_second=math.nan,
        decoded_per_cpu_second_before=math.nan,
        share_of_bytes=after / before,
        times_faster=math.nan,
        nothing_to_do=True,
    )


def _decode_rates(index: Index, out: Path, shards: Sequence[Shard]) -> tuple[float, float]:
    """Images decoded per CPU-second before and after, by turns, on a sample of all shards."""
    members = [(number, member) for number, shard in enumerate(shards) for member in shard.members]
    chosen = members[:: max(1, len(members) // _SAMPLE_IMAGES)]
    seconds, count = np.zeros(2), 0
    decode.decode(np.frombuffer(_content(out, *chosen[0]), dtype=np.uint8))  # builds it
    for number, member in chosen:
        try:
            original = index.read_bytes(member.row)
        except BadInputError:
            continue  # it went away since
        for i, content in enumerate((original, _content(out, number, member))):
            started = time.process_time()
            decode.decode(np.frombuffer(content, dtype=np.uint8))
            seconds[i] += time.process_time() - started
        count += 1
    slow, fast = (per_second(count, float(taken)) for taken in seconds)
    return slow, fast


def _content(out: Path, number: int, member: ShardMember) -> bytes:
    with (out / shard_writer.name_of(number)).open("rb") as file:
        file.seek(member.offset)
        return file.read(member.bytes)


def parse_bytes(text: str) -> int:
    """ "256MiB" -> 268,435,456; also B, KiB, GiB, and decimal kB, MB, GB.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+) ?([kKMG]?)(i?)B?", text)
    if match is None or (match[3] and not match[2]) or not int(match[1]):
        raise UsageError(f"--shard-bytes {text}", expected="bytes, or a size such as 256MiB")
    power = ("", "K", "M", "G").index(match[2].upper())
    return int(int(match[1]) * (1024 if match[3] else 1000) ** power)
