"""A linear classifier on an encoder, frozen or tuned, as the published code judges one.

Crops and flips, SGD with a cosine over epochs, the test images once at the end in the evaluation
view. Distributed and resumable like pretraining: order and crops are functions of seed, epoch and
image, so that the state is the weights, the momenta and a step. What differs from evaluate.py of
facebookresearch/barlowtwins: crops are resized bicubically, EXIF turns are applied, the last short
batch of an epoch is left out, and the result is the last epoch's, not the best on the test images.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional

from btpipe import artifact, runtime
from btpipe.data.index import Index, open_index
from btpipe.data.pipeline.dali_graphs import Geometry
from btpipe.data.pipeline.train_loader import LoaderSettings, TrainingLoader, evaluation_batches
from btpipe.errors import IntegrityError, NumericsError, Stopped
from btpipe.evaluate.head import Classifier
from btpipe.events import Progressed, Report, Warned
from btpipe.export import contract, weights
from btpipe.recipe import Blur, Jitter, View, count_steps
from btpipe.recipe.protocols import Protocol
from btpipe.runtime import Runtime

KIND = "classifier"
STATE = "state"
TENSORS = "state.safetensors"
SAVE_SECONDS = 600.0
REPORT_SECONDS = 1.0
MAX_BAD = 0.01
"""Share of the training images that may be unreadable."""
CROP = View(jitter=Jitter(probability=0.0), gray=0.0, blur=Blur(probability=0.0))
"""Crop and flip, without colours."""


@dataclasses.dataclass(frozen=True)
class FinetuneJob:
    """What is judged, on what: index files with a label for each row. `work` keeps the state."""

    bundle: Path
    train: Path
    test: Path
    protocol: Protocol
    work: Path

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the training images' labels, in order."""
        return tuple(sorted({str(label) for label in open_index(self.train).labels}))

    @property
    def identity(self) -> dict[str, object]:
        """What a state belongs to."""
        indexes = (open_index(path) for path in (self.train, self.test))
        return {
            "bundle": contract.open_bundle(self.bundle).digest,
            "images": [index.fingerprint for index in indexes],
            "classes": list(self.classes),
            "protocol": self.protocol.model_dump(mode="json"),
        }


@dataclasses.dataclass(frozen=True)
class FinetuneScore:
    """How many of the test images the classifier names rightly, first and among five."""

    images: int
    top1: int
    top5: int
    rejected: int


