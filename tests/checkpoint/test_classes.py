"""Checkpoints of every class: which are accepted, the one modeling file, and what travels with a result."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import TINY
from networks import randomise
from safetensors.torch import load_file, save_file
from torch import nn

import gfprune_cli
from gfprune_cli.checkpoint.layout import is_autoencoder, is_denoiser, locate, predicts
from gfprune_cli.checkpoint.modeling import gfprune_models_v2 as modeling
from gfprune_cli.checkpoint.reader import build_meta, cast_model, inspect, load_model
from gfprune_cli.checkpoint.shards import write_weights
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.checkpoint.writer import (
    absent_parts,
    check_pipeline,
    copy_component,
    copy_pipeline,
    stored_dtype,
)
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.pruning.verify import random_part
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

CONDITIONAL: dict[str, Any] = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=8,
    attention_head_dim=4,
)
AUTOENCODER: dict[str, Any] = dict(
    block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, layers_per_block=1
)
DIT: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
)
WAN: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
    ffn_dim=16, num_layers=1,
)  # fmt: skip
NARROW = {
    "down_blocks.0.resnets.0.conv1": {"in": 8, "out": 4},
    "down_blocks.0.resnets.0.time_emb_proj": {"in": 32, "out": 4},
    "down_blocks.0.resnets.0.norm2": {"groups": [1, 2, 1]},
    "down_blocks.0.resnets.0.conv2": {"in": 4, "out": 8},
    "down_blocks.0.attentions.0.transformer_blocks.0": {"identity": True},
}
LOAD_ELSEWHERE = """
import sys
sys.modules["gfprune_cli"] = None  # an environment without gfprune
import torch
from diffusers import AutoModel
from safetensors.torch import save_file
source, saved, half, results = sys.argv[1:]
inputs = torch.load(results, weights_only=True)
found = {}
model = AutoModel.from_pretrained(source, trust_remote_code=True)
found["first"] = model(**inputs).sample
model.save_pretrained(saved)
again = AutoModel.from_pretrained(saved, trust_remote_code=True)
found["again"] = again(**inputs).sample
again.half().save_pretrained(half, variant="fp16")
options = dict(variant="fp16", torch_dtype=torch.float16)
small = AutoModel.from_pretrained(half, trust_remote_code=True, **options)
for name, tensor in small.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
save_file({name: tensor.detach() for name, tensor in found.items()}, saved + "/found.safetensors")
"""


def look(folder: Path, **options: Any) -> Any:
    return inspect(resolve(str(folder)), **options)


def conditional_inputs() -> dict[str, Any]:
    source = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=source),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=source),
    }


def pipeline(folder: Path, **components: nn.Module | list[str]) -> Path:
    """A pipeline folder of models as diffusers saves them, and of other components by their index entry."""
    index: dict[str, Any] = {"_class_name": "DiffusionPipeline", "_diffusers_version": diffusers.__version__}
    for name, component in components.items():
        if isinstance(component, list):
            index[name] = component
            continue
        network: Any = component
        network.save_pretrained(folder / name)
        index[name] = ["diffusers", type(component).__name__]
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "UNet2DModel", "UNet2DConditionModel", "UNet3DConditionModel", "UNet1DModel", "Kandinsky3UNet",
            "UVit2DModel", "DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel",
            "FluxTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel", "UNetMotionModel",
            "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel", "StableAudioDiTModel",
        ],
    )  # fmt: skip
    def test_denoisers(self, name: str) -> None:
        assert is_denoiser("diffusers", name)
        assert is_denoiser("gfprune_models_v2", f"Pruned{name}")
        assert not is_denoiser("transformers", name)
        assert not is_autoencoder(name)
        assert issubclass(modeling.pruned_class(name), getattr(diffusers, name))

    @pytest.mark.parametrize("name", ["AutoencoderKL", "VQModel"])
    def test_autoencoders(self, name: str) -> None:
        assert is_denoiser("diffusers", name)
        assert is_autoencoder(name)
        assert is_autoencoder(f"Pruned{name}")

    @pytest.mark.parametrize("name", ["ControlNetModel", "T2IAdapter", "SD3ControlNetModel"])
    def test_what_adds_to_a_denoiser(self, name: str) -> None:
        assert is_denoiser("diffusers", name)
        assert not predicts(name)
        assert not predicts(f"Pruned{name}")

    @pytest.mark.parametrize(
        "name",
        [
            "ControlNetUnionModel",
            "UNetControlNetXSModel",
            "MultiAdapter",
            "CLIPTextModel",
            "AutoModel",
            "ModelMixin",
            "os",
        ],
    )
    def test_other_classes(self, name: str) -> None:
        assert not is_denoiser("diffusers", name)

    @pytest.mark.parametrize(
        "name", ["PrunedNothing", "PrunedAutoModel", "Prunedos", "Pruned", "anything", "__path__x"]
    )
    def test_the_modeling_file_makes_only_models_of_diffusers(self, name: str) -> None:
        with pytest.raises(AttributeError):
            getattr(modeling, name)


class TestComponents:
    def test_the_denoiser_is_the_default_and_the_autoencoder_has_to_be_named(self, tmp_path: Path) -> None:
        unet, vae = diffusers.UNet2DConditionModel(**CONDITIONAL), diffusers.AutoencoderKL(**AUTOENCODER)
        folder = pipeline(tmp_path / "sd", vae=vae, unet=unet, text_encoder=["transformers", "CLIPTextModel"])
        assert locate(folder).name == "unet"
        assert locate(folder, "vae").class_name == "AutoencoderKL"
        with pytest.raises(UsageError, match="choose vae or unet"):
            locate(folder, "text_encoder")

    def test_transformer_before_its_second(self, tmp_path: Path) -> None:
        model = diffusers.DiTTransformer2DModel(**DIT)
        folder = pipeline(tmp_path / "wan", transformer_2=model, transformer=model)
        assert locate(folder).name == "transformer"
        assert locate(folder, "transformer_2").name == "transformer_2"

    def test_an_autoencoder_is_never_taken_for_a_denoiser(self, tmp_path: Path) -> None:
        vae = diffusers.AutoencoderKL(**AUTOENCODER)
        folder = pipeline(tmp_path / "odd", vae=vae, prior=["somewhere", "Denoiser"])
        with pytest.raises(GfpruneError, match="names no denoiser"):
            locate(folder)
        assert look(folder, component="vae").class_name == "AutoencoderKL"
        assert look(folder / "vae").class_name == "AutoencoderKL"


PIPELINE_ELSEWHERE = """
import sys
sys.modules["gfprune_cli"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
source, saved, tensors = sys.argv[1:]
given = load_file(tensors)
images = {}
for step, folder in enumerate((source, saved)):
    without = dict(text_encoder=None, tokenizer=None)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **without)
    pipeline.set_progress_bar_config(disable=True)
    images[str(step)] = torch.from_numpy(pipeline(
        prompt_embeds=given["text"], negative_prompt_embeds=given["text"] * 0, latents=given["latents"],
        num_inference_steps=2, output_type="np").images).contiguous()
    pipeline.save_pretrained(saved)
