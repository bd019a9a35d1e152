"""Hostile inputs in JSON: configurations, pipelines and what they name, records. See `corpus`."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpus import Case, Good, bad_files, copied, edit, nested, outside, zipped

CONFIG, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
SCRIPT = "raise SystemExit('evil')\n"  # what a Python file in a checkpoint says


def on_json(name: str, **changes: Any) -> Callable[[Path, Good], Path]:
    """A pipeline with other values in one JSON file."""
    return on_file(name, lambda path: edit(path, lambda document: document.update(changes)))


def on_file(name: str, change: Callable[[Path], Any]) -> Callable[[Path, Good], Path]:
    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.pipeline)
        change(model / name)
        return model

    return make


def texts() -> Iterator[tuple[str, bytes, str]]:
    """What may stand where an object in JSON should: (name, content, message)."""
    yield "nothing", b"", "not valid JSON"
    yield "null", b"null", "not a JSON object"
    yield "a list", b"[1]", "not a JSON object"
    yield "a pickle", b"\x80\x04" + b"cos\nsystem\n", "not valid JSON"
    yield "YAML", b"_class_name: !!python/object/apply:os.system [touch evil]", "not valid JSON"
    yield "UTF-16", '{"a": 1}'.encode("utf-16"), "not valid JSON"
    yield "a key given twice", b'{"_class_name": "UNet2DModel", "_class_name": "Evil"}', "given twice"
    yield "a comment", b'{} // "evil"', "not valid JSON"
    yield "NaN", b'{"norm_eps": NaN}', "NaN"
    yield "1e999", b'{"norm_eps": 1e999}', "out of range|config|no denoiser"
    yield "a number of 5000 digits", b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"
    yield "100,000 nested lists", b'{"a": ' + b"[" * 10**5, "nested too deeply"
    yield "900 nested lists", b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "nested too deeply"
    yield "900 nested objects", b'{"a": ' * 900 + b"1" + b"}" * 900, "nested too deeply"
    yield "2 MB", b'{"a": "' + b"x" * (2 << 20) + b'"}', "larger than"


def config_cases() -> Iterator[Case]:
    for name, content, says in texts():
        make = on_file(CONFIG, lambda path, content=content: path.write_bytes(content))
        yield Case(f"config: {name}", "model", make, says)
    for name, change, says in bad_files():
        yield Case(f"config: {name}", "model", on_file(CONFIG, change), says)
    for value in (
        None,
        True,
        7,
        1.5,
        [],
        {},
        ["UNet2DModel"],
        {"evil": 1},
        "",
        "evil",
        "../evil",
        nested(20),
    ):
        make = on_json(CONFIG, _class_name=value)
        yield Case(f"config: a class that is {value!r}", "model", make, "but model_index.json says")
    channels = "block_out_channels"
    absurd: dict[str, tuple[dict[str, Any], str]] = {
        "10^9 channels": ({channels: [16, 10**9]}, channels),
        "10^300 channels": ({channels: [16, 10**300]}, channels),
        "no channels": ({channels: []}, "config.json"),
        "half a channel": ({channels: [16, 0.5]}, channels),
        "minus 16 channels": ({channels: [16, -16]}, channels),
        "1000 stages": ({channels: [16] * 1000}, channels),
        "channels that are text": ({channels: "evil"}, "valid UNet2DModel"),
        "channels that are true": ({channels: True}, "valid UNet2DModel"),
        "channels that are an object": ({channels: {"evil": 16}}, "config.json"),
        "a million layers": ({"layers_per_block": 10**6}, "layers_per_block"),
        "3600 layers": ({channels: [16] * 60, "layers_per_block": 60}, "layers in all"),
        "no norm groups": ({"norm_num_groups": 0}, "norm_num_groups"),
        "odd norm groups": ({"norm_num_groups": 5}, "valid UNet2DModel"),
        "an image of 10^9 pixels a side": ({"sample_size": 10**9}, "sample_size"),
        "10^9 input channels": ({"in_channels": 10**9}, "in_channels"),
        "no head": ({"attention_head_dim": 0}, "attention_head_dim"),
        "heads of 10^9": ({"attention_head_dim": 10**9}, "attention_head_dim"),
        "10^12 classes": ({"num_class_embeds": 10**12, "class_embed_type": None}, "num_class_embeds"),
        "blocks that are code": ({"down_block_types": ["os.system", "evil"]}, "valid UNet2DModel"),
        "blocks that are lists": ({"down_block_types": [[], []]}, "down_block_types"),
        "an activation that is code": ({"act_fn": "__import__('evil')"}, "valid UNet2DModel"),
        "a time embedding that is code": ({"time_embedding_type": "evil"}, "valid UNet2DModel"),
        "an epsilon in words": ({"norm_eps": "evil"}, "config.json|cannot"),
    }
    for name, (changes, says) in absurd.items():
        yield Case(f"config: {name}", "model", on_json(CONFIG, **changes), says)
    conditional = {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D"] * 64,
        "up_block_types": ["CrossAttnUpBlock2D"] * 64,
        channels: [64] * 64,
        "layers_per_block": 8,
        "transformer_layers_per_block": 64,
    }
    yield Case(
        "config: 32,768 transformer blocks", "model", bare(conditional), "transformer_layers_per_block"
    )
    for name, config in huge_transformers().items():
        yield Case(f"config: {name}", "model", bare(config), "config.json|cannot trace")


def bare(config: dict[str, Any]) -> Callable[[Path, Good], Path]:
    """A network's folder with that configuration and the weights of another."""

    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.pipeline / "unet")
        (model / "config.json").write_text(json.dumps(config))
        return model

    return make


