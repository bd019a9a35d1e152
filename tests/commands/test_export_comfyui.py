"""`export --format comfyui`: one file in the naming of a model's authors, for what ComfyUI can tell apart."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.loaders import single_file_utils
from pipelines import FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file
from transformers_zoo import build, build_other

import gfprune_cli
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.deploy import comfyui
from gfprune_cli.deploy.comfyui import PREFIX, check_expressible, write_original
from gfprune_cli.deploy.original_names import NAMES
from gfprune_cli.errors import UsageError
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.removal import remove

UNET: dict[str, Any] = dict(
    sample_size=8, block_out_channels=(320, 320), layers_per_block=1, attention_head_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=768,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
XL: dict[str, Any] = UNET | dict(
    attention_head_dim=(5, 10, 10), cross_attention_dim=2048, use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    block_out_channels=(320, 640, 640), transformer_layers_per_block=(1, 2, 5),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def empty(cls: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config)


def refusal(model: Any, class_name: str = "") -> str:
    name = class_name or type(model).__name__
    component = Component(Path(), Path(), "", name, None, dict(model.config), (), {})
    try:
        check_expressible(component, model)
    except UsageError as error:
        return str(error).removeprefix("--format comfyui: ComfyUI cannot hold this network: ")
    return ""


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 as narrow and as shallow as ComfyUI takes it, in a pipeline."""
    folder = FAMILIES["stable-diffusion"](tmp_path_factory.mktemp("sd") / "sd")
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).half().save_pretrained(folder / "unet")
    return folder


def test_a_file_is_read_by_diffusers_single_file_loader(unet_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sd.safetensors"
    done = gfprune_cli.export(str(unet_folder), format="comfyui", dtype="fp16", out=out)
    assert done.files.keys() == {out.name}
    assert done.parity.max_rel < 1e-2
    source = UNet2DConditionModel.from_pretrained(unet_folder / "unet", torch_dtype=torch.float16)
    found = UNet2DConditionModel.from_single_file(
        str(out), config=str(unet_folder), subfolder="unet", torch_dtype=torch.float16, local_files_only=True
    )
    assert found.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in source.state_dict().items())
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["gfprune"])["record"]["export"]["recipe"]["format"] == "comfyui"
    counted = counts(load_file(out))
    assert counted == {
        "num_res_blocks": [1, 1],
        "transformer_depth": [1, 0],
        "middle": 1,
        "channel_mult": [1, 1],
    }


