"""A ControlNet or T2I adapter is called as its pipeline calls it, and so is the denoiser that takes what it adds."""

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
from gfprune_cli.inputs.conditioning import Asked, recorded, recording_fingerprint
from gfprune_cli.inputs.pictures import Pictures
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.inputs.recording import with_rows
from gfprune_cli.progress import silent

PROMPTS = ["a red fox", "a house"]
CASES = [("controlnet", "controlnet"), ("t2i-adapter", "adapter")]


def seen(folder: Path, prompt: str, picture: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the U-Net of the pipeline answers first, both branches, and the timestep."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    pipeline.unet.register_forward_hook(lambda _module, args, output: found.append((output[0], args[1])))
    pipeline(prompt, image=picture, latents=latents, num_inference_steps=2, output_type="latent")
    return found[0]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_pass_is_that_of_the_pipeline(family: str, name: str, tmp_path: Path) -> None:
    """Of the second of two samples: each has its own text and picture, and both branches of guidance."""
    folder = PIPELINES[family](tmp_path / family)
    component = inspect(resolve(str(folder)), component=name)
    network, scheduler = load_model(component).requires_grad_(False), load_scheduler(component)
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 16, 16), generator=source, dtype=torch.uint8)
    pictures = Pictures(pixels, order=(0, 1), fingerprint="two")
    asked = Asked(PROMPTS, [0, 1])
    found = recorded(network, component, scheduler, asked, PipelineOptions(), silent, pictures)
    latents = torch.randn(1, *found.shape, generator=source)
    expected, time = seen(folder, PROMPTS[1], pictures.image(None, 1, (16, 16)), latents)
    conditions = with_rows(found, [0, 1])[[1]]
    with torch.no_grad():
        output = call(network, latents, time[None], conditions)
    assert torch.allclose(output[0], expected, atol=1e-5)
    assert conditions.guidance == pytest.approx(7.5)


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
