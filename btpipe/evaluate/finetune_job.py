"""`eval linear` and `eval semisup`: a classifier on a bundle's encoder, and the score it leaves."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from btpipe import artifact, events, progress, runtime
from btpipe.data.index import Index, build, open_index
from btpipe.errors import RefusedError, UsageError
from btpipe.evaluate import finetune, knn
from btpipe.events import Finished, Report, TextTable
from btpipe.export import contract
from btpipe.recipe.protocols import Protocol

Kind = Literal["linear", "semisup"]


@dataclasses.dataclass(frozen=True)
class FinetuneRequest:
    """What is to be judged: a bundle, by training on `train` and judging on `test`.

    `percent`: of each class's training images, chosen by the protocol's seed; 100 takes all.
    `split`: a file that names the training images to take instead, one a line, as published.
    """

    kind: Kind
    bundle: Path
    train: tuple[str, ...]
    test: tuple[str, ...]
    out: Path
    protocol: Protocol
    percent: float = 100.0
    split: Path | None = None


@dataclasses.dataclass(frozen=True)
class ClassifierJudged(Finished):
    """Shares, 0 to 1, of `images` test images that a classifier names rightly.

    `top1` first, `top5` among five; `interval1` is 95 %. It was trained for `epochs` on the encoder
    of `bundle`, frozen ("linear") or tuned ("semisup"). `rejected` images could not be read.
    """

    job = "eval"

    kind: Kind
    bundle: Path
    out: Path
    images: int
    rejected: int
    top1: float
    interval1: tuple[float, float]
    top5: float
    epochs: int
    nothing_to_do: bool = False

    @property
    def text(self) -> str:
        if self.nothing_to_do:
            return f"{self.out} holds this evaluation already: nothing to do"
        return str(self.out)

    def tables(self) -> list[TextTable]:
        """The shares for people, in per cent."""
        if self.nothing_to_do:
            return []
        low, high = self.interval1
        name = {"linear": "Linear classifier", "semisup": "Fine-tuned"}[self.kind]
        row = (f"{100 * self.top1:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
        note = f"{self.images:,} test images, {self.epochs} epochs, the last one's result"
        columns = ("top-1 %", "95 % interval", "top-5 %")
        cells = ((*row, f"{100 * self.top5:.1f}"),)
        return [TextTable(f"{name} on {self.bundle}", columns, cells, note)]


def is_bundle(path: Path) -> bool:
    """Whether an encoder is judged, not a table of vectors."""
    return (path / artifact.MANIFEST).is_file()


def check(inputs: Sequence[str], tests: Sequence[str], others: Sequence[str]) -> None:
    """Passes the arguments of `eval linear BUNDLE`; `others` are options of `eval linear TABLE`.

    Raises:
        UsageError: no images to train or to judge on, or such an option.
    """
    if others:
        fix = "leave it out, or name a table of vectors instead of the bundle"
        raise UsageError(f"{others[0]} is for tables of vectors", fix=fix)
    if not inputs or not tests:
        missing = "--test" if inputs else "INPUT"
        expected = "eval linear BUNDLE INPUT... --test INPUT"
        raise UsageError(f"no labelled images: {missing} is missing", expected=expected)


def judge(request: FinetuneRequest, *, devices: str, mode: progress.Mode) -> None:
    """Trains, judges and writes `request.out`; run again, it goes on, or says what stands there.

    `devices`: processes on this machine ("auto": one for each GPU, or one). Under torchrun and in
    a SLURM step the ranks are theirs.

    Raises:
        UsageError: inputs without labels, test classes that no training image has.
        RefusedError: `out` holds another evaluation, or another process works on it.
        BtpipeError: whatever `classifier.fit` raises.
    """
    count = 1 if runtime.is_rank() else runtime.devices(devices)
    if count == 1:
        judge_on_rank(request, mode)
    else:
        runtime.launch(count, judge_on_rank, (request, mode))


def judge_on_rank(request: FinetuneRequest, mode: progress.Mode) -> None:
    """One rank's part: the first one holds the work folder, shows progress and writes the score."""
    started = time.monotonic()
    with runtime.start() as process:
        if not process.is_first:
            if not runtime.any_rank(False):
                finetune.fit(_job(request), process, events.ignore)
                runtime.barrier()
            return
        with progress.show(mode) as on_event, _open(request, on_event) as identity:
            if runtime.any_rank(_stands(request.out, identity)):
                record = json.loads(request.out.read_text())
                on_event(_judged(request, record, time.monotonic() - started, nothing_to_do=True))
                return
            score = finetune.fit(_job(request), process, on_event)
            runtime.barrier()  # the others have read the lists of images
            record = {**identity, **_record(score)}
            artifact.write_json(request.out, record)
            on_event(_judged(request, record, time.monotonic() - started))