def counts(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What ComfyUI counts in the names and shapes of a U-Net (comfy/model_detection.py, in its order)."""
    names = [name.removeprefix(PREFIX) for name in tensors]
    assert all(name.startswith(PREFIX) for name in tensors)

    def count(prefix: str) -> int:
        found = {int(match[1]) for name in names if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
        assert found == set(range(len(found))), f"gaps in {prefix}"
        return len(found)

    blocks, depths, multiples = [0], [], [0]
    for number in range(1, count("input_blocks.")):
        if f"input_blocks.{number}.0.op.weight" in names:
            blocks.append(0)
            multiples.append(0)
            continue
        blocks[-1] += 1
        depths.append(count(f"input_blocks.{number}.1.transformer_blocks."))
        multiples[-1] = tensors[f"{PREFIX}input_blocks.{number}.0.out_layers.3.weight"].shape[0] // 320
    assert count("output_blocks.") == sum(number + 1 for number in blocks)
    middle = count("middle_block.1.transformer_blocks.")
    return {
        "num_res_blocks": blocks,
        "transformer_depth": depths,
        "middle": middle,
        "channel_mult": multiples,
    }


def test_uneven_depth_is_numbered_without_gaps() -> None:
    """Which diffusers' own converter does not read: it takes one number of layers for all stages."""
    model = empty(UNet2DConditionModel, **UNET | dict(layers_per_block=[1, 2], mid_block_type=None))
    assert refusal(model) == ""
    found = {
        PREFIX + name: value
        for name, value in NAMES["UNet2DConditionModel"](model, model.state_dict()).items()
    }
    assert counts(found) == {
        "num_res_blocks": [1, 2], "transformer_depth": [1, 0, 0], "middle": 0, "channel_mult": [1, 1],
    }  # fmt: skip
    assert len(found) == len(model.state_dict())


def test_a_short_flux_and_wan_are_read_by_diffusers_converters() -> None:
    """Rows as wide as diffusers' converter takes them to be, and two columns: it looks at rows alone."""
    flux = empty(
        FluxTransformer2DModel, num_layers=2, num_single_layers=1, in_channels=4, joint_attention_dim=8,
        pooled_projection_dim=8, guidance_embeds=True,
    )  # fmt: skip
    assert refusal(flux) == ""
    wan = build("wan")
    converters: list[tuple[Any, str, Callable[..., Any]]] = [
        (flux, "FluxTransformer2DModel", single_file_utils.convert_flux_transformer_checkpoint_to_diffusers),
        (wan, "WanTransformer3DModel", single_file_utils.convert_wan_transformer_to_diffusers),
    ]
    for model, name, convert in converters:
        torch.manual_seed(0)
        state = {
            key: torch.rand(value.shape[0], 2)[:, : value.ndim] for key, value in model.state_dict().items()
        }
        original = {PREFIX + key: value for key, value in NAMES[name](model, state).items()}
        found = convert(dict(original))
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_qwen_image_is_read_by_diffusers_single_file_loader(tmp_path: Path) -> None:
    """Which knows its names without a prefix alone."""
    source, _ = build_other("QwenImageTransformer2DModel")
    source.float().save_pretrained(tmp_path / "transformer")
    out = tmp_path / "qwen.safetensors"
    write_original(out, source, {})
    found = QwenImageTransformer2DModel.from_single_file(
        str(out), config=str(tmp_path), subfolder="transformer", local_files_only=True
    )
    assert found.state_dict().keys() == source.state_dict().keys() == load_file(out).keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in source.state_dict().items())
    assert refusal(empty(QwenImageTransformer2DModel, num_layers=1)) == ""


SD3: dict[str, Any] = dict(
    sample_size=8, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64, num_layers=3,
    num_attention_heads=3, joint_attention_dim=8, caption_projection_dim=192, pooled_projection_dim=8,
    pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0, 1),
)  # fmt: skip


