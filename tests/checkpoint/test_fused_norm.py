"""The Triton kernel of uneven group norms, by Triton's interpreter: it needs no GPU, but Triton.

pytest tests/checkpoint/test_fused_norm.py
"""

import os
import subprocess
import sys

import pytest
import torch

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm

COMPARE = """
import torch
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm, fused_group_norm
torch.manual_seed(0)
norm = UnevenGroupNorm([3, 5, 1, 4], 1e-5, torch.randn(13), torch.randn(13)).eval()
for shape in ((2, 13, 6, 5), (1, 13, 80, 80), (3, 13, 17), (2, 13, 1, 1), (2, 13, 2, 4, 4)):
    for layout in (torch.contiguous_format, torch.channels_last)[: 1 + (len(shape) == 4)]:
        for dtype in (torch.float32, torch.bfloat16):
            x = (3 * torch.randn(shape) + 5).to(dtype).to(memory_format=layout)
            with torch.no_grad():
                expected = norm(x)
                found = fused_group_norm(x, norm.starts(x.device), 5, norm.weight, norm.bias, norm.eps)
            assert found.stride() == x.stride() and found.dtype == x.dtype
            near = 1e-2 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(found, expected, rtol=near, atol=1e-4)
"""


def test_it_computes_what_the_operators_do() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_main_memory_and_training_do_without_it() -> None:
    norm = UnevenGroupNorm([1, 2], 1e-5, torch.ones(3), torch.zeros(3))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert not norm.is_fused(x)
    assert not norm.is_fused(x.requires_grad_())
