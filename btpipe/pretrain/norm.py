"""Batch norm per view and across replicas, on CPUs and GPUs, whole in a compiled graph.

The views go through the network as one batch, view after view. Each view has its own statistics in
every layer and updates the running ones in turn, as the published code's two passes do; pooled
statistics would be another method. Parameter and buffer names are those of torch's batch norm.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from btpipe import runtime


class ViewBatchNorm(_BatchNorm):
    """Batch norm of a batch that holds `views` views of equal size, one behind the other.

    x: (views * n, C, ...) in training, over the views * n * world_size images of all ranks;
    (n, C, ...) in evaluation, by the running statistics.
    """

    views = 2
    """How many views the next pass in training holds (see `group`)."""
    tracking = True
    """Whether a pass in training updates the running statistics (see `untracked`)."""

    def _check_input_dim(self, input: torch.Tensor) -> None:  # noqa: A002 - torch's name
        """(n, C) and (n, C, H, W) alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises; in training, updates the running statistics once for each view."""
        if not self.training:
            return super().forward(x)
        if self.num_batches_tracked is not None and self.tracking:
            self.num_batches_tracked.add_(self.views)
        if runtime.world_size() > 1:
            return self._across_replicas(x)
        return torch.cat([self._one_view(view) for view in x.chunk(self.views)])

    def _one_view(self, x: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(
            x,
            self._statistics(self.running_mean),
            self._statistics(self.running_var),
            self.weight,
            self.bias,
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )

    def _statistics(self, running: torch.Tensor | None) -> torch.Tensor | None:
        """What a pass may update: a copy that is thrown away where it does not count."""
        return running if self.tracking or running is None else running.clone()

    def _across_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """All views at once: one collective forward, one backward. In at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = torch.unflatten(wide, 0, (self.views, -1))
        dimensions = [1, *range(3, wide.ndim)]
        variance, mean = torch.var_mean(wide, dimensions, correction=0)
        mean, variance = runtime.merge_moments(torch.stack([mean, variance], 1)).unbind(1)
        if self.tracking:
            count = wide[0].numel() // wide.shape[2] * runtime.world_size()
            for view in range(self.views):
                self._track(mean[view].detach(), variance[view].detach(), count)
        shape = (self.views, 1, -1) + (1,) * (wide.ndim - 3)
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        out = wide * scale.view(shape) + shift.view(shape)
        return out.flatten(0, 1).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Running statistics with the unbiased variance, as torch keeps them."""
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum or 0.0
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def group(layers: Iterable[ViewBatchNorm], views: int) -> None:
    """The next passes in training hold this many views."""
    for layer in layers:
        layer.views = views


@contextlib.contextmanager
def untracked(network: nn.Module) -> Iterator[None]:
    """A context in which passes of `network` leave its running statistics as they are.

    For a batch that passes more than once in a step: only one of the passes counts.
    """
    layers = [module for module in network.modules() if isinstance(module, ViewBatchNorm)]
    before = [layer.tracking for layer in layers]
    for layer in layers:
        layer.tracking = False
    try:
        yield
    finally:
        for layer, tracking in zip(layers, before, strict=True):
            layer.tracking = tracking


def is_norm(module: nn.Module) -> bool:
    """Whether a module keeps running statistics that a few batches can calibrate."""
    return isinstance(module, _BatchNorm)
