"""The loss and its gradient against the published code's values, and against autograd."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from btpipe import runtime
from btpipe.pretrain import loss

PUBLISHED = load_file(Path(__file__).parent / "published.safetensors")
CASES = range(5)
EXACT = 1e-10  # float64 against float64: only the order of sums differs
SINGLE = 1e-4  # float32 sums over up to 2,048 x 256 terms, relative


def case(i: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    return (
        PUBLISHED[f"loss.{i}.z1"],
        PUBLISHED[f"loss.{i}.z2"],
        float(PUBLISHED[f"loss.{i}.lambda"]),
    )


@pytest.mark.parametrize("form", ["gram", "cross"])
@pytest.mark.parametrize("i", CASES)
def test_value_and_gradients_equal_the_published_code(i: int, form: loss.Form) -> None:
    z1, z2, lambd = case(i)
    terms, (gradient1, gradient2) = loss.value_and_gradient([z1, z2], lambd, form)
    torch.testing.assert_close(
        terms.total(lambd), PUBLISHED[f"loss.{i}.value"], atol=EXACT, rtol=EXACT
    )
    torch.testing.assert_close(gradient1, PUBLISHED[f"loss.{i}.grad_z1"], atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(gradient2, PUBLISHED[f"loss.{i}.grad_z2"], atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize(("count", "dimension"), [(7, 3), (16, 40), (64, 64)])
def test_both_forms_equal_autograd_through_the_definition(count: int, dimension: int) -> None:
    generator = torch.Generator().manual_seed(count)
    z = [
        torch.randn(count, dimension, generator=generator, dtype=torch.float64) * 3 + 1
        for _ in range(2)
    ]
    for tensor in z:
        tensor.requires_grad_()
    standard = [(t - t.mean(0)) / (t.var(0, correction=0) + loss.EPSILON).sqrt() for t in z]
    correlation = standard[0].T @ standard[1] / count
    off = correlation - torch.diag(correlation.diagonal())
    value = (1 - correlation.diagonal()).square().sum() + 0.0051 * off.square().sum()
    value.backward()  # type: ignore[no-untyped-call]
    forms: tuple[loss.Form, ...] = ("gram", "cross")
    for form in forms:
        terms, gradients = loss.value_and_gradient(z, 0.0051, form)
        torch.testing.assert_close(terms.total(0.0051), value.detach(), atol=EXACT, rtol=EXACT)
        for tensor, gradient in zip(z, gradients, strict=True):
            torch.testing.assert_close(gradient, tensor.grad, atol=EXACT, rtol=EXACT)


PAIRS = {
    "three alike": ((0, 1), (0, 2), (1, 2)),
    "two large and two small": ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3)),
    "one large": ((0, 1), (0, 2)),
}


def several(pairs: tuple[loss.Pair, ...], count: int, dimension: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(pairs))
    shape = (1 + max(max(pair) for pair in pairs), count, dimension)
    return [*torch.randn(shape, generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize("form", ["gram", "cross"])
@pytest.mark.parametrize("name", PAIRS)
def test_more_views_give_the_mean_over_their_pairs(name: str, form: loss.Form) -> None:
    pairs = PAIRS[name]
    z = several(pairs, 12, 20)
    terms, gradients = loss.value_and_gradient(z, 0.0051, form, pairs=pairs)
    expected = [torch.zeros_like(view) for view in z]
    value, diagonal = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i, j in pairs:
        of_pair, of_views = loss.value_and_gradient([z[i], z[j]], 0.0051, form)
        value += of_pair.total(0.0051) / len(pairs)
        diagonal += of_pair.mean_diagonal / len(pairs)
        for view, gradient in zip((i, j), of_views, strict=True):
            expected[view] += gradient / len(pairs)
    torch.testing.assert_close(terms.total(0.0051), value, atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(terms.mean_diagonal, diagonal, atol=EXACT, rtol=EXACT)
    torch.testing.assert_close(gradients, expected, atol=EXACT, rtol=EXACT)


def test_half_precision_embeddings_are_correlated_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(256, 64, generator=generator).bfloat16() for _ in range(2))
    terms, (gradient1, _) = loss.value_and_gradient([z1, z2], 0.0051, "gram")
    exact, (exact1, _) = loss.value_and_gradient([z1.double(), z2.double()], 0.0051, "gram")
    assert gradient1.dtype == torch.float32
    torch.testing.assert_close(
        terms.off_diagonal.double(), exact.off_diagonal, rtol=SINGLE, atol=0.0
    )
    torch.testing.assert_close(gradient1.double(), exact1, rtol=SINGLE, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "dimension", "expected"), [(2048, 8192, 124), (256, 8192, 1122), (32, 8192, 4695)]
)
def test_the_floor_is_what_the_rank_of_the_correlation_allows(
    count: int, dimension: int, expected: int
) -> None:
    assert round(loss.floor(count, dimension, 0.0051)) == expected


def test_no_embedding_goes_below_the_floor() -> None:
    z = torch.randn(9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z.requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        terms, (gradient1, gradient2) = loss.value_and_gradient([z, z], 0.05, "gram")
        z.grad = gradient1 + gradient2
        return float(terms.total(0.05))

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    floor = loss.floor(9, 32, 0.05)
    assert floor <= closure() < floor * 1.2  # a bound, and near: not every frame is equiangular


def test_auto_takes_the_form_with_fewer_operations() -> None:
    assert loss.choose_form("auto", 256, 8192) == "gram"
    assert loss.choose_form("auto", 2048, 2048) == "cross"
    assert loss.choose_form("cross", 256, 8192) == "cross"
    # Two views, one pair: 3,000 x 2 < 1.5 x 4,096 just holds; each view more has pairs more.
    assert loss.choose_form("auto", 3000, 4096) == "gram"
    assert loss.choose_form("auto", 4000, 4096) == "cross"
    assert loss.choose_form("auto", 4000, 4096, views=4, pairs=6) == "gram"


Gradients = dict[loss.Form, list[torch.Tensor]]


def compare_with_one_rank(of_four_views: Gradients) -> None:
    """Runs on every rank: this rank's slices of global gradients, against the whole batch's."""
    with runtime.start() as process:
        for form, whole in of_four_views.items():
            for i in CASES:
                compare_pair(process.rank, i, form)
            compare_four_views(process.rank, form, whole)


def compare_pair(rank: int, i: int, form: loss.Form) -> None:
    z1, z2, lambd = case(i)
    rows = slice(rank * len(z1) // 2, (rank + 1) * len(z1) // 2)
    terms, gradients = loss.value_and_gradient([z1[rows], z2[rows]], lambd, form)
    torch.testing.assert_close(
        terms.total(lambd), PUBLISHED[f"loss.{i}.value"], atol=1e-12, rtol=1e-12
    )
    for gradient, view in zip(gradients, ("z1", "z2"), strict=True):
        expected = PUBLISHED[f"loss.{i}.grad_{view}"][rows]
        torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=1e-12)


def compare_four_views(rank: int, form: loss.Form, whole: list[torch.Tensor]) -> None:
    pairs = PAIRS["two large and two small"]
    z = several(pairs, 12, 20)
    half = len(z[0]) // 2
    rows = slice(rank * half, (rank + 1) * half)
    _, gradients = loss.value_and_gradient([v[rows] for v in z], 0.0051, form, pairs=pairs)
    expected = [gradient[rows] for gradient in whole]
    torch.testing.assert_close(gradients, expected, atol=EXACT, rtol=EXACT)


def test_two_ranks_return_their_slices_of_the_global_gradient_for_two_views_and_four() -> None:
    pairs = PAIRS["two large and two small"]
    of_four_views: Gradients = {}
    forms: tuple[loss.Form, ...] = ("gram", "cross")
    for form in forms:
        z = several(pairs, 12, 20)
        _, of_four_views[form] = loss.value_and_gradient(z, 0.0051, form, pairs=pairs)
    runtime.launch(2, compare_with_one_rank, (of_four_views,))
