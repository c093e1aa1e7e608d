"""The gate: an export is published only if it gives the network's own vectors on real images."""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from btpipe import neighbours
from btpipe.errors import NumericsError
from btpipe.events import Tabled
from btpipe.export.contract import Preprocessing
from btpipe.export.onnx import Normalized
from btpipe.export.session import Session

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


FP32 = Thresholds(cosine=0.9999, agreement=0.99)


@dataclasses.dataclass(frozen=True)
class Gate:
    """How the exported model compares with the network, over `images` real images.

    Cosines and the largest absolute difference are over every batch size of `BATCHES`;
    `agreement` is the mean share of an image's nearest neighbours that both find.
    """

    images: int
    provider: str
    mean_cosine: float
    min_cosine: float
    max_difference: float
    agreement: float
    neighbours: int
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

    def tabled(self) -> Tabled:
        """The gate as a table for people."""
        rows = (
            ("mean cosine", f"{self.mean_cosine:.7f}", f"at least {self.thresholds.cosine}"),
            ("least cosine", f"{self.min_cosine:.7f}", ""),
            ("largest absolute difference", f"{self.max_difference:.2e}", ""),
            (
                f"top-{self.neighbours} neighbour agreement",
                f"{self.agreement:.4f}",
                f"at least {self.thresholds.agreement}",
            ),
        )
        columns = (f"{self.images} images, {self.provider}", "found", "wanted")
        return Tabled("torch against onnxruntime", columns, rows)

    def table(self) -> str:
        """The gate in Markdown."""
        tabled = self.tabled()
        lines = (tabled.columns, ("---",) * len(tabled.columns), *tabled.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compare(
    encoder: nn.Module,
    session: Session,
    preprocessing: Preprocessing,
    pixels: NDArray[np.uint8],
    thresholds: Thresholds = FP32,
) -> Gate:
    """The eager float32 encoder against the session on uint8 `(n, S, S, 3)`, n at least 2."""
    assert len(pixels) >= 2, "neighbours need two images"
    reference = _reference(Normalized(encoder, preprocessing).eval(), pixels)
    cosines, differences = [], []
    for batch in BATCHES:
        # The last batch size embeds everything; the small ones a few batches, which prove as much.
        count = len(pixels) if batch == BATCHES[-1] else min(len(pixels), 8 * batch)
        found = _embed(session, pixels[:count], batch)
        cosines.append(_cosine(reference[:count], found))
        differences.append(np.abs(reference[:count] - found).max())
    k = min(NEIGHBOURS, len(pixels) - 1)
    every = np.concatenate(cosines)
    return Gate(
        images=len(pixels),
        provider=session.device,
        mean_cosine=float(every.mean()),
        min_cosine=float(every.min()),
        max_difference=float(np.max(differences)),
        agreement=_agreement(reference, found, k),
        neighbours=k,
        thresholds=thresholds,
    )


def require(gate: Gate, where: object) -> None:
    """Passes a gate that was passed.

    Raises:
        NumericsError: the export's vectors are not the network's; the message has the table.
    """
    if not gate.passed:
        raise NumericsError(
            f"the exported model does not give the network's vectors\n{gate.table()}",
            where=where,
            fix="nothing was published; train in fp32 or report the table, with the versions of"
            " torch, onnx and onnxruntime",
        )


def _reference(network: nn.Module, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, S, S, 3) -> (n, D), by torch."""
    step = BATCHES[-1]
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(pixels[start : start + step])).numpy()
            for start in range(0, len(pixels), step)
        ]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _embed(session: Session, pixels: NDArray[np.uint8], batch: int) -> NDArray[np.float32]:
    return np.concatenate(
        [session.run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)]
    )


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row, (n, D), (n, D) -> (n,); NaN for a vector of zeros, which no gate passes."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine: NDArray[np.float64] = (x * y).sum(axis=1) / norms
    return cosine


def _agreement(reference: NDArray[np.float32], found: NDArray[np.float32], k: int) -> float:
    """Mean share of the k nearest by `found` that are so by `reference`, ties allowed."""
    if not (np.isfinite(reference).all() and np.isfinite(found).all()):
        return 0.0
    unit = neighbours.normalize(reference)
    wanted, _ = neighbours.nearest(reference, reference, k + 1)
    got, _ = neighbours.nearest(found, found, k + 1)
    shares = []
    for row in range(len(reference)):
        similarity = unit @ unit[row]
        weakest = similarity[_others(wanted[row], row, k)].min()
        shares.append(float((similarity[_others(got[row], row, k)] >= weakest - TIE).mean()))
    return float(np.mean(shares))


def _others(indices: NDArray[np.int64], row: int, k: int) -> NDArray[np.int64]:
    """The first k that are not the image itself, which twins of it may have displaced."""
    others: NDArray[np.int64] = indices[indices != row][:k]
    return others
