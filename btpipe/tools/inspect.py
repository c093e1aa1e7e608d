"""What an artifact is, what it says of itself, and the chain back to recipe and data."""

import contextlib
import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

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

_LONGEST_TEXT = 400
"""Characters of a fact; longer ones are cut."""
_FOOTER_JSON = {"preprocessing", "dimension", "normalize", "pixels", "format_version"}
"""What a table's footer holds as JSON, of its texts."""


class Fact(NamedTuple):
    """What is known by a name, as JSON has it, and in words."""

    value: object
    text: str


Facts = dict[str, Fact]


def inspect(path: Path) -> Inspected:
    """What is at `path`. Nothing is checked but what is read: that is what `verify` is for.

    Raises:
        UsageError: nothing is there, or nothing that btpipe wrote.
        IntegrityError: it cannot be read, or a file of it is missing or cut.
        NewerError: a newer btpipe wrote it.
    """
    recognised = recognise(path)
    facts = _FACTS[recognised.kind](recognised.path)
    facts = {name: fact for name, fact in facts.items() if fact.text}
    return Inspected(
        str(recognised.path),
        recognised.kind,
        {name: _cut(fact.text) for name, fact in facts.items()},
        tuple(provenance.of(recognised)),
        {name: fact.value for name, fact in facts.items()},
    )


def _fact(value: object) -> Fact:
    return Fact(value, _text(value))


def _count(count: int) -> Fact:
    return Fact(count, f"{count:,}")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ..."


def _of_manifest(folder: Path) -> Facts:
    """What every folder with a manifest says: its digest, files, version and origin."""
    kind = recognise(folder).kind
    assert kind in MANIFESTED
    manifest = artifact.read(folder, kind)
    sizes = {name: int(str(entry["bytes"])) for name, entry in manifest.files.items()}
    version, format_version = manifest.btpipe_version, manifest.format_version
    return {
        "digest": _fact(manifest.digest),
        "files": Fact(sizes, f"{', '.join(sizes)} ({sum(sizes.values()) / 1e6:,.1f} MB)"),
        "made by": Fact(
            {"btpipe": version, "format": format_version},
            f"btpipe {version}, format {format_version}",
        ),
        **_origin(manifest.origin),
    }


def _origin(origin: Mapping[str, object]) -> Facts:
    """An origin's facts; the gates of a bundle each for itself."""
    facts = {name: _fact(value) for name, value in origin.items() if name != "gates"}
    gates = origin.get("gates")
    for name, gate in gates.items() if isinstance(gates, Mapping) else ():
        facts[f"gate {name}"] = _fact(gate)
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
        config = json.loads((folder / contract.CONFIG).read_text())
        network = {name: config[name] for name in ("architecture", "stem", "num_features")}
        precisions = config.get("precisions") or [config.get("precision")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"says nothing usable ({error!r})", where=folder) from error
    architecture, stem, dimension = network.values()
    text = f"{architecture}, {stem} stem, {dimension} numbers out"
    network_fact = Fact(network, text)
    # What embeds is loaded for this alone.
    from btpipe.export import golden  # noqa: PLC0415

    least = golden.compare(contract.open_bundle(folder))
    golden_fact = {"golden images": Fact(least, f"least cosine here: {_text(least)}")}
    return {
        "network": network_fact,
        "precisions": _fact(precisions),
        **(golden_fact if least else {}),
        **facts,
        **_scores(folder),
    }


def _scores(folder: Path) -> Facts:
    """What `eval` left beside a bundle, BUNDLE.linear.json and others, if it judged this one."""
    digest, scores = artifact.read(folder, contract.KIND).digest, Facts()
    for path in sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*.json")):
        try:
            score = json.loads(path.read_text())
            if score["bundle"] != digest:
                continue
            low, high = score["top1 95 %"]
            text = (
                f"top-1 {100 * score['top1']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of"
                f" {score['test images']:,} test images, {path.name}"
            )
            scores[f"eval {score['kind']}"] = Fact(score, text)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no score of ours
    return scores


