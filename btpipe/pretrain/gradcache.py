"""Cached gradients: the loss of a large batch with the memory of a small one.

The redundancy term couples all images of a batch, so that plain accumulation over small batches
would train another objective. Here every micro-batch is embedded first, without a graph; the loss
and dL/dz are computed once over the whole batch; then each micro-batch passes again, with a graph,
and its rows of dL/dz go back through it (Gao et al., arXiv 2101.06983).

Batch norm sees one micro-batch, of all ranks, at a time. With frozen statistics the gradient is
that of one batch; in training that is the only difference. The running statistics count the second
pass alone.
"""

from collections.abc import Callable, Sequence

import torch

from btpipe.pretrain import loss
from btpipe.pretrain.network import BarlowTwins, ViewEmbeddings
from btpipe.pretrain.norm import untracked

Forward = Callable[[Sequence[torch.Tensor]], ViewEmbeddings]
Judge = Callable[[Sequence[torch.Tensor]], tuple[loss.Terms, list[torch.Tensor]]]
"""Embeddings (n, D) of each view -> terms and the gradients dL/dz of each."""


def backward(
    network: BarlowTwins,
    forward: Forward,
    judge: Judge,
    views: Sequence[torch.Tensor],
    micro_batch: int,
) -> tuple[ViewEmbeddings, loss.Terms]:
    """Adds the gradient of the whole batch's loss to the parameters, `micro_batch` rows at a time.

    views: (n, H, W, 3) each; activations are held for `micro_batch` images only.
    """
    micros = list(zip(*(torch.split(view, micro_batch) for view in views), strict=True))
    with torch.no_grad(), untracked(network):
        parts = [forward(micro) for micro in micros]
    z = tuple(torch.cat(rows) for rows in zip(*(part.z for part in parts), strict=True))
    by_view = zip(*(part.features.chunk(len(views)) for part in parts), strict=True)
    features = torch.cat([rows for view in by_view for rows in view])
    del parts
    terms, gradients = judge(z)
    cached = zip(*(torch.split(gradient, micro_batch) for gradient in gradients), strict=True)
    for micro, z_gradients in zip(micros, cached, strict=True):
        recomputed = forward(micro).z
        torch.autograd.backward(
            recomputed, [g.to(z.dtype) for g, z in zip(z_gradients, recomputed, strict=True)]
        )
    return ViewEmbeddings(z, features), terms
