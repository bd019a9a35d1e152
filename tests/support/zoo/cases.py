"""The tiny pipelines of diffusers' own tests, saved as checkpoints.

Every test class of a pipeline has `get_dummy_components`; nothing else of the tests is run.
"""

import contextlib
import importlib
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

NAMED = (
    *("num_inference_steps", "height", "width", "num_frames", "guidance_scale", "prompt", "output_type"),
    *("generator", "negative_prompt", "return_dict", "true_cfg_scale", "strength", "prompt_embeds"),
)
DESCRIPTION = "zoo.json"


def test_classes(checkout: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Of a checkout of diffusers: pipeline class name -> a test class that builds it; and module of tests ->
    why it cannot be imported."""
    sys.path.insert(0, str(checkout))
    found: dict[str, Any] = {}
    closed: dict[str, str] = {}
    for path in sorted((checkout / "tests" / "pipelines").glob("*/test_*.py")):
        if "onnx" in path.name:
            continue
        name = f"tests.pipelines.{path.parent.name}.{path.stem}"
        try:  # a library that is not installed shows at the import, or where its stand-in is looked at
            for value in vars(importlib.import_module(name)).values():
                kind = class_of(value)
                own = isinstance(value, type) and value.__module__ == name
                if own and kind is not None and builds(value):
                    found.setdefault(kind.__name__, value)
        except (Exception, SystemExit) as error:
            closed[path.stem] = f"{type(error).__name__}: {error}"[:300]
    return found, closed


def class_of(test_class: Any) -> Any:
    """The class of diffusers that a test is about, also where it wraps it; None for other tests."""
    kind = getattr(test_class, "pipeline_class", None)
    parents = kind.__mro__ if isinstance(kind, type) else ()
    return next((parent for parent in parents if parent.__module__.startswith("diffusers.pipelines")), None)


def builds(test_class: type) -> bool:
    """Whether it makes its components without being told more."""
    made = getattr(test_class, "get_dummy_components", None)
    parameters = list(inspect.signature(made).parameters.values())[1:] if made else []
    return made is not None and all(one.default is not one.empty for one in parameters)


def build(name: str, test_class: Any, folder: Path) -> None:
    """Save one pipeline, with what its test calls it with beside the prompt."""
    test = object.__new__(test_class)
    shutil.rmtree(folder, ignore_errors=True)
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        torch.manual_seed(0)
        components = test.get_dummy_components()
        for part in components.values():
            if isinstance(part, torch.nn.Module):
                vary(part)
        fit_tokenizers(components)
        if name in ("StableVideoDiffusionPipeline", "ShapEImg2ImgPipeline"):
            components["image_encoder"] = as_published(components["image_encoder"])
        if name == "SanaPAGPipeline":  # its test takes logits for states
            config = components["text_encoder"].config
            config.hidden_size = components["transformer"].config.caption_channels
            components["text_encoder"] = transformers.Gemma2Model(config).eval()
        if "HunyuanDiT" in name:  # its positions count on eight pixels for each latent
            components["vae"] = eightfold_vae()
        pipeline = class_of(test_class)(**components)
        pipeline.save_pretrained(folder, safe_serialization=True)
        if "scheduler" not in components and hasattr(pipeline, "scheduler"):  # it has made one
            pipeline.scheduler.save_pretrained(folder / "scheduler")
    published_names(folder / "model_index.json")
    if name == "PRXPipeline":  # which reads the half of a model's configuration
        place = folder / "text_encoder" / "config.json"
        half = json.loads(place.read_text())
        place.write_text(json.dumps({"model_type": "t5gemma", "is_encoder_decoder": False, "encoder": half}))
    (folder / DESCRIPTION).write_text(json.dumps(call_of(test)))


def vary(module: torch.nn.Module) -> None:
    """No parameter stays constant: a zero-initialised projection would hide an error."""
    for parameter in module.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    module.eval()


def fit_tokenizers(components: dict[str, Any]) -> None:
    """Text models have a place for every token of the stand-ins."""
    for end in ("", "_2", "_3", "_4"):
        tokenizer, encoder = components.get(f"tokenizer{end}"), components.get(f"text_encoder{end}")
        if tokenizer is None or not hasattr(encoder, "get_input_embeddings"):
            continue
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        with contextlib.suppress(Exception):  # of a model that has no such table
            if encoder.get_input_embeddings().num_embeddings < len(tokenizer):
                encoder.resize_token_embeddings(len(tokenizer))
        if hasattr(encoder.config, "image_token_id"):
            encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
            encoder.config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")


def published_names(index: Path) -> None:
    """Name what the tests put in the place of something else as published checkpoints do."""
    named = json.loads(index.read_text())
    for key, entry in named.items():
        if isinstance(entry, list) and "PaellaVQModel" in entry:  # diffusers has put it away since
            named[key] = ["wuerstchen", "PaellaVQModel"]
    if isinstance(named.get("safety_checker"), list):
        named["safety_checker"] = [None, None]
    index.write_text(json.dumps(named, indent=2))


def eightfold_vae() -> Any:
    """An autoencoder with a latent for every eight pixels."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    ).eval()


def as_published(encoder: Any) -> Any:
    """The image encoder for 224 pixels, which the pipeline counts on."""
    config = encoder.config
    config.image_size, config.patch_size = 224, 56
    return type(encoder)(config).eval()


def call_of(test: Any) -> dict[str, Any]:
    """Size, frames, and the other settings that keep a tiny text model within its length."""
    try:
        given = test.get_dummy_inputs(
            *([] if not inspect.signature(test.get_dummy_inputs).parameters else ["cpu"])
        )
    except Exception:  # files of the Hub
        given = {}
    plain = {name: value for name, value in given.items() if is_plain(value) or name == "audio_duration_s"}
    settings = {name: value for name, value in plain.items() if name not in NAMED}
    return {"height": plain.get("height"), "width": plain.get("width"), "frames": plain.get("num_frames"),
            "settings": settings}  # fmt: skip


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(entry, int | float | str) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(isinstance(entry, int | float | str) for entry in value)
    return isinstance(value, int | bool)


def use_settings(folder: Path) -> dict[str, Any]:
    """Make the settings of a pipeline's test the defaults of its class; the options for gfprune."""
    described = json.loads((folder / DESCRIPTION).read_text())
    named = json.loads((folder / "model_index.json").read_text())["_class_name"]
    plain = named.replace("Img2Img", "").replace("Inpaint", "")  # what a network of the same shape is run in
    for cls in {getattr(diffusers, named, None), getattr(diffusers, plain, None)} - {None}:
        call = inspect.unwrap(cls.__call__)
        names, defaults = list(inspect.signature(call).parameters), list(call.__defaults__ or ())
        sizes = {
            "height": described["height"],
            "width": described["width"],
            "num_frames": described["frames"],
        }
        given = {name: value for name, value in sizes.items() if value}
        for name, value in (given | described["settings"]).items():
            place = names.index(name) - len(names) + len(defaults) if name in names else -1
            if place >= 0:
                defaults[place] = tuple(value) if isinstance(value, list) else value
        call.__defaults__ = tuple(defaults)
    accepted = inspect.signature(getattr(diffusers, named).__call__).parameters
    options: dict[str, Any] = {}
    height, frames = described["height"], described["frames"]
    if "height" in accepted and (height or not frames):
        height = height or 32
        options["size"] = f"{height}x{described['width'] or height}"
    if "height" not in accepted and "image" in accepted and "task_prompt" not in accepted:
        options["size"] = "64x64"  # of the picture
    if "num_frames" in accepted and frames:
        options["frames"] = frames
    return options