save_file(images, tensors)
"""


class TestModelingFile:
    @pytest.mark.slow
    @pytest.mark.thorough  # test_clients.py
    def test_a_pipeline_of_pruned_parts_makes_an_image_elsewhere(self, tmp_path: Path) -> None:
        """Denoiser and autoencoder pruned, loaded by DiffusionPipeline, saved again, loaded again."""
        unet = modeling.pruned_class("UNet2DConditionModel")(gfprune={"modules": NARROW}, **CONDITIONAL)
        narrow = {
            "decoder.conv_in": {"in": 4, "out": 4},
            "decoder.mid_block.resnets.0.norm1": {"groups": [1, 1, 1, 1]},
        }
        vae = diffusers.AutoencoderKL(**AUTOENCODER)
        groups, _ = discover(vae)
        vae = remove(vae, groups, random_part(groups))
        assert narrow.keys() <= vae.config.gfprune["modules"].keys()
        parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae, unet=unet, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False, **parts
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(tmp_path / "sd")
        index = json.loads((tmp_path / "sd" / "model_index.json").read_text())
        assert index["vae"] == ["gfprune_models_v2", "PrunedAutoencoderKL"]
        source = torch.Generator().manual_seed(0)
        given = {
            "text": torch.randn(1, 5, 8, generator=source),
            "latents": torch.randn(1, 4, 8, 8, generator=source),
        }
        save_file(given, tmp_path / "tensors.safetensors")
        environment = {k: v for k, v in os.environ.items() if k != "DIFFUSERS_DISABLE_REMOTE_CODE"}
        paths = [tmp_path / "sd", tmp_path / "saved", tmp_path / "tensors.safetensors"]
        arguments = [sys.executable, "-c", PIPELINE_ELSEWHERE, *map(str, paths)]
        subprocess.run(arguments, check=True, env=environment, timeout=300)
        expected = pipe(
            prompt_embeds=given["text"],
            negative_prompt_embeds=given["text"] * 0,
            latents=given["latents"],
            num_inference_steps=2,
            output_type="np",
        ).images
        for image in load_file(tmp_path / "tensors.safetensors").values():
            assert torch.allclose(image, torch.from_numpy(expected), atol=1e-5)

    @pytest.mark.thorough  # whole pipelines are loaded so elsewhere: test_clients.py and test_prune.py
    def test_loads_without_gfprune_and_survives_saving(self, tmp_path: Path) -> None:
        """Bit-identical through AutoModel, save_pretrained and an fp16 variant, for any class."""
        model = modeling.pruned_class("UNet2DConditionModel")(
            gfprune={"format": 1, "modules": NARROW}, **CONDITIONAL
        )
        randomise(model, 0).eval()
        source = tmp_path / "source"
        source.mkdir()
        write_weights(source, model, None, None)
        inputs = conditional_inputs()
        torch.save(inputs, tmp_path / "inputs.pt")
        environment = {k: v for k, v in os.environ.items() if k != "DIFFUSERS_DISABLE_REMOTE_CODE"}
        paths = [source, tmp_path / "saved", tmp_path / "half", tmp_path / "inputs.pt"]
        arguments = [sys.executable, "-c", LOAD_ELSEWHERE, *map(str, paths)]
        subprocess.run(arguments, check=True, env=environment, timeout=300)
        with torch.no_grad():
            expected = model(**inputs).sample
            assert torch.equal(gfprune_cli.load(source)(**inputs).sample, expected)
        for name, output in load_file(tmp_path / "saved" / "found.safetensors").items():
            assert torch.equal(output, expected), name
        assert (tmp_path / "half" / "gfprune_models_v2.py").exists()

    def test_the_file_in_the_folder_is_never_executed(self, tmp_path: Path) -> None:
        """A checkpoint of the earlier format, whose own file would fail, loads in the installed class."""
        stem = "gfprune_models_v1"
        modules = {name: shape for name, shape in NARROW.items() if "identity" not in shape}
        model = modeling.pruned_class("UNet2DModel")(
            gfprune={"format": 1, "modules": {name: {**shape} for name, shape in modules.items()}},
            **{**TINY, "block_out_channels": (8, 16)},
        )
        folder = pipeline(tmp_path / "old", unet=model)
        (folder / "unet" / "gfprune_models_v2.py").unlink()
        (folder / "unet" / f"{stem}.py").write_text("raise SystemExit('executed')")
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = [stem, "PrunedUNet2DModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
        config = json.loads((folder / "unet" / "config.json").read_text())
        config["auto_map"] = {"AutoModel": f"{stem}.PrunedUNet2DModel"}
        (folder / "unet" / "config.json").write_text(json.dumps(config))
        loaded = gfprune_cli.load(folder)
        assert loaded.config.gfprune["modules"].keys() == modules.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)

    def test_the_legacy_transformer_is_not_mistaken_for_its_successor(self) -> None:
        options = dict(
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=8,
            norm_num_groups=4,
            cross_attention_dim=8,
        )
        model = modeling.pruned_class("Transformer2DModel").from_config({**options, "gfprune": None})
        assert type(model).__name__ == "PrunedTransformer2DModel"

    @pytest.mark.parametrize(
        ("module", "shape", "inputs", "output"),
        [
            (nn.Conv1d(4, 6, 1), {"out": 3, "in": 2}, (1, 2, 5), (1, 3, 5)),
            (nn.Conv3d(4, 6, 1), {"out": 3, "in": 2}, (1, 2, 2, 2, 2), (1, 3, 2, 2, 2)),
            (nn.Conv2d(6, 6, 1, groups=6), {"out": 4, "in": 4, "conv_groups": 4}, (1, 4, 5, 5), (1, 4, 5, 5)),
            (nn.ConvTranspose2d(4, 6, 2, stride=2), {"out": 3, "in": 2}, (1, 2, 4, 4), (1, 3, 8, 8)),
            (nn.Linear(4, 6, bias=False), {"out": 3, "in": 2}, (1, 2), (1, 3)),
            (nn.LayerNorm(6), {"norm": 4}, (2, 4), (2, 4)),
            (nn.LayerNorm(6, elementwise_affine=False), {"norm": 4}, (2, 4), (2, 4)),
            (nn.RMSNorm(6), {"norm": 4}, (2, 4), (2, 4)),
            (diffusers.models.normalization.RMSNorm(6, 1e-6), {"norm": 4}, (2, 4), (2, 4)),
            (diffusers.models.normalization.FP32LayerNorm(6), {"norm": 4}, (2, 4), (2, 4)),
        ],
    )  # fmt: skip
    def test_shapes(self, module: nn.Module, shape: Any, inputs: Any, output: Any) -> None:
        parent = nn.Sequential(module)
        modeling.resize_module(parent, "0", shape)
        assert parent(torch.randn(inputs)).shape == output

    def test_parameters_buffers_and_attributes(self) -> None:
        parent = nn.Module()
        parent.inner = nn.Module()
        parent.inner.table = nn.Parameter(torch.arange(6.0).view(1, 6))
        parent.inner.register_buffer("positions", torch.ones(1, 3, 6), persistent=False)
        modeling.resize_module(parent, "inner.table", {"parameter": [1, 4]})
        modeling.resize_module(parent, "inner.positions", {"parameter": [1, 3, 4]})
        modeling.resize_module(parent, "inner", {"attributes": {"inner_dim": 4}})
        assert parent.inner.inner_dim == 4
        # what cannot be computed again at the new width is saved
        assert {name: tuple(tensor.shape) for name, tensor in parent.state_dict().items()} == {
            "inner.table": (1, 4),
            "inner.positions": (1, 3, 4),
        }

    def test_skipped_blocks_hand_on_what_they_were_given(self) -> None:
        flux = diffusers.models.transformers.transformer_flux.FluxTransformerBlock(8, 1, 8)
        parent = nn.Sequential(flux)
        modeling.resize_module(parent, "0", {"identity": True})
        hidden, text, time = torch.randn(3, 1, 2, 8)
        assert parent[0](hidden, text, time) == (text, hidden)
        assert parent[0](hidden_states=hidden, encoder_hidden_states=text, temb=time) == (text, hidden)
        plain = nn.Sequential(nn.Linear(2, 2))
        modeling.resize_module(plain, "0", {"identity": True})
        assert plain(hidden) is hidden


class TestLoading:
    def test_float32_layers_stay_so_and_computed_tables_are_as_in_diffusers(self, tmp_path: Path) -> None:
        model: Any = diffusers.WanTransformer3DModel(**WAN)
        model.save_pretrained(tmp_path)
        component = look(tmp_path)
        loaded = load_model(component, dtype=torch.bfloat16)
        theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        types = {name: tensor.dtype for name, tensor in loaded.named_parameters()}
        assert set(types.values()) == {torch.bfloat16, torch.float32}
        assert types == {name: tensor.dtype for name, tensor in theirs.named_parameters()}
        buffers = dict(theirs.named_buffers())
        assert buffers
        for name, buffer in loaded.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        assert {name: t.dtype for name, t in cast_model(model, torch.bfloat16).named_parameters()} == types
        theirs.save_pretrained(tmp_path / "half")
        assert stored_dtype(look(tmp_path / "half")) == torch.bfloat16

    def test_shards_of_a_transformer(self, tmp_path: Path) -> None:
        model: Any = diffusers.DiTTransformer2DModel(**DIT)
        write_weights(tmp_path, model, None, 10_000)
        component = look(tmp_path)
        assert len(component.weights) > 1
        loaded = load_model(component)
        theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
            assert torch.equal(theirs.state_dict()[name], tensor)

    def test_tied_and_integer_tensors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tied weights are read once and stay tied; integers that a class stores are not weights."""
        stock = diffusers.UNet2DModel.__init__

        @functools.wraps(stock)
        def extended(self: Any, **options: Any) -> None:
            stock(self, **options)
            self.again = self.conv_in
            self.register_buffer("order", torch.arange(3))

        model = diffusers.UNet2DModel(**TINY)
        model.save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(path), "order": torch.tensor([2, 0, 1])}, path)
        monkeypatch.setattr(diffusers.UNet2DModel, "__init__", extended)
        loaded: Any = load_model(look(tmp_path), dtype=torch.float16)
        assert loaded.again.weight is loaded.conv_in.weight
        assert loaded.order.tolist() == [2, 0, 1]
        assert loaded.conv_in.weight.dtype == torch.float16
        out = tmp_path / "out"
        out.mkdir()
        write_weights(out, loaded, None, None)
        assert {"again.weight", "conv_in.weight", "order"} <= load_file(out / path.name).keys()

    def test_tensors_that_the_class_ignores(self, tmp_path: Path) -> None:
        diffusers.WanTransformer3DModel(**WAN).save_pretrained(tmp_path)
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(path), "blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, path)
        assert load_model(look(tmp_path)).config.num_layers == 1

    @pytest.mark.parametrize(
        ("change", "named"),
        [({"num_layers": 10**9}, "num_layers"), ({"attention_head_dim": 10**9}, "attention_head_dim")],
    )
    def test_sizes_are_checked_before_anything_is_built(
        self, tmp_path: Path, change: Any, named: str
    ) -> None:
        (tmp_path / "config.json").write_text(
            json.dumps({"_class_name": "DiTTransformer2DModel", **DIT, **change})
        )
        with pytest.raises(GfpruneError, match=named):
            look(tmp_path, weights_required=False)

    def test_tables_beside_the_weights_are_bounded(self, tmp_path: Path) -> None:
        diffusers.DiTTransformer2DModel(**DIT).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "sample_size": 30_000}))
        component = look(tmp_path)
        assert build_meta(component).config.sample_size == 30_000
        with pytest.raises(GfpruneError, match="bytes of tables beside the weights"):
            load_model(component)


