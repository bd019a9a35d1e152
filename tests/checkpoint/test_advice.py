"""What is no diffusers folder: the line names what lies there, and what can be done about it today."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from gfprune_cli.checkpoint import advice
from gfprune_cli.checkpoint.layout import locate_all, pick_weights
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import GfpruneError, UsageError

NETWORK = json.dumps({"_class_name": "UNet2DModel"})
PIPELINE = json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
TENSORS = {"weight": torch.zeros(1)}


def made(root: Path, *files: str, **texts: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    for name, text in texts.items():
        path = root / re.sub(r"(?<!-)__", "/", name).replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def told(root: Path) -> str:
    with pytest.raises(GfpruneError) as caught:
        locate_all(root)
    return str(caught.value)


def test_the_state_of_a_training_run_is_called_one(tmp_path: Path) -> None:
    """Its pickles are no model that a conversion could read."""
    made(tmp_path, "optimizer.bin", "pytorch_model.bin", "random_states_0.pkl")
    assert "the state of a training run" in told(tmp_path)
    assert "from_pretrained" not in told(tmp_path)


def test_pickles_of_a_model_are_converted(tmp_path: Path) -> None:
    assert "only 'weights.ckpt', and gfprune reads no pickle" in told(made(tmp_path, "weights.ckpt"))


def test_the_folder_around_checkpoints_names_them(tmp_path: Path) -> None:
    made(tmp_path, ema__config_json="{", run__model_index_json=PIPELINE, unet__config_json=NETWORK)
    assert told(tmp_path).endswith(f"holds run and unet: give --model {tmp_path}/run, or {tmp_path}/unet")


def test_a_part_of_a_pipeline_names_the_pipeline(tmp_path: Path) -> None:
    made(tmp_path, "scheduler/scheduler_config.json", model_index_json=PIPELINE)
    assert told(tmp_path / "scheduler").endswith(f"a part of one: give --model {tmp_path}")


def test_one_file_of_weights_in_a_folder_is_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "dreamshaper.safetensors")
    message = told(tmp_path)
    assert message.endswith(
        f"only 'dreamshaper.safetensors': give --model {tmp_path}/dreamshaper.safetensors"
    )


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "style.safetensors"])
def test_a_lora_is_merged_first(tmp_path: Path, name: str) -> None:
    save_file({"unet.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / name)
    assert "fuse_lora" in told(tmp_path)
    with pytest.raises(UsageError, match="fuse_lora"):
        resolve(str(tmp_path / name))


def test_the_hubs_cache_is_answered_by_its_id(tmp_path: Path) -> None:
    made(tmp_path, **{"models--google--tiny__snapshots__0123__config_json": NETWORK})
    root = tmp_path / "models--google--tiny"
    assert told(root).endswith(f"cache of one: give --model google/tiny, or {root / 'snapshots' / '0123'}")


def test_weights_under_the_name_of_another_library_are_named() -> None:
    with pytest.raises(GfpruneError, match=r"only 'model.safetensors': .* rename it to diffusion_"):
        pick_weights(["config.json", "model.safetensors"], None, "unet")


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
def test_an_export_of_gfprune_names_what_it_was_exported_from(tmp_path: Path, kind: str) -> None:
    record = {"export": {"recipe": {"format": kind}, "model": {"label": "runs/small"}}}
    made(tmp_path, config_json=NETWORK, gfprune_json=json.dumps(record))
    assert f"gfprune's export to '{kind}'" in told(tmp_path)
    assert told(tmp_path).endswith("--model 'runs/small'")
    made(tmp_path, gfprune_json=json.dumps({"export": {"recipe": {"format": "safetensors"}}}))
    assert locate_all(tmp_path)[0].class_name == "UNet2DModel"


@pytest.mark.parametrize("text", ["{", '{"export": 3}', '{"export": {"recipe": []}}', '{"command": []}'])
def test_a_record_that_tells_nothing_refuses_nothing(tmp_path: Path, text: str) -> None:
    assert locate_all(made(tmp_path, config_json=NETWORK, gfprune_json=text))


def test_samples_of_eval_are_called_so(tmp_path: Path) -> None:
    assert "samples that gfprune eval wrote" in told(made(tmp_path, gfprune_json='{"command": "eval"}'))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("model_index.json", "one file of a diffusers folder: give --model {root}"),
        ("unet/config.json", "one file of a diffusers folder: give --model {root}"),
        ("unet/diffusion_pytorch_model.safetensors", "one file of a diffusers folder: give --model {root}"),
        ("lone/sd15.ckpt", "from_single_file"),
        ("lone/model.onnx", "is a graph"),
        ("lone/model.gguf", "is GGUF"),
        ("lone/model.zip", "unpack it"),
        ("run/model.safetensors", "the state of a training run"),
    ],
)
def test_a_file_is_answered_by_what_it_is(tmp_path: Path, name: str, answer: str) -> None:
    made(tmp_path, "run/optimizer.bin", model_index_json=PIPELINE, unet__config_json=NETWORK)
    made(tmp_path, *([] if (tmp_path / name).exists() else [name]))
    with pytest.raises(UsageError, match=re.escape(answer.format(root=tmp_path))):
        resolve(str(tmp_path / name))


def test_gfprunes_own_single_file_is_not_sent_to_a_converter(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "unet.safetensors", metadata={"gfprune": "{}"})
    with pytest.raises(UsageError, match="exported: give the folder that it was exported from"):
        resolve(str(tmp_path / "unet.safetensors"))


def test_every_method_that_is_advised_exists() -> None:
    methods = re.findall(r"\b([A-Z]\w+)\.(\w+)", " ".join([advice.SINGLE_FILE, advice.CONVERSION]))
    assert methods
    for owner, method in methods:
        found: Callable[..., object] = getattr(getattr(diffusers, owner), method)
        assert callable(found)
    assert all(
        hasattr(diffusers.StableDiffusionPipeline, name) for name in ("load_lora_weights", "fuse_lora")
    )


@pytest.mark.parametrize("model", ["nowhere/x.safetensors", "nowhere/X.CKPT", "nowhere/x.msgpack", "a/b.zip"])
def test_a_file_that_is_not_there_is_no_hub_id(model: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        resolve(model)