def huge_transformers() -> dict[str, dict[str, Any]]:
    """Transformers whose tables of positions alone would fill the memory."""
    return {
        "a DiT of 10^9 patches": {
            "_class_name": "DiTTransformer2DModel",
            "sample_size": 65536,
            "patch_size": 1,
        },
        "an SD3 of 4096 x 4096 positions": {
            "_class_name": "SD3Transformer2DModel",
            "pos_embed_max_size": 4096,
            "sample_size": 65536,
        },
        "a video of 10^9 frames": {"_class_name": "CogVideoXTransformer3DModel", "sample_frames": 10**9},
        "a transformer of 10^6 layers": {"_class_name": "FluxTransformer2DModel", "num_layers": 10**6},
        "tables of 10^7 positions": {"_class_name": "ZImageTransformer2DModel", "axes_lens": [10**7] * 3},
        "a text of 10^12 tokens": {
            "_class_name": "CogVideoXTransformer3DModel",
            "max_text_seq_length": 10**12,
        },
    }


def index_cases() -> Iterator[Case]:
    """model_index.json, and the classes and files that it names."""
    for name, content, says in texts():
        if name not in ("NaN", "1e999", "2 MB"):
            make = on_file("model_index.json", lambda path, content=content: path.write_bytes(content))
            yield Case(f"pipeline: {name}", "model", make, says)
    entries: dict[str, Any] = {
        "a file of the folder": ["evil", "UNet2DModel"],
        "a module of Python": ["os", "system"],
        "a dotted module": ["evil.module", "UNet2DModel"],
        "a repository of the Hub": ["someone/evil--module", "UNet2DModel"],
        "a class of torch": ["torch", "UNet2DModel"],
        "a class that diffusers does not have": ["diffusers", "EvilModel"],
        "a private name": ["diffusers", "__import__"],
        "a function": ["diffusers", "logging"],
        "an automatic class": ["diffusers", "AutoModel"],
        "two nulls": [None, None],
        "one name": ["UNet2DModel"],
        "three names": ["diffusers", "UNet2DModel", "evil"],
        "text": "UNet2DModel",
        "a number": 7,
        "an object": {"diffusers": "UNet2DModel"},
        "nested lists": nested(20),
        "names that are lists": [["diffusers"], ["UNet2DModel"]],
    }
    for name, entry in entries.items():
        yield Case(
            f"pipeline: a network that is {name}", "model", with_script(unet=entry), "names no denoiser"
        )
    yield Case("pipeline: no components", "model", on_file("model_index.json", emptied), "no denoiser")
    yield Case(
        "pipeline: a network that climbs",
        "model",
        on_file("model_index.json", lambda path: edit(path, climbing)),
        "names no denoiser",
    )
    for name, change, says in bad_files():
        if name != "a link to itself" and "nothing" not in name:
            yield Case(f"pipeline: {name}", "model", on_file("model_index.json", change), says)


