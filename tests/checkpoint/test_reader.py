"""Reading checkpoints: every layout that diffusers writes, and files that lie about themselves."""

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from twins import assert_same

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import build_meta, inspect, load_model, sha256_of_weights
from gfprune_cli.checkpoint.safetensors_header import read_header
from gfprune_cli.checkpoint.scheduler import load_scheduler, scheduler_config_path
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.errors import GfpruneError, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(**changes: Any) -> UNet2DModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**settings | changes).eval()


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    return tiny_unet()


@pytest.fixture(scope="module")
def saved(unet: UNet2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A pipeline folder that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def local(folder: Path) -> Source:
    return Source(str(folder), folder, "local", None)


def look(folder: Path, **options: Any) -> Component:
    return inspect(local(folder), **options)


def flatten(pipeline: Path) -> Path:
    """The layout of google/ddpm-cifar10-32: everything at the root."""
    for file in [*(pipeline / "unet").iterdir(), *(pipeline / "scheduler").iterdir()]:
        shutil.move(file, pipeline / file.name)
    (pipeline / "unet").rmdir()
    (pipeline / "scheduler").rmdir()
    return pipeline


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a safetensors header and keep the data behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def assert_twins(left: torch.nn.Module, right: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_same(left, right, x, torch.tensor([3, 40]))


class TestLayouts:
    def test_a_pipeline(self, saved: Path, unet: UNet2DModel) -> None:
        component = look(saved)
        assert (component.name, component.class_name, component.folder) == (
            "unet",
            "UNet2DModel",
            saved / "unet",
        )
        assert component.root == saved
        assert not component.is_pruned
        assert component.bytes == (saved / "unet" / WEIGHTS).stat().st_size
        assert component.tensors["conv_in.weight"].shape == (8, 3, 3, 3)
        assert component.tensors["conv_in.weight"].dtype == "F32"
        assert_twins(load_model(component), unet)

    def test_a_flat_pipeline(self, pipeline: Path, unet: UNet2DModel) -> None:
        component = look(flatten(pipeline))
        assert (component.name, component.folder) == ("unet", pipeline)
        assert_twins(load_model(component), unet)
        scheduler = load_scheduler(component)
        assert isinstance(scheduler, DDPMScheduler)
        assert scheduler.config.num_train_timesteps == 50

    def test_a_bare_model(self, saved: Path, unet: UNet2DModel) -> None:
        component = look(saved / "unet")
        assert (component.name, component.pipeline) == ("", None)
        assert_twins(load_model(component), unet)

    def test_shards(self, unet: UNet2DModel, tmp_path: Path) -> None:
        unet.save_pretrained(tmp_path, max_shard_size="60KB")
        component = look(tmp_path)
        assert len(component.weights) > 1
        assert_twins(load_model(component), unet)
        assert len(sha256_of_weights(component)) == len(component.weights)

    @pytest.mark.parametrize("shards", [False, True])
    def test_a_variant(self, unet: UNet2DModel, tmp_path: Path, shards: bool) -> None:
        half = tiny_unet().half()
        half.save_pretrained(tmp_path, variant="fp16", **({"max_shard_size": "30KB"} if shards else {}))
        component = look(tmp_path, variant="fp16")
        assert {info.dtype for info in component.tensors.values()} == {"F16"}
        assert (len(component.weights) > 1) is shards
        loaded = load_model(component)
        assert loaded.dtype == torch.float32
        assert_twins(loaded, half.float())
        assert load_model(component, dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_the_plain_weights_are_not_the_variant(self, unet: UNet2DModel, tmp_path: Path) -> None:
        unet.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(UsageError, match="pass --variant fp16"):
            look(tmp_path)
        with pytest.raises(UsageError, match="pass --variant fp16"):
            look(tmp_path, variant="bf16")

    def test_an_absent_variant(self, saved: Path) -> None:
        with pytest.raises(UsageError, match="has no 'fp16' weights: drop --variant"):
            look(saved, variant="fp16")

    def test_old_attention_names(self, pipeline: Path, unet: UNet2DModel) -> None:
        path = pipeline / "unet" / WEIGHTS
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(path)
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
        save_file(tensors, path)
        assert_twins(load_model(look(pipeline)), unet)

    def test_fourier_features_under_their_old_name(self, tmp_path: Path) -> None:
        model = tiny_unet(time_embedding_type="fourier")
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        tensors["time_proj.W"] = tensors.pop("time_proj.weight")
        save_file(tensors, tmp_path / WEIGHTS)
        loaded = load_model(look(tmp_path))
        assert torch.equal(loaded.time_proj.weight, model.time_proj.weight)

    def test_buffers_that_are_never_saved(self, tmp_path: Path) -> None:
        changes = {"down_block_types": ("KDownBlock2D", "DownBlock2D"), "norm_num_groups": 4}
        model = UNet2DModel(**dict(tiny_unet().config) | changes).eval()
        computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        assert computed
        model.save_pretrained(tmp_path)
        before = torch.random.get_rng_state()
        loaded = load_model(look(tmp_path))
        assert torch.equal(torch.random.get_rng_state(), before)
        for name in computed:
            assert torch.equal(loaded.get_buffer(name), model.get_buffer(name))

    def test_a_component_that_is_not_called_unet(self, pipeline: Path) -> None:
        def rename(index: dict[str, Any]) -> None:
            index["prior"] = index.pop("unet")

        edit_json(pipeline / "model_index.json", rename)
        (pipeline / "unet").rename(pipeline / "prior")
        assert look(pipeline).name == "prior"
        assert look(pipeline, component="prior").name == "prior"
        with pytest.raises(UsageError, match="choose prior"):
            look(pipeline, component="unet")

    def test_several_denoisers_need_a_choice(self, pipeline: Path) -> None:
        edit_json(
            pipeline / "model_index.json", lambda index: index.update(a=index["unet"], b=index.pop("unet"))
        )
        with pytest.raises(UsageError, match="--component a or b"):
            look(pipeline)

    def test_component_needs_a_pipeline(self, saved: Path) -> None:
        with pytest.raises(UsageError, match="--component"):
            look(saved / "unet", component="unet")

    def test_what_gfprune_wrote(self, tmp_path: Path) -> None:
        from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class

        stock = {key: value for key, value in tiny_unet().config.items() if not key.startswith("_")}
        resnet = "mid_block.resnets.0"
        narrow = {
            f"{resnet}.conv1": {"in": 16, "out": 10},
            f"{resnet}.time_emb_proj": {"in": 32, "out": 10},
            f"{resnet}.norm2": {"groups": [4, 3, 2, 1]},
            f"{resnet}.conv2": {"in": 10, "out": 16},
        }
        model = pruned_class("UNet2DModel")(gfprune={"modules": narrow}, **stock).eval()
        DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
        component = look(tmp_path)
        assert component.is_pruned
        assert component.tensors[f"{resnet}.conv1.weight"].shape == (10, 16, 3, 3)
        assert_twins(load_model(component), model)
        assert_twins(load_model(look(tmp_path / "unet")), model)


class TestModel:
    def test_meta_costs_no_memory(self, saved: Path) -> None:
        model = build_meta(look(saved))
        assert all(tensor.is_meta for tensor in model.state_dict().values())

    def test_the_model_does_not_share_memory_with_its_file(self, pipeline: Path, unet: UNet2DModel) -> None:
        model = load_model(look(pipeline))
        (pipeline / "unet" / WEIGHTS).write_bytes(b"")
        assert_twins(model, unet)
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_loading_leaves_the_random_state_alone(self, saved: Path) -> None:
        before = torch.random.get_rng_state()
        load_model(look(saved))
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_shape_that_the_config_does_not_give(self, pipeline: Path) -> None:
        edit_json(pipeline / "unet" / "config.json", lambda config: config.update(out_channels=4))
        with pytest.raises(
            GfpruneError, match=r"'conv_out.weight' is \[3, 8, 3, 3\] in .*\[4, 8, 3, 3\] by .*config"
        ):
            load_model(look(pipeline))

    def test_a_missing_tensor(self, pipeline: Path) -> None:
        path = pipeline / "unet" / WEIGHTS
        tensors = load_file(path)
        del tensors["conv_in.bias"]
        save_file(tensors, path)
        with pytest.raises(GfpruneError, match=r"'conv_in.bias' is missing from .*safetensors"):
            load_model(look(pipeline))

    def test_an_unknown_tensor(self, pipeline: Path) -> None:
        path = pipeline / "unet" / WEIGHTS
        save_file(load_file(path) | {"extra\x1b[31m": torch.zeros(1)}, path)
        with pytest.raises(GfpruneError, match="has no place in UNet2DModel") as caught:
            load_model(look(pipeline))
        assert "\x1b" not in str(caught.value)

    def test_integers_are_no_weights(self, pipeline: Path) -> None:
        path = pipeline / "unet" / WEIGHTS
        tensors = load_file(path)
        tensors["conv_in.weight"] = tensors["conv_in.weight"].to(torch.int8)
        save_file(tensors, path)
        with pytest.raises(GfpruneError, match=r"I8: .* before it was quantized"):
            load_model(look(pipeline))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_tensor_that_is_not_finite(self, pipeline: Path, bad: float) -> None:
        path = pipeline / "unet" / WEIGHTS
        tensors = load_file(path)
        tensors["conv_out.weight"][0, 0, 0, 0] = bad
        save_file(tensors, path)
        with pytest.raises(GfpruneError, match=r"'conv_out.weight' in .* is not finite"):
            load_model(look(pipeline))

    def test_a_type_too_narrow(self, pipeline: Path) -> None:
        path = pipeline / "unet" / WEIGHTS
        tensors = load_file(path)
        tensors["conv_out.weight"][0, 0, 0, 0] = 1e30
        save_file(tensors, path)
        with pytest.raises(GfpruneError, match=r"not finite in torch.float16: .*a wider type"):
            load_model(look(pipeline), dtype=torch.float16)

    def test_hashes(self, saved: Path) -> None:
        expected = hashlib.sha256((saved / "unet" / WEIGHTS).read_bytes()).hexdigest()
        assert sha256_of_weights(look(saved)) == {WEIGHTS: expected}

    def test_weights_that_cannot_be_read_are_named(self, saved: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(saved, tmp_path / "copy")
        component = look(copy)
        (copy / "unet" / WEIGHTS).unlink()
        (copy / "unet" / WEIGHTS).mkdir()
        with pytest.raises(GfpruneError, match=f"{WEIGHTS} cannot be read"):
            sha256_of_weights(component)


class TestConditional:
    CONFIG = {  # noqa: RUF012
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": [2, 4],
    }

    def test_can_be_analyzed_from_its_config(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(self.CONFIG))
        component = look(tmp_path, weights_required=False)
        assert (component.weights, component.tensors, component.bytes) == ((), {}, 0)
        assert build_meta(component).config.cross_attention_dim == 8
        with pytest.raises(GfpruneError, match="no weights"):
            load_model(component)

    @pytest.mark.parametrize(
        "name",
        [
            "CLIPTextModel",
            "StableDiffusionSafetyChecker",
            "T5EncoderModel",
            "PrunedPrunedUNet2DModel",
            "os.UNet2DModel",
            None,
        ],
    )
    def test_other_networks_are_refused(self, tmp_path: Path, name: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**self.CONFIG, "_class_name": name}))
        with pytest.raises(GfpruneError, match="gfprune supports U-Nets and diffusion transformers"):
            look(tmp_path)

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("ControlNetUnionModel", "is given several pictures at once: prune the denoiser"),
            ("UNetControlNetXSModel", "adds to the states of the denoiser at places that are not known here"),
            ("MotionAdapter", "adds to the states of the denoiser at places that are not known here"),
            ("AutoencoderDC", "averages groups of channels beside its layers"),
        ],
    )
    def test_networks_that_are_not_pruned_say_why(self, tmp_path: Path, name: str, why: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**self.CONFIG, "_class_name": name}))
        with pytest.raises(GfpruneError, match=f"config.json is for '{name}', which {why}"):
            look(tmp_path)

    @pytest.mark.parametrize("name", ["NoSuchTransformer2DModel", "TransformerModel", "PrunedNoUNet"])
    def test_a_name_that_diffusers_does_not_have(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**self.CONFIG, "_class_name": name}))
        with pytest.raises(GfpruneError, match=r"is no model of diffusers \d"):
            build_meta(look(tmp_path, weights_required=False))


