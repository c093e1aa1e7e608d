"""Numbers that call for a person: what it is, what it means, what to do. Each is told once.

The thresholds lie outside of what healthy runs showed: a ResNet-18 at batch 128 on 3,068
photographs and on drawn samples, whose vectors named 46 and 62 % of held-out images.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Self

from btpipe.events import Alarm, RanksMeasured, StepDone
from btpipe.pretrain import network
from btpipe.pretrain.run import TrainingRun

COLLAPSED_RMS = 0.9
"""Off-diagonal RMS at which all dimensions say one thing: r different ones give about 1 / sqrt(r),
independent ones 1 / sqrt(N). The healthy runs came to 0.73, far above their 0.09."""
COLLAPSED_SHARE = 0.05
"""Effective rank over the largest that rows and dimensions allow. The healthy runs' encoders kept
0.43 of it on 128 images and 0.28 on 1,024; a projector 0.24 on 128, after three epochs."""
COLLAPSED_RANK = 4.0
"""The same for few rows, of which 0.05 is about one direction, but a quarter of them at most. Of 16
rows, rates far too high left the projector 2 to 4 directions, a healthy run 12 to 14."""
MOST_DEAD = 0.5
DEAD_SHARE = 0.1
"""Dimensions that are constant over a batch; the healthy runs had none."""
ALIKE = 0.95
"""Mean diagonal while the rate still rises: equal views give 1, the drawn samples came to 0.5 in
their first three epochs."""
OVERFLOW_SHARE = 0.2
"""Updates left out in an interval: a scale that fits overflows once in 2,000 steps."""
OVERFLOW_STEPS = 10
"""Updates that such an interval holds at least."""
SEARCH_STEPS = 20
"""A run finds its loss scale in its first 16 steps: that many halvings lead from 65,536 to 1, and
below that it ends with an error."""


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What one look at the numbers says of one `cause`; no text: all is well."""

    cause: str
    about: str
    text: str = ""


class Alarms:
    """Hears every number of a run that the host knows anyway, and says when one calls for a person.

    `early_steps`: how long views that are nearly equal are not the training's doing.
    """

    def __init__(
        self, *, batch_size: int, features: int, dimension: int, early_steps: int = 0
    ) -> None:
        self._batch_size, self._dimension = batch_size, dimension
        self._features, self._early_steps = features, early_steps
        self._active: set[str] = set()
        self._mark: tuple[int, int] | None = None

    @classmethod
    def of(cls, run: TrainingRun) -> Self:
        """The alarms of a run; its warm-up is early, or its first epoch where it has none."""
        recipe = run.recipe
        return cls(
            batch_size=recipe.data.batch_size,
            features=network.features(recipe.network),
            dimension=recipe.network.projector[-1],
            early_steps=max(1, recipe.optim.warmup_epochs) * run.steps_per_epoch,
        )

    def update(self, logged: StepDone | None, ranks: RanksMeasured | None) -> list[Alarm]:
        """The alarms that these numbers raise and that are not known yet."""
        findings: list[tuple[int, _Finding]] = []
        if logged:
            findings += [(logged.step, finding) for finding in self._of_step(logged)]
        if ranks:
            findings.append((ranks.step, self._of_ranks(ranks)))
        raised = []
        for step, finding in findings:
            if not finding.text:
                self._active.discard(finding.cause)
            elif finding.cause not in self._active:
                self._active.add(finding.cause)
                raised.append(Alarm(step, finding.about, finding.text))
        return raised

    def _of_step(self, logged: StepDone) -> Iterator[_Finding]:
        yield self._of_correlation(logged)
        yield self._of_dead(logged)
        if logged.step <= self._early_steps:
            yield self._of_views(logged)
        yield from self._of_overflows(logged)

    def _of_ranks(self, ranks: RanksMeasured) -> _Finding:
        for name, rank, width in (
            ("encoder", ranks.encoder, self._features),
            ("projector", ranks.projector, self._dimension),
        ):
            most = min(ranks.rows, width)
            if rank < max(COLLAPSED_SHARE * most, min(COLLAPSED_RANK, most / 4)):
                text = (
                    f"the {name}'s vectors of {ranks.rows} images lie in {rank:.1f} directions,"
                    f" where {most} have room: all images look alike to it. Lower optim.lr or"
                    " lengthen optim.warmup_epochs, and start anew"
                )
                return _Finding("ranks", "collapse", text)
        return _Finding("ranks", "collapse")

    def _of_correlation(self, logged: StepDone) -> _Finding:
        independent = 1 / math.sqrt(self._batch_size)
        rms = logged.off_diagonal_rms
        # Of 6 images or fewer any two dimensions correlate by chance: never said of them.
        if rms < max(COLLAPSED_RMS, 2.5 * independent):
            return _Finding("correlation", "collapse")
        text = (
            f"off-diagonal RMS {rms:.2f}, where independent dimensions give {independent:.2f}:"
            " all dimensions of the embedding say the same. Lower optim.lr, raise loss.lambd or"
            " take a larger batch"
        )
        return _Finding("correlation", "collapse", text)

    def _of_dead(self, logged: StepDone) -> _Finding:
        dead, dimension = logged.dead_dimensions, self._dimension
        if dead <= DEAD_SHARE * dimension:
            return _Finding("dead", "dead dimensions")
        what = f"{dead} of {dimension} dimensions of the embedding are constant over the batch"
        if dead > MOST_DEAD * dimension:
            text = f"{what}: it has collapsed. Lower optim.lr and start anew"
            return _Finding("dead", "collapse", text)
        text = f"{what} and learn nothing: lower optim.lr or narrow network.projector"
        return _Finding("dead", "dead dimensions", text)

    def _of_views(self, logged: StepDone) -> _Finding:
        # Asked so that a batch which is not finite raises nothing; it has an error of its own.
        alike = logged.mean_diagonal >= ALIKE and logged.off_diagonal_rms < COLLAPSED_RMS
        if not alike:
            return _Finding("views", "views too alike")
        text = (
            f"the two views of an image correlate by {logged.mean_diagonal:.2f} before anything is"
            " learned: the augmentations leave nothing to learn. Make them stronger in [[views]]:"
            " smaller crops (scale), jitter, gray, blur"
        )
        return _Finding("views", "views too alike", text)

    def _of_overflows(self, logged: StepDone) -> Iterator[_Finding]:
        """Says something at the end of an interval of `OVERFLOW_STEPS` or more."""
        if self._mark is None or logged.step <= SEARCH_STEPS:
            self._mark = logged.step, logged.overflows
            return
        steps, left_out = logged.step - self._mark[0], logged.overflows - self._mark[1]
        if steps < OVERFLOW_STEPS:
            return
        self._mark = logged.step, logged.overflows
        if left_out <= OVERFLOW_SHARE * steps:
            yield _Finding("overflow", "overflow")
            return
        text = (
            f"{left_out} of the last {steps} updates were left out, because a number overflowed in"
            " fp16 and the loss scale was halved: stop, and go on with --set run.precision=bf16 (or"
            " fp32) --accept-change run.precision, or start anew with a lower optim.lr; the run"
            " ends with an error when the scale falls below 1"
        )
        yield _Finding("overflow", "overflow", text)
