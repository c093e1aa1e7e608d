"""Cached gradients: the loss of a large batch with the memory of a small one.

The redundancy term couples all images of a batch, so that plain accumulation over small batches
would train another objective. Here every micro-batch is embedded first, without a graph; the loss
and dL/dz are computed once over the whole batch; then each micro-batch passes again, with a graph,
and its rows of dL/dz go back through it (Gao et al., arXiv 2101.06983).

Batch norm sees one micro-batch, of all ranks, at a time. With frozen statistics the gradient is
that of one batch; in training that is the only difference. The running statistics count the second
pass alone.
"""

from collections.abc import Callable

import torch

from btpipe.pretrain import loss
from btpipe.pretrain.network import BarlowTwins, Embedded
from btpipe.pretrain.norm import untracked

Forward = Callable[[torch.Tensor, torch.Tensor], Embedded]
Judge = Callable[[torch.Tensor, torch.Tensor], tuple[loss.Terms, torch.Tensor, torch.Tensor]]
"""Embeddings (n, D) of the two views -> terms and the gradients dL/dz1, dL/dz2."""


def backward(
    network: BarlowTwins,
    forward: Forward,
    judge: Judge,
    view1: torch.Tensor,
    view2: torch.Tensor,
    micro_batch: int,
) -> tuple[Embedded, loss.Terms]:
    """Adds the gradient of the whole batch's loss to the parameters, `micro_batch` rows at a time.

    view1, view2: (n, H, W, 3), of which activations are held for `micro_batch` images only.
    """
    views = list(zip(torch.split(view1, micro_batch), torch.split(view2, micro_batch), strict=True))
    with torch.no_grad(), untracked(network):
        parts = [forward(*pair) for pair in views]
    z1, z2 = torch.cat([part.z1 for part in parts]), torch.cat([part.z2 for part in parts])
    firsts, seconds = zip(*(part.features.chunk(2) for part in parts), strict=True)
    features = torch.cat([*firsts, *seconds])
    del parts
    terms, gradient1, gradient2 = judge(z1, z2)
    parts1, parts2 = torch.split(gradient1, micro_batch), torch.split(gradient2, micro_batch)
    for pair, part1, part2 in zip(views, parts1, parts2, strict=True):
        again = forward(*pair)
        torch.autograd.backward(
            [again.z1, again.z2], [part1.to(again.z1.dtype), part2.to(again.z2.dtype)]
        )
    return Embedded(z1, z2, features), terms