class TestSchedulers:
    def test_the_pipelines_own(self, saved: Path) -> None:
        component = look(saved)
        assert scheduler_config_path(component) == saved / "scheduler" / "scheduler_config.json"
        scheduler = load_scheduler(component)
        assert isinstance(scheduler, DDPMScheduler)
        assert scheduler.config.num_train_timesteps == 50

    def test_a_bare_model_gets_the_default(self, saved: Path) -> None:
        component = look(saved / "unet")
        assert scheduler_config_path(component) is None
        assert isinstance(load_scheduler(component), DDPMScheduler)

    def test_a_pipeline_without_one(self, pipeline: Path) -> None:
        shutil.rmtree(pipeline / "scheduler")
        with pytest.raises(GfpruneError, match=r"scheduler_config.json is missing"):
            load_scheduler(look(pipeline))
        edit_json(pipeline / "model_index.json", lambda index: index.pop("scheduler"))
        assert load_scheduler(look(pipeline)) is None

    @pytest.mark.parametrize(
        "name", ["UNet2DModel", "os", "KarrasDiffusionSchedulers", "NoScheduler", None, 3, "a.bScheduler"]
    )
    def test_only_schedulers_of_diffusers(self, pipeline: Path, name: object) -> None:
        path = pipeline / "scheduler" / "scheduler_config.json"
        edit_json(path, lambda config: config.update(_class_name=name))
        with pytest.raises(GfpruneError, match="no scheduler of diffusers"):
            load_scheduler(look(pipeline))

    @pytest.mark.parametrize("change", [{"num_train_timesteps": 10**12}, {"beta_schedule": "surprise"}])
    def test_a_broken_config(self, pipeline: Path, change: dict[str, Any]) -> None:
        path = pipeline / "scheduler" / "scheduler_config.json"
        edit_json(path, lambda config: config.update(change))
        with pytest.raises(GfpruneError, match=r"scheduler_config.json"):
            load_scheduler(look(pipeline))


