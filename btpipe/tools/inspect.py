"""What an artifact is, what it says of itself, and the chain back to recipe and data."""

import contextlib
import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from btpipe import artifact, recipe
from btpipe.data import rejects
from btpipe.data.index import Index, open_index
from btpipe.embed import outputs, table
from btpipe.errors import IntegrityError
from btpipe.events import Inspected
from btpipe.export import contract
from btpipe.pretrain import changes
from btpipe.tools import provenance
from btpipe.tools.artifact_kinds import MANIFESTED, Kind, recognise

Facts = dict[str, str]
_LONGEST_TEXT = 400
"""Characters of a fact; longer ones are cut."""


def inspect(path: Path) -> Inspected:
    """What is at `path`. Nothing is checked but what is read: that is what `verify` is for.

    Raises:
        UsageError: nothing is there, or nothing that btpipe wrote.
        IntegrityError: it cannot be read, or a file of it is missing or cut.
        NewerError: a newer btpipe wrote it.
    """
    found = recognise(path)
    facts = _FACTS[found.kind](found.path)
    shown = {name: _cut(text) for name, text in facts.items() if text}
    return Inspected(str(found.path), found.kind, shown, tuple(provenance.of(found)))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."


def _of_manifest(folder: Path) -> Facts:
    """What every folder with a manifest says: its digest, files, version and origin."""
    kind = recognise(folder).kind
    assert kind in MANIFESTED
    manifest = artifact.read(folder, kind)
    size = sum(int(str(entry["bytes"])) for entry in manifest.files.values())
    return {
        "digest": manifest.digest,
        "files": f"{', '.join(manifest.files)} ({size / 1e6:,.1f} MB)",
        "made by": f"btpipe {manifest.btpipe_version}, format {manifest.format_version}",
        **_origin(manifest.origin),
    }


def _origin(origin: Mapping[str, object]) -> Facts:
    """An origin as text; the gates of a bundle each for itself."""
    facts = {name: _text(value) for name, value in origin.items() if name != "gates"}
    gates = origin.get("gates")
    for name, gate in gates.items() if isinstance(gates, Mapping) else ():
        facts[f"gate {name}"] = _text(gate)
    return facts


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items() if part != "")
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _of_bundle(folder: Path) -> Facts:
    facts = _of_manifest(folder)
    try:
        said = json.loads((folder / contract.CONFIG).read_text())
        network = f"{said['architecture']}, {said['stem']} stem, {said['num_features']} numbers out"
        precisions = said.get("precisions") or [said.get("precision")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"says nothing usable ({error!r})", where=folder) from error
    return {"network": network, "precisions": _text(precisions), **facts, **_scores(folder)}


def _scores(folder: Path) -> Facts:
    """What `eval` left beside a bundle, BUNDLE.linear.json and others, if it judged this one."""
    digest, found = artifact.read(folder, contract.KIND).digest, Facts()
    for path in sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*.json")):
        try:
            said = json.loads(path.read_text())
            if said["bundle"] != digest:
                continue
            low, high = said["top1 95 %"]
            found[f"eval {said['kind']}"] = (
                f"top-1 {100 * said['top1']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of"
                f" {said['test images']:,} test images, {path.name}"
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no score of ours
    return found


def _of_run(folder: Path) -> Facts:
    version = changes.versions(folder)[-1]
    described = version.recipe
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*[0-9]"))
    facts = {
        "recipe": described.digest,
        "changed on the way": version.text,
        "network": f"{described.network.backbone}, {described.data.image_size} pixels",
        "trained on": " ".join(described.data.inputs),
        "epochs, batch": f"{described.optim.epochs}, {described.data.batch_size}",
        "checkpoints": ", ".join(steps) or "none yet",
        "rejected": _lines(folder / "rejects.csv"),
    }
    index = folder / "index.parquet"
    if index.is_file():
        made = open_index(index)
        facts |= {"images": f"{len(made):,}", "data": made.fingerprint}
    try:
        environment = json.loads((folder / "environment.json").read_text())
        facts["made in"] = _text(environment)
    except (OSError, ValueError):
        pass  # for the record only
    return facts


def _lines(path: Path) -> str:
    """Rows of a .csv below its head."""
    return str(len(rejects.read(path))) if path.is_file() else ""


def _of_index(path: Path) -> Facts:
    made = open_index(path)
    kinds = [source.kind for source in made.sources] or ["folder"]
    places = [source.place for source in made.sources] or [str(made.root)]
    return {
        "images": f"{len(made):,}",
        "data": made.fingerprint,
        "root": str(made.root),
        "sources": ", ".join(f"{kind} {place}" for kind, place in zip(kinds, places, strict=True)),
        "bytes": f"{int(np.array(made.table['bytes']).sum()):,}",
        "depth": _depth(made),
        "formats": _text(_counts(made, "format")),
        "labels": _text(_counts(made, "label")),
        "rejected": _lines(rejects.path_beside(path)),
    }


def _depth(made: Index) -> str:
    """How closely the images were looked at."""
    digests = len(made) - made.table["digest"].null_count
    if digests:
        return "decode" if digests == len(made) else f"decode, {digests:,} so far"
    return "header" if (made.widths > 0).any() else "list"


def _counts(made: Index, column: str) -> dict[str, object]:
    """Values of a column and how often they come, the commonest first."""
    counted = pc.value_counts(made.table[column].drop_null()).to_pylist()
    ordered = sorted(counted, key=lambda entry: -entry["counts"])
    return {str(entry["values"]): entry["counts"] for entry in ordered if entry["values"] != ""}


def _of_vectors(path: Path) -> Facts:
    footer = outputs.footer_of(path)
    if footer is None:
        raise IntegrityError("holds no vectors", where=path)
    beside = table.rejects_path(path)
    facts = {"vectors": f"{outputs.count(path):,}"}
    facts["rejects"] = f"{table.count(beside):,}" if beside.is_file() else "no table of them"
    return facts | _footer(footer)


def _footer(footer: Mapping[str, str]) -> Facts:
    facts = {name.removeprefix("btpipe."): text for name, text in sorted(footer.items())}
    with contextlib.suppress(KeyError, ValueError):  # it stays as it stands
        facts["preprocessing"] = _text(json.loads(facts["preprocessing"]))
    return facts


def _of_rejects(path: Path) -> Facts:
    footer = table.footer_of(path) or {}
    facts = {"rejects": f"{table.count(path):,}"}
    return facts | _footer(footer)


def _of_work(folder: Path) -> Facts:
    """The plan of a job that is not done, and its finished parts."""
    try:
        plan = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"no readable plan.json ({error})", where=folder) from error
    parts = [*folder.glob("part-*.parquet"), *folder.glob("shard-*.tar")]
    return {"finished parts": f"{len(parts):,}", **_origin(plan)}


def _of_recipe(path: Path) -> Facts:
    described = recipe.load(path)
    return {name: _text(value) for name, value in described.decisive().items()} | {
        "digest": described.digest
    }


_FACTS: Mapping[Kind, Callable[[Path], Facts]] = {
    "run": _of_run,
    "checkpoint": _of_manifest,
    "initial": _of_manifest,
    "shards": _of_manifest,
    "bundle": _of_bundle,
    "index": _of_index,
    "vectors": _of_vectors,
    "rejects": _of_rejects,
    "embed work": _of_work,
    "shard work": _of_work,
    "recipe": _of_recipe,
}
