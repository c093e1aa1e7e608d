"""Whether an artifact is what it was when it was written: every sha256, page and account."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from btpipe import artifact, recipe
from btpipe.data import findings, index_checksum, index_mmap, rejects, shard_writer
from btpipe.data.index import open_index
from btpipe.embed import outputs, table
from btpipe.errors import IntegrityError
from btpipe.events import Report
from btpipe.export import contract
from btpipe.pretrain import changes
from btpipe.tools.artifact_kinds import Artifact, recognise
from btpipe.tools.verify_report import ANEW, Account, ProblemsFound, Verified


def verify(path: Path, on_event: Report) -> Account:
    """Checks all that can be checked of what is at `path`, and reports.

    Raises:
        UsageError: nothing is there, or nothing that btpipe wrote.
        NewerError: a newer btpipe wrote it.
        IntegrityError: something of it changed, is missing, or does not add up.
    """
    started = time.monotonic()
    thing, account = recognise(path), Account()
    _check(thing, account)
    if account.problems:
        on_event(ProblemsFound(thing.path, tuple(account.problems)))
        first, more = account.problems[0], len(account.problems) - 1
        others = f"; {more} more, listed above" if more else ""
        raise IntegrityError(first.what + others, where=first.where, fix=first.fix)
    seconds = time.monotonic() - started
    on_event(Verified(seconds, thing.path, thing.kind, account.files, account.rows, account.golden))
    return account


def _check(thing: Artifact, account: Account) -> None:
    path = thing.path
    match thing.kind:
        case "bundle":
            with account.noting(path):
                # What embeds is loaded for this alone.
                from btpipe.export import golden  # noqa: PLC0415

                bundle = contract.open_bundle(path)
                account.files += 1 + len(bundle.manifest.files)
                account.golden = golden.compare(bundle)
                golden.require(account.golden, bundle)
        case "checkpoint":
            _checkpoint(path, account)
        case "initial":
            _manifest(path, "initial", account)
        case "shards":
            _manifest(path, "shards", account)
            _index(path / "index.parquet", account)
        case "run":
            _run(path, account)
        case "index":
            _index(path, account)
        case "vectors":
            _vectors(path, account)
        case "rejects":
            with account.noting(path):
                _rejects(path, account)
        case "embed work":
            _embed_work(path, account)
        case "shard work":
            _shard_work(path, account)
        case "recipe":
            recipe.load(path)
            account.files += 1


def _manifest(folder: Path, kind: str, account: Account) -> artifact.Manifest | None:
    """The manifest of a folder, all of whose files have the sha256 listed; None where not."""
    with account.noting(folder):
        manifest = artifact.verify(folder, kind)
        digest = json.loads((folder / artifact.MANIFEST).read_bytes()).get("digest")
        if digest != manifest.digest:
            raise IntegrityError("its digest is not that of its files", where=folder, fix=ANEW)
        account.files += 1 + len(manifest.files)
        return manifest
    return None


def _checkpoint(folder: Path, account: Account) -> artifact.Manifest | None:
    manifest = _manifest(folder, "checkpoint", account)
    if manifest is not None:
        with account.noting(folder):
            state = json.loads((folder / "state.json").read_text())
            if state != dict(manifest.origin):
                account.wrong(folder, "manifest.json and state.json are of two checkpoints")
    return manifest


def _run(folder: Path, account: Account) -> None:
    """Recipe, index and every checkpoint, and that they belong together.

    A checkpoint may be of a recipe that the run had before an accepted change.
    """
    expected: dict[str, set[str]] = {"recipe": set(), "data": set()}
    with account.noting(folder / "recipe.toml"):
        expected["recipe"] = {version.recipe.digest for version in changes.versions(folder)}
        account.files += 1
    index = folder / "index.parquet"
    if index.is_file():
        expected["data"] = {_index(index, account)} - {""}
    else:
        account.wrong(index, "is missing", "run the same btpipe pretrain again: it lists anew")
    if (folder / "initial").is_dir():
        _manifest(folder / "initial", "initial", account)
    for checkpoint in sorted((folder / "checkpoints").glob("step-*")):
        if ".tmp-" in checkpoint.name:
            continue  # what a killed process left: swept at the next start
        manifest = _checkpoint(checkpoint, account)
        for key, digests in expected.items() if manifest else ():
            if manifest and digests and manifest.origin.get(key) not in digests:
                account.wrong(checkpoint, f"is of another {key} than the run's", _MOVED)
    for name in ("rejects.csv", "environment.json"):
        if (folder / name).is_file():
            with account.noting(folder / name):
                text = (folder / name).read_text()
                _ = json.loads(text) if name.endswith("json") else rejects.read(folder / name)
                account.files += 1


_MOVED = "put the run's own file back from a copy: a resume refuses this one"


def _index(path: Path, account: Account) -> str:
    """An index's pages, its mapped table, and that no image is a reject; its fingerprint."""
    with account.noting(path):
        content = pq.read_table(path.absolute(), page_checksum_verification=True)
        index = open_index(path)
        if changed := index_checksum.broken(
            path, content.replace_schema_metadata(), index.root, index.sources
        ):
            account.wrong(path, f"its {' and '.join(changed)} changed since it was written")
        account.files, account.rows = account.files + 1, account.rows + len(index)
        named = (pq.read_schema(path.absolute()).metadata or {}).get(b"content", b"").decode()
        mapped = path.with_suffix(".arrow")
        if named and mapped.is_file():
            account.files += 1
            if not index_mmap.is_whole(mapped, named):
                account.wrong(mapped, "its bytes changed", "remove it: the index is read without")
        numbers = np.array(content["source"])
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < max(len(index.sources), 1):
            account.wrong(path, "rows name sources that it does not list")
        rejects_path = rejects.path_beside(path)
        if rejects_path.is_file():
            bad = [reject.path for reject in rejects.read(rejects_path)]
            account.files, account.rows = account.files + 1, account.rows + len(bad)
            _disjoint(content["path"], pa.array(bad, pa.string()), path, account, "scan")
        if findings.path_beside(path).is_file():
            findings.read(findings.path_beside(path))
            account.files += 1
        return index.fingerprint
    return ""