def _of_run(folder: Path) -> Facts:
    version = changes.versions(folder)[-1]
    described = version.recipe
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*[0-9]"))
    changed = [
        {"step": c.step, "key": c.key, "before": c.before, "after": c.after}
        for c in version.changes
    ]
    backbone, size = described.network.backbone, described.data.image_size
    epochs, batch_size = described.optim.epochs, described.data.batch_size
    facts = {
        "recipe": _fact(described.digest),
        "changed on the way": Fact(changed, version.text),
        "network": Fact({"backbone": backbone, "image_size": size}, f"{backbone}, {size} pixels"),
        "trained on": _fact(list(described.data.inputs)),
        "epochs, batch": Fact(
            {"epochs": epochs, "batch_size": batch_size}, f"{epochs}, {batch_size}"
        ),
        "checkpoints": Fact(steps, ", ".join(steps) or "none yet"),
        "rejected": _lines(folder / "rejects.csv"),
    }
    if (folder / "index.parquet").is_file():
        index = open_index(folder / "index.parquet")
        facts |= {"images": _count(len(index)), "data": _fact(index.fingerprint)}
    try:
        environment = json.loads((folder / "environment.json").read_text())
        facts["made in"] = _fact(environment)
    except (OSError, ValueError):
        pass  # for the record only
    return facts


def _lines(path: Path) -> Fact:
    """Rows of a .csv below its head; without text where there is none."""
    return _fact(len(rejects.read(path))) if path.is_file() else Fact(None, "")


def _of_index(path: Path) -> Facts:
    index = open_index(path)
    sources = [{"kind": source.kind, "place": source.place} for source in index.sources]
    sources = sources or [{"kind": "folder", "place": str(index.root)}]
    return {
        "images": _count(len(index)),
        "data": _fact(index.fingerprint),
        "root": _fact(str(index.root)),
        "sources": Fact(sources, ", ".join(f"{s['kind']} {s['place']}" for s in sources)),
        "bytes": _count(int(np.array(index.table["bytes"]).sum())),
        "depth": _depth(index),
        "formats": _fact(_counts(index, "format")),
        "labels": _fact(_counts(index, "label")),
        "rejected": _lines(rejects.path_beside(path)),
    }


def _depth(index: Index) -> Fact:
    """How closely the images were looked at, and how many of them were decoded."""
    digests = len(index) - index.table["digest"].null_count
    if digests:
        text = "decode" if digests == len(index) else f"decode, {digests:,} so far"
        return Fact({"depth": "decode", "images": digests}, text)
    depth = "header" if (index.widths > 0).any() else "list"
    return Fact({"depth": depth, "images": 0}, depth)


def _counts(index: Index, column: str) -> dict[str, object]:
    """Values of a column and how often they come, the commonest first."""
    counted = pc.value_counts(index.table[column].drop_null()).to_pylist()
    ordered = sorted(counted, key=lambda entry: -entry["counts"])
    return {str(entry["values"]): entry["counts"] for entry in ordered if entry["values"] != ""}


def _of_vectors(path: Path) -> Facts:
    footer = outputs.footer_of(path)
    if footer is None:
        raise IntegrityError("holds no vectors", where=path)
    refused, facts = table.rejects_path(path), {"vectors": _count(outputs.count(path))}
    is_there = refused.is_file()
    facts["rejects"] = _count(table.count(refused)) if is_there else Fact(None, "no table of them")
    return facts | _footer(footer)


def _footer(footer: Mapping[str, str]) -> Facts:
    facts = Facts()
    for key, text in sorted(footer.items()):
        name = key.removeprefix("btpipe.")
        facts[name] = _fact(text)
        if name in _FOOTER_JSON:
            with contextlib.suppress(ValueError):  # it stays as it stands
                facts[name] = _fact(json.loads(text))
    return facts


def _of_rejects(path: Path) -> Facts:
    footer = table.footer_of(path) or {}
    return {"rejects": _count(table.count(path)), **_footer(footer)}


def _of_work(folder: Path) -> Facts:
    """The plan of a job that is not done, and its finished parts."""
    try:
        plan = json.loads((folder / "plan.json").read_text())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"no readable plan.json ({error})", where=folder) from error
    parts = [*folder.glob("part-*.parquet"), *folder.glob("shard-*.tar")]
    return {"finished parts": _count(len(parts)), **_origin(plan)}


def _of_recipe(path: Path) -> Facts:
    described = recipe.load(path)
    decisive = {**described.decisive(), "digest": described.digest}
    return {name: _fact(value) for name, value in decisive.items()}


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
