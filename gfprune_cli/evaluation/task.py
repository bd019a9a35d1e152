"""What the networks of an evaluation are asked for: samples of which shape, given what, from which noise."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.data.calibration import ImageRequest, Images, PipelineOptions, draw_labels
from gfprune_cli.data.drawing import refuse_options
from gfprune_cli.diffusion.conditions import Condition, Conditions, keywords
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.diffusion.guidance import GuidedProcess, with_guidance
from gfprune_cli.diffusion.schedulers import NoisingProcess, noising_process
from gfprune_cli.evaluation.deployment import batch_inputs
from gfprune_cli.evaluation.protocols import Settings
from gfprune_cli.evaluation.quality import is_statistics
from gfprune_cli.evaluation.subjects import Subject
from gfprune_cli.evaluation.teacher import LOSS_DRAWS
from gfprune_cli.inputs.conditioning import asked_of, recorded, recording_fingerprint
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.inputs.made_up import made_up
from gfprune_cli.progress import Progress, notice
from gfprune_cli.recipes.evaluate import EvalRecipe


@dataclass(frozen=True)
class Task:
    """What both networks are asked for.

    Args:
        shape: of one sample as the networks see it.
        process: noise that goes with the samples, and guidance if the conditions have branches.
        seed: of the run.
        classes: of class-conditional networks without a pipeline that conditions them, or None.
        pool: what a pipeline gives its network, one row per prompt; None for `UNet2DModel`.
        fingerprint: of `pool`.
        mu: shift of the scheduler for samples of this size, or None.
        given: the samples of `--data` as the networks see them, with their conditions, for all but pixels of
            `UNet2DModel`; of an autoencoder the pictures that it is to give back.
        reconstructs: whether the networks are autoencoders.
    """

    shape: tuple[int, ...]
    process: NoisingProcess
    seed: int
    classes: int | None = None
    pool: Conditions | None = None
    fingerprint: str | None = None
    mu: float | None = None
    given: Images | None = None
    reconstructs: bool = False

    @property
    def plain(self) -> NoisingProcess:
        """The process of one branch."""
        return self.process.process if isinstance(self.process, GuidedProcess) else self.process

    def conditions(self, count: int) -> Condition:
        """Of samples 0 to `count` - 1."""
        if self.pool is None:
            return draw_labels(self.classes, count, self.seed)
        distinct = len(self.pool)
        return self.pool[[number % distinct for number in range(count)]] if distinct else self.pool

    def network_inputs(self, network: nn.Module, batch: int) -> dict[str, Any]:
        """Keyword arguments of one evaluation for `batch` samples, branches of guidance included."""
        if self.pool is None:
            return batch_inputs(network, batch)
        parameter = next(network.parameters())
        noise = torch.randn(batch, *self.shape, generator=generator(0, "latency")).to(parameter)
        if noise.is_cuda and noise.ndim == 4:
            noise = noise.contiguous(memory_format=torch.channels_last)
        index = torch.full((batch,), self.process.steps // 2, device=noise.device)
        conditions = self.conditions(batch)
        assert isinstance(conditions, Conditions), "there is a pool"
        found = keywords(noise, self.process.timesteps(index), conditions)
        found.pop("return_dict", None)
        return found

    def sample_inputs(self, network: nn.Module) -> dict[str, Any]:
        """Keyword arguments of one evaluation for one sample, without guidance."""
        if self.pool is None:
            return dict(example_inputs(network))
        pool = self.pool
        single = {name: tensor[:, -1:] for name, tensor in pool.tensors.items()}
        return replace(self, pool=replace(pool, tensors=single, branches=1)).network_inputs(network, 1)


def task_of(
    recipe: EvalRecipe, settings: Settings, subject: Subject, device: torch.device, progress: Progress
) -> Task:
    """What the model's checkpoint says of its samples; a pipeline that conditions it is asked.

    Raises:
        UsageError: options or data that do not fit; GfpruneError: the network cannot be sampled.
    """
    if subject.autoencoder:
        return reconstruction_task(recipe, settings, subject, device, progress)
    if subject.unconditional:
        refuse_options(PipelineOptions.of(recipe), subject.component)
        config: Any = type("Config", (), dict(subject.component.config))
        classes = subject.component.config.get("num_class_embeds")
        task = Task(subject.shape(config), subject.process, recipe.seed, classes)
        return replace(task, given=encoded_data(recipe, settings, subject, device, progress))
    return conditioned_task(recipe, settings, subject, device, progress)


def conditioned_task(
    recipe: EvalRecipe, settings: Settings, subject: Subject, device: torch.device, progress: Progress
) -> Task:
    """Of a network that its pipeline conditions."""
    options, network = PipelineOptions.of(recipe), subject.load(device)
    component, count = subject.component, settings.samples
    if component.pipeline is None:
        refuse_options(options, component)
        recording = made_up(network, min(count, LOSS_DRAWS), recipe.seed, progress)
    else:
        asked = asked_of(component, network.config, options, count, recipe.seed, shuffled=False)
        recording = recorded(network, component, subject.scheduler, asked, options, progress)
        if recording.conditions.tensors:  # those of unconditional pipelines stay as they are
            recording = replace(recording, conditions=recording.conditions.of_rows(asked.rows))
    for remark in recording.remarks:
        notice(progress, remark)
    process = with_guidance(noising_process(subject.scheduler, recording.mu), recording.conditions)
    return Task(
        recording.shape,
        process,
        recipe.seed,
        pool=recording.conditions,
        fingerprint=recording_fingerprint(recording),
        mu=recording.mu,
        given=encoded_data(recipe, settings, subject, device, progress),
    )


def reconstruction_task(
    recipe: EvalRecipe, settings: Settings, subject: Subject, device: torch.device, progress: Progress
) -> Task:
    """Of an autoencoder: pictures of `--data`, or that its pipeline draws, to be given back."""
    statistics = is_statistics(recipe.data)
    images = request(recipe, settings, settings.samples, data=None if statistics else recipe.data).answer(
        subject.load(device), subject.component, subject.scheduler, subject.hashes, progress
    )
    assert isinstance(images.conditions, Conditions)
    return Task(
        tuple(images.images.shape[1:]),
        images.process,
        recipe.seed,
        pool=images.conditions,
        given=images,
        reconstructs=True,
    )


def encoded_data(
    recipe: EvalRecipe, settings: Settings, subject: Subject, device: torch.device, progress: Progress
) -> Images | None:
    """Images of `--data` as latents; None where there are none, or the network works on pixels."""
    if recipe.data is None or not subject.latent or is_statistics(recipe.data):
        return None
    return request(recipe, settings, LOSS_DRAWS, data=recipe.data).answer(
        subject.load(device), subject.component, subject.scheduler, subject.hashes, progress
    )


def request(recipe: EvalRecipe, settings: Settings, count: int, *, data: str | None) -> ImageRequest:
    return ImageRequest(data, count, settings.steps, recipe.seed, PipelineOptions.of(recipe))
