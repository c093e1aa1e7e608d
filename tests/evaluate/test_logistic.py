"""The linear classifier on vectors: its minimum, its penalty, and the score of a table."""

import json
from pathlib import Path

import event_schema
import numpy as np
import pytest
import scipy.optimize
import vector_table
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.errors import IntegrityError, RefusedError, UsageError
from btpipe.evaluate import knn, linear_probe, logistic
from btpipe.evaluate.labelled import Labels
from btpipe.events import Event, Warned, ignore

CLOSE = 1e-4
"""Of a probability: what two solvers leave that stop at gradients of 1e-6 and 1e-9."""
NAMES = [f"class {letter}" for letter in "abcdefgh"]

Vectors = NDArray[np.float32]


def clouds(
    count: int, seed: int, classes: int = 4, spread: float = 0.7
) -> tuple[Vectors, NDArray[np.int64]]:
    """Overlapping classes in 12 dimensions of unlike scales, some correlated, the last constant."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, count - classes)])
    vectors = np.eye(classes, 12)[labels] + spread * random.normal(size=(count, 12))
    vectors[:, 5] += 3 * vectors[:, 0]
    vectors = vectors * np.logspace(-3, 3, 12) + 5
    vectors[:, -1] = 0.1
    return vectors.astype(np.float32), labels


def by_scipy(
    vectors: Vectors, labels: NDArray[np.int64], c: float, test: Vectors
) -> NDArray[np.float64]:
    """Probabilities by scipy's optimiser on the equation as it is written, dimension by dimension.

    Two classes have one weight vector, as in scikit-learn.
    """
    mean, scale = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6] = 1
    rows, others = (vectors - mean) / scale, (test - mean) / scale
    classes = int(labels.max()) + 1
    free = 1 if classes == 2 else classes

    def logits(flat: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = flat.reshape(free, -1)
        scores = at @ weights[:, :-1].T + weights[:, -1]
        return np.hstack([0 * scores, scores]) if classes == 2 else scores

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scores = logits(flat, rows)
        loss = float((logsumexp(scores, axis=1) - scores[np.arange(len(labels)), labels]).sum())
        errors = (softmax(scores, axis=1) - np.eye(classes)[labels])[:, -free:]
        weights = flat.reshape(free, -1)[:, :-1]
        gradient = np.hstack([c * errors.T @ rows + weights, c * errors.sum(axis=0)[:, None]])
        return c * loss + 0.5 * float((weights**2).sum()), gradient.ravel()

    start = np.zeros(free * (rows.shape[1] + 1))
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    done = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return np.asarray(softmax(logits(done.x, others), axis=1))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [1e-4, 0.1, 10.0])
def test_the_minimum_is_the_one_that_scipy_finds(c: float, classes: int) -> None:
    vectors, labels = clouds(300, 1, classes)
    test, _ = clouds(100, 2, classes)
    model = logistic.fit(vectors, labels, c)
    assert model.converged
    expected = by_scipy(vectors, labels, c, test)
    assert np.abs(model.probabilities(test) - expected).max() < CLOSE


def test_more_dimensions_than_rows_have_their_minimum_too() -> None:
    random = np.random.default_rng(3)
    vectors = random.normal(size=(40, 90)).astype(np.float32)
    labels = np.arange(40) % 3
    model = logistic.fit(vectors, labels, 0.1)
    expected = by_scipy(vectors, labels, 0.1, vectors)
    assert np.abs(model.probabilities(vectors) - expected).max() < CLOSE


def test_the_penalty_that_names_most_held_out_rows_is_taken() -> None:
    vectors, labels = clouds(400, 4)
    held_out = np.random.default_rng(0).random(400) < 0.25
    sweep = logistic.sweep(vectors, labels, held_out)
    fitted = [logistic.fit(vectors[~held_out], labels[~held_out], c) for c in sweep.grid]
    shares = [
        float((m.probabilities(vectors[held_out]).argmax(axis=1) == labels[held_out]).mean())
        for m in fitted[: len(sweep.right)]
    ]
    # Means and scales of all rows, looser minima: a row at the border may go the other way.
    assert np.abs(np.array(shares) - sweep.right).max() < 3 / held_out.sum()
    assert sweep.c == sweep.grid[int(np.argmax(sweep.right))]
    assert not sweep.at_end
    again = logistic.fit(vectors, labels, sweep.c).probabilities(vectors)
    assert np.abs(again - sweep.model.probabilities(vectors)).max() < CLOSE
    assert logistic.sweep(vectors, labels, held_out, grid=(1e-5, 1e-4)).at_end


def test_what_separates_well_still_converges_and_is_named_rightly() -> None:
    vectors, labels = clouds(200, 5, spread=0.01)
    model = logistic.fit(vectors, labels, 100.0)
    assert model.converged
    assert (model.probabilities(vectors).argmax(axis=1) == labels).all()


def tables(tmp_path: Path) -> tuple[Path, Path]:
    files = []
    for name, count, seed in (("known", 200, 1), ("asked", 80, 2)):
        vectors, labels = clouds(count, seed, 8)
        paths = [f"{name}-{row}.jpg" for row in range(count)]
        named: list[str | None] = [NAMES[label] for label in labels]
        files.append(
            vector_table.write(tmp_path / f"{name}.parquet", vectors, paths=paths, labels=named)
        )
    return files[0], files[1]


def test_a_table_is_judged_by_another_and_its_score_stands_beside_it(tmp_path: Path) -> None:
    train, test = tables(tmp_path)
    done = CliRunner().invoke(app, ["eval", "linear", str(train), "--test", str(test), "--json"])
    assert done.exit_code == 0, done.output
    event = event_schema.read(done.stdout)[-1]
    written = json.loads((tmp_path / "known.linear.json").read_text())
    assert event["score"].items() <= written.items()
    assert (written["bundle"], written["kind"]) == (vector_table.BUNDLE, linear_probe.KIND)
    vectors, labels = clouds(200, 1, 8)
    others, right = clouds(80, 2, 8)
    scores = logistic.fit(vectors, labels, written["c"]).probabilities(others)
    top1 = int((scores.argmax(axis=1) == right).sum())
    five = np.argsort(-scores, axis=1)[:, :5] == right[:, None]
    assert (round(80 * written["top1"]), round(80 * written["top5"])) == (top1, int(five.sum()))
    assert tuple(written["interval1"]) == knn.wilson(top1, 80)
    assert 0.4 < written["top1"] < written["top5"] < 1
    shown = CliRunner().invoke(app, ["eval", "linear", str(train), "--test", str(test)])
    assert f"{100 * top1 / 80:.1f}" in shown.stdout


def test_a_split_is_by_seed_and_content_and_labels_come_from_where_they_are_said_to(
    tmp_path: Path,
) -> None:
    vectors, labels = clouds(200, 3)
    digests = [f"{row // 2:064x}" for row in range(200)]  # each image is there twice
    path = vector_table.write(tmp_path / "v.parquet", vectors, digests=digests)
    listed = tmp_path / "labels.csv"
    lines = [f"{row}.jpg,{NAMES[label]}" for row, label in enumerate(labels[:190])]
    listed.write_text("\n".join(["path,label", *lines]))
    out, places = tmp_path / "s.json", Labels(file=listed)
    first = linear_probe.judge(path, None, out, ignore, labels=places, split=0.3, seed=4)
    assert linear_probe.judge(path, None, out, ignore, labels=places, split=0.3, seed=4) == first
    assert first.score.n % 2 == first.score.known % 2 == 0
    assert (first.score.n + first.score.known, first.left_out) == (190, 10)
    other = linear_probe.judge(path, None, out, ignore, labels=places, split=0.3, seed=5)
    assert other.test != first.test


def test_a_class_on_one_side_alone_counts_as_missed_or_as_never_chosen(tmp_path: Path) -> None:
    vectors, labels = clouds(120, 6, 3)
    named: list[str | None] = [NAMES[label] for label in labels]
    named[7], named[8] = "only one of its kind", "another"
    path = vector_table.write(tmp_path / "v.parquet", vectors, labels=named)
    judged = [
        linear_probe.judge(path, None, tmp_path / "s.json", ignore, split=0.5, seed=seed).score
        for seed in range(3)
    ]
    assert {one.classes for one in judged} == {5}
    assert {one.unnamed for one in judged} > {0}
    assert all(one.top5 <= 1 - one.unnamed / one.n for one in judged)


def test_rows_of_one_class_or_too_few_rows_are_refused(tmp_path: Path) -> None:
    vectors, _ = clouds(20, 7)
    same = vector_table.write(tmp_path / "a.parquet", vectors, labels=["x"] * 20)
    with pytest.raises(UsageError, match="are of one class: x"):
        linear_probe.judge(same, None, tmp_path / "s.json", ignore)
    few = vector_table.write(tmp_path / "b.parquet", vectors[:2], labels=["x", "y"])
    test = vector_table.write(tmp_path / "d.parquet", vectors[2:4], labels=["x", "y"])
    with pytest.raises(UsageError, match="too few to choose C by"):
        linear_probe.judge(few, test, tmp_path / "s.json", ignore)
    vectors[3, 2] = np.nan
    broken = vector_table.write(tmp_path / "c.parquet", vectors, labels=["x", "y"] * 10)
    with pytest.raises(IntegrityError, match="the first is row 3"):
        linear_probe.judge(broken, None, tmp_path / "s.json", ignore)


def test_a_best_penalty_at_the_end_of_the_grid_is_said(tmp_path: Path) -> None:
    random = np.random.default_rng(8)
    noise = random.normal(size=(60, 4)).astype(np.float32)
    labels: list[str | None] = ["x" if row % 5 else "y" for row in range(60)]
    path = vector_table.write(tmp_path / "v.parquet", noise, labels=labels)
    events: list[Event] = []
    score = linear_probe.judge(path, None, tmp_path / "s.json", events.append).score
    assert score.at_end
    (warned,) = [e for e in events if isinstance(e, Warned) and "C = 1e-05" in e.text]
    assert warned.values == {"c": 1e-5}


def test_another_file_is_not_replaced_by_a_score(tmp_path: Path) -> None:
    train, test = tables(tmp_path)
    (tmp_path / "known.linear.json").write_text('{"kind": "linear"}')
    with pytest.raises(RefusedError, match="holds something else"):
        linear_probe.judge(train, test, tmp_path / "known.linear.json", ignore)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["known.parquet", "images"], "a table of vectors with images"),
        (["known.parquet", "--test", "a", "--test", "b"], "more than once"),
        (["known.parquet", "--epochs", "3"], "--epochs is for bundles"),
        (["known.parquet", "--lr", "3"], "--lr is for bundles"),
        (["known.parquet", "--devices", "2"], "--devices is for bundles"),
        (["missing.parquet"], "neither a bundle nor a table"),
        (["bundle", "--test", "images"], "INPUT is missing"),
        (["bundle", "images"], "--test is missing"),
        (["bundle", "images", "--test", "images", "--split", "0.3"], "--split is for tables"),
        (["bundle", "images", "--test", "images", "--labels", "l.csv"], "--labels is for tables"),
        (["bundle", "images", "--test", "images", "--seed", "1"], "--seed is for tables"),
        (["bundle", "--label-column", "kind"], "--label-column is for tables"),
    ],
)
def test_options_of_the_other_way_to_judge_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    tables(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["eval", "linear", *words])
    assert isinstance(done.exception, UsageError)
    assert message in str(done.exception)
