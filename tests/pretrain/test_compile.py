"""The compiled network: one graph, and the eager network's numbers."""

import pytest
import torch

from btpipe.pretrain import loss, network
from btpipe.recipe import Loss, Network

CLOSE = 2e-4  # float32, fused kernels sum in another order


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_the_network_compiles_without_a_break_and_agrees_with_eager() -> None:
    settings = Network(backbone="resnet18", stem="small", projector=(32, 16))
    views = torch.randint(
        0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = network.BarlowTwins(settings).train()
        if compiled:
            model.compile(fullgraph=True)
        z1, z2, _ = model(views[0], views[1])
        terms, gradient1, gradient2 = loss.value_and_gradient(z1, z2, Loss().lambd, "gram")
        torch.autograd.backward([z1, z2], [gradient1, gradient2])
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((terms.total(Loss().lambd), gradients, model.state_dict().keys()))
    eager, fused = results
    torch.testing.assert_close(fused[0], eager[0], rtol=CLOSE, atol=CLOSE)
    assert fused[2] == eager[2]
    for name, gradient in eager[1].items():
        assert gradient is not None
        scale = float(gradient.abs().max())
        torch.testing.assert_close(fused[1][name], gradient, rtol=0, atol=50 * CLOSE * scale)
