"""`eval` and `export` on every family, through tiny pipelines of the real classes."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import CALLS, COMPONENTS, FAMILIES, FREE, image_vae, saved
from safetensors.torch import load_file, save_file
from text_encoders import t5

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.network import FloorLinearAttention, replace_modules
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.schedulers import Reconstruction, noising_process
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation import job as run
from gfprune_cli.evaluation import teacher
from gfprune_cli.evaluation.consistency import Consistency, ssim
from gfprune_cli.evaluation.deepcache import DeepCache
from gfprune_cli.evaluation.job import denoiser
from gfprune_cli.evaluation.protocols import settings_of
from gfprune_cli.evaluation.sampling import draw, make_sampling
from gfprune_cli.evaluation.subjects import Subject
from gfprune_cli.evaluation.task import Task, task_of
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.pages.evaluation_page import markdown, render
from gfprune_cli.progress import silent
from gfprune_cli.recipes.evaluate import EvalRecipe

pytestmark = pytest.mark.matrix(3)

CPU = torch.device("cpu")
DRAWS = 20
PROMPT = "a red cube on a table"
UNPROMPTED = ("dit", "ldm")
SIZES: dict[str, dict[str, Any]] = {
    "flux": dict(size="16"),
    "sana": dict(size="32"),
    "cogvideox": dict(size="32", frames=9),
    "wan": dict(size="32", frames=9),
    "ltx": dict(size="32", frames=9),
}
AUTOENCODERS = {"stable-diffusion": "vae", "ldm": "vqvae"}

NEEDS_ONNX, NEEDS_OPENVINO = (
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in FORMATS[extra].packages),
        reason=f"the extra {extra} is not installed",
    )
    for extra in ("onnx", "openvino")
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The pipeline of a family, made once."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def find(family: str) -> Path:
        if family not in made:
            made[family] = FAMILIES[family](root / family)
        return made[family]

    return find


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is the same with fewer draws and repeats."""
    monkeypatch.setattr(teacher, "LOSS_DRAWS", DRAWS)
    monkeypatch.setattr(run, "REPEATS", 5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(f"{PROMPT}\n")
    return path


def disturbed(folder: Path, component: str, out: Path) -> Path:
    """A copy with 5 % noise on the weights of one component."""
    shutil.copytree(folder, out)
    path = next((out / component).glob("*.safetensors"))
    source = torch.Generator().manual_seed(1)
    weights = {
        name: tensor * (1 + 0.05 * torch.randn(tensor.shape, generator=source))
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return out


def options(family: str, prompts: Path) -> dict[str, Any]:
    return SIZES.get(family, {}) | ({} if family in UNPROMPTED else {"prompts": str(prompts)})


def evaluated(model: Path, **settings: Any) -> Any:
    timed = {} if settings.get("no_latency") else {"latency_batches": "1"}
    result = gfprune_cli.evaluate(str(model), samples=2, steps=2, **timed, **settings)
    page = render(result.document(), result.grid)
    assert page.count("<img") == 2 * len(result.grid)
    assert result.class_name in page
    assert markdown(result.document()).startswith("# ")
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_compared_with_its_reference(
    family: str, folder_of: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    dense = folder_of(family)
    model = disturbed(dense, COMPONENTS[family], tmp_path / "model")
    found = evaluated(model, reference=str(dense), **options(family, prompts))
    metrics = found.metrics
    assert 10 < metrics["psnr"]["value"] < 80
    assert metrics["fd_teacher"]["value"] > 0
    assert metrics["loss"]["value"] != metrics["loss_reference"]["value"]
    assert sum(row["n"] for row in found.loss_by_timestep) == metrics["loss"]["n"]
    assert [(row["mode"], row["batch"]) for row in found.latency] == [("eager", 1)]
    assert found.macs["model"] == found.macs["reference"] > 0
    assert not found.grid


@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "cogvideox"])
def test_a_model_is_equal_to_itself(family: str, folder_of: Callable[[str], Path], prompts: Path) -> None:
    dense = folder_of(family)
    found = evaluated(dense, reference=str(dense), no_latency=True, **options(family, prompts))
    assert found.metrics["psnr"]["identical"] == 2
    assert found.metrics["fd_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert found.metrics.get("relative_error", {"value": 0})["value"] == 0


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_autoencoders_give_pictures_back(
    family: str, folder_of: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    dense, component = folder_of(family), AUTOENCODERS[family]
    model = disturbed(dense, component, tmp_path / "model")
    found = evaluated(model, reference=str(dense), component=component, **options(family, prompts))
    assert 0 < found.metrics["ssim"]["value"] < 1
    assert found.metrics["loss"]["n"] == DRAWS
    assert found.loss_by_timestep == []
    assert len(found.grid) == 2


def test_images_of_data_are_evaluated_as_latents(
    folder_of: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    from PIL import Image

    for number in range(3):
        pixels = (255 * torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(number))).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    dense = folder_of("stable-diffusion")
    found = evaluated(dense, reference=str(dense), data=str(tmp_path), no_latency=True, prompts=str(prompts))
    assert found.metrics["fd_teacher"]["against"] == "data"
    assert found.metrics["fd_teacher"]["value"] > 0
    assert "fid" not in found.metrics


def test_shallow_steps_of_conditioned_networks(folder_of: Callable[[str], Path], prompts: Path) -> None:
    """Of U-Nets; with unchanged inputs they give what a full step gives."""
    network = gfprune_cli.load(folder_of("sdxl"))
    cache, inputs = DeepCache(network), example_inputs(network)
    torch.testing.assert_close(cache.full_step(**inputs), cache.shallow_step(**inputs))
    with pytest.raises(ValueError, match="no U-Net"):
        DeepCache(gfprune_cli.load(folder_of("dit")))
    found = evaluated(
        folder_of("sdxl"), reference=str(folder_of("sdxl")), deepcache=True, prompts=str(prompts)
    )
    assert [row["mode"] for row in found.latency] == ["eager", "deepcache"]


@pytest.mark.parametrize("family", ["stable-diffusion", "pixart"])
def test_a_network_without_its_pipeline(family: str, folder_of: Callable[[str], Path]) -> None:
    """Noise stands in for the text, and the report says so."""
    bare = folder_of(family) / COMPONENTS[family]
    found = evaluated(bare, reference=str(bare), no_latency=True)
    assert found.metrics["psnr"]["identical"] == 2
    assert any("normal noise stands in" in warning for warning in found.warnings)


def task_for(folder: Path, family: str, recipe: EvalRecipe) -> tuple[Subject, Any, Task]:
    source = Source(str(folder), folder, "local", None)
    subject = Subject(str(folder), source, inspect(source, component=COMPONENTS[family]))
    settings = settings_of(recipe, subject.process)
    return subject, settings, task_of(recipe, settings, subject, CPU, silent)


@pytest.mark.parametrize("family", ["sd3", "flux", "sana", "wan", "ltx", "sdxl", "stable-audio"])
def test_the_schedulers_own_loop_draws_what_the_pipeline_draws(
    family: str, folder_of: Callable[[str], Path], prompts: Path
) -> None:
    """Same noise, same prompt, same steps: guidance, time steps and shifts are those of the pipeline."""
    folder = folder_of(family)
    recipe = EvalRecipe(sampler="pipeline", steps=3, samples=2, **options(family, prompts))
    subject, settings, task = task_for(folder, family, recipe)
    ours = draw(
        make_sampling(settings, task.plain, subject.scheduler, task.mu),
        denoiser(subject.load(CPU), task.conditions(1), task, recipe.precision, lambda: None),
        members=[0],
        shape=task.shape,
        seed=recipe.seed,
        device=CPU,
        what="model",
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    arguments = CALLS[family] | {"num_inference_steps": 3, "output_type": "latent", "prompt": PROMPT}
    arguments.pop("max_sequence_length", None)
    arguments.pop("complex_human_instruction", None)
    noise = torch.randn(1, *task.shape, generator=generator(recipe.seed, "evaluate", 0))
    theirs = pipeline(**arguments, latents=noise)[0]
    torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-3)


def test_the_sampler_follows_the_noise() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert settings_of(EvalRecipe(), noising_process(flow)).sampler == "pipeline"
    assert settings_of(EvalRecipe(), Reconstruction()).sampler == "pipeline"
    for process in (noising_process(flow), Reconstruction()):
        with pytest.raises(UsageError, match=r"--sampler ddim"):
            settings_of(EvalRecipe(sampler="ddim"), process)


def test_frames_of_a_video_are_compared_one_by_one() -> None:
    source = torch.Generator().manual_seed(0)
    first = torch.rand(2, 3, 4, 16, 16, generator=source)
    second = (first + 0.1 * torch.randn(first.shape, generator=source)).clamp(0, 1)
    found = {}
    for name, one, other in (
        ("channels first", first, second),
        ("frames first", first.transpose(1, 2), second.transpose(1, 2)),
    ):
        consistency = Consistency()
        consistency.add(one, other, eight_bit=False)
        found[name] = consistency.scores["ssim"]
    frames = torch.stack([ssim(first[:, :, frame], second[:, :, frame]) for frame in range(4)]).mean(0)
    assert found["channels first"] == pytest.approx(frames.tolist())
    assert found["frames first"] == pytest.approx(frames.tolist())


def test_latents_without_a_picture_have_a_relative_error_and_no_ssim() -> None:
    consistency = Consistency()
    tokens = torch.rand(3, 40, 16)
    consistency.add(tokens, tokens / 2, eight_bit=False)
    consistency.add_relative(tokens, tokens * 1.5)
    assert consistency.metrics().keys() == {"psnr", "relative_error"}
    assert consistency.metrics()["relative_error"]["value"] == pytest.approx(0.5)


def exported(folder: Path, form: str, out: Path, **settings: Any) -> Any:
    return gfprune_cli.export(str(folder), format=form, out=out, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_denoisers_in_half_precision(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The pipeline folder in bf16, written, read back and run beside its source; plain diffusers loads it."""
    result = exported(folder_of(family), "safetensors", tmp_path / "out", dtype="bf16")
    assert 0 < result.parity.max_rel < 0.1
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert getattr(pipeline, COMPONENTS[family]).dtype == torch.bfloat16


@pytest.mark.thorough  # pruned ones are exported in test_families.py
@pytest.mark.parametrize("family", ["stable-diffusion", "dit", "stable-audio"])
def test_denoisers_as_programs(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    result = exported(folder_of(family), "torch-export", tmp_path / "out")
    check_graph(family, result)
    if family == "stable-audio":
        assert result.inputs["rotary_embedding_0"]["shape"] == ["w+1", 4]


@pytest.mark.thorough  # test_export.py has a network in OpenVINO
@NEEDS_OPENVINO
@pytest.mark.slow
@pytest.mark.parametrize("family", ["sana", "wan"])
def test_denoisers_in_openvino(family: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    check_graph(family, exported(folder_of(family), "openvino", tmp_path / "out"))


def check_graph(family: str, result: Any) -> None:
    """What is free, under which names, and that it computes what its source computes."""
    assert next(iter(result.inputs.values()))["shape"] == FREE[family]
    assert result.parity.max_rel < 1e-4
    if family not in UNPROMPTED:
        assert result.inputs["encoder_hidden_states"]["shape"][:2] == ["batch", "text"]
    if family == "sdxl":
        assert {"text_embeds", "time_ids"} <= result.inputs.keys()


@pytest.mark.parametrize("family", AUTOENCODERS)
def test_a_graph_of_an_autoencoder_is_its_decoder(
    family: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, component = folder_of(family), AUTOENCODERS[family]
    result = exported(folder, "torch-export", tmp_path / "out", component=component)
    channels = {"vae": 4, "vqvae": 3}[component]
    assert result.inputs == {"latent": {"dtype": "float32", "shape": ["batch", channels, "h", "w"]}}
    latent = torch.randn(2, channels, 6, 10, generator=torch.Generator().manual_seed(0))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        expected = getattr(pipeline, component).decode(latent).sample
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    torch.testing.assert_close(program(latent=latent), expected, rtol=1e-4, atol=1e-4)


def test_linear_attention_with_a_floor_is_that_of_sana(folder_of: Callable[[str], Path]) -> None:
    """Equal to the class's own, also for queries of which ReLU leaves nothing."""
    folder = folder_of("sana")
    network: Any = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    attention = network.transformer_blocks[0].attn1
    attention.to_q.weight.data[:8] = 0  # all of the first head
    states = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    expected = attention(states)
    replace_modules(network)
    assert isinstance(attention.processor, FloorLinearAttention)
    torch.testing.assert_close(attention(states), expected, rtol=1e-4, atol=1e-5)


def unknown_network() -> Any:
    """A class that no part of gfprune names; its inputs follow from the names of its arguments."""
    return diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip


def test_the_inputs_of_an_unknown_class_are_seen_in_its_pipeline(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, tokenizer = t5(32)
        saved(
            tmp_path / "cogview",
            diffusers.CogView3PlusPipeline,
            transformer=unknown_network(),
            vae=image_vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        )
    for form in ("safetensors", "torch-export"):
        result = exported(tmp_path / "cogview", form, tmp_path / form)
        assert result.parity.max_rel < 1e-4
    assert result.inputs["hidden_states"]["shape"] == ["batch", 4, 8, 8]
    found = evaluated(tmp_path / "cogview", reference=str(tmp_path / "cogview"))
    assert found.metrics["psnr"]["identical"] == 2
    few = dict(images=4, sample_steps=2)
    pruned = gfprune_cli.prune(
        str(tmp_path / "cogview"),
        out=tmp_path / "pruned",
        sparsity=0.1,
        one_shot=True,
        draws=4,
        recover=1,
        **few,
    )
    assert abs(pruned.sparsity["achieved"] - 0.1) <= 0.01
    assert pruned.loss["removed"] == pytest.approx(pruned.loss["masked"], rel=1e-4)
    tuned = gfprune_cli.finetune(
        tmp_path / "pruned", out=tmp_path / "tuned", steps=1, sample_every=0, features=0.1, batch=2, **few
    )
    assert tuned.loss["after"] is not None


def test_an_unknown_class_is_one_line(tmp_path: Path) -> None:
    diffusers.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=24, num_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        cross_attention_dim=32,
    ).save_pretrained(tmp_path / "bare")  # fmt: skip
    with pytest.raises(GfpruneError, match=r"LuminaNextDiT2DModel.*its pipeline is needed") as caught:
        exported(tmp_path / "bare", "torch-export", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