@contextlib.contextmanager
def _open(request: FinetuneRequest, on_event: Report) -> Iterator[dict[str, object]]:
    """Holds the prepared work folder, for one process at a time; what the score is to be of.

    After an error the folder stays where it holds a state to go on from.
    """
    contract.open_bundle(request.bundle)
    work, fix = _job(request).work, "wait for it, or choose another --out"
    with artifact.locked(work, "another process judges here", fix):
        try:
            job = prepare(request, on_event)
            images = len(open_index(job.train))
            yield {"kind": request.kind, "train images": images, **job.identity}
            shutil.rmtree(work / finetune.STATE, ignore_errors=True)
        finally:
            if not (work / finetune.STATE).exists():
                shutil.rmtree(work)


def _job(request: FinetuneRequest) -> finetune.FinetuneJob:
    work = request.out.with_name(f"{request.out.name}.work")
    files = work / "train.parquet", work / "test.parquet"
    return finetune.FinetuneJob(request.bundle, *files, request.protocol, work)


def prepare(request: FinetuneRequest, on_event: Report) -> finetune.FinetuneJob:
    """The job, with the lists of its images in the work folder; raises as `judge`."""
    train, _ = build(request.train, on_event)
    test, _ = build(request.test, on_event)
    _require_labels(train, "the training images")
    _require_labels(test, "the test images")
    chosen = _chosen(train, request)
    classes = sorted({str(label) for label in chosen.labels})
    unknown = sorted({str(label) for label in test.labels} - set(classes))
    if unknown:
        raise UsageError(
            f"classes that no training image has: {', '.join(unknown[:5])}",
            expected=f"some of {', '.join(classes[:5])}{' ...' if len(classes) > 5 else ''}",
            fix="give both folders the same class folders",
        )
    job = _job(request)
    job.work.mkdir(parents=True, exist_ok=True)
    chosen.save(job.train)
    test.save(job.test)
    return job


def _require_labels(index: Index, what: str) -> None:
    without = sum(label is None for label in index.labels)
    if without:
        raise UsageError(
            f"{without} of {len(index)} have no label: {what}",
            where=index.root,
            expected="a folder for each class, or an input with labels",
        )


def _chosen(train: Index, request: FinetuneRequest) -> Index:
    """The training images that the split or the percentage leaves.

    Raises:
        UsageError: a split file that names none of them.
    """
    if request.split is not None:
        names = {line.strip() for line in request.split.read_text().splitlines() if line.strip()}
        paths = train.table["path"].to_pylist()
        rows = [i for i, path in enumerate(paths) if path in names or Path(path).name in names]
        if len(rows) < len(names):
            raise UsageError(
                f"{len(names) - len(rows)} of its {len(names)} names are not among the images",
                where=request.split,
                expected="paths as in the index, or file names",
            )
    elif request.percent < 100:
        rows = _share(train.labels, request.percent, request.protocol.seed)
    else:
        return train
    return dataclasses.replace(train, table=train.table.take(rows))


def _share(labels: list[str | None], percent: float, seed: int) -> list[int]:
    """Rows of so many per cent of each class, one at least, in the order of the table."""
    random = np.random.Generator(np.random.Philox(seed))
    shuffled = random.permutation(len(labels))
    left = {label: max(1, round(count * percent / 100)) for label, count in Counter(labels).items()}
    rows = []
    for row in shuffled.tolist():
        if left[labels[row]]:
            left[labels[row]] -= 1
            rows.append(row)
    return sorted(rows)


def _stands(out: Path, identity: dict[str, object]) -> bool:
    """Whether `out` is this very evaluation.

    Raises:
        RefusedError: it is another one, or no evaluation.
    """
    if not out.exists():
        return False
    try:
        previous = json.loads(out.read_text())
    except (OSError, ValueError):
        previous = None
    plain = json.loads(json.dumps(identity))
    if isinstance(previous, dict) and all(
        previous.get(key) == value for key, value in plain.items()
    ):
        return True
    raise RefusedError(
        "holds something else", where=out, expected="this evaluation", fix="choose another --out"
    )


def _record(score: finetune.FinetuneScore) -> dict[str, object]:
    low, high = knn.wilson(score.top1, score.images)
    return {
        "test images": score.images,
        "rejected": score.rejected,
        "top1": score.top1 / score.images,
        "top1 95 %": [low, high],
        "top5": score.top5 / score.images,
    }


def _judged(
    request: FinetuneRequest,
    record: Mapping[str, Any],
    seconds: float,
    *,
    nothing_to_do: bool = False,
) -> ClassifierJudged:
    """The result, as the record in `request.out` has it."""
    low, high = record["top1 95 %"]
    return ClassifierJudged(
        seconds=seconds,
        kind=request.kind,
        bundle=request.bundle,
        out=request.out,
        images=record["test images"],
        rejected=record["rejected"],
        top1=record["top1"],
        interval1=(low, high),
        top5=record["top5"],
        epochs=request.protocol.epochs,
        nothing_to_do=nothing_to_do,
    )
