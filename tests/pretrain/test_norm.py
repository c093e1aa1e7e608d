"""Batch norm per view and across replicas, against two passes of torch's own."""

import torch
from torch import nn

from btpipe import runtime
from btpipe.pretrain import network
from btpipe.pretrain.norm import ViewBatchNorm
from btpipe.recipe import Network

EXACT = 1e-12  # float64, same sums in another order


def two_passes(
    norm: nn.BatchNorm2d, views: list[torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.cat([norm(view) for view in views])
    (out * weights).sum().backward()  # type: ignore[no-untyped-call]
    assert norm.weight.grad is not None
    return out.detach(), norm.weight.grad


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 5, 6, 7, generator=generator, dtype=torch.float64) * 4 + 100
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def test_two_views_in_one_batch_equal_two_passes() -> None:
    x, weights = example()
    plain, ours = nn.BatchNorm2d(5).double(), ViewBatchNorm(5).double()
    expected, gradient = two_passes(plain, [x[:4], x[4:]], weights)
    out = ours(x)
    (out * weights).sum().backward()
    torch.testing.assert_close(out.detach(), expected, atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(ours.weight.grad, gradient, atol=EXACT, rtol=EXACT)
    assert dict(ours.state_dict()).keys() == dict(plain.state_dict()).keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, atol=EXACT, rtol=EXACT)


def test_evaluation_uses_the_running_statistics() -> None:
    x, _ = example()
    ours, plain = ViewBatchNorm(5).double(), nn.BatchNorm2d(5).double()
    ours(x)
    plain.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x[:3]), plain.eval()(x[:3]), atol=EXACT, rtol=EXACT)


def compare_replicas_with_one() -> None:
    """Runs on two ranks: each holds half of each view, its output and gradients are the whole's."""
    with runtime.start() as process:
        x, weights = example()
        plain = nn.BatchNorm2d(5).double()
        whole = x.clone().requires_grad_()
        expected, gradient = two_passes(plain, [whole[:4], whole[4:]], weights)
        rows = [4 * view + 2 * process.rank + i for view in range(2) for i in range(2)]
        ours, part = ViewBatchNorm(5).double(), x[rows].clone().requires_grad_()
        out = ours(part)
        (out * weights[rows]).sum().backward()
        runtime.sum_gradients(list(ours.parameters()))
        torch.testing.assert_close(out.detach(), expected[rows], atol=EXACT, rtol=EXACT)
        assert whole.grad is not None
        torch.testing.assert_close(part.grad, whole.grad[rows], atol=EXACT, rtol=EXACT)
        torch.testing.assert_close(ours.weight.grad, gradient, atol=EXACT, rtol=EXACT)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, atol=EXACT, rtol=EXACT)


def test_two_replicas_equal_one_in_values_and_gradients() -> None:
    runtime.launch(2, compare_replicas_with_one, ())


def test_the_network_takes_two_views_and_keeps_torchvisions_names() -> None:
    settings = Network(backbone="resnet18", stem="small", projector=(32, 16))
    model = network.BarlowTwins(settings)
    views = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    (z1, z2), _ = model(views[0], views[1])
    assert z1.shape == z2.shape == (4, 16)
    plain = network.encoder(settings)
    state = {
        key.removeprefix("encoder."): value
        for key, value in model.state_dict().items()
        if key.startswith("encoder.")
    }
    plain.load_state_dict(state, strict=True)
    assert network.features(settings) == plain.layer4[1].conv2.out_channels