@pytest.mark.parametrize("dual", [(), (0, 1)], ids=["sd3", "sd3.5"])
def test_sd3_is_read_by_diffusers_single_file_loader(
    dual: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many blocks as heads: what ComfyUI counts in the width of the patches is what there is.

    diffusers' converter is told the width of the text: it knows that of the two published sizes alone.
    """
    monkeypatch.setattr(single_file_utils, "get_caption_projection_dim", lambda checkpoint: 192)
    folder = FAMILIES["sd3"](tmp_path / "sd3")
    torch.manual_seed(0)
    source = SD3Transformer2DModel(**SD3 | dict(dual_attention_layers=dual))
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    source.save_pretrained(folder / "transformer")
    out = tmp_path / "sd3.safetensors"
    gfprune_cli.export(str(folder), format="comfyui", out=out)
    found = SD3Transformer2DModel.from_single_file(
        str(out), config=str(folder), subfolder="transformer", local_files_only=True
    )
    assert found.state_dict().keys() == source.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in source.state_dict().items())
    names = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(out).items()}
    blocks = {int(name.split(".")[1]) for name in names if name.startswith("joint_blocks.")}
    assert blocks == set(range(names["x_embedder.proj.weight"].shape[0] // 64))
    again = [int(name.split(".")[1]) for name in names if name.endswith(".x_block.attn2.qkv.weight")]
    assert sorted(again) == list(dual)


@pytest.mark.thorough  # uneven depths and the names of an SDXL have tests of their own
def test_an_sdxl_without_some_blocks_comes_back_through_diffusers_loader(tmp_path: Path) -> None:
    """Blocks removed as the native layout removes them, to a depth that ComfyUI knows (KOALA's)."""
    folder = FAMILIES["sdxl"](tmp_path / "sdxl")
    torch.manual_seed(0)
    deep = UNet2DConditionModel(
        **XL | dict(
            block_out_channels=(320, 320, 320), attention_head_dim=(5, 5, 5), mid_block_type=None,
            transformer_layers_per_block=(1, 2, 6), reverse_transformer_layers_per_block=(1, 1, 1),
        )
    ).half()  # fmt: skip
    groups = block_groups(deep, stock=True)
    gone = "down_blocks.2.attentions.0.transformer_blocks.3"
    kept = {group.name: torch.tensor([group.name != gone]) for group in groups}
    short: Any = remove(deep, groups, kept)
    assert type(short) is UNet2DConditionModel
    before, after = deep.state_dict(), short.state_dict()
    moved = gone.replace("blocks.3", "blocks.4")
    assert all(
        torch.equal(after[name.replace(moved, gone)], before[name]) for name in before if moved in name
    )
    short.save_pretrained(folder / "unet")
    assert refusal(deep) == refusal(short) == ""
    out = tmp_path / "short.safetensors"
    gfprune_cli.export(str(folder), format="comfyui", dtype="fp16", out=out)
    found = UNet2DConditionModel.from_single_file(
        str(out), config=str(folder), subfolder="unet", torch_dtype=torch.float16, local_files_only=True
    )
    assert found.state_dict().keys() == after.keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in after.items())
    assert counts(load_file(out))["transformer_depth"] == [0, 2, 5]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: empty(UNet2DConditionModel, **UNET), ""),
        (lambda: empty(UNet2DConditionModel, **XL), ""),
        (
            lambda: empty(UNet2DConditionModel, **XL | dict(transformer_layers_per_block=(1, 2, 4))),
            r"of SDXL it knows",
        ),
        (
            lambda: empty(UNet2DConditionModel, **UNET | dict(block_out_channels=(320, 448))),
            r"a stage of 448 channels is no multiple of the first one's 320",
        ),
        (lambda: empty(UNet2DConditionModel, **UNET | dict(attention_head_dim=4)), r"it expects 8 heads"),
        (lambda: build("flux"), r"heads of 128 channels"),
        (lambda: empty(SD3Transformer2DModel, **SD3), ""),
        (
            lambda: empty(SD3Transformer2DModel, **SD3 | dict(num_layers=2)),
            r"blocks from their width.*of 192 channels it expects 3 blocks, and this one has 2",
        ),
        (lambda: build("sd3"), r"heads of 64 channels"),
        (lambda: build("pixart"), r"no file format for PixArtTransformer2DModel here"),
        (
            lambda: empty(QwenImageTransformer2DModel, num_layers=1, num_attention_heads=2),
            r"24 heads of 128",
        ),
    ],
)  # fmt: skip
def test_what_comfyui_would_misread_is_refused_with_the_reason(model: Callable[[], Any], reason: str) -> None:
    found = refusal(model())
    assert re.search(reason, found) if reason else found == ""


def test_the_adaptive_layout_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    model = empty(UNet2DConditionModel, **UNET)
    assert "prune with --layout native" in refusal(model, "PrunedUNet2DConditionModel")
    with pytest.raises(UsageError, match="no file format for UNet2DModel"):
        gfprune_cli.export(str(pipeline_folder), format="comfyui", out=tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"one file is written: give it a name that ends in \.safetensors"):
        gfprune_cli.export(str(pipeline_folder), format="comfyui", out=tmp_path / "folder")


def test_tensors_without_a_name_of_the_authors_are_refused() -> None:
    """They would go into the file under diffusers' names, which nobody reads."""
    assert not refusal(empty(UNet2DConditionModel, **UNET))
    left = refusal(empty(UNet2DConditionModel, **UNET, time_cond_proj_dim=8))
    assert left == "its authors have no name for time_embedding.cond_proj.weight"


def test_a_v_prediction_that_the_file_cannot_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    monkeypatch.setattr(comfyui, "load_scheduler", lambda component: scheduler)
    assert "v prediction" in refusal(empty(UNet2DConditionModel, **UNET))
