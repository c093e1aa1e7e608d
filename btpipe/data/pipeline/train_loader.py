"""Batches for training: the views of every image, the same in every run of a seed.

`evaluation_batches` is found here as well; torch is imported by the first training batch only.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from btpipe import runtime
from btpipe.data import header
from btpipe.data.index import Index
from btpipe.data.pipeline import augment_params, dali_graphs, dali_runner, decode, prefetch, sampler
from btpipe.data.pipeline.decode import Encoded, Pixels
from btpipe.data.pipeline.eval_loader import EvaluationBatch, evaluation_batches
from btpipe.data.rejects import BadInputError
from btpipe.data.retry import reading_threads
from btpipe.errors import BudgetError, UsageError
from btpipe.events import Rejected, Report
from btpipe.recipe import Data, Recipe, View, count_steps

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "EvaluationBatch", "LoaderSettings", "TrainingLoader", "evaluation_batches"]

ENDLESS = sys.maxsize
"""Steps of a loader that never ends."""
_DEFAULTS = Data()


@dataclasses.dataclass(frozen=True)
class LoaderSettings:
    """What decides the batches of a `TrainingLoader`; the words are the recipe's.

    The loader ends before step `steps`. By default it has no end, gives a rank its whole share of a
    batch at a time, and replaces every unreadable image.
    """

    seed: int
    views: tuple[View, ...]
    view_sizes: tuple[int, ...]
    batch_size: int
    steps: int = ENDLESS
    micro_batch: int = 0
    shuffle: Literal["full", "blocks"] = _DEFAULTS.shuffle
    block_images: int = _DEFAULTS.block_images
    mixed_blocks: int = _DEFAULTS.mixed_blocks
    threads: int = _DEFAULTS.threads
    max_bad: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, images: int) -> "LoaderSettings":
        """For a whole run of the recipe on so many images."""
        return dataclasses.replace(
            cls.sample(recipe, recipe.data.batch_size, recipe.steps(images)),
            micro_batch=recipe.run.micro_batch,
            max_bad=recipe.data.max_bad,
        )

    @classmethod
    def sample(cls, recipe: Recipe, batch_size: int, steps: int = ENDLESS) -> "LoaderSettings":
        """The recipe's views and order of images, in batches of another size."""
        return cls(
            seed=recipe.seed,
            views=recipe.views,
            view_sizes=recipe.view_sizes,
            batch_size=batch_size,
            steps=steps,
            shuffle=recipe.data.shuffle,
            block_images=recipe.data.block_images,
            mixed_blocks=recipe.data.mixed_blocks,
            threads=recipe.data.threads,
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: index rows and their views, uint8 (n, H, W, 3) each."""

    step: int
    images: NDArray[np.int64]
    views: tuple["torch.Tensor", ...]


class TrainingLoader:
    """The batches of one rank from `start_step` on: what is drawn depends on seed and step alone.

    An image that cannot be read or decoded goes to `rejected`, by its row, and another takes its
    place, the same one in every run. Files are read by threads, DALI runs ahead.
    """

    def __init__(
        self,
        index: Index,
        settings: LoaderSettings,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        device: "torch.device",
        on_event: Report,
        rejected: dict[int, Rejected],
    ) -> None:
        """Batch and micro-batch are multiples of `world_size`.

        Raises:
            UsageError: fewer images than a batch.
        """
        size, micro = settings.batch_size, settings.micro_batch or settings.batch_size
        if len(index) < size:
            what = f"{len(index)} images do not fill one batch of {size}"
            fix = "add images, or take a smaller batch"
            raise UsageError(what, where=index.root, expected=f"{size} or more", fix=fix)
        assert size % micro == micro % world_size == 0
        self.index, self.settings, self.device = index, settings, device
        self.start_step, self.rejected = start_step, rejected
        self.allowed_bad = int(settings.max_bad * len(index) + 1e-9)  # 0.29 * 100 is below 29
        self.steps_per_epoch = count_steps(len(index), size)
        self._on_event = on_event
        self._share = size // world_size
        # A micro-batch is shared out like a batch: the same images form it on any number of ranks.
        positions = np.arange(size).reshape(-1, world_size, micro // world_size)
        self._positions = positions[:, rank].ravel()
        self._threads = settings.threads or runtime.cores()
        self._gpu = None if device.type == "cpu" else device.index or 0
        self._decoder = (
            None if self._gpu is None else decode.batch_decoder(self._gpu, self._threads)
        )
        self._open = contextlib.ExitStack()
        self._pool = self._open.enter_context(reading_threads(self._threads + 2))

    def __enter__(self) -> "TrainingLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def view_shapes(self) -> list[tuple[int, int, int, int]]:
        """Of each view of this rank's share: (n, H, W, 3)."""
        return [(self._share, size, size, 3) for size in self.settings.view_sizes]

    def close(self) -> None:
        """Stops the reading threads; what is in flight is dropped."""
        self._open.close()

    def __iter__(self) -> Iterator[Batch]:
        """Raises BudgetError: more than `data.max_bad` of the images are unusable."""

        def build() -> Pipeline:
            return dali_graphs.training_pipeline(
                self.settings.views,
                self.settings.view_sizes,
                batch_size=self._share,
                threads=self._threads,
                gpu=self._gpu,
            )

        stream = self._decoder.stream if self._decoder else None
        for load, outputs in dali_runner.run(self._loads(), build, stream):
            yield Batch(load.number, load.rows, tuple(self._tensor(one) for one in outputs))

    def _tensor(self, output: dali_runner.Output) -> "torch.Tensor":
        """DALI's output as a tensor of its own: DALI uses its buffers again."""
        # Embedding imports this module without torch.
        import torch  # noqa: PLC0415
        from nvidia.dali.plugin.pytorch import feed_ndarray  # noqa: PLC0415

        if self._gpu is None:
            return torch.from_numpy(dali_runner.copied(output))
        dense = output.as_tensor()
        tensor = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(dense, tensor, cuda_stream=torch.cuda.current_stream(self.device))
        return tensor

    def _loads(self) -> Iterator[dali_runner.DaliBatch]:
        """The loads from `start_step` on, read ahead; what cannot be read is replaced here."""
        steps = range(self.start_step, self.settings.steps)
        tasks = ((step, self._rows(step)) for step in steps)
        for step, rows, contents in prefetch.read_ahead(
            tasks, self._read, self._finish, self._pool
        ):
            yield self._load(step, rows, list(contents))

    def _epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def planned(self, step: int) -> NDArray[np.int64]:
        """The images that the order alone gives this rank for a step: index rows (n,)."""
        settings = self.settings
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * settings.batch_size
        span = (settings.seed, epoch, len(self.index), start, start + settings.batch_size)
        if settings.shuffle == "full":
            return sampler.permutation(*span)[self._positions]
        mixed = sampler.blocks(
            *span, block_images=settings.block_images, mixed_blocks=settings.mixed_blocks
        )
        return mixed[self._positions]

    def _rows(self, step: int) -> NDArray[np.int64]:
        """`planned`, with stand-ins for those that are known to be bad."""
        rows = self.planned(step)
        for i, row in enumerate(rows.tolist() if self.rejected else ()):
            if row in self.rejected:
                rows[i] = self._substitute(self._epoch(step), row)
        return rows

    def _substitute(self, epoch: int, row: int) -> int:
        """The first replacement that is not known to be bad."""
        candidates = (
            sampler.replacement(self.settings.seed, epoch, row, attempt, len(self.index))
            for attempt in itertools.count()
        )
        return next(candidate for candidate in candidates if candidate not in self.rejected)

    def _read(self, row: int) -> Encoded | NDArray[np.uint8] | Rejected:
        """A file's pixels, or the file as a GPU's batch takes it."""
        try:
            content = self.index.read_bytes(row)
            header.refuse_scan_bomb(content)
            file = np.frombuffer(content, np.uint8)
            encoded = decode.parse(file) if self._decoder else None
            return encoded or decode.decode(file)
        except BadInputError as error:
            return self.index.reject(row, "decode", error)

    def _finish(
        self, rows: NDArray[np.int64], contents: Sequence[Encoded | NDArray[np.uint8] | Rejected]
    ) -> list[Pixels | Rejected]:
        """The pixels of a batch where its views are made."""
        good = [content for content in contents if not isinstance(content, Rejected)]
        images = iter(self._decoder.decode(good) if self._decoder else good)
        decoded = [each if isinstance(each, Rejected) else next(images) for each in contents]
        return self.index.with_rejects(rows, decoded)

    def _load(
        self, step: int, rows: NDArray[np.int64], contents: list[Pixels | Rejected]
    ) -> dali_runner.DaliBatch:
        """The batch with its draws: readable images in the places of those that are rejected."""
        epoch, planned = self._epoch(step), self.planned(step)
        images: list[Pixels] = []
        for position, content in enumerate(contents):
            image = content
            while isinstance(image, Rejected):
                self._reject(int(rows[position]), image)
                rows[position] = row = self._substitute(epoch, int(planned[position]))
                (image,) = self._finish(rows[position : position + 1], [self._read(row)])
            images.append(image)
        sizes, seed = dali_runner.sizes_of(images), self.settings.seed
        draws = augment_params.draw_views(
            self.settings.views, seed=seed, epoch=epoch, images=rows, sizes=sizes
        )
        return dali_runner.DaliBatch(step, rows, images, dali_graphs.training_inputs(draws, sizes))

    def _reject(self, row: int, rejected: Rejected) -> None:
        if row in self.rejected:
            return
        self.rejected[row] = rejected
        self._on_event(rejected)
        last = f", {rejected.path} the last: {rejected.reason}"
        self.require_budget(len(self.rejected), last)

    def require_budget(self, count: int, last: str = "") -> None:
        """Raises BudgetError where `count` unusable images are more than `data.max_bad` allows."""
        if count > self.allowed_bad or count == len(self.index):
            raise BudgetError(
                f"{count} of {len(self.index)} images cannot be used{last}",
                where=self.index.root,
                expected=f"at most data.max_bad = {self.settings.max_bad:g} of them",
                fix="see rejects.csv in the run folder: raise data.max_bad to go on without"
                " them, or mend them and train under another --name",
            )