def emptied(path: Path) -> None:
    path.write_text("{}")


def climbing(index: dict[str, Any]) -> None:
    index["../unet"] = index.pop("unet")


def with_script(**entries: Any) -> Callable[[Path, Good], Path]:
    """A pipeline with Python files wherever diffusers could look for one."""

    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.pipeline)
        edit(model / "model_index.json", lambda index: index.update(entries))
        for place in (model, model / "unet", model / "scheduler"):
            for name in ("evil.py", "pipeline.py", "modeling.py", "diffusers.py", "os.py"):
                (place / name).write_text(SCRIPT)
        return model

    return make


def pipeline_cases() -> Iterator[Case]:
    """The other components of an unconditional pipeline: they travel into the output."""
    others: dict[str, tuple[dict[str, Any], str]] = {
        "a scheduler in a Python file": ({"scheduler": ["evil", "EvilScheduler"]}, "'evil'"),
        "a component in a Python file": ({"extra": ["evil", "EvilModel"]}, "'evil'"),
        "a component of the Hub": ({"extra": ["someone/evil--module", "EvilModel"]}, "evil"),
        "a component of a class that loads others": ({"extra": ["diffusers", "AutoModel"]}, "AutoModel"),
        "a component of Python's own": ({"extra": ["builtins", "exec"]}, "'builtins'"),
        "a pipeline in a Python file": ({"_class_name": ["pipeline", "EvilPipeline"]}, "_class_name"),
    }
    for name, (entries, says) in others.items():
        yield Case(f"pipeline: {name}", "model", with_script(**entries), says, analyze=0)
    scheduler: dict[str, tuple[Any, str]] = {
        "a class that is code": ({"_class_name": "evil.Scheduler"}, "no scheduler of diffusers"),
        "a class that is a list": ({"_class_name": ["DDPMScheduler"]}, "no scheduler of diffusers"),
        "a class of another kind": ({"_class_name": "UNet2DModel"}, "no scheduler of diffusers"),
        "a mixin": ({"_class_name": "SchedulerMixin"}, "no scheduler of diffusers|schedul"),
        "10^12 timesteps": ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        "no timesteps": ({"num_train_timesteps": 0}, "num_train_timesteps"),
        "timesteps in words": ({"num_train_timesteps": "evil"}, "schedul"),
        "an unknown schedule": ({"beta_schedule": "evil"}, "valid scheduler"),
        "betas that are an object": ({"trained_betas": {"evil": 1}}, "schedul"),
        "betas of one number": ({"trained_betas": [0.5]}, "schedul"),
        "betas above one": ({"beta_start": 2.0, "beta_end": 3.0}, "schedul|finite"),
        "an unknown prediction": ({"prediction_type": "evil"}, "prediction"),
    }
    for name, (changes, says) in scheduler.items():
        yield Case(f"scheduler: {name}", "model", on_json(SCHEDULER, **changes), says, analyze=0)
    for name, change, says in bad_files():
        if name in ("a named pipe", "a folder", "a link out of the folder", "a link to /dev/zero"):
            yield Case(f"scheduler: {name}", "model", on_file(SCHEDULER, change), says, analyze=0)


def on_text(name: str, change: Callable[[Path], Any]) -> Callable[[Path, Good], Path]:
    """A pipeline with a text encoder, one file changed."""

    def make(folder: Path, good: Good) -> Path:
        model = copied(folder, good.text)
        change(model / name)
        return model

    return make


