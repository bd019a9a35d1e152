"""What a pipeline passes to its network, as recorded, against the pipeline itself in plain diffusers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import COMPONENTS, FAMILIES, conditional_unet, flux2_vae
from safetensors import safe_open
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import cast_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.data.calibration import ImageRequest, Images, PipelineOptions
from gfprune_cli.data.drawing import self_images
from gfprune_cli.data.latents import laid_out, normalised, pictures
from gfprune_cli.data.stored import in_memory
from gfprune_cli.diffusion.conditions import Conditions, call
from gfprune_cli.diffusion.guidance import GuidedProcess
from gfprune_cli.diffusion.schedulers import Reconstruction
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.inputs.conditioning import as_recording, as_tensors
from gfprune_cli.inputs.pipeline import open_pipeline, pipeline_class
from gfprune_cli.inputs.pipeline_run import call_arguments
from gfprune_cli.inputs.recording import Recording, record
from gfprune_cli.progress import Event, silent

pytestmark = pytest.mark.matrix(3)

CONDITIONED = [family for family in FAMILIES if family != "ldm"]
VIDEO = dict(size="32", frames=9)
OPTIONS: dict[str, dict[str, Any]] = {
    "flux": dict(size="16"),
    "sana": dict(size="32"),
    "cogvideox": VIDEO,
    "wan": VIDEO,
    "ltx": VIDEO,
}
PROMPTS = ["a red fox", "two dogs and a cat"]
LABELS = [3, 7]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The saved pipeline of a family; made once."""
    root = tmp_path_factory.mktemp("families")

    def find(family: str) -> Path:
        place = root / family
        return place if place.exists() else FAMILIES[family](place)

    return find


def component_of(root: Path, name: str) -> Component:
    index = json.loads((root / "model_index.json").read_text())
    config = json.loads((root / name / "config.json").read_text())
    return Component(root, root / name, name, index[name][1], index, config, (), {})


def opened(root: Path, name: str) -> tuple[nn.Module, Component, Any]:
    """A network of a pipeline, where it is from, and the pipeline's scheduler."""
    component = component_of(root, name)
    model = getattr(diffusers, component.class_name).from_pretrained(root / name).requires_grad_(False)
    return model.eval(), component, load_scheduler(component)


def options_of(family: str, **changes: Any) -> PipelineOptions:
    return PipelineOptions(**{**OPTIONS.get(family, {}), **changes})


def recording_of(root: Path, family: str, **changes: Any) -> tuple[Recording, nn.Module, Any]:
    model, component, scheduler = opened(root, COMPONENTS[family])
    pipeline = open_pipeline(component, model, scheduler)
    asked: Any = LABELS if family == "dit" else PROMPTS
    return record(pipeline, model, asked, options_of(family, **changes)), model, scheduler


def answer(root: Path, name: str, options: PipelineOptions, **changes: Any) -> Images:
    model, component, scheduler = opened(root, name)
    progress = changes.pop("progress", silent)
    settings: dict[str, Any] = dict(data=None, count=4, sample_steps=2, seed=0)
    request = ImageRequest(**{**settings, **changes}, options=options)
    return request.answer(model, component, scheduler, {"weights": str(root)}, progress)


class FirstStep(Exception):
    pass


