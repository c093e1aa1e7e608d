"""`eval knn`: the shares agree with votes that are counted one by one, to the last image."""

import math
from pathlib import Path

import event_schema
import numpy as np
import pytest
import vector_table
from numpy.typing import NDArray
from typer.testing import CliRunner

from btpipe.cli import app
from btpipe.errors import UsageError
from btpipe.evaluate import knn
from btpipe.evaluate.labelled import Labels

CLASSES = [f"class {letter}" for letter in "abcdefgh"]


def clouds(count: int, seed: int) -> tuple[NDArray[np.float32], list[str | None]]:
    random = np.random.default_rng(seed)
    numbers = random.integers(0, len(CLASSES), count)
    noise = random.normal(size=(count, 12))
    vectors = np.eye(len(CLASSES), 12)[numbers] + 0.6 * noise
    return vectors.astype(np.float32), [CLASSES[number] for number in numbers]


def one_by_one(
    train: NDArray[np.float32],
    labels: list[str | None],
    test: NDArray[np.float32],
    right: list[str | None],
    k: int,
) -> tuple[int, int]:
    """Images whose class wins, and is among the first five, by plain loops in float64."""
    wins = fives = 0
    for vector, label in zip(test.tolist(), right, strict=True):
        cosines = []
        for row, other in enumerate(train.tolist()):
            product = math.fsum(a * b for a, b in zip(vector, other, strict=True))
            cosines.append((-product / math.hypot(*vector) / math.hypot(*other), row))
        scores: dict[str, float] = {}
        for negative, row in sorted(cosines)[:k]:
            name = labels[row] or ""
            scores[name] = scores.get(name, 0.0) + math.exp(-negative / 0.07)
        order = sorted(scores, key=lambda name: (-scores[name], name))
        wins += order[0] == label
        fives += label in order[:5]
    return wins, fives


def tables(tmp_path: Path) -> tuple[Path, Path]:
    train, labels = clouds(150, 1)
    test, right = clouds(60, 2)
    paths = [f"test-{row}.jpg" for row in range(60)]
    return (
        vector_table.write(tmp_path / "known.parquet", train, labels=labels),
        vector_table.write(tmp_path / "asked.parquet", test, labels=right, paths=paths),
    )


def test_every_k_agrees_with_votes_counted_one_by_one(tmp_path: Path) -> None:
    judged = knn.judge(*tables(tmp_path), (1, 5, 20, 100))
    assert judged.k == (1, 5, 20, 100)
    for k, top1, top5 in zip(judged.k, judged.top1, judged.top5, strict=True):
        wins, fives = one_by_one(*clouds(150, 1), *clouds(60, 2), k)
        assert (round(60 * top1), round(60 * top5)) == (wins, fives)
    assert 0.3 < judged.top1[2] < 1
    assert judged.top5[2] > judged.top1[2]
    assert judged.intervals1[2] == knn.wilson(round(60 * judged.top1[2]), 60)
    assert judged.top1[2] == knn.evaluate(*tables(tmp_path), 20).top1


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    scores = np.array([[0.9, 0.1, 0.0, 0.0], [0.2, 0.5, 0.5, 0.0]])
    assert (knn.ranks(scores, np.array([1, 2])) == [1, 1]).all()
    assert (knn.ranks(scores, np.array([2, 3])) >= [5, 5])[1]
    assert knn.ranks(scores, np.array([3, 1]))[1] == 0  # of equal scores the first name


def test_more_neighbours_than_rows_are_all_rows_once(tmp_path: Path) -> None:
    assert knn.judge(*tables(tmp_path), (100, 200, 400)).k == (100, 150)


def test_a_split_is_drawn_by_the_seed_and_keeps_copies_together(tmp_path: Path) -> None:
    vectors, labels = clouds(200, 3)
    digests = [f"{row // 2:064x}" for row in range(200)]  # each image is there twice
    path = vector_table.write(tmp_path / "v.parquet", vectors, labels=labels, digests=digests)
    first, again = (knn.judge(path, None, (5,), split=0.3, seed=4) for _ in range(2))
    assert first == again
    assert first.n % 2 == first.known % 2 == 0
    assert 30 < first.n < 90
    assert first.n + first.known == 200
    other = knn.judge(path, None, (5,), split=0.3, seed=5)
    assert (other.n, other.top1) != (first.n, first.top1)
    with pytest.raises(UsageError, match="leaves one side"):
        knn.judge(path, None, (5,), split=0.0)


def test_labels_come_from_a_list_and_rows_without_are_left_out(tmp_path: Path) -> None:
    train, test = tables(tmp_path)
    expected = knn.judge(train, test, (10,))
    bare = vector_table.write(tmp_path / "bare.parquet", clouds(150, 1)[0])
    _, labels = clouds(150, 1)
    _, right = clouds(60, 2)
    lines = [f"{row}.jpg,{label}" for row, label in enumerate(labels)]
    lines += [f"test-{row}.jpg,{label}" for row, label in enumerate(right[:50])]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(lines))
    judged = knn.judge(bare, test, (10,), labels=Labels(file=tmp_path / "labels.csv"))
    assert (judged.n, judged.left_out, judged.known) == (50, 10, expected.known)
    assert "10 rows without a label are left out" in judged.tables()[0].note


def test_labels_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    train, test = tables(tmp_path)
    with pytest.raises(UsageError, match="no column 'shape'"):
        knn.judge(train, test, (10,), labels=Labels("shape"))
    by_width = knn.judge(train, test, (10,), labels=Labels("width"))
    assert by_width.top1 == (1.0,)
    (tmp_path / "twice.csv").write_text("path,label\n1.jpg,a\n1.jpg,b\n")
    with pytest.raises(UsageError, match=r"two labels for 1\.jpg"):
        knn.judge(train, test, (10,), labels=Labels(file=tmp_path / "twice.csv"))
    (tmp_path / "other.csv").write_text("name,kind\n1.jpg,a\n")
    with pytest.raises(UsageError, match="path and label"):
        knn.judge(train, test, (10,), labels=Labels(file=tmp_path / "other.csv"))


def test_the_command_prints_a_table_or_numbers(tmp_path: Path) -> None:
    train, test = map(str, tables(tmp_path))
    runner = CliRunner()
    result = runner.invoke(app, ["eval", "knn", train, "--test", test])
    assert result.exit_code == 0
    assert all(f" {k} " in result.output for k in (10, 20, 100, 150))
    command = ["eval", "knn", train, "--test", test, "-k", "3", "-k", "7", "--json"]
    (record,) = event_schema.read(runner.invoke(app, command).output)
    assert (record["event"], record["k"], len(record["top5"])) == ("Judged", [3, 7], 2)
