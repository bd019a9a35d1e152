"""`export` of whole text-to-image pipelines, in the folders of optimum.

optimum itself forbids the version of transformers that the project is tested with: `on_graphs` calls the
graphs as its classes do (optimum-onnx 0.1.0, `onnxruntime/modeling_diffusion.py`), by the same names and in
the same order.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import ONE_SHOT
from pipelines import FAMILIES, PNDMScheduler, conditional_unet, stable_diffusion
from transformers.modeling_outputs import ModelOutput

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.parts import sibling, sizes_of_parts
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.recipes.export import ExportRecipe

NEEDS_ONNX, NEEDS_OPENVINO = (
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in FORMATS[extra].packages),
        reason=f"the extra {extra} is not installed",
    )
    for extra in ("onnx", "openvino")
)
FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}


class Graph:
    """One graph in ONNX Runtime or OpenVINO."""

    def __init__(self, path: Path) -> None:
        if path.suffix == ".onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
            self.types = {entry.name: types[entry.type] for entry in session.get_inputs()}
            self.shapes = {
                entry.name: entry.shape for entry in (*session.get_inputs(), *session.get_outputs())
            }
            names = [entry.name for entry in session.get_outputs()]
            self.run = lambda feed: dict(zip(names, session.run(None, feed), strict=True))
        else:
            import openvino

            model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            self.types = {entry.any_name: entry.element_type.to_dtype() for entry in model.inputs}
            self.run = lambda feed: {next(iter(key.names)): value for key, value in model(feed).items()}

    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        feed = {name: given[name].numpy(force=True).astype(dtype) for name, dtype in self.types.items()}
        return {name: torch.from_numpy(np.array(value)) for name, value in self.run(feed).items()}


def on_graphs(pipeline: Any, folder: Path, form: str) -> Any:
    """A pipeline whose networks are the graphs of a folder."""
    found = {path.parent.name: Graph(path) for path in folder.glob(f"*/{FILES[form]}")}

    def unet(
        sample: Any, timestep: Any, encoder_hidden_states: Any, added_cond_kwargs: Any = None, **rest: Any
    ) -> Any:
        states = dict(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        return (found["unet"](**states, **(added_cond_kwargs or {}))["out_sample"],)

    def transformer(**given: Any) -> Any:
        return (found["transformer"](**given)["out_hidden_states"],)

    def text(name: str) -> Any:
        def forward(
            input_ids: Any, attention_mask: Any = None, output_hidden_states: Any = None, **rest: Any
        ) -> Any:
            outputs: dict[str, Any] = found[name](input_ids=input_ids)
            deep = [outputs.pop(key) for key in list(outputs) if key.startswith("hidden_states.")]
            if output_hidden_states:
                outputs["hidden_states"] = [*deep[:-1], outputs["last_hidden_state"]]
            return ModelOutput(**outputs)

        return forward

    if "unet" in found:
        pipeline.unet.forward = unet
    else:
        pipeline.transformer.forward = transformer
    for name in (name for name in found if name.startswith("text_encoder")):
        getattr(pipeline, name).forward = text(name)
    pipeline.vae.decode = lambda latents, **rest: (found["vae_decoder"](latent_sample=latents)["sample"],)
    return pipeline, found


def picture(pipeline: Any, prompts: list[str], size: int) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts, num_inference_steps=2, height=size, width=size, output_type="pt", guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(number) for number in range(len(prompts))],
    ).images  # fmt: skip


def check(model: Path, form: str, out: Path, **networks: Any) -> dict[str, Graph]:
    """Export, and draw with torch and with the graphs: two prompts, at a size that no trace has seen."""
    done = gfprune_cli.export(str(model), format=form, out=out)
    assert done.parity.max_rel < 1e-4
    assert done.files.keys() == {
        str(path.relative_to(out)) for path in out.rglob("*") if path.suffix in (".onnx", ".xml", ".bin")
    }

    def torch_pipeline() -> Any:
        return diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True, **networks)

    prompts = ["a red cube", "two green birds on a wire"]
    expected = picture(torch_pipeline(), prompts, 24)
    pipeline, found = on_graphs(torch_pipeline(), out, form)
    torch.testing.assert_close(picture(pipeline, prompts, 24), expected, rtol=0, atol=2e-3)
    return found


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion of one level, with uneven widths."""
    root = tmp_path_factory.mktemp("sd")
    one = dict(block_out_channels=(24,), attention_head_dim=(3,))
    one |= dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    dense = stable_diffusion(root / "dense", conditional_unet(**one), PNDMScheduler(skip_prk_steps=True))
    gfprune_cli.prune(str(dense), sparsity=0.3, out=root / "pruned", **ONE_SHOT)
    return root / "pruned"


