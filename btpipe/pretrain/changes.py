"""Changes of a run's recipe on a resume: those that may be accepted, and those of a run so far.

events.jsonl holds each as a `RecipeChanged`, written before recipe.toml takes the new value.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from btpipe import artifact, recipe
from btpipe.errors import RefusedError, UsageError
from btpipe.events import RecipeChanged, Report
from btpipe.recipe import BOOKKEEPING, ROUNDING, Recipe

OPTION = "--accept-change"
RECIPE, EVENTS = "recipe.toml", "events.jsonl"


@dataclasses.dataclass(frozen=True)
class Version:
    """A recipe that a run had, and the changes, oldest first, that led to it."""

    recipe: Recipe
    changes: tuple[RecipeChanged, ...]

    @property
    def text(self) -> str:
        """The changes for people: run.precision fp16 -> fp32 at step 600."""
        return "; ".join(f"{c.key} {c.before} -> {c.after} at step {c.step}" for c in self.changes)


def require_acceptable(keys: Sequence[str]) -> None:
    """Passes the keys that `--accept-change` may name.

    Raises:
        UsageError: a key that needs no such option, that would make another run, or that is none.
    """
    for key in keys:
        if key in ROUNDING:
            continue
        if key in BOOKKEEPING:
            what, fix = "may change on every resume", f"leave {OPTION} out"
        elif key in Recipe().decisive():
            what = "decides what is learned: with another value it would be another run"
            fix = "train it under another --name"
        else:
            what, fix = "is no key of a recipe that may be accepted", ""
        expected = f"one of {', '.join(sorted(ROUNDING))}"
        raise UsageError(f"{OPTION} {key}: {what}", expected=expected, fix=fix)


def differences(folder: Path, resumed: Recipe, accepted: Sequence[str]) -> Mapping[str, str]:
    """Key to former value of each accepted change from the run's recipe to the one resumed with.

    Raises:
        RefusedError: keys differ that are not accepted; they are named.
    """
    before, after = recipe.load(folder / RECIPE).decisive(), resumed.decisive()
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if ROUNDING.intersection(accepted).issuperset(keys):
        return {key: str(before[key]) for key in keys}
    fix = "choose another --name, or go on with that run's recipe.toml"
    if ROUNDING.issuperset(keys):
        options = " ".join(f"{OPTION} {key}" for key in keys)
        fix = f"the same command with {options}, or choose another --name"
    lines = [f"{key} is {before.get(key)!r} there, {after.get(key)!r} asked for" for key in keys]
    what = "holds a run of another recipe: " + "; ".join(lines)
    raise RefusedError(what, where=folder, fix=fix)


def write(folder: Path, resumed: Recipe, before: Mapping[str, str], step: int, log: Report) -> None:
    """Records that the run goes on from `step` under this recipe; `before` as in `differences`.

    The events come first, and reach the disk: a checkpoint's recipe is always one that is known.
    """
    for key, value in before.items():
        log(RecipeChanged(step, key, value, str(resumed.decisive()[key])))
    artifact.fsync_path(folder / EVENTS)
    artifact.write_file(folder / RECIPE, resumed.to_toml().encode())


def versions(folder: Path) -> list[Version]:
    """The recipes that a run had, the first one first, the present one last.

    Raises:
        RecipeError: recipe.toml cannot be read.
    """
    changes = tuple(_read(folder / EVENTS))
    undone = [f"{change.key}={json.dumps(change.before)}" for change in reversed(changes)]
    return [
        Version(recipe.load(folder / RECIPE, undone[: len(changes) - count]), changes[:count])
        for count in range(len(changes) + 1)
    ]


def version_at(folder: Path, step: int, digest: str) -> Version:
    """The recipe of the checkpoint of this step, whose recipe's digest is given.

    The present one where the run never had such a recipe.
    """
    history = versions(folder)
    fitting = [
        version
        for version in history
        if version.recipe.digest == digest
        and (not version.changes or version.changes[-1].step <= step)
    ]
    return (fitting or history)[-1]


def _read(log: Path) -> list[RecipeChanged]:
    """The changes in a run's log; lines that a crash damaged are passed over."""
    changes = []
    lines = log.read_bytes().splitlines() if log.is_file() else []
    for line in lines:
        if b'"RecipeChanged"' not in line:
            continue
        try:
            fields = json.loads(line)
            step = int(fields["step"])
            words = (str(fields[name]) for name in ("key", "before", "after"))
            changes.append(RecipeChanged(step, *words))
        except (ValueError, KeyError, TypeError):
            continue
    return changes
