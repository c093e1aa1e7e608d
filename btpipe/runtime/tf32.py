"""Whether a GPU multiplies float32 in float32, or in TF32 because a setting outside btpipe says so.

TF32 keeps ten bits of a factor's mantissa. The loss's Gram product is computed in float32: its
off-diagonal terms are small differences of sums over a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from btpipe.errors import MachineError

if TYPE_CHECKING:
    import torch

TERMS = 256
FACTOR = 1 + 2**-12
"""Exact in float32, 1 in TF32."""


def require_float32_products(device: torch.device) -> None:
    """Passes where this device's float32 products are not TF32's; once a run is enough.

    Raises:
        MachineError: they are, by the environment or by torch's settings.
    """
    if device.type != "cuda":
        return
    import torch

    factors = torch.full((TERMS, TERMS), FACTOR, device=device)
    if is_tf32(factors @ torch.ones_like(factors)):
        raise MachineError(
            f"float32 products are computed in TF32: {TERMS} times 1 + 2^-12 gives {TERMS}",
            where=device,
            expected=f"{TERMS * FACTOR}, which float32 has exactly",
            fix="unset NVIDIA_TF32_OVERRIDE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, or, in Python,"
            " torch.set_float32_matmul_precision('highest')",
        )


def is_tf32(sums: torch.Tensor) -> bool:
    """Whether any of these sums of `TERMS` times `FACTOR` is what TF32 makes of it.

    Both numbers and all sums on the way are exact in float32. What is neither, such as zero, is
    another matter.
    """
    return bool((sums == TERMS).any())
