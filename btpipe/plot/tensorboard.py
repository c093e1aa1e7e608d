"""Runs as TensorBoard's event files, a folder for each: files alone, nothing is served."""

from collections.abc import Sequence
from pathlib import Path

from btpipe import artifact
from btpipe.errors import UsageError
from btpipe.plot import history
from btpipe.plot.history import History, Mark, Series

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise UsageError(
        "--tensorboard needs tensorboard", fix="pip install 'btpipe[tensorboard]'"
    ) from error

SUFFIX = ".btpipe"
"""How the files' names end: what ends otherwise is of others, and stays."""
TAGS = {
    "loss": "loss/total",
    "on_diagonal": "loss/on_diagonal",
    "mean_diagonal": "correlation/mean_diagonal",
    "off_diagonal_rms": "correlation/off_diagonal_rms",
    "dead_dimensions": "correlation/dead_dimensions",
    "encoder": "rank/encoder",
    "projector": "rank/projector",
    "lr": "rate/weights",
    "bias_lr": "rate/biases",
    "overflows": "rate/overflows",
    "accuracy": "knn/accuracy",
    "images_per_second": "speed/images_per_second",
    "data_wait": "speed/data_wait",
}
"""A number's name in the log to its tag; loss/off_diagonal, with lambda, and loss/floor join."""


class Board:
    """Writes runs below a folder; written again, the same points stand there once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, _RunWriter] = {}

    def write(self, runs: Sequence[History]) -> None:
        """Writes what the runs told so far; what was written before by this object stays.

        Raises:
            MachineError: no space, or no permission.
        """
        for name, run in zip(history.names(runs), runs, strict=True):
            with artifact.disk_errors(self._folder / name):
                if name not in self._runs:
                    self._runs[name] = _RunWriter(self._folder / name)
                self._runs[name].write(run)

    def close(self) -> None:
        """Ends the files."""
        for run in self._runs.values():
            run.close()


class _RunWriter:
    """The event file of one run: begun anew, then gone on with while the run does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: dict[str, Series] = {}
        self._marks: tuple[Mark, ...] = ()
        self._writer = self._begin()

    def write(self, run: History) -> None:
        lines, marks = _lines(run), (*run.starts, *run.alarms)
        if not self._is_continued(lines, marks):  # a restart did steps again
            self.close()
            self._writer = self._begin()
            self._lines, self._marks = {}, ()
        for tag, line in lines.items():
            for step, value in line[len(self._lines.get(tag, ())) :]:
                self._writer.add_scalar(tag, value, step, walltime=run.times.get(step))
        for mark in marks:
            if mark not in self._marks:
                tag = "restarts" if mark in run.starts else f"alarms/{mark.about}"
                self._writer.add_text(tag, mark.text, mark.step, walltime=run.times.get(mark.step))
        self._writer.flush()
        self._lines, self._marks = lines, marks

    def close(self) -> None:
        self._writer.close()

    def _begin(self) -> SummaryWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        return SummaryWriter(str(self._folder), filename_suffix=SUFFIX)

    def _is_continued(self, lines: dict[str, Series], marks: Sequence[Mark]) -> bool:
        same = all(lines[tag][: len(old)] == old for tag, old in self._lines.items())
        return same and set(self._marks) <= set(marks)


def _lines(run: History) -> dict[str, Series]:
    lines = {tag: run.series[name] for name, tag in TAGS.items()}
    lines["loss/off_diagonal"] = tuple(
        (step, run.lambd * value) for step, value in run.series["off_diagonal"]
    )
    lines["loss/floor"] = tuple((step, run.floor) for step, _ in run.series["loss"])
    return lines