def plain_first_step(root: Path, family: str, ask: Any, options: PipelineOptions) -> dict[str, Any]:
    """What the plain pipeline hands to its scheduler first: sample, timestep, model_output."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(root, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}
    network = getattr(pipeline, COMPONENTS[family])

    def see(module: Any, args: Any, kwargs: Any) -> None:
        found.setdefault("input", next(iter([*args, *kwargs.values()])))

    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> None:
        found.update(model_output=model_output, timestep=timestep)
        raise FirstStep

    network.register_forward_pre_hook(see, with_kwargs=True)
    pipeline.scheduler.step = step
    arguments = call_arguments(pipeline, options)
    arguments["class_labels" if family == "dit" else "prompt"] = [ask]
    with pytest.raises(FirstStep):
        pipeline(generator=torch.Generator().manual_seed(1), **arguments)
    return found


@pytest.mark.parametrize("family", CONDITIONED)
def test_the_network_called_by_the_recording_gives_the_scheduler_what_the_pipeline_gives(
    family: str, folder: Folder
) -> None:
    """Conditioning, order and scale of guidance, timesteps and layout, all at once."""
    recording, model, _ = recording_of(folder(family), family)
    ask: Any = LABELS[1] if family == "dit" else PROMPTS[1]
    seen = plain_first_step(folder(family), family, ask, options_of(family))
    conditions = recording.conditions
    x = seen["input"][:1]
    assert tuple(x.shape[1:]) == recording.shape

    timesteps = torch.as_tensor(seen["timestep"]).reshape(1)
    with torch.no_grad():
        output = call(model, x, timesteps, conditions[[1]])
    if conditions.branches == 2:
        output = GuidedProcess(Reconstruction(), conditions.guidance).guided(output)

    wanted = seen["model_output"][:1]
    made = output[:, : wanted.shape[1]]  # the rest is a learned variance
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CONDITIONED)
def test_a_recording_survives_the_cache_and_leaves_the_network_alone(family: str, folder: Folder) -> None:
    recording, model, scheduler = recording_of(folder(family), family)
    tensors, document = as_tensors(recording)
    again = as_recording(tensors, json.loads(json.dumps(document)))

    assert not {"forward", "step"} & (vars(model).keys() | vars(scheduler).keys())
    assert (again.shape, again.mu, again.image) == (recording.shape, recording.mu, recording.image)
    x, timesteps = torch.randn(2, *recording.shape), torch.tensor([3, 7])
    with torch.no_grad():
        first = call(model, x, timesteps, recording.conditions)
        second = call(model, x, timesteps, again.conditions)
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", CONDITIONED)
def test_prompts_matter_and_have_rows_of_their_own(family: str, folder: Folder) -> None:
    recording, model, _ = recording_of(folder(family), family)
    both, swapped = recording.conditions, recording.conditions[[1, 0]]
    x = torch.randn(1, *recording.shape).repeat(2, *[1] * len(recording.shape))
    timesteps = torch.tensor([5, 5])
    with torch.no_grad():
        plain, turned = call(model, x, timesteps, both), call(model, x, timesteps, swapped)
    assert not torch.allclose(plain[0], plain[1], atol=1e-6)
    torch.testing.assert_close(plain.flip(0), turned)
    if both.branches == 2:  # nothing was asked for in the unconditional branch
        torch.testing.assert_close(plain[0, 0], plain[1, 0])


def test_flux_is_told_thousandths_and_is_shifted_for_its_size(folder: Folder) -> None:
    recording, _, _ = recording_of(folder("flux"), "flux")
    larger, _, _ = recording_of(folder("flux"), "flux", size="32")
    assert (recording.conditions.time_factor, recording.conditions.time_offset) == (1 / 1000, 0)
    assert recording.shape == (16, 16)
    assert larger.shape == (64, 16)
    assert recording.mu is not None
    assert larger.mu is not None
    assert larger.mu > recording.mu


def test_guidance_of_one_leaves_one_branch_and_another_scale_is_taken(folder: Folder) -> None:
    off, _, _ = recording_of(folder("stable-diffusion"), "stable-diffusion", guidance=1.0)
    strong, _, _ = recording_of(folder("stable-diffusion"), "stable-diffusion", guidance=12.0)
    assert (off.conditions.branches, off.conditions.guidance) == (1, 1.0)
    assert (strong.conditions.branches, strong.conditions.guidance) == (2, 12.0)


@pytest.mark.parametrize("family", ["stable-diffusion", "dit", "flux", "wan", "stable-audio"])
def test_drawn_images_come_from_the_cache_and_do_not_depend_on_batches(family: str, folder: Folder) -> None:
    first = answer(folder(family), COMPONENTS[family], options_of(family))
    calls: list[Event] = []
    second = answer(folder(family), COMPONENTS[family], options_of(family), progress=calls.append)
    model, _, _ = opened(folder(family), COMPONENTS[family])
    alone = self_images(
        model,
        first.process,
        count=4,
        steps=2,
        seed=0,
        conditions=first.conditions,
        shape=tuple(first.images.shape[1:]),
        device=torch.device("cpu"),
        progress=silent,
        batch=1,
    )

    assert not any(event.phase in ("calibrate", "encode") for event in calls)
    assert torch.equal(first.images, second.images)
    assert len(second.conditions or ()) == 4
    torch.testing.assert_close(alone, first.images, rtol=1e-3, atol=1e-3)


def test_every_distinct_prompt_is_encoded_once(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\nein Fuchs im Schnee\n", encoding="utf-8")
    options = PipelineOptions(prompts=str(tmp_path / "prompts.txt"))
    found = answer(folder("stable-diffusion"), "unet", options, count=5)
    conditions = found.conditions
    assert isinstance(conditions, Conditions)
    assert conditions.rows == (0, 1, 0, 1, 0)
    assert len(conditions.tensors["encoder_hidden_states"]) == 2
    assert found.fingerprint is not None


def test_other_prompts_are_other_images(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    options = PipelineOptions(prompts=str(tmp_path / "prompts.txt"))
    own = answer(folder("stable-diffusion"), "unet", options)
    assert not torch.allclose(own.images, answer(folder("stable-diffusion"), "unet", options_of("")).images)


# --- options and components that do not fit ----------------------------------------------------------------


def refused(kind: type[GfpruneError], *arguments: Any, **changes: Any) -> str:
    with pytest.raises(GfpruneError) as caught:
        answer(*arguments, **changes)
    assert type(caught.value) is kind, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "word"),
    [
        ("stable-diffusion", dict(frames=3), "--frames"),
        ("stable-diffusion", dict(size="12x"), "--size"),
        ("stable-diffusion", dict(size="0"), "--size"),
        ("dit", dict(prompts="p.txt"), "--prompts"),
        ("dit", dict(size="16"), "--size"),
        ("ldm", dict(guidance=3.0), "--guidance"),
        ("stable-diffusion", dict(prompts="nowhere.txt"), "--prompts nowhere.txt"),
    ],
)
def test_options_that_a_pipeline_does_not_have_are_refused(
    family: str, options: dict[str, Any], word: str, folder: Folder
) -> None:
    assert word in refused(UsageError, folder(family), COMPONENTS[family], PipelineOptions(**options))


def refused_by_a_dry_run(root: Path) -> str:
    """What is said where no weight is read."""
    component = component_of(root, "unet")
    request = ImageRequest(data=None, count=4, sample_steps=2, seed=0)
    with pytest.raises(GfpruneError) as caught:
        request.check(component, component.config, load_scheduler(component))
    return str(caught.value)


def as_pipeline(root: Path, target: Path, class_name: str, **changes: Any) -> Path:
    """A copy of a pipeline that says it is of another class, its U-Net changed."""
    shutil.copytree(root, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name}))
    if changes:
        conditional_unet(**changes).save_pretrained(target / "unet")
    return target


@pytest.mark.parametrize(
    "class_name",
    ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "LEditsPPPipelineStableDiffusion"],
)
def test_a_pipeline_that_changes_images_is_run_as_the_one_that_draws_them(
    class_name: str, folder: Folder, tmp_path: Path
) -> None:
    """Its network is the same: checkpoints are published under either name."""
    plain, _, _ = recording_of(folder("stable-diffusion"), "stable-diffusion")
    root = as_pipeline(folder("stable-diffusion"), tmp_path / "copy", class_name)
    found, _, _ = recording_of(root, "stable-diffusion")
    assert found.conditions.tensors.keys() == plain.conditions.tensors.keys()
    for name, tensor in plain.conditions.tensors.items():
        assert torch.equal(found.conditions.tensors[name], tensor)


def test_a_network_that_does_not_say_its_size_is_asked_for_one(folder: Folder, tmp_path: Path) -> None:
    root = as_pipeline(
        folder("stable-diffusion"), tmp_path / "copy", "StableDiffusionPipeline", sample_size=None
    )
    message = refused(UsageError, root, "unet", PipelineOptions())
    assert "has no sample_size" in message
    assert "--size" in message
    assert refused_by_a_dry_run(root) == message
    assert answer(root, "unet", PipelineOptions(size="16")).images.shape[2:] == (8, 8)


def test_a_refiner_is_no_pipeline_that_draws_from_noise(folder: Folder, tmp_path: Path) -> None:
    """What its class alone can be told would be lost."""
    root = as_pipeline(folder("sdxl"), tmp_path / "copy", "StableDiffusionXLImg2ImgPipeline")
    component = component_of(root, "unet")
    assert pipeline_class(component).__name__ == "StableDiffusionXLPipeline"
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "requires_aesthetics_score": True}))
    assert pipeline_class(component_of(root, "unet")).__name__ == "StableDiffusionXLImg2ImgPipeline"


def test_a_size_that_the_pipeline_cannot_draw_is_one_line(folder: Folder) -> None:
    message = refused(UsageError, folder("stable-diffusion"), "unet", PipelineOptions(size="17"))
    assert "--size: ValueError: `height` and `width` have to be divisible by 8" in message


@pytest.mark.parametrize("damage", ["absent", "no weights", "foreign class", "foreign pipeline"])
def test_a_component_that_cannot_be_loaded_is_named(damage: str, folder: Folder, tmp_path: Path) -> None:
    root = shutil.copytree(folder("stable-diffusion"), tmp_path / "copy")
    index = json.loads((root / "model_index.json").read_text())
    if damage == "absent":
        shutil.rmtree(root / "text_encoder")
    elif damage == "no weights":
        (root / "text_encoder" / "model.safetensors").rename(root / "text_encoder" / "pytorch_model.bin")
    elif damage == "foreign class":
        index["text_encoder"] = ["os", "system"]
    else:
        index["_class_name"] = "EvilPipeline"
    (root / "model_index.json").write_text(json.dumps(index))
    message = refused(GfpruneError, root, "unet", PipelineOptions())
    assert ("EvilPipeline" if damage == "foreign pipeline" else "text_encoder") in message


HOSTILE = [
    "pipeline",
    "auto class",
    "auto tokenizer",
    "link",
    "shard elsewhere",
    "pickled shard",
    "adapter",
    "kernel",
]


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_component_cannot_run_code_or_lead_out_of_its_folder(
    trick: str, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "cache"))  # what was recorded before is not read again
    root = shutil.copytree(folder("stable-diffusion"), tmp_path / "copy")
    index, encoder = json.loads((root / "model_index.json").read_text()), root / "text_encoder"
    weights = encoder / "model.safetensors"
    if trick == "pipeline":  # it would load what it likes, pickles included
        index["text_encoder"] = ["diffusers", "DiffusionPipeline"]
        shutil.copy(root / "model_index.json", encoder)
    elif trick == "auto class":
        index["text_encoder"] = ["transformers", "AutoModel"]
    elif trick == "auto tokenizer":
        index["tokenizer"] = ["transformers", "AutoTokenizer"]
    elif trick == "link":
        weights.rename(tmp_path / "elsewhere.safetensors")
        weights.symlink_to(tmp_path / "elsewhere.safetensors")
    elif trick == "adapter":
        (encoder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/"}))
    elif trick == "kernel":
        config = json.loads((encoder / "config.json").read_text())
        config["attn_implementation"] = "somebody/kernel"
        (encoder / "config.json").write_text(json.dumps(config))
    else:
        with safe_open(weights, framework="pt") as reader:
            names = list(reader.keys())
        target = tmp_path / "elsewhere.safetensors" if trick == "shard elsewhere" else encoder / "weights.bin"
        weights.rename(target)
        place = "../../elsewhere.safetensors" if trick == "shard elsewhere" else "weights.bin"
        entries = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
        (encoder / "model.safetensors.index.json").write_text(json.dumps(entries))
    (root / "model_index.json").write_text(json.dumps(index))
    message = refused(GfpruneError, root, "unet", PipelineOptions())
    expected = {
        "pipeline": "no class of diffusers or transformers",
        "auto class": "no class of diffusers or transformers",
        "auto tokenizer": "no class of diffusers or transformers",
        "link": "leads out of the checkpoint's folder",
        "shard elsewhere": "no shard beside it",
        "pickled shard": "no shard beside it",
        "adapter": "an adapter of another model",
        "kernel": "code from the Hub",
    }
    assert expected[trick] in message


class Stopped:
    """A pipeline within which a signal ends the run."""

    scheduler = None

    def __call__(
        self, prompt: list[str], num_inference_steps: int = 1, output_type: str = "np", generator: Any = None
    ) -> Any:
        raise Interrupted("stopped by SIGTERM within a long operation", 15)


def test_a_signal_within_a_pipeline_is_no_error_of_the_pipeline() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(Interrupted):
        pictures(Stopped(), ["a"], PipelineOptions(), count=1, steps=1, seed=0, progress=silent)
    with pytest.raises(Interrupted):
        record(Stopped(), network, ["a"], PipelineOptions())
    assert "forward" not in vars(network)


@pytest.mark.parametrize("family", CONDITIONED)
def test_a_network_in_bfloat16_takes_what_was_recorded(family: str, folder: Folder) -> None:
    """As a teacher on little memory is called."""
    recording, model, _ = recording_of(folder(family), family)
    x = torch.randn(2, *recording.shape, generator=torch.Generator().manual_seed(0))
    times, conditions = torch.tensor([1.0, 400.0]), recording.conditions
    if recording.conditions.time_factor == 1:
        times = times.long()
    with torch.no_grad():
        single = call(model, x, times, conditions)
        half = call(cast_model(model, torch.bfloat16), x.bfloat16(), times, conditions)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - single).norm()) < 0.1 * float(single.norm())


# --- the user's images -------------------------------------------------------------------------------------


@pytest.fixture
def pixels(tmp_path: Path) -> str:
    """Three images of 16 x 16 pixels."""
    source = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=source.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8))
    return str(tmp_path / "x.npz")


@pytest.mark.parametrize("family", ["stable-diffusion", "sdxl", "sd3", "flux", "sana", "dit", "ldm", "wan"])
def test_images_become_latents_that_the_decoder_turns_back(family: str, folder: Folder, pixels: str) -> None:
    root, name = folder(family), COMPONENTS[family]
    options = options_of(family, **({"frames": 1} if family == "wan" else {}))
    told: list[Event] = []
    found = answer(root, name, options, data=pixels, progress=told.append)
    drawn = answer(root, name, options, count=2)
    assert found.images.shape[1:] == drawn.images.shape[1:]
    assert len(found.images) == 3
    assert found.fingerprint is not None
    assert len(found.conditions) == 3 if found.conditions is not None else family == "ldm"
    random = [event.text for event in told if event.phase == "notice" and "at random" in event.text]
    assert ["captions" in text for text in random] == {"ldm": [], "dit": [False]}.get(family, [True])


def labelled(folder: Path, kind: str) -> list[str]:
    """Images with captions, or in class folders; what is said of each, in their order."""
    said = ["a red fox", "two dogs and a cat", "a red fox"] if kind == "captions" else ["7", "3", "7"]
    rows = []
    for number, text in enumerate(said):
        place = folder / (f"{number}.png" if kind == "captions" else f"{text}/{number}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(place)
        rows.append(json.dumps({"file_name": place.name, "text": text}) + "\n")
    if kind == "captions":
        (folder / "metadata.jsonl").write_text("".join(reversed(rows)))
    return said if kind == "captions" else sorted(said)


@pytest.mark.parametrize("family", ["stable-diffusion", "dit"])
def test_images_go_with_their_own_captions_and_classes(family: str, folder: Folder, tmp_path: Path) -> None:
    """Each image has the conditions that the pipeline gives its network for what is said of that image."""
    root, name, kind = folder(family), COMPONENTS[family], "classes" if family == "dit" else "captions"
    said = labelled(tmp_path / "photos", kind)
    told: list[Event] = []
    found = answer(root, name, PipelineOptions(), data=str(tmp_path / "photos"), progress=told.append)
    assert isinstance(found.conditions, Conditions)
    expected, _, _ = recording_of(root, family)
    order = [PROMPTS.index(text) if kind == "captions" else LABELS.index(int(text)) for text in said]
    for key, tensor in expected.conditions.tensors.items():
        assert found.conditions.rows is not None
        torch.testing.assert_close(found.conditions.tensors[key][list(found.conditions.rows)], tensor[order])
    assert not any("at random" in event.text for event in told)
    plain = answer(root, name, PipelineOptions(), data=str(tmp_path / "photos"), count=2)
    assert plain.fingerprint != found.fingerprint


def test_prompts_that_were_given_go_before_captions(folder: Folder, tmp_path: Path) -> None:
    labelled(tmp_path / "photos", "captions")
    (tmp_path / "prompts.txt").write_text("a house\n")
    told: list[Event] = []
    options = PipelineOptions(prompts=str(tmp_path / "prompts.txt"))
    data = str(tmp_path / "photos")
    found = answer(folder("stable-diffusion"), "unet", options, data=data, progress=told.append)
    assert isinstance(found.conditions, Conditions)
    assert found.conditions.rows == (0, 0, 0)
    assert [event.text for event in told if "--prompts" in (event.text or "")] == [
        "--prompts: images of --data are paired with them at random"
    ]


def test_flux_latents_are_packed_as_the_pipeline_packs_them(folder: Folder, pixels: str) -> None:
    root = folder("flux")
    found = in_memory(answer(root, "transformer", options_of("flux"), data=pixels).images)
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae")
    image = torch.from_numpy(np.load(pixels)["x"][:1]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(image).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    wanted = diffusers.FluxPipeline._pack_latents(latents, 1, 4, 8, 8)
    torch.testing.assert_close(found[:1], wanted)


def test_flux2_latents_are_normalised_as_squares_before_they_are_packed() -> None:
    """As the pipeline does with the statistics of the autoencoder's own norm."""
    torch.manual_seed(0)
    vae = flux2_vae()
    latents = torch.randn(1, 4, 8, 6)
    pipeline = diffusers.Flux2Pipeline
    wanted = pipeline._patchify_latents(latents)
    wanted = (wanted - vae.bn.running_mean.view(1, -1, 1, 1)) / (
        vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps
    ).sqrt()
    wanted = pipeline._pack_latents(wanted)
    found = laid_out(normalised(vae, latents, None), tuple(wanted.shape[1:]), (16, 12))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["wan", "stable-audio"])
