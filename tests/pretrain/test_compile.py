"""The compiled network: one graph on one rank and on two, and the eager network's numbers."""

import pytest
import torch

from btpipe import runtime
from btpipe.pretrain import step
from btpipe.recipe import Data, Network, Recipe, Run, View

CPU = torch.device("cpu")
EXACT = 1e-10  # float64, relative to a tensor's largest: the same operations, decomposed
CLOSE = (
    1e-2  # float32, likewise: fused kernels sum in another order, through batch norm of 8 images
)
SIZE, IMAGES = 32, 8
PAIR = (View(), View())
CROPS = (*PAIR, View(size=16), View(size=16))
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:dynamo_pgo", "ignore:Online softmax"
)  # torch's own, while it compiles


def build(precision: str, memory_budget: float = 1.0, views: tuple[View, ...] = PAIR) -> step.Core:
    run = {"precision": precision, "compile": "on", "memory_budget": memory_budget}
    described = Recipe(
        data=Data(batch_size=IMAGES, image_size=SIZE),
        network=Network(backbone="resnet18", projector=(32, 16)),
        views=views,
        run=Run.model_validate(run),
    )
    return step.build(described, CPU)


def update(core: step.Core) -> dict[str, torch.Tensor]:
    """Gradients and running statistics after one step on this rank's share of one batch."""
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randint(0, 256, (IMAGES, size, size, 3), dtype=torch.uint8, generator=generator)
        for size in core.recipe.view_sizes
    ]
    share = IMAGES // runtime.world_size()
    rows = slice(runtime.rank() * share, (runtime.rank() + 1) * share)
    step.update(core, [view[rows] for view in drawn], 0.1, 0.1)
    gradients = {n: p.grad for n, p in core.network.named_parameters() if p.grad is not None}
    return {**gradients, **dict(core.network.named_buffers())}


def assert_alike(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = max(float(tensor.abs().max()), 1e-6)
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * scale)


def trace_and_compare(*cases: tuple[View, ...]) -> None:
    """One graph through autograd (`fullgraph`, without code generation), against eager."""
    for views in cases:
        eager, traced = (build("fp64", views=views) for _ in range(2))
        keys = traced.network.state_dict().keys()
        traced.network.compile(fullgraph=True, backend="aot_eager")
        assert_alike(update(traced), update(eager), EXACT)
        assert traced.network.state_dict().keys() == keys


def trace_on_a_rank() -> None:
    with runtime.start():
        trace_and_compare(CROPS)  # a pair is the first half of its graph


def test_the_network_is_one_graph_and_keeps_its_keys() -> None:
    trace_and_compare(PAIR, CROPS)


def test_the_network_is_one_graph_on_two_ranks_too() -> None:
    runtime.launch(2, trace_on_a_rank, ())


class Untraced(torch.nn.Module):
    """What a compiler cannot see into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.compiler.disable(torch.relu)(x)  # type: ignore[no-any-return, no-untyped-call]


def test_a_break_in_the_graph_is_an_error() -> None:
    core = build("fp64")
    core.network.projector[2] = Untraced()
    core.network.compile(fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="disable"):
        update(core)


def compile_and_compare() -> None:
    eager = update(build("fp32"))
    for budget in (1.0, 0.3):
        core = build("fp32", budget)
        step.compile(core)
        assert_alike(update(core), eager, CLOSE)


def compile_on_a_rank() -> None:
    with runtime.start():
        compile_and_compare()


@pytest.mark.slow
def test_generated_code_agrees_with_eager_whatever_is_recomputed() -> None:
    compile_and_compare()


@pytest.mark.slow
def test_generated_code_agrees_with_eager_on_two_ranks() -> None:
    runtime.launch(2, compile_on_a_rank, ())