def _disjoint(
    images: pa.ChunkedArray, bad: pa.Array, where: Path, account: Account, command: str
) -> None:
    """Notes an input that is a row as well as a reject."""
    both = images.filter(pc.is_in(images, bad))
    if len(both):
        what = f"{len(both)} inputs are rows and rejects at once, such as {both[0].as_py()}"
        account.wrong(where, what, f"make it again with btpipe {command}")


def _vectors(path: Path, account: Account) -> None:
    """Every row's vector and digest, and that each input is either a row or a reject."""
    again = "restore it from a copy, or embed again with --overwrite"
    with account.noting(path):
        footer = outputs.footer_of(path)
        if footer is None:
            raise IntegrityError("holds no vectors", where=path, fix=again)
        names: list[pa.Array] = []
        exact: list[pa.Array] = []
        strange = 0
        for batch in outputs.rows(path):
            names.append(batch["path"])
            exact.append(pc.coalesce(batch["path_bytes"], batch["path"].cast(pa.binary())))
            strange += _strange(batch, int(footer["btpipe.dimension"]))
        paths = pa.chunked_array(names, pa.string())
        account.rows += len(paths)
        account.files += _parts(path, footer, account, again) if path.is_dir() else 1
        account.files += sum(file.is_file() for file in outputs.companions(path))
        if strange:
            what = f"{strange} rows have a vector that is not finite, or no digest"
            account.wrong(path, what, again)
        if len(paths) != outputs.count(path):
            account.wrong(path, f"{len(paths)} rows, {outputs.count(path)} announced", again)
        twice = len(paths) - pc.count_distinct(pa.chunked_array(exact, pa.binary())).as_py()
        if twice:
            account.wrong(path, f"{twice} inputs have more than one row", again)
        rejects_path = table.rejects_path(path)
        if not rejects_path.is_file():
            account.wrong(rejects_path, "the table of rejects is missing", again)
            return
        bad = _rejects(rejects_path, account, footer)
        _disjoint(paths, bad.combine_chunks(), path, account, "embed")


