"""The whole road on sample images that this machine draws itself: minutes on two cores, offline."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from btpipe import progress, recipe
from btpipe.embed import job
from btpipe.embed.precisions import EncoderConfig
from btpipe.errors import NumericsError
from btpipe.evaluate import baselines
from btpipe.events import Finished, Note, Report, TextTable
from btpipe.explore.map import make
from btpipe.export import bundle
from btpipe.plot import plot
from btpipe.pretrain import launch
from btpipe.tools import drawn_images

GAIN = 0.10
"""What the trained encoder must add to the best other vectors, in neighbours' top-1 accuracy."""


@dataclasses.dataclass(frozen=True)
class DemoDone(Finished):
    """The whole road was walked; `stages` are the seconds of each."""

    job = "demo"

    out: Path
    stages: Mapping[str, float]

    @property
    def text(self) -> str:
        return f"all of it is in {self.out}"

    def tables(self) -> list[TextTable]:
        """Where the time went."""
        rows = tuple((stage, progress.duration(taken)) for stage, taken in self.stages.items())
        return [TextTable("Where the time went", ("stage", "time"), rows)]


def run(out: Path, *, seed: int, mode: progress.Mode) -> None:
    """Draws images, pretrains, exports, embeds, compares, and draws what there is to see.

    Run again, it goes on where it was.

    Raises:
        NumericsError: the trained encoder is not `GAIN` above all others.
    """
    images, trained, exported = out / "images", out / "runs" / "demo", out / "exports" / "demo"
    vectors = out / "vectors.parquet"
    seconds: dict[str, float] = {}
    with _timed(seconds, "draw 2,500 sample images"):
        drawn_images.draw(images, seed=seed)
    settings = (f"data.train={images / 'train'}", f"seed={seed}")
    with _timed(seconds, "pretrain"):
        described = recipe.load(Path("demo.toml"), settings)
        launch.pretrain(trained, described, devices="auto", mode=mode)
    with progress.show(mode) as on_event:
        with _timed(seconds, "export, checked against the network"):
            bundle.export_run(trained, exported, on_event)
        with _timed(seconds, "embed 2,000 images"):
            job.embed(images / "train", vectors, EncoderConfig(exported), on_event)
        with _timed(seconds, "compare with the baselines"):
            judged = baselines.compare(
                trained, images / "test", out / "compare", on_event, pretrained=exported
            )
        with _timed(seconds, "draw the map and the plots"):
            pages = _draw_pages(out, vectors, trained, images / "train", on_event)
        on_event(judged)
        on_event(DemoDone(sum(seconds.values()), out, seconds))
        on_event(Note(_next_steps(exported, vectors, pages)))
    if judged.gain < GAIN:
        raise NumericsError(
            f"the pretrained encoder is {100 * judged.gain:.1f} points above the others",
            where=out,
            expected=f"at least {100 * GAIN:.0f}",
        )


def _draw_pages(
    out: Path, vectors: Path, trained: Path, images: Path, on_event: Report
) -> tuple[Path, Path]:
    """The map of the vectors, and the plots of the run with its first and last correlations."""
    map_page, run_page = out / "map.html", out / "run.html"
    make(vectors, map_page, on_event, images=images)
    plot.make([trained], run_page, on_event, correlation="first,last")
    return map_page, run_page


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _next_steps(exported: Path, vectors: Path, pages: tuple[Path, Path]) -> str:
    map_page, run_page = pages
    return f"""Made: {exported} (the encoder), {vectors} (vectors with path and label),
  {map_page} (the vectors as a map), {run_page} (where the run went).
Look at them in a browser; each page is one file:
  xdg-open {map_page}
  xdg-open {run_page}
Try next, on your own images:
  btpipe pretrain recipes/folder.toml --set data.train=DIR
  btpipe export --onnx
  btpipe embed DIR --out vectors.parquet
Read the vectors:
  python -c "import pyarrow.parquet as p; print(p.read_table('{vectors}'))\""""
