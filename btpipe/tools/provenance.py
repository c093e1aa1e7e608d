"""From vectors back to the recipe and the data: each link's digest, and whether it is near by.

vectors -> bundle -> checkpoint -> run -> recipe, data
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from btpipe import artifact
from btpipe.data.index import open_index
from btpipe.embed import outputs, table
from btpipe.errors import BtpipeError
from btpipe.events import Link
from btpipe.pretrain import changes
from btpipe.tools.artifact_kinds import Artifact

SAME, GONE = "here, the same", "not found near by"


def of(thing: Artifact) -> Iterator[Link]:
    """The links from this artifact on, the nearest first.

    Near by is the present folder, the artifact's own and the two around it, and `exports/` and
    `runs/` in each of them.
    """
    path = thing.path
    match thing.kind:
        case "vectors":
            yield from _of_vectors(path, outputs.footer_of(path) or {})
        case "rejects":
            yield from _of_vectors(path, table.footer_of(path) or {})
        case "embed work":
            yield from _of_vectors(path, _settings(path))
        case "bundle":
            yield from _of_bundle(path, artifact.read(path, "bundle").origin)
        case "checkpoint":
            origin = artifact.read(path, "checkpoint").origin
            yield from _of_run(path.absolute().parents[1], origin)
        case "run":
            yield from _of_initial(path)
        case "initial":
            yield _outside(artifact.read(path, "initial").origin)
        case "shards":
            data = str(artifact.read(path, "shards").origin.get("data", ""))
            yield Link("data", data, "", "the images that were rewritten")
        case _:
            pass


def _settings(work: Path) -> Mapping[str, str]:
    """What the plan of an embedding job says about its bundle and input."""
    plan = json.loads((work / "plan.json").read_text())
    settings = plan.get("settings", {})
    return {table.BUNDLE: plan.get("bundle", ""), table.INPUT: plan.get("input", ""), **settings}


def _around(path: Path, kept_in: str) -> list[Path]:
    """Folders to look in."""
    whole = path.absolute()
    bases = [Path.cwd(), *whole.parents[:3]]
    return list(dict.fromkeys(folder for base in bases for folder in (base / kept_in, base)))


def _of_vectors(path: Path, footer: Mapping[str, str]) -> Iterator[Link]:
    yield Link("input", footer.get(table.INPUT, ""), footer.get(table.ROOT, ""), "as it was listed")
    digest = footer.get(table.BUNDLE, "")
    for folder in _around(path, "exports"):
        for manifest in sorted(folder.glob(f"*/{artifact.MANIFEST}")):
            try:
                read = artifact.read(manifest.parent, "bundle")
            except BtpipeError:
                continue  # something else, or a damaged one: not what is looked for
            if read.digest == digest:
                yield Link("bundle", digest, _shown(manifest.parent), SAME)
                yield from _of_bundle(manifest.parent, read.origin)
                return
    yield Link("bundle", digest, "", GONE)


def _of_bundle(path: Path, origin: Mapping[str, object]) -> Iterator[Link]:
    if "run" not in origin:
        yield _outside(origin)
        return
    name, step = str(origin["run"]), int(str(origin.get("step", 0)))
    candidates = [folder / name for folder in _around(path, "runs")]
    run = next(
        (candidate for candidate in candidates if (candidate / "recipe.toml").is_file()), None
    )
    if origin.get("trained") and origin.get("checkpoint"):
        yield _checkpoint(run, step, str(origin["checkpoint"]))
    if run is None:
        yield Link("run", "", name, GONE)
        yield Link("recipe", str(origin.get("recipe", "")), "", GONE)
        yield Link("data", str(origin.get("data", "")), "", GONE)
        return
    yield from _of_run(run, origin)


def _checkpoint(run: Path | None, step: int, digest: str) -> Link:
    folder = (run or Path()) / "checkpoints" / f"step-{step:08d}"
    if run is None or not folder.is_dir():
        return Link("checkpoint", digest, f"step {step}", GONE)
    try:
        present = artifact.read(folder, "checkpoint").digest
    except BtpipeError as error:
        return Link("checkpoint", digest, _shown(folder), f"damaged: {error.what}")
    return Link("checkpoint", digest, _shown(folder), _compared(present, digest))


def _of_run(run: Path, origin: Mapping[str, object]) -> Iterator[Link]:
    """The run that wrote a checkpoint of this origin, its recipe and its data."""
    yield Link("run", "", _shown(run), "here" if run.is_dir() else GONE)
    for what, file in (("recipe", run / "recipe.toml"), ("data", run / "index.parquet")):
        digest = str(origin.get(what, ""))
        if not file.is_file():
            yield Link(what, digest, _shown(file), GONE)
            continue
        try:
            state = _state_of(what, run, digest)
        except BtpipeError as error:
            yield Link(what, digest, _shown(file), f"damaged: {error.what}")
            continue
        yield Link(what, digest, _shown(file), state)
    yield from _of_initial(run)


def _state_of(what: str, run: Path, digest: str) -> str:
    """How a run's recipe or data stand to those of this digest."""
    if what == "data":
        return _compared(open_index(run / "index.parquet").fingerprint, digest)
    *earlier, present = changes.versions(run)
    if digest != present.recipe.digest and digest in {e.recipe.digest for e in earlier}:
        return f"here, changed since: {present.text}"
    return _compared(present.recipe.digest, digest)


def _of_initial(run: Path) -> Iterator[Link]:
    """The weights that a run started from, where it did not start from nothing."""
    if (run / "initial").is_dir():
        yield _outside(artifact.read(run / "initial", "initial").origin)


def _outside(origin: Mapping[str, object]) -> Link:
    source = str(origin.get("source", "unknown"))
    return Link("weights of others", str(origin.get("sha256", "")), source, "not looked for")


def _compared(present: str, digest: str) -> str:
    return SAME if present == digest else f"here, but another: {present[:12]}"


def _shown(path: Path) -> str:
    """A path from the present folder, where it lies below it."""
    whole = path.absolute()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else str(whole)
