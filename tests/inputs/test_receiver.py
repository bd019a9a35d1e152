"""A ControlNet or T2I adapter is called as its pipeline calls it, and so is the denoiser behind it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from image_pipelines import PIPELINES

from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.diffusion.conditions import Conditions, call
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.inputs.conditioning import Asked, recorded, recording_fingerprint
from gfprune_cli.inputs.pictures import Pictures
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.progress import silent

PROMPTS = ["a red fox", "a house"]
CASES = [  # the component, what its pipeline calls the picture, and what a timestep of its network is times
    ("controlnet", "controlnet", "image", 1),
    ("t2i-adapter", "adapter", "image", 1),
    ("flux-controlnet", "controlnet", "control_image", 1000),
]


def seen(folder: Path, number: int, latents: torch.Tensor, **picture: Any) -> tuple[Any, Any]:
    """What the denoiser of the pipeline answers first, its branches if it has two, and its timestep.

    Some pipelines encode the picture, which takes noise: that of every recording of one prompt.
    """
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    found: list[tuple[Any, Any]] = []

    def note(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append((output[0], kwargs["timestep"] if "timestep" in kwargs else args[1]))

    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    denoiser.register_forward_hook(note, with_kwargs=True)
    size = dict(height=16, width=16, num_inference_steps=2, output_type="latent")
    source = generator(0, "recording", 0)
    pipeline(PROMPTS[number], latents=latents, generator=source, **size, **picture)
    return found[0]


@pytest.mark.parametrize(("family", "name", "picture", "factor"), CASES)
def test_a_pass_is_that_of_the_pipeline(
    family: str, name: str, picture: str, factor: float, tmp_path: Path
) -> None:
    """Of the last of three samples that ask for two things: both networks are given the text and the picture
    that it asks for, and both branches of guidance."""
    folder = PIPELINES[family](tmp_path / family)
    component = inspect(resolve(str(folder)), component=name)
    network, scheduler = load_model(component).requires_grad_(False), load_scheduler(component)
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 16, 16), generator=source, dtype=torch.uint8)
    pictures = Pictures(pixels, order=(0, 1), fingerprint="two")
    asked = Asked(PROMPTS, [0, 1])
    options = PipelineOptions(size="16x16")
    found = recorded(network, component, scheduler, asked, options, silent, pictures)
    latents = torch.randn(1, *found.shape, generator=source)
    shown = {picture: pictures.image(None, 1, (16, 16))}
    expected, time = seen(folder, 1, latents, **shown)
    conditions = found.conditions.of_rows([0, 0, 1])[[2]]
    with torch.no_grad():
        output = call(network, latents, time.view(1) * factor, conditions)
    assert torch.allclose(output.flatten(0, 1) if conditions.branches > 1 else output, expected, atol=1e-5)


def test_another_denoiser_is_another_recording(tmp_path: Path) -> None:
    """Samples are drawn through it: those of one must not serve the other from the cache."""
    found = []
    for change in (0.0, 1e-3):
        folder = PIPELINES["t2i-adapter"](tmp_path / str(change))
        component = inspect(resolve(str(folder)), component="adapter")
        network = load_model(component).requires_grad_(False)
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.unet.conv_out.weight.data += change
        pipeline.unet.save_pretrained(folder / "unet")
        asked = Asked(PROMPTS[:1], [0])
        made = recorded(
            network, component, load_scheduler(component), asked, PipelineOptions(), silent, Pictures()
        )
        assert isinstance(made.conditions, Conditions)
        found.append(recording_fingerprint(made))
    assert found[0] != found[1]
