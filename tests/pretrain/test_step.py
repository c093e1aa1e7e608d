"""One update: the same from micro-batches, recomputed, on any number of ranks; or left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from btpipe import runtime
from btpipe.pretrain import loss, nonfinite, norm, step
from btpipe.recipe import Data, Loss, Network, Optim, Recipe, Run, View

CPU = torch.device("cpu")
EXACT = 1e-12  # float64, relative to the largest: the same sums in another order
SINGLE = 1e-5  # the same in float32
SIZE, IMAGES = 32, 8


def recipe(run: Run | None = None, **tables: object) -> Recipe:
    """A resnet18 at 32 pixels with a narrow projector, batch 8; in float64 unless `run` says.

    Plain SGD, which leaves the gradients as they were (LARS uses them up).
    """
    described = {
        "data": Data(batch_size=IMAGES, image_size=SIZE),
        "network": Network(backbone="resnet18", projector=(24, 16)),
        "optim": Optim(name="sgd"),
        "run": run or Run(precision="fp64"),
        **tables,
    }
    return Recipe.model_validate(described)


def views(count: int = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, count, SIZE, SIZE, 3)
    first, second = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return first, second


def gradients(core: step.Core) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in core.network.named_parameters() if p.grad is not None}


def assert_alike(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Tensors of the same names, equal to `tolerance` of each one's largest value."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=tolerance * largest)


def freeze_norms(core: step.Core) -> None:
    for module in core.network.modules():
        if norm.is_norm(module):
            module.eval()


@contextmanager
def largest_graph() -> Iterator[Callable[[], int]]:
    """Bytes of the activations that autograd holds at the same time, at most."""
    live, most = 0, 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal live, most
            self.tensor = tensor
            self.nbytes = 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
            live += self.nbytes
            most = max(most, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield lambda: most


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch_where_batch_norm_is_frozen(
    micro_batch: int,
) -> None:
    whole = step.build(recipe(), CPU)
    parts = step.build(recipe(Run(precision="fp64", micro_batch=micro_batch)), CPU)
    for core in (whole, parts):
        freeze_norms(core)
    expected, actual = (step.update(core, views(), 0.1, 0.1) for core in (whole, parts))
    assert_alike(gradients(parts), gradients(whole), EXACT)
    torch.testing.assert_close(
        actual.terms.off_diagonal, expected.terms.off_diagonal, rtol=EXACT, atol=0
    )
    torch.testing.assert_close(actual.embedded.features, expected.embedded.features)
    torch.testing.assert_close(actual.embedded.z[1], expected.embedded.z[1])


def test_micro_batches_differ_in_training_by_what_batch_norm_sees_alone() -> None:
    """Against autograd through micro-batches that pass one by one and are judged together."""
    described = recipe(Run(precision="fp64", micro_batch=4))
    core, plain = step.build(described, CPU), step.build(described, CPU)
    step.update(core, views(), 0.0, 0.0)
    first, second = views()
    passed = [plain.network(first[i : i + 4], second[i : i + 4]) for i in (0, 4)]
    z1, z2 = (torch.cat(rows) for rows in zip(*(part.z for part in passed), strict=True))
    _, (gradient1, gradient2) = loss.value_and_gradient([z1, z2], Loss().lambd, "cross")
    torch.autograd.backward([z1, z2], [gradient1, gradient2])
    assert_alike(gradients(core), gradients(plain), EXACT)
    running = dict(plain.network.named_buffers())
    for name, buffer in core.network.named_buffers():
        torch.testing.assert_close(buffer, running[name], rtol=EXACT, atol=EXACT)


SMALL = View(size=16, scale=(0.05, 0.3))
CROPS = (View(), View(), SMALL, SMALL)


def crops() -> list[torch.Tensor]:
    """Two views of 32 pixels and two of 16."""
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (2, IMAGES, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return [*views(), *small]


def test_many_views_pass_as_each_does_alone() -> None:
    """Each view has its own statistics, in the encoder and in the projector."""
    together, alone = (step.build(recipe(views=CROPS), CPU).network for _ in range(2))
    embedded = together(*crops())
    for z, view in zip(embedded.z, crops(), strict=True):
        torch.testing.assert_close(z, alone(view).z[0], rtol=EXACT, atol=EXACT)
    assert embedded.features.shape == (4 * IMAGES, 512)
    running = dict(alone.named_buffers())
    for name, buffer in together.named_buffers():
        torch.testing.assert_close(buffer, running[name], rtol=EXACT, atol=EXACT)


def test_small_views_learn_from_the_full_size_ones_alone() -> None:
    described = recipe(views=CROPS)
    assert described.pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    core, plain = (step.build(described, CPU) for _ in range(2))
    outcome = step.update(core, crops(), 0.0, 0.0)
    z = [plain.network(view).z[0] for view in crops()]
    terms, parts = loss.value_and_gradient(z, Loss().lambd, "cross", pairs=described.pairs)
    torch.autograd.backward(z, parts)
    assert_alike(gradients(core), gradients(plain), EXACT)
    torch.testing.assert_close(outcome.terms.on_diagonal, terms.on_diagonal, rtol=EXACT, atol=0)


def test_micro_batches_take_many_views() -> None:
    whole = step.build(recipe(views=CROPS), CPU)
    parts = step.build(recipe(Run(precision="fp64", micro_batch=4), views=CROPS), CPU)
    for core in (whole, parts):
        freeze_norms(core)
        step.update(core, crops(), 0.1, 0.1)
    assert_alike(gradients(parts), gradients(whole), EXACT)


def test_memory_follows_the_micro_batch() -> None:
    held = {}
    for micro_batch in (0, 4, 2):
        core = step.build(recipe(Run(precision="fp64", micro_batch=micro_batch)), CPU)
        with largest_graph() as most:
            step.update(core, views(), 0.1, 0.1)
        held[micro_batch] = most()
    assert held[4] < 0.55 * held[0]
    assert held[2] < 0.3 * held[0]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_recomputation_gives_the_same_gradient_and_counts_statistics_once(precision: str) -> None:
    results, held = [], []
    for budget in (1.0, 0.5, 0.01):
        run = Run.model_validate({"precision": precision, "memory_budget": budget})
        core = step.build(recipe(run), CPU)
        with largest_graph() as most:
            step.update(core, views(), 0.1, 0.1)
        held.append(most())
        results.append((gradients(core), dict(core.network.named_buffers())))
    for recomputed, buffers in results[1:]:
        assert_alike(recomputed, results[0][0], 0.0)
        for name, buffer in results[0][1].items():
            assert torch.equal(buffers[name], buffer)
    assert held[2] < held[1] < held[0]


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_an_update_that_is_not_finite_touches_neither_weights_nor_momenta(name: str) -> None:
    core = step.build(recipe(optim=Optim.model_validate({"name": name})), CPU)
    step.update(core, views(), 0.01, 0.01)  # so that there are momenta
    bad = next(core.network.projector.parameters())
    good = bad[0, 0].item()
    with torch.no_grad():
        bad[0, 0] = torch.inf
    before = [t.clone() for t in everything(core)]
    outcome = step.update(core, views(), 0.01, 0.01)
    assert outcome.flags.found_inf.item() == 1
    for tensor, was in zip(everything(core), before, strict=True):
        assert torch.equal(tensor, was)
    with torch.no_grad():
        bad[0, 0] = good
    outcome = step.update(core, views(), 0.01, 0.01)
    assert outcome.flags.found_inf.item() == 0
    assert not all(torch.equal(t, was) for t, was in zip(everything(core), before, strict=True))
    assert all(torch.isfinite(t).all() for t in everything(core))


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_a_first_update_that_is_left_out_leaves_nothing_behind(name: str) -> None:
    described = recipe(optim=Optim.model_validate({"name": name}))
    core, fresh = step.build(described, CPU), step.build(described, CPU)
    bad = next(core.network.projector.parameters())
    good = bad[0, 0].item()
    with torch.no_grad():
        bad[0, 0] = torch.inf
    assert step.update(core, views(), 0.01, 0.01).flags.found_inf.item() == 1
    with torch.no_grad():
        bad[0, 0] = good
    for one in (core, fresh):
        step.update(one, views(), 0.01, 0.01)
    for tensor, expected in zip(everything(core), everything(fresh), strict=True):
        assert torch.equal(tensor, expected)


def everything(core: step.Core) -> list[torch.Tensor]:
    """All that an update changes, but for the running statistics of the forward pass."""
    states = [core.optimizer.state[p] for p in core.network.parameters()]
    momenta = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    return [*(p.detach() for p in core.network.parameters()), *momenta]


def one_bad_rank_of_two() -> None:
    """Runs on two ranks: the second one's gradient of one parameter is not a number."""
    with runtime.start() as process:
        core = step.build(recipe(), CPU)
        if process.rank == 1:
            core.network.encoder.conv1.weight.register_hook(lambda g: g * torch.nan)
        before = [p.detach().clone() for p in core.network.parameters()]
        first, second = views()
        rows = slice(process.rank * 4, process.rank * 4 + 4)
        outcome = step.update(core, [first[rows], second[rows]], 0.1, 0.1)
        assert outcome.flags.ranks.tolist() == [0, 1]
        assert torch.isfinite(outcome.terms.on_diagonal)
        for parameter, was in zip(core.network.parameters(), before, strict=True):
            assert torch.equal(parameter, was)


