"""A model in one file, in the naming of its authors: read through diffusers' loaders into the cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import hub_server
from image_pipelines import PIPELINES
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy.comfyui import PREFIX, write_original
from gfprune_cli.errors import GfpruneError, UsageError

BLOCKS = {  # of the tiny U-Net, as Stable Diffusion's authors number them
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_name(name: str) -> str:
    block = next(block for block in BLOCKS if name.startswith(f"{block}."))
    rest = name.removeprefix(f"{block}.")
    if "resnets" in block:
        layer, _, leaf = rest.partition(".")
        rest = f"{LAYERS[layer]}.{leaf}"
    return f"model.diffusion_model.{BLOCKS[block]}.{rest}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["stable-diffusion"](tmp_path_factory.mktemp("one-file") / "folder")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """U-Net and text encoder, other than those of the folder, half precision."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {original_name(name): (2 * value).half() for name, value in unet.items()}
    tensors |= {
        f"cond_stage_model.transformer.text_model.{name}": (2 * value).half() for name, value in text.items()
    }
    path = folder.parent / "civitai.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path


@pytest.mark.slow
def test_a_file_is_pruned_like_its_folder(folder: Path, file: Path, tmp_path: Path) -> None:
    """Network and text encoder come from the file, in its precision; the rest from --config-from."""
    settings: dict[str, Any] = dict(one_shot=True, refit=False, recover=0, images=4, sample_steps=2, draws=4)
    found = gfprune_cli.prune(file, config_from=str(folder), sparsity=0.3, out=tmp_path / "out", **settings)
    assert found.class_name == "PrunedUNet2DConditionModel"
    record = json.loads((tmp_path / "out" / "gfprune.json").read_text())
    assert record["source"]["label"] == str(file)
    assert record["recipe"]["config_from"] == str(folder)
    pruned = gfprune_cli.load(tmp_path / "out").state_dict()
    dense = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(pruned["conv_out.bias"], (2 * dense["conv_out.bias"]).half())
    text = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    before = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(torch.equal(text[name].float(), (2 * value).half().float()) for name, value in before.items())
    assert load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")[
        "conv_in.bias"
    ].dtype == (torch.float16)
    tuned = gfprune_cli.finetune(
        tmp_path / "out", steps=1, images=4, sample_steps=2, batch=2, out=tmp_path / "tuned"
    )
    assert tuned.teacher == str(file)


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("sdxl", PREFIX),
        *((family, prefix) for family in ("sd3", "wan", "qwen-image") for prefix in (PREFIX, "")),
    ],
)  # of SDXL there are no files without it
def test_the_denoiser_of_a_family_is_read_as_it_was(family: str, prefix: str, tmp_path: Path) -> None:
    """Under the names of its authors, each tensor: not one is lost, and none comes from --config-from.

    Not FLUX.1: diffusers' converter takes it to be as wide as it was published.
    """
    folder = (FAMILIES | PIPELINES)[family](tmp_path / "folder")
    network = load_model(inspect(resolve(str(folder))))
    torch.manual_seed(1)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "one.safetensors"
    write_original(path, network, {})
    save_file({prefix + name.removeprefix(PREFIX): value for name, value in load_file(path).items()}, path)
    found = load_model(inspect(resolve(str(path), config_from=str(folder)))).state_dict()
    expected = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_folder_with_one_file_is_that_file(folder: Path, file: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / file.name).write_bytes(file.read_bytes())
    first = resolve(str(tmp_path / "alone"), config_from=str(folder)).folder
    assert first == resolve(str(file), config_from=str(folder)).folder
    assert (first / "unet" / "config.json").is_file()
    assert not list(first.rglob("*.bin"))


@pytest.mark.slow
def test_a_file_on_the_hub(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gfprune: Any
) -> None:
    """owner/name/file.safetensors: that file alone is fetched, at one commit."""
    repo = tmp_path / "repo" / "models"
    repo.mkdir(parents=True)
    (repo / "one.safetensors").write_bytes(file.read_bytes())
    (repo / "two.safetensors").write_bytes(b"not asked for")
    with hub_server({"owner/name": repo.parent}) as hub:
        ask = [
            "analyze",
            "--model",
            "owner/name/models/one.safetensors",
            "--config-from",
            folder,
            "--json",
            "-q",
        ]
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        done = gfprune(*ask, **settings)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["class_name"] == "UNet2DConditionModel"
        assert hub.downloads() == ["models/one.safetensors"]
        missing = gfprune("analyze", "--model", "owner/name/three.safetensors", "-q", **settings)
        assert "has no file 'three.safetensors'" in missing.stderr


class TestRefused:
    def test_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(UsageError, match="quantized blocks"):
            resolve(str(tmp_path / "model.gguf"))

    @pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.txt"])
    def test_other_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04 a pickle")
        with pytest.raises(UsageError, match="no pickle"):
            resolve(str(tmp_path / name))

    @pytest.mark.parametrize(
        ("name", "dtype", "message"),
        [
            ("unet.a.lora_A.weight", torch.float32, "is a LoRA"),
            ("model.diffusion_model.a.weight_scale", torch.float32, "is quantized"),
            ("model.diffusion_model.a.weight", torch.uint8, "is quantized"),
        ],
    )
    def test_what_is_no_network(self, tmp_path: Path, name: str, dtype: torch.dtype, message: str) -> None:
        save_file({name: torch.ones(2, 2, dtype=dtype)}, tmp_path / "a.safetensors")
        with pytest.raises(GfpruneError, match=message):
            resolve(str(tmp_path / "a.safetensors"))

    def test_another_family(self, file: Path, tmp_path: Path) -> None:
        other = FAMILIES["sdxl"](tmp_path / "other")
        with pytest.raises(GfpruneError, match=r"name a folder of its family|does not hold"):
            resolve(str(file), config_from=str(other))

    def test_weights_that_are_nowhere(self, folder: Path, file: Path, tmp_path: Path) -> None:
        configured = tmp_path / "configured"
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                copy = configured / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        with pytest.raises(GfpruneError, match="does not hold vae"):
            resolve(str(file), config_from=str(configured))

    def test_the_configuration_that_diffusers_would_fetch(self, file: Path) -> None:
        with pytest.raises(GfpruneError, match=r"needs the configuration of .*/.* name a diffusers folder"):
            resolve(str(file), offline=True)

    def test_the_flag_without_a_file(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="--config-from is for models in one file"):
            resolve(str(folder), config_from=str(folder))

    def test_a_network_saved_with_an_adapter_attached(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "attached"
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "unet" / "config.json").read_bytes())
        tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        tensors["conv_in.base_layer.weight"] = tensors.pop("conv_in.weight")
        save_file(tensors, copy / "diffusion_pytorch_model.safetensors")
        with pytest.raises(GfpruneError, match="PEFT adapter attached"):
            gfprune_cli.load(copy)
