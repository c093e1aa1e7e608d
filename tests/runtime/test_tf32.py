"""Products of float32 numbers, and of the same numbers as TF32 keeps them."""

import torch

from btpipe import runtime
from btpipe.runtime import tf32


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 with ten bits of mantissa, the nearest."""
    dropped = 23 - 10
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (dropped - 1))) >> dropped << dropped).view(torch.float32)


def products(keep: bool) -> torch.Tensor:
    factors = torch.full((tf32.TERMS, tf32.TERMS), tf32.FACTOR)
    if not keep:
        factors = rounded_to_tf32(factors)
    return factors @ torch.ones_like(factors)


def test_products_in_tf32_are_told_from_those_in_float32() -> None:
    assert tf32.is_tf32(products(keep=False))
    assert not tf32.is_tf32(products(keep=True))
    assert (products(keep=True) == tf32.TERMS * tf32.FACTOR).all()  # exact, in any order


def test_the_rounding_of_this_test_keeps_ten_bits() -> None:
    kept, dropped = 1 + 2.0**-10, 1 + 2.0**-12
    assert rounded_to_tf32(torch.tensor([kept, dropped])).tolist() == [kept, 1]


def test_a_result_that_is_neither_is_not_taken_for_tf32() -> None:
    """A GPU that computes nothing is for the self-test to find."""
    assert not tf32.is_tf32(torch.zeros(4, 4))
    assert not tf32.is_tf32(torch.full((4, 4), torch.nan))


def test_no_device_here_computes_in_tf32() -> None:
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime.require_float32_products(on)
