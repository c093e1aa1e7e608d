"""The gate: an export is published only if it gives the network's own vectors on real images."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import neighbours
from btpipe.errors import NumericsError
from btpipe.events import Event, TextTable
from btpipe.export.contract import Precision, Preprocessing
from btpipe.export.onnx_model import Normalized
from btpipe.export.samples import Samples

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

BATCHES = (1, 2, 17)
"""One, the exporter's example, and an odd number: a shape baked in fails at one of them."""
NEIGHBOURS = 10
TIE = 1e-6
"""Similarities closer than this are equal in float32; their order says nothing."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What an export must reach: least mean cosine, least mean share of common neighbours."""

    cosine: float
    agreement: float


THRESHOLDS: dict[Precision, Thresholds] = {
    "fp32": Thresholds(cosine=0.9999, agreement=0.99),
    "fp16": Thresholds(cosine=0.999, agreement=0.97),
    "int8": Thresholds(cosine=0.99, agreement=0.85),
}


@dataclasses.dataclass(frozen=True)
class Gate:
    """How an exported model compares with the float32 network, over `images` real images.

    Cosines and the largest absolute difference are over every batch size of `BATCHES`;
    `agreement` is the mean share of an image's nearest neighbours that both find, and
    `label_agreement` the share of labelled images whose neighbours vote for the same label in
    both: None where fewer than two labels are known, and never below a threshold.
    """

    model: str
    images: int
    provider: str
    mean_cosine: float
    min_cosine: float
    max_difference: float
    agreement: float
    neighbours: int
    label_agreement: float | None
    thresholds: Thresholds

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return (
            self.mean_cosine >= self.thresholds.cosine
            and self.agreement >= self.thresholds.agreement
        )

    def record(self) -> dict[str, object]:
        """The gate as a JSON value, for a manifest."""
        return {**dataclasses.asdict(self), "batch_sizes": list(BATCHES)}

    def cells(self) -> tuple[str, ...]:
        """The gate as a row of a table."""
        limits, labels = self.thresholds, self.label_agreement
        return (
            self.model,
            self.provider,
            f"{self.mean_cosine:.7f} ({limits.cosine})",
            f"{self.min_cosine:.7f}",
            f"{self.max_difference:.2e}",
            f"{self.agreement:.4f} ({limits.agreement})",
            "-" if labels is None else f"{labels:.4f}",
            "yes" if self.passed else "NO",
        )


@dataclasses.dataclass(frozen=True)
class Gates(Event):
    """How the models of a bundle compare with the network, before it is published or refused."""

    gates: tuple[Gate, ...]

    def tables(self) -> list[TextTable]:
        """A row for each model."""
        columns = (
            "model",
            "runs on",
            "mean cosine (least allowed)",
            "least cosine",
            "largest difference",
            f"top-{self.gates[0].neighbours} neighbours the same (least allowed)",
            "kNN labels the same",
            "passed",
        )
        title = f"torch in float32 against onnxruntime, {self.gates[0].images} images"
        return [TextTable(title, columns, tuple(gate.cells() for gate in self.gates))]


def table(gates: Sequence[Gate]) -> str:
    """Gates in Markdown."""
    (whole,) = Gates(tuple(gates)).tables()
    lines = (whole.columns, ("---",) * len(whole.columns), *whole.rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reference(
    encoder: nn.Module, preprocessing: Preprocessing, pixels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """What the eager float32 encoder makes of uint8 pixels: (n, S, S, 3) -> (n, D)."""
    network, step = Normalized(encoder, preprocessing).eval(), BATCHES[-1]
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(pixels[start : start + step])).numpy()
            for start in range(0, len(pixels), step)
        ]
    return np.concatenate(parts).astype(np.float32, copy=False)


def compare(
    references: NDArray[np.float32],
    embed: Embed,
    samples: Samples,
    thresholds: Thresholds,
    *,
    model: str,
    provider: str,
) -> Gate:
    """`embed` on the samples' pixels against the `references` of them, (n, D), n at least 2."""
    pixels = samples.pixels
    assert len(pixels) >= 2, "neighbours need two images"
    cosines, differences = [], []
    for batch in BATCHES:
        # The last batch size embeds everything; the small ones a few batches, which prove as much.
        count = len(pixels) if batch == BATCHES[-1] else min(len(pixels), 8 * batch)
        starts = range(0, count, batch)
        vectors = np.concatenate([embed(pixels[i : min(i + batch, count)]) for i in starts])
        cosines.append(_cosine(references[:count], vectors))
        differences.append(np.abs(references[:count] - vectors).max())
    k = min(NEIGHBOURS, len(pixels) - 1)
    cosine = np.concatenate(cosines)
    return Gate(
        model=model,
        images=len(pixels),
        provider=provider,
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        max_difference=float(np.max(differences)),
        agreement=_agreement(references, vectors, k),
        neighbours=k,
        label_agreement=_label_agreement(references, vectors, samples.labels, k),
        thresholds=thresholds,
    )


def require(gates: Sequence[Gate], where: object) -> None:
    """Passes gates that were all passed.

    Raises:
        NumericsError: a model's vectors are not the network's; the message has the table.
    """
    failed = [gate.model for gate in gates if not gate.passed]
    if failed:
        raise NumericsError(
            f"{' and '.join(failed)} does not give the network's vectors\n{table(gates)}",
            where=where,
            fix="nothing was published; leave that precision out, or train in fp32; where"
            " encoder.onnx itself fails, report the table, with the versions of torch, onnx and"
            " onnxruntime",
        )


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row, (n, D), (n, D) -> (n,); NaN for a vector of zeros, which no gate passes."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosine: NDArray[np.float64] = (x * y).sum(axis=1) / norms
    return cosine


def _agreement(references: NDArray[np.float32], vectors: NDArray[np.float32], k: int) -> float:
    """Mean share of the k nearest by `vectors` that are so by `references`, ties allowed."""
    if not (np.isfinite(references).all() and np.isfinite(vectors).all()):
        return 0.0
    unit = neighbours.normalize(references)
    true, _ = neighbours.leave_one_out(references, k)
    got, _ = neighbours.leave_one_out(vectors, k)
    shares = []
    for row in range(len(references)):
        similarity = unit @ unit[row]
        weakest = similarity[true[row]].min()
        shares.append(float((similarity[got[row]] >= weakest - TIE).mean()))
    return float(np.mean(shares))


def _label_agreement(
    references: NDArray[np.float32], vectors: NDArray[np.float32], labels: NDArray[np.int64], k: int
) -> float | None:
    """Share of labelled images whose k labelled neighbours vote for one label in both."""
    has_label = labels >= 0
    classes = len(np.unique(labels[has_label]))
    if classes < 2:
        return None
    if not np.isfinite(vectors).all():
        return 0.0
    votes = []
    for matrix in (references[has_label], vectors[has_label]):
        scores = neighbours.vote(
            *neighbours.leave_one_out(matrix, k), labels[has_label], int(labels.max()) + 1
        )
        votes.append(scores.argmax(axis=1))
    return float((votes[0] == votes[1]).mean())