def test_one_bad_rank_keeps_the_update_from_all_and_is_named() -> None:
    runtime.launch(2, one_bad_rank_of_two, ())


def test_fp16_overflows_lower_the_scale_and_are_counted() -> None:
    core = step.build(recipe(Run(precision="fp16")), CPU)
    assert core.scale is not None
    core.scale.scale.fill_(2.0**60)
    before = [p.detach().clone() for p in core.network.parameters()]
    assert step.update(core, views(), 0.1, 0.1).flags.found_inf.item() == 1
    assert (int(core.scale.overflows), float(core.scale.scale)) == (1, 2.0**59)
    assert all(
        torch.equal(p, was) for p, was in zip(core.network.parameters(), before, strict=True)
    )
    core.scale.scale.fill_(2.0**10)
    assert step.update(core, views(), 0.1, 0.1).flags.found_inf.item() == 0
    assert int(core.scale.overflows) == 1
    single = step.build(recipe(Run(precision="fp32")), CPU)
    step.update(single, views(), 0.1, 0.1)
    cosine = nn.functional.cosine_similarity(flat(core), flat(single), 0)
    assert cosine > 0.99  # fp16 convolutions: 10 bits of mantissa


def test_a_tensor_that_is_not_finite_is_named() -> None:
    state = step.build(recipe(), CPU).network.state_dict()
    assert nonfinite.broken(state) == ""
    state["encoder.layer1.0.bn1.running_var"][3] = torch.nan
    assert nonfinite.broken(state) == "encoder.layer1.0.bn1.running_var"