@NEEDS_ONNX
@pytest.mark.slow
def test_a_pruned_pipeline_draws_the_same_in_onnx(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    found = check(pruned, "onnx", out, unet=gfprune_cli.load(pruned))
    assert found["unet"].shapes["sample"] == ["batch_size", 4, "height", "width"]
    assert found["unet"].shapes["timestep"] == []
    assert found["unet"].shapes["encoder_hidden_states"][:2] == ["batch_size", "sequence_length"]
    assert found["vae_decoder"].shapes["sample"] == ["batch_size", 3, "latent_height * 2", "latent_width * 2"]
    assert found["vae_encoder"].shapes["latent_parameters"][2] == "sample_height / 2"
    assert found["text_encoder"].shapes["input_ids"] == ["batch_size", "sequence_length"]
    index = json.loads((out / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert "auto_map" not in index
    for name in ("unet", "text_encoder", "vae_decoder", "vae_encoder"):  # optimum's classes stop without it
        assert "gfprune" not in json.loads((out / name / "config.json").read_text()), name
    assert json.loads((out / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert any((out / "tokenizer").iterdir())
    assert not list(out.rglob("*.safetensors")) + list(out.rglob("*.py"))
    assert "ORTDiffusionPipeline" in (out / "README.md").read_text()
    with pytest.raises(GfpruneError, match="gfprune's export to 'onnx': give what it was exported from"):
        gfprune_cli.analyze(str(out))


@NEEDS_ONNX
@NEEDS_OPENVINO
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "form"),
    [("stable-diffusion", "openvino"), ("sdxl", "onnx"), ("sd3", "onnx"), ("flux", "onnx")],
)
def test_pipelines_of_every_supported_family_draw_the_same(
    family: str, form: str, tmp_path: Path, thorough: bool
) -> None:
    if not thorough:
        pytest.skip("the long form only: pipelines in ONNX and graphs in OpenVINO have tests")
    check(FAMILIES[family](tmp_path / family), form, tmp_path / form)


def test_one_network_of_a_pipeline_is_asked_for_by_name(pruned: Path, tmp_path: Path) -> None:
    whole = gfprune_cli.export(str(pruned), format="onnx", dry_run=True, out=tmp_path / "none")
    folders = {name.partition("/")[0] for name in whole.files}
    assert folders == {"unet", "vae_encoder", "vae_decoder", "text_encoder"}
    alone = gfprune_cli.export(
        str(pruned), format="onnx", component="unet", dry_run=True, out=tmp_path / "none"
    )
    assert alone.files == {"model.onnx": whole.files["unet/model.onnx"]}


def test_a_pipeline_that_optimum_does_not_take_says_what_to_do(tmp_path: Path) -> None:
    folder = FAMILIES["stable-diffusion"](tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UsageError, match=r"vae is AutoencoderTiny.*: export the network alone with --component"
    ):
        gfprune_cli.export(str(folder), format="onnx", dry_run=True)


def test_the_autoencoder_keeps_the_variant_and_its_own_precision(tmp_path: Path) -> None:
    """A folder of nothing but fp16 files; an autoencoder that overflows in float16 stays in float32."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        FAMILIES["stable-diffusion"](tmp_path / "plain")
    )
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16")
    unet = inspect(resolve(str(tmp_path / "fp16")), component="unet", variant="fp16")
    assert [path.name for path in sibling(unet, "vae").weights] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    sizes = [sizes_of_parts(unet, ExportRecipe(format="onnx", dtype=dtype)) for dtype in ("fp32", "fp16")]
    assert sizes[1]["unet"] == sizes[0]["unet"] // 2
    assert sizes[1]["vae_decoder"] == sizes[0]["vae_decoder"]