class TestTravellers:
    def test_tokenizers_and_processors_travel_and_code_does_not(self, tmp_path: Path) -> None:
        source = tmp_path / "tokenizer"
        source.mkdir()
        kept = {"spiece.model", "vocab.json", "merges.txt", "preprocessor_config.json", "chat_template.jinja"}
        for name in [*kept, "tokenization.py", "pytorch_model.bin", "weights.pt"]:
            (source / name).write_text("{}")
        copy_component(source, tmp_path / "copy", None, (tmp_path,))
        assert {path.name for path in (tmp_path / "copy").iterdir()} == kept

    def test_a_component_that_has_only_the_variant_gets_plain_names(self, tmp_path: Path) -> None:
        """The pruned weights are plain, so the pipeline is loaded without a variant."""
        model: Any = diffusers.AutoencoderKL(**AUTOENCODER).half()
        model.save_pretrained(tmp_path / "vae", variant="fp16", max_shard_size="20KB")
        copy_component(tmp_path / "vae", tmp_path / "copy", "fp16", (tmp_path,))
        again: Any = diffusers.AutoencoderKL.from_pretrained(tmp_path / "copy", torch_dtype=torch.float16)
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        model.save_pretrained(tmp_path / "vae")
        copy_component(tmp_path / "vae", tmp_path / "both", "fp16", (tmp_path,))
        names = {path.name for path in (tmp_path / "vae").iterdir()}
        assert {path.name for path in (tmp_path / "both").iterdir()} == names

    def test_an_optional_part_that_is_not_there_is_left_out(self, tmp_path: Path) -> None:
        """What model_index.json names, plain diffusers would look for, and not load the output."""
        unet = diffusers.UNet2DConditionModel(**CONDITIONAL)
        parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        place = pipeline(tmp_path / "sd", unet=unet, **parts) / "model_index.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "requires_safety_checker": True}))
        component = look(tmp_path / "sd")
        assert absent_parts(component) == ["safety_checker"]
        (tmp_path / "out").mkdir()
        copy_pipeline(tmp_path / "out", component, {"unet": ["diffusers", "UNet2DConditionModel"]})
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert (index["safety_checker"], index["requires_safety_checker"]) == ([None, None], False)
        (tmp_path / "sd" / "safety_checker").mkdir()
        assert absent_parts(component) == []

    def test_only_models_need_weights_to_travel(self, tmp_path: Path) -> None:
        unet = diffusers.UNet2DConditionModel(**CONDITIONAL)
        parts = {
            "tokenizer": ["transformers", "T5Tokenizer"],
            "text_encoder": ["transformers", "T5EncoderModel"],
        }
        folder = pipeline(tmp_path / "sd", unet=unet, **parts)
        for name in parts:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
        with pytest.raises(GfpruneError, match="text_encoder has no safetensors weights"):
            check_pipeline(look(folder))
        save_file({"a": torch.zeros(1)}, folder / "text_encoder" / "model.safetensors")
        check_pipeline(look(folder))
