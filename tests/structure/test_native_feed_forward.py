"""The native layout of Wan, whose configuration has one key for the width of all feed-forward layers."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from pipelines import FAMILIES

import gfprune_cli
from gfprune_cli.errors import UsageError


@pytest.mark.slow
def test_feed_forward_layers_narrow_alike_and_load_in_the_stock_class(tmp_path: Path) -> None:
    dense = FAMILIES["wan"](tmp_path / "dense")
    narrow = WanTransformer3DModel.from_pretrained(dense / "transformer")
    torch.manual_seed(0)
    wide = WanTransformer3DModel.from_config(dict(narrow.config) | {"ffn_dim": 192})
    wide.save_pretrained(dense / "transformer")
    out = tmp_path / "native"
    done = gfprune_cli.prune(
        str(dense), layout="native", sparsity=0.2, budget="params", out=out,
        draws=4, recover=1, one_shot=True, images=2, sample_steps=1, size="16", frames=5,
    )  # fmt: skip
    stock = WanTransformer3DModel.from_pretrained(out / "transformer")
    assert stock.config.ffn_dim in (64, 128)
    assert sum(parameter.numel() for parameter in stock.parameters()) == done.params["after"]
    assert done.loss["masked"] == pytest.approx(done.loss["removed"], rel=1e-4)
    planned = gfprune_cli.prune(str(dense), layout="native", sparsity=0.2, budget="params", dry_run=True)
    assert planned.params == done.params


def test_layers_that_cannot_narrow_are_refused_and_not_copied(tmp_path: Path) -> None:
    """A width of one step, and targets below what one step takes away."""
    dense = FAMILIES["wan"](tmp_path / "dense")
    plan = dict(layout="native", budget="params", dry_run=True, size="16", frames=5)
    with pytest.raises(UsageError, match=r"feed-forward layers of \d+ cannot shrink by steps of \d+"):
        gfprune_cli.prune(str(dense), sparsity=0.3, **plan)
    wide = WanTransformer3DModel.from_config(
        dict(WanTransformer3DModel.from_pretrained(dense / "transformer").config) | {"ffn_dim": 192}
    )
    wide.save_pretrained(dense / "transformer")
    planned = gfprune_cli.prune(str(dense), sparsity=0.01, **plan)
    assert planned.params["after"] < planned.params["before"]