def text_cases() -> Iterator[Case]:
    """Components that diffusers and transformers load themselves."""

    def updated(**changes: Any) -> Callable[[Path], Any]:
        return lambda path: edit(path, lambda document: document.update(changes))

    def entry(**changes: Any) -> Callable[[Path, Good], Path]:
        return on_text("model_index.json", updated(**changes))

    def pickled(path: Path) -> None:
        path.rename(path.with_name("pytorch_model.bin")).write_bytes(zipped())

    def linked(path: Path) -> None:
        place = outside(path.parents[2]) / path.name
        path.rename(place)
        path.symlink_to(place)

    def elsewhere(path: Path) -> None:
        place = outside(path.parents[2]) / "evil.json"
        place.write_text('{"evil": 1}')
        edit(path, lambda document: document.update(vocab_file=str(place), tokenizer_file=str(place)))

    encoder, tokenizer = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
    weights = "text_encoder/model.safetensors"
    bad: dict[str, tuple[Callable[[Path, Good], Path], str]] = {
        "an encoder in a Python file": (entry(text_encoder=["evil", "CLIPTextModel"]), "evil"),
        "an encoder of Python's own": (entry(text_encoder=["builtins", "eval"]), "builtins"),
        "an encoder that loads others": (entry(text_encoder=["transformers", "AutoModel"]), "AutoModel"),
        "an encoder that is a pipeline": (entry(text_encoder=["transformers", "Pipeline"]), "Pipeline"),
        "a tokenizer that is a function": (entry(tokenizer=["transformers", "pipeline"]), "tokenizer"),
        "a pipeline that is code": (entry(_class_name="os.system"), "no pipeline of diffusers"),
        "a pipeline that is another class": (entry(_class_name="UNet2DModel"), "no pipeline of diffusers"),
        "kernels of the Hub": (on_text(encoder, updated(_attn_implementation="evil/kernel")), "Hub"),
        "an encoder of 10^9 columns": (on_text(encoder, updated(hidden_size=10**9)), "hidden_size"),
        "an encoder of 10^6 layers": (
            on_text(encoder, updated(num_hidden_layers=10**6)),
            "num_hidden_layers",
        ),
        "an encoder of 10^12 words": (on_text(encoder, updated(vocab_size=10**12)), "vocab_size"),
        "layers that the weights lack": (on_text(encoder, updated(num_hidden_layers=9)), "text_encoder"),
        "wider layers than stored": (on_text(encoder, updated(intermediate_size=10**6)), "text_encoder"),
        "an encoder in a pickle": (on_text(weights, pickled), "no safetensors weights"),
        "an encoder cut short": (on_text(weights, lambda path: os.truncate(path, 200)), "text_encoder"),
        "encoder weights that link out": (on_text(weights, linked), "leads out"),
        "a tokenizer of a file elsewhere": (on_text(tokenizer, elsewhere), "tokenizer"),
        "an adapter of another model": (
            on_text("text_encoder/adapter_config.json", lambda path: path.write_text("{}")),
            "adapter",
        ),
    }
    for name, (make, says) in bad.items():
        yield Case(f"text: {name}", "text", make, says, analyze=0)


def record_cases() -> Iterator[Case]:
    """The record beside a pruned checkpoint, which `finetune` believes."""

    def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Good], Path]:
        def make(folder: Path, good: Good) -> Path:
            model = copied(folder, good.pruned)
            edit(model / "gfprune.json", change)
            return model

        return make

    def source(**changes: Any) -> Callable[[Path, Good], Path]:
        return record(lambda document: document["source"].update(changes))

    def kept(value: Any) -> Callable[[Path, Good], Path]:
        return record(lambda document: document.update(kept=value))

    bad: dict[str, tuple[Callable[[Path, Good], Path], str]] = {
        "a source of another kind": (source(kind="evil"), "damaged"),
        "a source that is gone": (source(label="/evil"), "not there"),
        "hashes of another model": (source(weights={"a": "0" * 64}), "--teacher"),
        "hashes that are none": (source(weights={"a": "evil"}), "no SHA-256"),
        "channels out of order": (kept({"a": [3, 1]}), "do not ascend"),
        "channels below zero": (kept({"a": [-1]}), "damaged"),
        "channels that are objects": (kept({"a": [{"evil": 1}]}), "damaged"),
        "no channels": (kept(None), "damaged"),
        "a component that climbs": (record(lambda r: r.update(component="../evil")), "evil"),
        "a recipe that is a list": (record(lambda r: r.update(recipe=[])), "damaged"),
        "900 nested lists": (record(lambda r: r.update(recipe=nested(900))), "nested too deeply"),
    }
    for name, (make, says) in bad.items():
        code = 2 if name == "a component that climbs" else 1  # which --component then has to name
        yield Case(f"record: {name}", "record", make, says, code)