def test_images_are_refused_where_the_network_works_on_something_else(
    family: str, folder: Folder, pixels: str
) -> None:
    message = refused(UsageError, folder(family), "transformer", options_of(family), data=pixels)
    assert "--data" in message


# --- autoencoders, and networks alone ----------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [("stable-diffusion", "vae"), ("ldm", "vqvae")])
def test_an_autoencoder_is_given_what_its_pipeline_draws(family: str, name: str, folder: Folder) -> None:
    found = answer(folder(family), name, PipelineOptions(), count=2)
    model, _, _ = opened(folder(family), name)
    index = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        output = call(model, found.images, index, found.conditions)
    losses = found.process.losses(output, found.images, torch.zeros_like(found.images), index)
    assert found.images.shape == (2, 3, 16, 16)
    assert float(found.images.abs().max()) <= 1
    assert output.shape == found.images.shape
    torch.testing.assert_close(losses, (output - found.images).square().flatten(1).mean(1))


def bare(root: Path, name: str, tmp_path: Path) -> Component:
    config = json.loads((root / name / "config.json").read_text())
    return Component(tmp_path, tmp_path, "", config["_class_name"], None, config, (), {})


def test_an_autoencoder_alone_needs_data(folder: Folder, pixels: str, tmp_path: Path) -> None:
    model, _, scheduler = opened(folder("stable-diffusion"), "vae")
    component = bare(folder("stable-diffusion"), "vae", tmp_path)
    with pytest.raises(UsageError, match="--data"):
        ImageRequest(None, 4, 2, 0).answer(model, component, scheduler, {}, silent)
    found = ImageRequest(pixels, 4, 2, 0).answer(model, component, scheduler, {}, silent)
    assert found.images.shape == (3, 3, 16, 16)


def test_a_network_without_its_pipeline_is_given_noise_for_text(folder: Folder, tmp_path: Path) -> None:
    model, _, scheduler = opened(folder("sdxl"), "unet")
    component = bare(folder("sdxl"), "unet", tmp_path)
    told: list[Event] = []
    found = ImageRequest(None, 3, 2, 0).answer(model, component, scheduler, {}, told.append)
    conditions = found.conditions
    assert isinstance(conditions, Conditions)
    assert found.images.shape == (3, 4, 8, 8)
    assert conditions.tensors["encoder_hidden_states"].shape == (3, 1, 77, 40)
    assert conditions.tensors["added_cond_kwargs.text_embeds"].shape == (3, 1, 24)
    assert any("normal noise" in event.text for event in told)


def test_a_text_encoder_may_come_as_a_variant_alone(folder: Folder, tmp_path: Path) -> None:
    root = shutil.copytree(folder("stable-diffusion"), tmp_path / "copy")
    encoder = root / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    plain, _, _ = recording_of(folder("stable-diffusion"), "stable-diffusion")
    variant, _, _ = recording_of(root, "stable-diffusion")
    name = "encoder_hidden_states"
    assert torch.equal(plain.conditions.tensors[name], variant.conditions.tensors[name])
