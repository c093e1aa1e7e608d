"""The gate: an export is published only if it gives the network's own vectors on real images."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import neighbours, runtime
from btpipe.errors import NumericsError
from btpipe.events import Event, TextTable
from btpipe.export.contract import MODELS, Precision, Preprocessing
from btpipe.export.onnx_model import Normalized
from btpipe.export.samples import Samples

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

BATCHES = (1, 2, 17)
"""One, the exporter's example, and an odd number: a shape baked in fails at one of them."""
NEIGHBOURS = 10
TIE = 1e-6
"""Similarities closer than this are equal in float32; their order says nothing."""
ALIKE = 1e-3
"""A vector that is this near to the mean, in lengths of its own, has no direction of its own."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What an export must reach: least mean cosines, least mean share of common neighbours."""

    cosine: float
    agreement: float
    centred_cosine: float


THRESHOLDS: dict[Precision, Thresholds] = {
    "fp32": Thresholds(cosine=0.9999, agreement=0.99, centred_cosine=0.9999),
    "fp16": Thresholds(cosine=0.999, agreement=0.97, centred_cosine=0.999),
    "int8": Thresholds(cosine=0.99, agreement=0.9, centred_cosine=0.994),
}
"""int8: of trained ResNet-18s and a ResNet-50, models with clipped sums had centred cosines of
0.950 to 0.992 (cosines 0.988 to 0.998, neighbours 0.84 to 0.95), those with none 0.9955 and more
(neighbours 0.954 and more): docs/measured.md."""


@dataclasses.dataclass(frozen=True)
class Gate:
    """How an exported model compares with the float32 network, over `images` real images.

    Cosines and the largest absolute difference are over every batch size of `BATCHES`; centred
    ones are of vectors minus their mean, which all images share. `agreement` is the mean share of
    an image's nearest neighbours that both find, and `label_agreement` the share of labelled images
    whose neighbours vote for the same label in both: None where fewer than two labels are known,
    and never below a threshold. `exact` is the same of the model without graph optimisation, in
    which an int8 model clips no sums.
    """

    model: str
    images: int
    provider: str
    mean_cosine: float
    min_cosine: float
    centred_cosine: float
    min_centred_cosine: float
    max_difference: float
    agreement: float
    neighbours: int
    label_agreement: float | None
    thresholds: Thresholds
    exact: "Gate | None" = None

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return (
            self.mean_cosine >= self.thresholds.cosine
            and self.centred_cosine >= self.thresholds.centred_cosine
            and self.agreement >= self.thresholds.agreement
            and (self.exact is None or self.exact.passed)
        )

    def record(self) -> dict[str, object]:
        """The gate as a JSON value, for a manifest."""
        return {**dataclasses.asdict(self), "batch_sizes": list(BATCHES)}

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The gate as a row of a table, and another one with exact sums where they differ."""
        limits, labels = self.thresholds, self.label_agreement
        row = (
            self.model,
            self.provider,
            f"{self.mean_cosine:.7f} ({limits.cosine})",
            f"{self.centred_cosine:.7f} ({limits.centred_cosine})",
            f"{self.min_centred_cosine:.7f}",
            f"{self.max_difference:.2e}",
            f"{self.agreement:.4f} ({limits.agreement})",
            "-" if labels is None else f"{labels:.4f}",
            "yes" if self.passed else "NO",
        )
        return (row, *(self.exact.rows() if self.exact else ()))


@dataclasses.dataclass(frozen=True)
class Gates(Event):
    """How the models of a bundle compare with the network, before it is published or refused.

    `cpu` is the one that computed.
    """

    gates: tuple[Gate, ...]
    cpu: runtime.Cpu

    def tables(self) -> list[TextTable]:
        """A row for each model, two for int8."""
        columns = (
            "model",
            "runs on",
            "mean cosine (least allowed)",
            "centred cosine (least allowed)",
            "least centred",
            "largest difference",
            f"top-{self.gates[0].neighbours} neighbours the same (least allowed)",
            "kNN labels the same",
            "passed",
        )
        title = f"torch in float32 against onnxruntime, {self.gates[0].images} images"
        rows = tuple(row for gate in self.gates for row in gate.rows())
        return [TextTable(title, columns, rows, note=f"On {self.cpu.text}.")]

    def markdown(self) -> str:
        """The table in Markdown, and the CPU below it."""
        (whole,) = self.tables()
        lines = (whole.columns, ("---",) * len(whole.columns), *whole.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{whole.note}"


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
    every: list[NDArray[np.float32]] = []
    for batch in BATCHES:
        # The last batch size embeds everything; the small ones a few batches, which prove as much.
        count = len(pixels) if batch == BATCHES[-1] else min(len(pixels), 8 * batch)
        starts = range(0, count, batch)
        every.append(np.concatenate([embed(pixels[i : min(i + batch, count)]) for i in starts]))
    vectors = every[-1]
    pairs = [(references[: len(each)], each) for each in every]
    means = references.mean(axis=0), vectors.mean(axis=0)
    cosine = np.concatenate([_cosine(a, b) for a, b in pairs])
    centred = np.concatenate([_centred_cosine(a, b, *means) for a, b in pairs])
    k = min(NEIGHBOURS, len(pixels) - 1)
    return Gate(
        model=model,
        images=len(pixels),
        provider=provider,
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
        centred_cosine=float(centred.mean()),
        min_centred_cosine=float(centred.min()),
        max_difference=float(max(np.abs(a - b).max() for a, b in pairs)),
        agreement=_agreement(references, vectors, k),
        neighbours=k,
        label_agreement=_label_agreement(references, vectors, samples.labels, k),
        thresholds=thresholds,
    )


def require(gates: Gates, where: object) -> None:
    """Passes gates that were all passed.

    Raises:
        NumericsError: a model's vectors are not the network's; the message has the table.
    """
    failed = [gate for gate in gates.gates if not gate.passed]
    if failed:
        names = " and ".join(gate.model for gate in failed)
        raise NumericsError(
            f"{names} {'does' if len(failed) == 1 else 'do'} not give the network's vectors\n"
            f"{gates.markdown()}",
            where=where,
            fix=f"nothing was published; {_advice(failed)}",
        )


def _advice(failed: Sequence[Gate]) -> str:
    """What to do about models that failed, the most fundamental one first."""
    models = {gate.model: gate for gate in failed}
    if not models.keys() <= {MODELS["fp16"], MODELS["int8"]}:
        return "report the table, with the versions of torch, onnx and onnxruntime"
    advice = []
    if MODELS["fp16"] in models:
        advice.append("leave fp16 out: this encoder's values do not fit into half precision")
    if int8 := models.get(MODELS["int8"]):
        clips = int8.exact is not None and int8.exact.passed
        advice.append(
            "export int8 on another kind of CPU: with exact sums it is right, this one clips them"
            if clips
            else "leave int8 out, or calibrate it on more images like those that it is to embed"
            " (--images)"
        )
    return "; ".join(advice)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row, (n, D), (n, D) -> (n,); NaN for a vector of zeros, which no gate passes."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        cosine: NDArray[np.float64] = (x * y).sum(axis=1) / norms
    return cosine


def _centred_cosine(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    a_mean: NDArray[np.float32],
    b_mean: NDArray[np.float32],
) -> NDArray[np.float64]:
    """`_cosine` of vectors minus their means; as they are where nothing but rounding is left."""
    rest, alike = a - a_mean, ALIKE * np.linalg.norm(a, axis=1)
    centred = _cosine(rest, b - b_mean)
    return np.where(np.linalg.norm(rest, axis=1) < alike, _cosine(a, b), centred)


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