class TestHostileConfigs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
            ({"block_out_channels": [8] * 65}, "65 entries"),
            ({"block_out_channels": [8] * 60, "layers_per_block": 60}, "layers in all"),
            ({"layers_per_block": 1000}, "layers_per_block"),
            ({"layers_per_block": -1}, "layers_per_block"),
            ({"norm_eps": 10**400}, "out of range"),
            ({"down_block_types": "DownBlock2D"}, "down_block_types"),
            ({"_class_name": "AutoencoderKL"}, "model_index.json says UNet2DModel"),
        ],
    )
    def test_absurd_values(self, pipeline: Path, change: dict[str, Any], message: str) -> None:
        edit_json(pipeline / "unet" / "config.json", lambda config: config.update(change))
        with pytest.raises(GfpruneError, match=message):
            look(pipeline)

    @pytest.mark.parametrize(
        "change",
        [
            {"norm_num_groups": 3},
            {"block_out_channels": "eight"},
            {"down_block_types": ["os.system", "DownBlock2D"]},
            {"up_block_types": ["UpBlock2D"]},
            {"act_fn": "__import__"},
            {"time_embedding_dim": "a"},
        ],
    )
    def test_what_the_class_refuses(self, pipeline: Path, change: dict[str, Any]) -> None:
        edit_json(pipeline / "unet" / "config.json", lambda config: config.update(change))
        with pytest.raises(GfpruneError, match="does not describe a valid UNet2DModel") as caught:
            load_model(look(pipeline))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"_class_name": "UNet2DModel", "_class_name": "Other"}', "given twice"),
            ('{"norm_eps": NaN}', "NaN"),
            ('{"norm_eps": 1e999}', "out of range"),
            ("[" * 100_000, "not valid JSON"),
            ("[1]", "not a JSON object"),
            ("{", "not valid JSON"),
            ('{"a": "' + "x" * (1 << 20) + '"}', "larger than"),
            ("\udcff", "not valid JSON"),
        ],
    )
    def test_bad_json(self, pipeline: Path, text: str, message: str) -> None:
        (pipeline / "unet" / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(GfpruneError, match=message):
            look(pipeline)

    @pytest.mark.parametrize(
        "entry",
        [
            ["torch", "UNet2DModel"],
            ["diffusers", "AutoencoderKL"],
            ["transformers", "UNet2DModel"],
            ["diffusers", "PrunedUNet2DModel"],
            ["gfprune_models_v2", "UNet2DModel"],
            ["gfprune_models_v1", "PrunedControlNetModel"],
            ["diffusers", "ControlNetModel"],
            [None, None],
            "UNet2DModel",
            ["a", "b", "c"],
        ],
    )
    def test_classes_outside_the_list(self, pipeline: Path, entry: object) -> None:
        edit_json(pipeline / "model_index.json", lambda index: index.update(unet=entry))
        with pytest.raises(GfpruneError, match="names no denoiser"):
            look(pipeline)

    def test_a_component_name_is_no_path(self, pipeline: Path) -> None:
        edit_json(pipeline / "model_index.json", lambda index: index.update({"../unet": index.pop("unet")}))
        with pytest.raises(GfpruneError, match="names no denoiser"):
            look(pipeline)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(GfpruneError, match=r"neither model_index.json nor config.json"):
            look(tmp_path)

    def test_the_folder_of_a_training_run_names_the_one_to_give(self, pipeline: Path, tmp_path: Path) -> None:
        for name in ("unet", "unet_ema"):
            (tmp_path / "run" / name).mkdir(parents=True)
            shutil.copy(pipeline / "unet" / "config.json", tmp_path / "run" / name)
        (tmp_path / "run" / "optimizer.bin").touch()
        with pytest.raises(GfpruneError, match=r"holds unet and unet_ema: give .*run/unet, or .*/unet_ema$"):
            look(tmp_path / "run")


class TestHostileWeights:
    @pytest.fixture
    def weights(self, pipeline: Path) -> Path:
        return pipeline / "unet" / WEIGHTS

    def refused(self, weights: Path, message: str) -> None:
        with pytest.raises(GfpruneError, match=message) as caught:
            look(weights.parent.parent)
        assert "\n" not in str(caught.value)
        assert str(weights) in str(caught.value)

    def test_cut_short(self, weights: Path) -> None:
        size = weights.stat().st_size
        os.truncate(weights, size - 100)
        self.refused(weights, f"cut short: {size - 100} bytes instead of {size}")

    @pytest.mark.parametrize("size", [0, 4, 200])
    def test_cut_short_in_the_header(self, weights: Path, size: int) -> None:
        os.truncate(weights, size)
        self.refused(weights, f"cut short: {size} bytes")

    def test_bytes_at_the_end(self, weights: Path) -> None:
        with weights.open("ab") as stream:
            stream.write(b"payload")
        self.refused(weights, "7 bytes that belong to no tensor")

    def test_a_pickle_in_disguise(self, weights: Path) -> None:
        weights.write_bytes(pickle.dumps({"a": 1}))
        self.refused(weights, "pickled PyTorch file.*safe_serialization=True")

    @pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
    def test_a_header_whose_length_begins_like_a_pickle(self, tmp_path: Path, length: int) -> None:
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        header = json.dumps({"a": entry}).encode().ljust(length)
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + header + bytes(4))
        assert read_header(tmp_path / "x.safetensors")["a"].shape == (1,)

    def test_a_zip_in_disguise(self, weights: Path) -> None:
        torch.save({"a": torch.zeros(1)}, weights)
        self.refused(weights, "pickled PyTorch file.*safe_serialization=True")

    def test_a_git_lfs_pointer(self, weights: Path) -> None:
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
        self.refused(weights, "git lfs pull")

    def test_an_absurd_header_length(self, weights: Path) -> None:
        weights.write_bytes(struct.pack("<Q", 2**63) + b"{}")
        self.refused(weights, "not a safetensors file")

    def test_no_json_in_the_header(self, weights: Path) -> None:
        weights.write_bytes(struct.pack("<Q", 4) + b"    ")
        self.refused(weights, "not a safetensors file")

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("dtype", "F4", "unknown type 'F4'"),
            ("dtype", "F16", "bytes, but the header gives it"),
            ("shape", [2**40, 2**40], "bytes, but the header gives it"),
            ("shape", [-8, -3, 3, 3], "malformed"),
            ("shape", [True], "malformed"),
            ("data_offsets", [0], "malformed"),
            ("data_offsets", [864 + 4, 864 + 4 + 864], "overlaps|gap"),
        ],
    )
    def test_a_header_that_lies(self, weights: Path, field: str, value: object, message: str) -> None:
        edit_header(weights, lambda header: header["conv_in.weight"].update({field: value}))
        self.refused(weights, message)

    def test_a_key_given_twice(self, weights: Path) -> None:
        entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
        header = f"{{{entry},{entry}}}".encode()
        weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
        self.refused(weights, "given twice")

    @pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "unet.pt"])
    def test_only_pickles(self, weights: Path, name: str) -> None:
        weights.rename(weights.with_name(name))
        with pytest.raises(
            GfpruneError, match=f"only '{name}', and gfprune reads no pickle.*safe_serialization=True"
        ):
            look(weights.parent.parent)

    def test_only_pickles_can_still_be_analyzed(self, weights: Path) -> None:
        weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
        assert look(weights.parent.parent, weights_required=False).weights == ()

    def test_a_link_out_of_the_folder(self, weights: Path, tmp_path: Path) -> None:
        shutil.move(weights, tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
        self.refused(weights, "leads out of the checkpoint's folder")

    def test_a_pipe(self, weights: Path) -> None:
        weights.unlink()
        os.mkfifo(weights)
        self.refused(weights, "not a regular file")

    def test_links_of_the_hub_cache(self, saved: Path, tmp_path: Path, unet: UNet2DModel) -> None:
        repo = tmp_path / "models--someone--tiny"
        (repo / "blobs").mkdir(parents=True)
        shared = tmp_path / "blobs"
        shared.mkdir()
        snapshot = repo / "snapshots" / ("0" * 40)
        for number, file in enumerate(path for path in sorted(saved.rglob("*")) if path.is_file()):
            link = snapshot / file.relative_to(saved)
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = (shared if file.name == WEIGHTS else repo / "blobs") / str(number)
            shutil.copy(file, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
        assert_twins(load_model(look(snapshot)), unet)
        assert_twins(load_model(look(snapshot / "unet")), unet)


class TestHostileShards:
    @pytest.fixture
    def index(self, unet: UNet2DModel, tmp_path: Path) -> Path:
        folder = tmp_path / "model"
        unet.save_pretrained(folder, max_shard_size="60KB")
        return folder / f"{WEIGHTS}.index.json"

    @pytest.mark.parametrize(
        "shard",
        [
            "../x.safetensors",
            "/etc/x.safetensors",
            "a\\b.safetensors",
            "x.bin",
            "a\0.safetensors",
            "..",
            "\x1b[2J.safetensors",
        ],
    )
    def test_names_are_plain(self, index: Path, shard: str) -> None:
        edit_json(index, lambda value: value["weight_map"].update({"conv_in.weight": shard}))
        with pytest.raises(GfpruneError, match="no plain safetensors file name"):
            look(index.parent)

    def test_a_missing_shard(self, index: Path) -> None:
        shard = look(index.parent).weights[0]
        shard.unlink()
        with pytest.raises(GfpruneError, match=f"{shard.name} is missing"):
            look(index.parent)

    def test_a_missing_index(self, index: Path) -> None:
        index.unlink()
        with pytest.raises(
            GfpruneError, match=r"has shards but no diffusion_pytorch_model.safetensors.index.json"
        ):
            look(index.parent)

    def test_a_tensor_in_another_shard(self, index: Path) -> None:
        first, second = look(index.parent).weights[:2]
        edit_json(index, lambda value: value["weight_map"].update({"conv_in.weight": second.name}))
        with pytest.raises(GfpruneError, match=f"{first.name} holds tensor 'conv_in.weight'"):
            look(index.parent)

    def test_a_tensor_in_no_shard(self, index: Path) -> None:
        first = look(index.parent).weights[0]
        edit_json(index, lambda value: value["weight_map"].update(ghost=first.name))
        with pytest.raises(GfpruneError, match="places tensor 'ghost'"):
            look(index.parent)

    @pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}])
    def test_no_weight_map(self, index: Path, weight_map: object) -> None:
        edit_json(index, lambda value: value.update(weight_map=weight_map))
        with pytest.raises(GfpruneError, match="no weight_map"):
            look(index.parent)
