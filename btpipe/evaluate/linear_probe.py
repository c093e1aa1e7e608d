"""`eval linear TABLE`: a linear classifier on a table's vectors, and the score it leaves."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from btpipe import artifact
from btpipe.embed import arrays, outputs
from btpipe.errors import RefusedError, UsageError
from btpipe.evaluate import knn, labelled, logistic
from btpipe.evaluate.labelled import Labelled, Labels
from btpipe.events import Event, Progressed, Report, TextTable, Warned

KIND = "linear probe"
HELD_OUT = 0.2
"""Share of the training images that chooses C."""
ROWS = 4096
"""Test images judged at a time."""
MISSED = 10**9


@dataclasses.dataclass(frozen=True)
class LinearScore:
    """How many of `n` test images the classifier names rightly, first and among five, 0 to 1.

    Intervals are 95 %. `c` is the penalty's inverse as in `logistic`; `at_end` says that it is the
    first or last that was tried. `unnamed` images have a class that no training image has.
    """

    top1: float
    interval1: tuple[float, float]
    top5: float
    interval5: tuple[float, float]
    n: int
    known: int
    classes: int
    majority: float
    unnamed: int
    c: float
    at_end: bool
    converged: bool


@dataclasses.dataclass(frozen=True)
class Probed(Event):
    """A score, and what it is the score of: bundle, tables, the share judged and its seed.

    `vectors` and `test` are sha256 of images, labels and vectors; `split` is 0 with a table `test`.
    """

    table: Path
    score: LinearScore
    bundle: str
    vectors: str
    test: str
    split: float
    seed: int
    left_out: int

    def tables(self) -> list[TextTable]:
        """The score for people, in per cent."""
        one = self.score
        row = (
            f"{100 * one.top1:.1f}",
            f"{100 * one.interval1[0]:.1f} to {100 * one.interval1[1]:.1f}",
            f"{100 * one.top5:.1f}",
            f"{100 * one.interval5[0]:.1f} to {100 * one.interval5[1]:.1f}",
            f"{one.c:.3g}",
        )
        note = (
            f"{one.n:,} test images by {one.known:,}, {one.classes} classes (the commonest"
            f" {100 * one.majority:.1f} %), logistic regression, C chosen on a fifth of the latter"
        )
        if one.unnamed:
            note += f"; {one.unnamed:,} have a class that was not trained on, and count as missed"
        if self.left_out:
            note += f"; {self.left_out:,} rows without a label are left out"
        columns = ("top-1 %", "95 % interval", "top-5 %", "95 % interval", "C")
        return [TextTable(f"Linear classifier on {self.table}", columns, (row,), note)]


def score_path(vectors: Path) -> Path:
    """`X.parquet` -> `X.linear.json`, beside the table."""
    return vectors.with_name(f"{vectors.name.removesuffix(vectors.suffix)}.linear.json")


def check(
    vectors: Path, inputs: Sequence[str], tests: Sequence[str], others: Sequence[str]
) -> None:
    """Passes the arguments of `eval linear TABLE`; `others` are options of `eval linear BUNDLE`.

    Raises:
        UsageError: no table, inputs, several tables to test on, or such an option.
        IntegrityError: a damaged table.
    """
    if outputs.footer_of(vectors) is None:
        raise UsageError(
            "neither a bundle nor a table of vectors",
            where=vectors,
            expected="eval linear TABLE, or eval linear BUNDLE INPUT... --test INPUT",
        )
    if inputs or len(tests) > 1:
        raise UsageError(
            f"a table of vectors with {inputs[0] if inputs else '--test, more than once'}",
            where=vectors,
            expected="one table of vectors, and one for --test or none",
        )
    if others:
        fix = "leave it out, or name a bundle and images instead of the table"
        raise UsageError(f"{others[0]} is for bundles: a table is trained for no epochs", fix=fix)


def judge(
    vectors: Path,
    test: Path | None,
    out: Path,
    on_event: Report,
    *,
    labels: Labels = Labels(),
    split: float = 0.2,
    seed: int = 0,
) -> Probed:
    """Trains on `vectors`, judges the table `test` or a share `split`, writes `out`.

    Raises:
        UsageError: as `knn.judge`; or training images of one class, or too few to choose C by.
        RefusedError: as `knn.judge`; or `out` holds something else.
        IntegrityError: not a table of vectors, or one with a vector that is not finite.
        MachineError: `out` cannot be written.
    """
    _require_ours(out)
    train_rows, test_rows, left_out = labelled.sides(vectors, test, labels, split, seed)
    linear_score = score(train_rows, test_rows, vectors, on_event, seed=seed)
    share = split if test is None else 0.0
    digests = _digest(train_rows), _digest(test_rows)
    done = Probed(vectors, linear_score, train_rows.bundle, *digests, share, seed, left_out)
    origin = {"kind": KIND, "table": vectors.name, "test table": test.name if test else ""}
    content = dataclasses.asdict(done)
    del content["time"], content["table"]  # the same vectors give the same bytes, wherever they are
    artifact.write_json(out, {**origin, **content.pop("score"), **content})
    return done


def score(
    train: Labelled, test: Labelled, where: Path, on_event: Report, *, seed: int = 0
) -> LinearScore:
    """Trains on `train` with C chosen on a fifth of its images, and judges `test`.

    Raises:
        UsageError: one class, or too few images to choose C by; it names `where`.
        IntegrityError: vectors that are not finite.
    """
    names = train.names
    if len(names) < 2:
        raise UsageError(
            f"all {len(train.labels)} training images are of one class: {next(iter(names))}",
            where=where,
            expected="two classes or more",
        )
    vectors, numbers = train.numbered(names)
    arrays.require_finite(vectors, where)
    arrays.require_finite(test.embeddings, where)
    held_out = _held_out(train.keys, seed)
    if len(np.unique(numbers[~held_out])) < 2:
        raise UsageError(
            f"{len(numbers)} training images are too few to choose C by",
            where=where,
            expected="two classes or more among the four fifths that are fitted",
            fix="label more images, or judge by neighbours: btpipe eval knn",
        )
    started = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        images, seconds = len(numbers) * done, time.monotonic() - started
        on_event(Progressed("fit", images, len(numbers) * total, images / max(seconds, 1e-9), 0.0))

    sweep = logistic.sweep(vectors, numbers, held_out, on_progress=on_progress)
    _warn(sweep, where, on_event)
    right = np.array([names.get(label, -1) for label in test.labels], dtype=np.int64)
    places = _places(sweep.model, test.embeddings, right)
    top1, top5 = (int(np.count_nonzero(places < k)) for k in (1, 5))
    n = len(right)
    commonest = max(test.labels.count(name) for name in set(test.labels))
    return LinearScore(
        top1=top1 / n,
        interval1=knn.wilson(top1, n),
        top5=top5 / n,
        interval5=knn.wilson(top5, n),
        n=n,
        known=len(numbers),
        classes=len(set(train.labels) | set(test.labels)),
        majority=commonest / n,
        unnamed=int(np.count_nonzero(right < 0)),
        c=sweep.c,
        at_end=sweep.at_end,
        converged=sweep.model.converged,
    )


def _places(
    model: logistic.Model, vectors: NDArray[np.floating], right: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many classes come before the right one; more than five where `right` is -1."""
    parts = []
    for start in range(0, len(right), ROWS):
        numbers = right[start : start + ROWS]
        shares = model.probabilities(vectors[start : start + ROWS])
        parts.append(np.where(numbers < 0, MISSED, knn.ranks(shares, np.maximum(numbers, 0))))
    return np.concatenate(parts)


