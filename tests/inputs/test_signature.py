"""What a bare network takes, from the names of its arguments and its configuration."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers_zoo import build_other, randomise

import gfprune_cli
from gfprune_cli.diffusion.conditions import AFTER
from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Sizes
from gfprune_cli.inputs.made_up import made_up
from gfprune_cli.inputs.signature import inputs_by_name
from gfprune_cli.progress import silent

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


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
ROPE = {"axes_dims_rope": (4, 2, 2)}
# class -> configuration, and what a bare network of it is found to take: [1, ...] tensors by their shapes
BARE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "QwenImageTransformer2DModel": (
        {**HEADS, **ROPE, "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 12},
        {"hidden_states": (1, 256, 16), "encoder_hidden_states": (1, 8, 12), "img_shapes": [[(1, 16, 16)]]},
    ),
    "Krea2Transformer2DModel": (  # states of several layers of a text encoder, and positions of all tokens
        {
            **HEADS,
            **ROPE,
            "in_channels": 16,
            "num_layers": 1,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 12,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
        },
        {"hidden_states": (1, 256, 16), "encoder_hidden_states": (1, 8, 3, 12), "position_ids": (264, 3)},
    ),
    "HunyuanVideo15Transformer3DModel": (  # an image and a mask behind the noise, and arguments that are not
        {  # as optional as their defaults
            **HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 12,
            "text_embed_2_dim": 20,
            "image_embed_dim": 16,
            "rope_axes_dim": (2, 2, 4),
        },
        {"encoder_hidden_states_2": (1, 8, 20), "image_embeds": (1, 8, 16)},
    ),
    "AnyFlowTransformer3DModel": (  # a noise level for each frame, told twice
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_dim": 12, "ffn_dim": 16,
         "freq_dim": 8, "rope_max_seq_len": 32},
        {"hidden_states": (1, 4, 4, 16, 16), "timestep": (1, 4), "r_timestep": (1, 4)},
    ),
    "MotifVideoTransformer3DModel": (  # likewise an image and a mask
        {**HEADS, "in_channels": 9, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
         "num_decoder_layers": 0, "patch_size": 1, "text_embed_dim": 12, "rope_axes_dim": (2, 2, 4)},
        {"hidden_states": (1, 9, 4, 16, 16), "encoder_hidden_states": (1, 8, 12)},
    ),
    "PriorTransformer": (  # no picture at all, and as many tokens as the configuration says
        {**HEADS, "num_layers": 1, "embedding_dim": 12, "num_embeddings": 5, "additional_embeddings": 4},
        {"hidden_states": (1, 12), "proj_embedding": (1, 12), "encoder_hidden_states": (1, 5, 12)},
    ),
}  # fmt: skip


def bare(name: str) -> Any:
    return randomise(getattr(diffusers, name)(**BARE[name][0]), 0, torch.float32)


@pytest.mark.parametrize("name", BARE)
def test_a_bare_network_is_given_what_its_layers_read(name: str) -> None:
    inputs = inputs_by_name(bare(name), Sizes())
    for argument, expected in BARE[name][1].items():
        value = inputs[argument]
        assert (tuple(value.shape) if isinstance(value, torch.Tensor) else value) == expected, argument


@pytest.mark.parametrize(
    "name",
    ["QwenImageTransformer2DModel", "MotifVideoTransformer3DModel", "AnyFlowTransformer3DModel"],
)
def test_removal_is_exact_on_what_is_made_up(name: str, tmp_path: Path) -> None:
    """Lists with an entry for each sample, joined channels and noise levels of frames, in batches."""
    bare(name).save_pretrained(tmp_path / "model")
    brief = dict(sparsity=0.1, budget="params", images=4, sample_steps=1, draws=2, recover=0, fold=0)
    done = gfprune_cli.prune(str(tmp_path / "model"), out=tmp_path / "out", **brief)
    assert done.loss["removed"] == pytest.approx(done.loss["masked"], rel=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("QwenImageTransformer2DModel", 1e-3), ("PriorTransformer", 1)])
def test_timesteps_are_told_as_the_network_counts_them(name: str, factor: float) -> None:
    """Qwen-Image makes thousands of them itself."""
    conditions = made_up(bare(name), 2, 0, silent).conditions
    assert conditions.time_factor == factor


def test_what_is_not_noise_stays_as_it_is_for_every_sample() -> None:
    """The channels that are joined to the noise are drawn, a mask of ones is not."""
    recording = made_up(bare("HunyuanVideo15Transformer3DModel"), 2, 0, silent)
    tensors = recording.conditions.tensors
    assert recording.shape == (4, 4, 16, 16)
    assert tensors[AFTER].shape == (2, 1, 5, 4, 16, 16)
    assert tensors[AFTER].std() == pytest.approx(1, abs=0.1)
    assert tensors["encoder_attention_mask"].eq(1).all()


def test_what_nothing_says_is_named() -> None:
    """Lumina-Next is given complex rotations, which only its pipeline makes."""
    tiny = dict(sample_size=4, in_channels=4, hidden_size=8, num_layers=1, num_attention_heads=1)
    model = diffusers.LuminaNextDiT2DModel(**tiny, num_kv_heads=1, cross_attention_dim=8)
    with pytest.raises(GfpruneError, match=r"is given as image_rotary_emb, .* its pipeline is needed"):
        inputs_by_name(model, Sizes())