def flat(core: step.Core) -> torch.Tensor:
    return torch.cat([g.flatten().float() for g in gradients(core).values()])


class Watchman(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and those among them that make the host wait for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.default")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count, self.waits = 0, list[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        if any(name in str(function) for name in self.WAITING):
            self.waits.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_nothing_in_the_step_waits_for_the_device(name: str) -> None:
    core = step.build(recipe(optim=Optim.model_validate({"name": name})), CPU)
    with Watchman() as watchman:
        step.update(core, views(), 0.1, 0.1)
    assert watchman.count > 100
    assert watchman.waits == []
    with Watchman() as watchman:
        float(torch.ones(()))
    assert watchman.waits  # so that the test can fail


def test_lars_takes_as_many_operations_for_many_parameters_as_for_few() -> None:
    counts = []
    for depth in ((16,), (16,) * 20):
        described = recipe(network=Network(backbone="resnet18", projector=depth))
        core = step.build(described, CPU)
        step.update(core, views(), 0.1, 0.1)
        with Watchman() as watchman:
            core.optimizer.step()
        counts.append(watchman.count)
    assert counts[0] == counts[1]


PRECISIONS = {"fp64": EXACT, "fp32": SINGLE}
TOLERANCES = {**PRECISIONS, "crops": EXACT}


def gradients_of_one_batch() -> dict[str, dict[str, torch.Tensor]]:
    """By precision: the gradient, summed over ranks, of the same global batch on any of them."""
    share = IMAGES // runtime.world_size()
    rows = slice(runtime.rank() * share, (runtime.rank() + 1) * share)
    first, second = views()
    by_precision = {}
    for precision in PRECISIONS:
        core = step.build(recipe(Run.model_validate({"precision": precision})), CPU)
        step.update(core, [first[rows], second[rows]], 0.1, 0.1)
        by_precision[precision] = gradients(core)
    core = step.build(recipe(views=CROPS), CPU)
    step.update(core, [view[rows] for view in crops()], 0.1, 0.1)
    by_precision["crops"] = gradients(core)
    return by_precision


def save_gradients(folder: Path) -> None:
    """Runs on several ranks: their gradients, and those of a collective without its backward."""
    with runtime.start() as process:
        right = gradients_of_one_batch()
        # The fault that this test is for: what others made of this rank's statistics is lost.
        merge = runtime.merge_moments
        norm.runtime.merge_moments = lambda x: merge(x.detach())  # type: ignore[attr-defined]
        wrong = gradients_of_one_batch()
        if process.is_first:
            torch.save(right, folder / "right.pt")
            torch.save(wrong, folder / "wrong.pt")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """The gradients in one process."""
    return gradients_of_one_batch()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_does_not_depend_on_the_number_of_ranks_and_a_lost_backward_is_seen(
    tmp_path: Path, alone: dict[str, dict[str, torch.Tensor]], ranks: int
) -> None:
    runtime.launch(ranks, save_gradients, (tmp_path,))
    shared = torch.load(tmp_path / "right.pt")
    for precision, tolerance in TOLERANCES.items():
        assert_alike(shared[precision], alone[precision], tolerance)
    shared = torch.load(tmp_path / "wrong.pt")
    for precision in PRECISIONS:
        with pytest.raises(AssertionError, match="not close"):
            assert_alike(shared[precision], alone[precision], 1e-3)