def _warn(sweep: logistic.Swept, where: Path, on_event: Report) -> None:
    if not sweep.model.converged:
        text = f"{where}: the classifier has not converged in {logistic.STEPS} steps"
        on_event(Warned(text, {"steps": logistic.STEPS}))
    if sweep.at_end:
        end = f"C = {sweep.c:g} is the last that was tried: a better one may lie beyond"
        on_event(Warned(f"{where}: {end}", {"c": sweep.c}))


def _held_out(keys: list[str], seed: int) -> NDArray[np.bool_]:
    """A fifth of the images, one at least, by seed and content alone: copies are on one side."""
    draws = {key: hashlib.sha256(f"C {seed} {key}".encode()).digest() for key in set(keys)}
    ordered = sorted(draws, key=lambda key: draws[key])
    chosen = set(ordered[: max(1, round(HELD_OUT * len(ordered)))])
    return np.array([key in chosen for key in keys])


def _digest(rows: Labelled) -> str:
    """sha256 over what was judged, whatever the format of the table."""
    digest = hashlib.sha256(artifact.json_digest([rows.keys, rows.labels]).encode())
    digest.update(np.ascontiguousarray(rows.embeddings).data)
    return digest.hexdigest()


def _require_ours(out: Path) -> None:
    """Passes a free name, or a score of this kind, which is replaced.

    Raises:
        RefusedError: another file, which may have taken long to make.
    """
    if not out.exists():
        return
    try:
        kind = json.loads(out.read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND:
        raise RefusedError(
            "holds something else",
            where=out,
            expected="a score of eval linear TABLE",
            fix="choose another --out",
        )
