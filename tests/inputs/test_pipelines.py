"""The tiny pipelines that other tests prune: each runs in plain diffusers, and nothing in it is constant."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import COMPONENTS, FAMILIES, sample
from safetensors.torch import load_file


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_small_and_runs(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / family)
    weights = load_file(next((folder / COMPONENTS[family]).glob("*.safetensors")))
    constant = [
        name for name, value in weights.items() if value.numel() > 1 and value.double().std(correction=0) == 0
    ]

    made = sample(family, folder)

    values = made.detach().numpy() if isinstance(made, torch.Tensor) else np.asarray(made)
    assert values.size > 0
    assert np.isfinite(values).all()
    assert values.std() > 0
    assert constant == []
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 2 * 10**6
