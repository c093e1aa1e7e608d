"""What the loss does not say: effective ranks, alarms, nearest neighbours. Beside the training.

Nothing here reaches the weights, and only a due measurement waits for the device.
"""

from collections.abc import Callable

import torch

from btpipe import events, neighbours, runtime
from btpipe.pretrain.alarms import Alarms
from btpipe.pretrain.knn import Judge
from btpipe.pretrain.network import ViewEmbeddings
from btpipe.pretrain.run import TrainingRun
from btpipe.pretrain.step import Outcome

RANK_ROWS = 1024
"""Vectors that an effective rank is measured on: half a second on two cores for 8,192 numbers."""


class HealthMonitor:
    """Measures a run every `health.steps` steps, judges it every `health.knn_epochs` epochs.

    Every rank calls it at every step, because every rank's vectors are measured; the first one
    reports. `stopping` says whether this rank was asked to stop: a judgement is then broken off.
    """

    def __init__(self, run: TrainingRun, stopping: Callable[[], bool]) -> None:
        self._run = run
        self._alarms = Alarms.of(run)
        labelled = run.recipe.health.knn and run.runtime.is_first
        self._judge = Judge(run, stopping) if labelled else None

    def stepped(self, outcome: Outcome, logged: events.StepDone | None) -> None:
        """Does what is due after a step; `logged` is what was said of the step, if it was."""
        run, done = self._run, self._run.state.step
        last = done == run.steps
        ranks = None
        if done % run.recipe.health.steps == 0 or last:
            ranks = effective_ranks(outcome.embedded, done)
        for event in (ranks, *self._alarms.update(logged, ranks)):
            if event:
                run.on_event(event)
        knn_steps = run.recipe.health.knn_epochs * run.steps_per_epoch
        if run.recipe.health.knn and (done % knn_steps == 0 or last):
            if self._judge:
                self._judge.judge()
            runtime.barrier()


def effective_ranks(embedded: ViewEmbeddings, step: int) -> events.RanksMeasured | None:
    """RankMe of the first view's features and embeddings, over the rows of all ranks.

    A collective: every rank takes part with an even choice of its rows, `RANK_ROWS` at most over
    all. None where a vector is not finite, and on every rank but the first.
    """
    first = embedded.z[0]
    count = len(first)
    chosen = min(count, max(1, RANK_ROWS // runtime.world_size()))
    at = torch.arange(chosen, device=first.device) * count // chosen
    features, z1 = (runtime.gather_rows(x.detach()[at]) for x in (embedded.features, first))
    if runtime.rank():
        return None
    encoder, projector = _effective_rank(features), _effective_rank(z1)
    if encoder is None or projector is None:
        return None
    return events.RanksMeasured(step, encoder, projector, len(features))


def _effective_rank(vectors: torch.Tensor) -> float | None:
    """(n, D) -> RankMe; the product is made where the vectors are, (m, m) numbers leave it."""
    wide = vectors.double()
    gram = wide @ wide.T if len(wide) < wide.shape[1] else wide.T @ wide
    if not bool(torch.isfinite(gram).all()):
        return None
    return neighbours.effective_rank_of_gram(gram.cpu().numpy())
