"""Where the stages of `benchmarks.gpu` read and write; imports nothing heavy."""

import dataclasses
from pathlib import Path

MARK = "= "
"""What a line of a stage's log starts with that is a result, as JSON."""
PROJECT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Workspace:
    """`work` is written to and kept between calls, `data` holds `photos/` and `nasty/`.

    `small`: sizes for a dry run, on a CPU or on a GPU that computes nothing.
    """

    work: Path
    data: Path
    small: bool

    @property
    def photos(self) -> Path:
        return self.data / "photos"

    @property
    def nasty(self) -> Path:
        """Good files, and bad ones whose names begin with bad-."""
        return self.data / "nasty"

    @property
    def jpegs(self) -> Path:
        """Drawn JPEGs of 400 x 533 pixels."""
        return self.work / "drawn" / "jpeg"

    @property
    def pngs(self) -> Path:
        """Drawn PNGs of 32 pixels."""
        return self.work / "drawn" / "png"

    @property
    def sizes(self) -> tuple[str, ...]:
        """Overrides of a dry run."""
        small = ("data.batch_size=8", "network.backbone=resnet18", "network.projector=[64,64]")
        return (*small, "data.image_size=32", "run.micro_batch=0") if self.small else ()


class Failed(Exception):
    """Something is not as it must be; the stage is red, and says so at its end."""
