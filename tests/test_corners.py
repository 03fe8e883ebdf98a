"Kernels where numbers, shapes and types are unusual; on a CPU in Triton's interpreter."
import os
from contextlib import nullcontext
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA: os.environ["TRITON_INTERPRET"] = "1"

from ftkit.kernels.fp8 import quantize_rows, scaled_linear
from ftkit.kernels.launch import interpreted
from ftkit.quant.fp8 import E4M3, from_fp8, to_fp8

DEV = "cuda" if CUDA else "cpu"
kernels = nullcontext if CUDA else interpreted


@pytest.mark.parametrize("width", [48, 40000])
def test_rows_of_next_to_nothing_are_zeros(width):
    x = torch.zeros(3, width, device=DEV)
    x[0,3],x[1,5],x[2,7] = 1e-40,3e-37,1e-30
    with kernels(): codes,scales = quantize_rows(x)
    for c,s in (codes, scales), to_fp8(x):
        found = from_fp8(c, s)
        assert found.isfinite().all() and (found[:2] == 0).all() and (s[:2] == 1).all()
        torch.testing.assert_close(found[2], x[2], rtol=1e-6, atol=0)


def test_no_tokens_in_eight_bits():
    w = torch.ones(32, 16, device=DEV).to(E4M3)
    x,scales = torch.empty(0, 16, device=DEV).to(E4M3),torch.empty(0, 1, device=DEV)
    assert scaled_linear(x, scales, w).shape == (0, 32)
