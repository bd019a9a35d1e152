"""Weights as other tools leave them: wrapped names, adapters, aliases, old shards; disks without mmap."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from networks import PLAIN
from safetensors.torch import load_file, save_file

from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.tensor_files import load_tensors, opened, read_whole

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.fp16.json"
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**PLAIN).eval()


def saved(unet: UNet2DModel, folder: Path, rename: Rename = str, **more: torch.Tensor) -> Path:
    unet.save_pretrained(folder)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors | more, folder / WEIGHTS)
    return folder


def loaded(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load_model(inspect(Source(str(folder), folder, "local", None), **options)).state_dict()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("mid_block.", "mid_block._orig_mod."),
    ],
)
def test_names_of_wrapped_networks_are_read(unet: UNet2DModel, tmp_path: Path, rename: Rename) -> None:
    """A compiled or distributed network saved as it was: diffusers itself finds no tensor."""
    assert same(loaded(saved(unet, tmp_path, rename)), unet.state_dict())


def test_a_tensor_that_is_there_twice_is_not_taken_for_the_wrapped_one(
    unet: UNet2DModel, tmp_path: Path
) -> None:
    folder = saved(unet, tmp_path, **{"module.conv_in.bias": torch.zeros(8)})
    with pytest.raises(GfpruneError, match=r"'module.conv_in.bias' .* has no place"):
        loaded(folder)


def test_lora_layers_that_were_never_merged_are_named(unet: UNet2DModel, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return name.replace("to_q.weight", "to_q.base_layer.weight")

    folder = saved(unet, tmp_path, rename, **{"x.to_q.lora_A.default.weight": torch.zeros(1)})
    with pytest.raises(GfpruneError, match=r"PEFT adapter attached .*fuse_lora"):
        loaded(folder)


def test_quantized_weights_are_named_by_their_configuration(unet: UNet2DModel, tmp_path: Path) -> None:
    """Their shapes and types would be blamed, as if the files were of two models."""
    folder = saved(unet, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GfpruneError, match=r"quantized \('bitsandbytes'\).* before it was quantized"):
        loaded(folder)


def test_an_alias_in_the_metadata_stands_for_its_tensor(unet: UNet2DModel, tmp_path: Path) -> None:
    """Of tensors that share memory, safetensors writes one, and the names of the others beside it."""
    folder = saved(unet, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    first, second = [name for name in tensors if name.endswith(("to_q.weight", "to_k.weight"))][:2]
    del tensors[second]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", second: first})
    assert torch.equal(loaded(folder)[second], unet.state_dict()[first])
    save_file(tensors, folder / WEIGHTS, metadata={second: "nowhere"})
    with pytest.raises(GfpruneError, match=f"'{second}' is missing"):
        loaded(folder)


def test_variants_and_plain_shards_lie_side_by_side_under_old_names(
    unet: UNet2DModel, tmp_path: Path
) -> None:
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    half = UNet2DModel(**PLAIN).half()
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    index = json.loads((tmp_path / INDEX).read_text())
    renamed: dict[str, str] = {}
    for name in set(index["weight_map"].values()):
        stem, shard, suffix = name.split(".")  # diffusion_pytorch_model.fp16-00001-of-00002.safetensors
        renamed[name] = f"{stem}{shard.removeprefix('fp16')}.fp16.{suffix}"
        (tmp_path / name).rename(tmp_path / renamed[name])
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).unlink()
    (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text(json.dumps(index))
    assert len(renamed) > 1
    assert same(loaded(tmp_path), unet.state_dict())
    assert same(loaded(tmp_path, variant="fp16"), half.float().state_dict())
    with pytest.raises(UsageError, match=r"no 'bf16' weights: drop --variant, or pass --variant fp16$"):
        loaded(tmp_path, variant="bf16")


def test_pickled_shards_are_converted_in_a_way_that_works(unet: UNet2DModel, tmp_path: Path) -> None:
    """A plain from_pretrained does not find them."""
    unet.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=False)
    with pytest.raises(GfpruneError, match=r"from_pretrained\(..., use_safetensors=False\)"):
        loaded(tmp_path)
    UNet2DModel.from_pretrained(tmp_path, use_safetensors=False).save_pretrained(tmp_path / "again")
    assert same(loaded(tmp_path / "again"), unet.state_dict())


def test_what_early_schedulers_call_a_prediction_of_the_image_is_not_ignored(
    unet: UNet2DModel, tmp_path: Path
) -> None:
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "prediction_type"}
    component = inspect(Source(str(tmp_path), tmp_path, "local", None))
    for early, fits in (({"predict_epsilon": True}, True), ({"predict_epsilon": False}, False)):
        path.write_text(json.dumps(config | early))
        if fits:
            assert load_scheduler(component) is not None
        else:
            with pytest.raises(GfpruneError, match='"prediction_type": "sample"'):
                load_scheduler(component)
    path.write_text(json.dumps(config | {"predict_epsilon": False, "prediction_type": "sample"}))
    assert load_scheduler(component) is not None


class TestDisksThatMapNoFiles:
    """FUSE, mergerfs and network drives answer mmap with ENODEV, which safetensors says in words alone."""

    @pytest.fixture(autouse=True)
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_arguments: Any, **_options: Any) -> None:
            raise OSError("No such device (os error 19)")

        monkeypatch.setattr(safetensors, "safe_open", refuse)
        monkeypatch.setattr("safetensors.torch.safe_open", refuse)

    def test_weights_are_read_as_they_are(self, unet: UNet2DModel, tmp_path: Path) -> None:
        unet.save_pretrained(tmp_path)
        assert same(loaded(tmp_path), unet.state_dict())

    def test_states_and_caches_too(self, tmp_path: Path) -> None:
        save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors", metadata={"document": "{}"})
        assert load_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]
        assert read_whole(tmp_path / "x.safetensors")[1] == {"document": "{}"}

    def test_other_failures_stay_failures(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def fail(*_arguments: Any, **_options: Any) -> None:
            raise OSError("Input/output error (os error 5)")

        save_file({"a": torch.arange(3)}, tmp_path / "x.safetensors")
        monkeypatch.setattr(safetensors, "safe_open", fail)
        monkeypatch.setattr("safetensors.torch.safe_open", fail)
        with pytest.raises(OSError, match="error 5"), opened(tmp_path / "x.safetensors"):
            pass
        with pytest.raises(OSError, match="error 5"):
            load_tensors(tmp_path / "x.safetensors")