def fit(job: FinetuneJob, process: Runtime, on_event: Report) -> FinetuneScore:
    """Trains and judges, from where `job.work` stands; every rank calls it.

    Raises:
        Stopped: a signal came; the state is saved.
        NumericsError: the loss is not finite, or a frozen encoder changed.
        UsageError: fewer training images than ranks.
        BudgetError: more training images than `MAX_BAD` cannot be used.
    """
    bundle, protocol = contract.open_bundle(job.bundle), job.protocol
    train = open_index(job.train)
    share = max(min(protocol.batch_size, len(train)) // process.world_size, 1)
    batch_size = share * process.world_size
    tuned = protocol.encoder_lr > 0
    model = Classifier(bundle, len(job.classes), tuned=tuned, seed=protocol.seed).to(process.device)
    before = weights.digest(model.encoder.state_dict())
    optimizer = _optimizer(model, protocol, batch_size)
    start = _restore(job, model, optimizer)
    with (
        runtime.StopSignals() as signals,
        TrainingLoader(
            train,
            _settings(bundle, protocol, batch_size, len(train)),
            rank=process.rank,
            world_size=process.world_size,
            start_step=start,
            device=process.device,
            on_event=on_event,
            rejected={},
        ) as loader,
    ):
        _train(job, process, on_event, loader, model, optimizer, signals, start)
    if not tuned and weights.digest(model.encoder.state_dict()) != before:
        raise NumericsError("the frozen encoder changed", where=job.bundle, fix="report this bug")
    return _judge(job, bundle, model, process, on_event)


def _settings(
    bundle: contract.Bundle, protocol: Protocol, batch_size: int, images: int
) -> LoaderSettings:
    """One view of each image, to the end of the protocol's last epoch."""
    return LoaderSettings(
        seed=protocol.seed,
        views=(CROP,),
        view_sizes=(bundle.preprocessing.size,),
        batch_size=batch_size,
        steps=count_steps(images, batch_size, protocol.epochs),
        max_bad=MAX_BAD,
    )


def _optimizer(model: Classifier, protocol: Protocol, batch_size: int) -> torch.optim.SGD:
    scale = batch_size / 256
    groups = [{"params": list(model.head.parameters()), "peak": protocol.lr * scale}]
    if model.tuned:
        encoder = [p for p in model.encoder.parameters() if p.requires_grad]
        groups.append({"params": encoder, "peak": protocol.encoder_lr * scale})
    return torch.optim.SGD(
        groups, lr=0.0, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )


def _train(
    job: FinetuneJob,
    process: Runtime,
    on_event: Report,
    loader: TrainingLoader,
    model: Classifier,
    optimizer: torch.optim.SGD,
    signals: runtime.StopSignals,
    start: int,
) -> None:
    numbers, steps = _label_numbers(loader.index, job.classes), loader.settings.steps
    agreement, saved = runtime.Agreement(), time.monotonic()
    reported, since, value = saved, start, torch.zeros(())
    model.train()
    for batch in loader:
        epoch = batch.step // loader.steps_per_epoch
        factor = 0.5 * (1 + math.cos(math.pi * epoch / job.protocol.epochs))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        labels = torch.from_numpy(numbers[batch.images]).to(process.device)
        value = _update(model, optimizer, batch.views[0], labels)
        done, now = batch.step + 1, time.monotonic()
        overdue = process.is_first and now - saved > SAVE_SECONDS
        stop, save = agreement.exchange([bool(signals.first), overdue])
        if stop or save or done == steps:
            _save(job, process, done, model, optimizer, value)
            saved = now
        if stop and done < steps:
            raise Stopped(
                f"stopped at step {done} of {steps}, the state is saved",
                fix="run the same command to go on",
            )
        if now - reported > REPORT_SECONDS or done == steps:
            rate = (done - since) * loader.settings.batch_size / max(now - reported, 1e-9)
            on_event(Progressed("eval", done, steps, rate, 0.0))
            reported, since = now, done


def _update(
    model: Classifier,
    optimizer: torch.optim.SGD,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """One step on the mean cross-entropy over the batch of all ranks."""
    optimizer.zero_grad(set_to_none=True)
    loss = functional.cross_entropy(model(images), labels) / runtime.world_size()
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    runtime.sum_gradients([p for p in parameters if p.grad is not None])
    optimizer.step()
    return loss.detach()


def _label_numbers(index: Index, classes: tuple[str, ...]) -> NDArray[np.int64]:
    names = {name: number for number, name in enumerate(classes)}
    return np.array([names[str(label)] for label in index.labels], dtype=np.int64)


def _save(
    job: FinetuneJob,
    process: Runtime,
    step: int,
    model: Classifier,
    optimizer: torch.optim.SGD,
    loss: torch.Tensor,
) -> None:
    if not bool(torch.isfinite(runtime.all_reduce_sum(loss.clone()))):
        raise NumericsError(
            f"the loss is not finite by step {step}",
            where=job.work,
            fix="lower --lr; the state before it is kept",
        )
    if process.is_first:
        tensors = {n: t.detach().cpu().contiguous() for n, t in _tensors(model, optimizer)}
        with artifact.publish(job.work / STATE, KIND, {"step": step, **job.identity}) as folder:
            save_file(
                {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / TENSORS
            )
    runtime.barrier()


def _tensors(model: Classifier, optimizer: torch.optim.SGD) -> Iterator[tuple[str, torch.Tensor]]:
    """What a state holds: of a frozen encoder nothing."""
    trained = model if model.tuned else model.head
    yield from ((f"model.{name}", tensor) for name, tensor in trained.state_dict().items())
    for name, parameter in trained.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            yield f"momentum.{name}", momentum


def _restore(job: FinetuneJob, model: Classifier, optimizer: torch.optim.SGD) -> int:
    """The step that the state of this very job stands at; 0 without one.

    Raises:
        RefusedError: a state of another job is there.
        IntegrityError: its bytes changed.
    """
    folder = job.work / STATE
    if not folder.exists():
        return 0
    manifest = artifact.verify(folder, KIND)
    origin = dict(manifest.origin)
    step = int(str(origin.pop("step")))
    if origin != job.identity:
        raise IntegrityError(
            "holds the state of another evaluation",
            where=folder,
            expected="the same bundle, images, classes and protocol",
            fix="choose another --out, or remove the folder",
        )
    try:
        tensors = load_file(folder / TENSORS)
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"cannot be read: {error}", where=folder) from error
    trained = model if model.tuned else model.head
    trained.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    for name, parameter in trained.named_parameters():
        momentum = tensors.get(f"momentum.{name}")
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
    return step


def _judge(
    job: FinetuneJob, bundle: contract.Bundle, model: Classifier, process: Runtime, on_event: Report
) -> FinetuneScore:
    """The test images in the evaluation view, shared out among the ranks."""
    test = open_index(job.test)
    numbers = _label_numbers(test, job.classes)
    prepared = bundle.preprocessing
    geometry = Geometry(prepared.size, prepared.resize)
    counts = torch.zeros(4, dtype=torch.float64)
    model.eval()
    rows = np.arange(process.rank, len(test), process.world_size)
    for batch in evaluation_batches(test, rows, geometry, batch_size=64, threads=runtime.cores()):
        for bad in batch.rejected.values():
            on_event(Warned(f"{bad.path} is not judged: {bad.reason}"))
        counts[3] += len(batch.rejected)
        if len(batch.rows) == 0:
            continue
        with torch.inference_mode():
            logits = model(torch.from_numpy(batch.pixels).to(process.device)).cpu()
        labels = torch.from_numpy(numbers[batch.rows])[:, None]
        best = logits.topk(min(5, logits.shape[1])).indices == labels
        counts += torch.tensor([len(best), int(best[:, 0].sum()), int(best.sum()), 0])
    images, top1, top5, rejected = (int(x) for x in runtime.all_reduce_sum(counts))
    return FinetuneScore(images, top1, top5, rejected)
