"""What a run is said to hold is what a training step holds, where activations are small."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from gfprune_cli.checkpoint.reader import cast_model
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.lora import adapter_size, add_adapters
from gfprune_cli.recovery.losses import RecoveryLoss
from gfprune_cli.recovery.memory import held_bytes, memory_text
from gfprune_cli.recovery.optimizers import soap_numbers
from gfprune_cli.recovery.trainer import Trainer
from gfprune_cli.runtime.memory import Alive
from gfprune_cli.runtime.processes import Processes

WIDE: dict[str, Any] = dict(
    sample_size=8, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(optimizer="muon"),
        dict(optimizer="adamw"),
        dict(optimizer="adafactor", ema=0.0),
        dict(lora=4),
        dict(teacher_precision="bf16"),
    ],
)
def test_the_estimate_is_near_the_peak_of_a_training_step(settings: dict[str, Any]) -> None:
    recipe = FinetuneRecipe(model="m", batch=1, steps=2, **settings)
    layers = ["mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"]
    with Alive([]) as alive:  # counts what is made within it
        student, teacher = (UNet2DModel(**WIDE).eval() for _ in range(2))
        if recipe.teacher_precision == "bf16":
            cast_model(teacher, torch.bfloat16)
        count = sum(parameter.numel() for parameter in student.parameters())
        training = adapter_size(student, layers, 4) if recipe.lora else count
        if recipe.lora:
            add_adapters(student, layers, 4, 0)
            assert training == sum(p.numel() for p in student.parameters() if p.requires_grad)
        process, images = noising_process(DDPMScheduler()), torch.zeros(2, 3, 8, 8)
        loss = RecoveryLoss(student, teacher.requires_grad_(False), process, recipe, None, "fp32")
        trainer = Trainer(student, loss, Draws(images, 1000, 0), recipe, Processes(None, images.device))
        trainer.step(0, lambda: False)
        settled, alive.most = alive.now, alive.now  # a network is made and cast before it is held
        trainer.step(1, lambda: False)
        moments = soap_numbers(student) if trainer.recipe.optimizer == "soap" else None
    held = held_bytes(trainer.recipe, student=count, training=training, teacher=count, moments=moments)
    gradients = held["gradients"]  # they are let go between two steps
    assert sum(held.values()) - gradients == pytest.approx(settled, rel=0.1)
    assert sum(held.values()) < 1.1 * alive.most < 1.5 * sum(held.values())
    assert f"{sum(held.values()) / 1e9:.2f} GB" in memory_text(held)
