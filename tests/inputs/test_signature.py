"""What a bare network takes, from the names of its arguments and its configuration."""

from pathlib import Path

import pytest
from transformers_zoo import build_other

import gfprune_cli
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Sizes
from gfprune_cli.inputs.signature import inputs_by_name

TOLD = {
    "ChromaTransformer2DModel": (1, 256, 16),
    "AuraFlowTransformer2DModel": (1, 4, 8, 8),
    "Lumina2Transformer2DModel": (1, 4, 8, 8),
    "HunyuanVideoTransformer3DModel": (1, 4, 4, 16, 16),
    "Flux2Transformer2DModel": (1, 256, 16),
}


@pytest.mark.parametrize("name", TOLD)
def test_the_sample_has_the_layout_that_the_network_takes(name: str) -> None:
    model, _ = build_other(name)
    inputs = inputs_by_name(model.float(), Sizes())
    assert tuple(inputs["hidden_states"].shape) == TOLD[name]
    assert {"encoder_hidden_states", "timestep"} <= inputs.keys()


def test_a_bare_folder_is_pruned_without_its_pipeline(tmp_path: Path) -> None:
    model, _ = build_other("AuraFlowTransformer2DModel")
    model.float().save_pretrained(tmp_path / "model")
    brief = dict(sparsity=0.2, images=4, sample_steps=1, draws=2, recover=1, fold=0)
    done = gfprune_cli.prune(str(tmp_path / "model"), out=tmp_path / "out", **brief)
    assert abs(done.sparsity["achieved"] - 0.2) < 0.01
    assert done.loss["removed"] == pytest.approx(done.loss["masked"], rel=1e-4)


def test_what_nothing_says_is_named() -> None:
    """Qwen-Image is told the shapes of its images as a list, which no key describes."""
    model, _ = build_other("QwenImageTransformer2DModel")
    with pytest.raises(GfpruneError, match="its pipeline is needed"):
        inputs_by_name(model.float(), Sizes())
