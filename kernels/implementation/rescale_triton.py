"""Multiply a gradient by a factor that is nearly always 1, in Triton, without synchronising host and GPU."""

# mypy: disable-error-code="no-untyped-def"
# (kernel arguments have their types in comments: Triton interprets annotations itself)

import triton
import triton.language as tl
from torch import Tensor

from distilspeed.kernels.implementation.backend import launch_device

TILE, NUM_WARPS = 1024, 4


@triton.jit
def rescale_kernel(
    gradient_ptr,  # [rows, WIDTH] fp16, bf16 or fp32
    factor_ptr,  # [] fp32
    gradient_stride,  # elements from one row to the next
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TOLERANCE: tl.constexpr,  # a factor this close to 1 counts as 1
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr)
    if not (tl.abs(factor - 1.0) <= TOLERANCE):  # not ">", which is false for NaN
        for start in range(0, WIDTH, TILE):
            columns = start + tl.arange(0, TILE)
            pointers = gradient_ptr + row * gradient_stride + columns
            gradient = tl.load(pointers, mask=columns < WIDTH).to(tl.float32) * factor
            tl.store(pointers, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < WIDTH)


def rescale(gradient: Tensor, factor: Tensor, tolerance: float) -> None:
    """Multiply [rows, width] in place by ``factor``, a 0-dim float32 tensor on the same device.

    A factor within ``tolerance`` of 1 leaves the gradient unread and unchanged.
    """
    num_rows, width = gradient.shape
    if num_rows > 0:
        with launch_device(gradient):
            rescale_kernel[(num_rows,)](
                gradient,
                factor,
                gradient.stride(0),
                width,
                TILE,
                tolerance,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