def _parts(path: Path, footer: Mapping[str, str], account: Account, again: str) -> int:
    """How many files a folder of vectors has; its tables follow each other, and are of one job."""
    parts = sorted(path.glob("part-*.parquet"))
    for number, part in enumerate(parts):
        if part.name != f"part-{number:06d}.parquet":
            account.wrong(path / f"part-{number:06d}.parquet", "is missing", again)
            break
        if table.footer_of(part) != footer:
            account.wrong(part, "is of another job than the first part", again)
        if part != parts[-1] and table.count(part) != outputs.FILE_ROWS:
            account.wrong(part, f"{table.count(part)} rows before the last part", again)
    return len([file for file in path.rglob("*") if file.is_file()])


def _strange(batch: pa.RecordBatch, dimension: int) -> int:
    """Rows whose vector is not `dimension` finite numbers, or whose digest is no sha256."""
    column = batch["embedding"]
    if column.type.list_size != dimension:
        return int(batch.num_rows)
    flat = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dimension)
    is_digest = pc.match_substring_regex(batch["digest"], "^[0-9a-f]{64}$")
    whole = np.isfinite(flat).all(axis=1) & np.array(pc.fill_null(is_digest, fill_value=False))
    return int((~whole).sum())


def _rejects(
    path: Path, account: Account, footer: Mapping[str, str] | None = None
) -> pa.ChunkedArray:
    """A table of rejects, of the same job as the vectors of this footer; its paths."""
    metadata = table.footer_of(path)
    if footer is not None and metadata != footer:
        differ = [key for key in footer if metadata is None or metadata.get(key) != footer[key]]
        what = f"is of another job than the vectors: {', '.join(differ)} differ"
        account.wrong(path, what, "put the file that belongs to them back, or embed again")
    content = table.read(path)
    account.files, account.rows = account.files + 1, account.rows + len(content)
    return content["path"]


def _embed_work(folder: Path, account: Account) -> None:
    """Each part that a commit line names: its sha256, its pages, its rows."""
    again = "run the same btpipe embed again: it computes that part anew"
    with account.noting(folder / "plan.json"):
        json.loads((folder / "plan.json").read_text())
        account.files += 1
    commits = folder / "commits.jsonl"
    lines = commits.read_text(errors="replace").splitlines() if commits.is_file() else []
    for number, line in enumerate(lines):
        try:
            commit = json.loads(line)
            path = folder / f"part-{int(commit['part']):06d}.parquet"
        except (ValueError, KeyError, TypeError):
            if number < len(lines) - 1:  # the last one may be torn by a kill
                account.wrong(commits, f"line {number + 1} is no commit", again)
            continue
        if not path.is_file() or artifact.file_digest(path) != commit["sha256"]:
            what = "its bytes changed since it was written" if path.is_file() else "is missing"
            account.wrong(path, what, again)
            continue
        with account.noting(path):
            rows = len(table.read(path))
            account.files, account.rows = account.files + 1, account.rows + rows
            if rows != commit["rows"]:
                account.wrong(path, f"{rows} rows, {commit['rows']} announced", again)


def _shard_work(folder: Path, account: Account) -> None:
    """Each shard that has its record: the sha256 of its images."""
    again = "run the same btpipe shard again after removing this shard and those behind it"
    number = 0
    while True:
        path = folder / shard_writer.name_of(number)
        with account.noting(path):
            shard = shard_writer.read(folder, number)
            if shard is None:
                return
            account.files, account.rows = account.files + 2, account.rows + len(shard.members)
            changed = shard_writer.changed(folder, number, shard)
            if changed:
                account.wrong(path, f"{len(changed)} images changed, first {changed[0]}", again)
        number += 1
