"""What an evaluation works on, settled before any work: models, settings, extractor, and what is left out."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.checkpoint.scheduler import scheduler_config_path
from gfprune_cli.data.images import load_images, to_model_range
from gfprune_cli.errors import UsageError
from gfprune_cli.evaluation.consistency import WINDOW
from gfprune_cli.evaluation.inception import Extractor, Unavailable, find_extractor
from gfprune_cli.evaluation.protocols import Settings, settings_of
from gfprune_cli.evaluation.quality import is_statistics, read_statistics
from gfprune_cli.evaluation.result import check_gates
from gfprune_cli.evaluation.sampling import make_sampling
from gfprune_cli.evaluation.statistics import Gaussian
from gfprune_cli.evaluation.subjects import NoReference, Subject, model_of, reference_of, same_noise
from gfprune_cli.evaluation.task import Task, task_of
from gfprune_cli.evaluation.teacher import LOSS_DRAWS
from gfprune_cli.progress import Event, Progress, notice
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.runtime.processes import Processes

NOT_EMA = "google/ddpm-cifar10-32"


@dataclass
class Remarks:
    """What the user should know: told at once, and kept for the result."""

    told: Progress
    texts: list[str] = field(default_factory=list)

    def progress(self, event: Event) -> None:
        """Pass an event on, and keep it if it is a notice."""
        if event.phase == "notice" and event.text not in self.texts:
            self.texts.append(event.text)
        self.told(event)

    def add(self, text: str) -> None:
        notice(self.progress, text)


@dataclass(frozen=True)
class Inputs:
    """Everything that is known before the first image is drawn.

    Args:
        reference: None if there is nothing to compare with.
        task: what the networks are asked for.
        extractor: None if there will be no FID.
        statistics: of `--data`, if it names statistics.
        data: images of `--data` for the losses, uint8 [N, C, H, W], if it names images.
    """

    recipe: EvalRecipe
    settings: Settings
    model: Subject
    reference: Subject | None
    task: Task
    extractor: Extractor | None
    statistics: Gaussian | None
    data: torch.Tensor | None
    remarks: Remarks

    @property
    def pictures(self) -> bool:
        """Whether samples are images that can be looked at."""
        return not self.model.latent and len(self.task.shape) == 3

    @property
    def subjects(self) -> dict[str, Subject]:
        """Role -> subject, the reference first."""
        first = {} if self.reference is None else {"reference": self.reference}
        return first | {"model": self.model}

    @property
    def weights(self) -> dict[str, dict[str, str]]:
        """SHA-256 of the weight files, by role and file name."""
        return {role: subject.hashes for role, subject in self.subjects.items()}

    def in_network_range(self, images: torch.Tensor) -> torch.Tensor:
        """8-bit images as the network sees them."""
        low, high = self.task.plain.value_range
        return (to_model_range(images) + 1) * ((high - low) / 2) + low

    def identity(self, device: torch.device) -> dict[str, Any]:
        """What decides the samples."""
        import diffusers

        return {
            **vars(self.settings),
            "weights": self.weights,
            "config": {role: subject.component.config for role, subject in self.subjects.items()},
            "scheduler": {k: v for k, v in dict(self.model.scheduler.config).items() if k[0] != "_"},
            "conditions": (self.task.fingerprint, self.task.shape),
            "data": None if self.task.given is None else self.task.given.fingerprint,
            "seed": self.recipe.seed,
            "batch": self.recipe.batch,
            "precision": self.recipe.precision,
            "device": device.type,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }


def gather(
    recipe: EvalRecipe, processes: Processes, *, save_stats: bool, offline: bool, progress: Progress
) -> Inputs:
    """Read everything but the weights, and refuse what cannot be answered.

    Raises:
        UsageError: wrong settings; GfpruneError: a checkpoint or file cannot be read.
    """
    remarks = Remarks(progress)
    progress = remarks.progress
    why_not: dict[str, str] = {}
    model = model_of(recipe, offline=offline, progress=progress)
    settings = settings_of(recipe, model.process)
    reference = None
    try:
        reference = reference_of(recipe, model, offline=offline, progress=progress)
    except NoReference as reason:
        why_not |= dict.fromkeys(("ssim", "speedup"), str(reason))
        remarks.add(f"no reference: {reason}; name one with --reference to compare with")
    with processes.main_first():
        task = task_of(recipe, settings, model, processes.device, progress)
    make_sampling(settings, task.plain, model.scheduler, task.mu)  # refuses what cannot be sampled
    if task.reconstructs and task.given is not None:
        settings = replace(settings, samples=len(task.given.images))
    if recipe.no_latency:
        why_not["speedup"] = "--no-latency was given"
    if len(task.shape) < 3 or min(task.shape[-2:]) < WINDOW:
        images = f"images are smaller than its {WINDOW} x {WINDOW} window"
        why_not["ssim"] = images if len(task.shape) > 2 else "the samples are no images"
        remarks.add(f"no SSIM: {why_not['ssim']}")
    remark_on_models(recipe, model, reference, remarks)
    extractor = statistics = data = None
    if processes.main:
        extractor = quality_extractor(
            recipe, settings, model, why_not, remarks, processes.device, offline=offline
        )
        if extractor is not None and is_statistics(recipe.data):
            statistics, found = read_statistics(Path(str(recipe.data)).expanduser(), extractor)
            for text in found:
                remarks.add(text)
        check_gates(recipe, why_not)
        data = loss_images(recipe, model, task.shape, progress)
        if save_stats and (data is None or extractor is None):
            raise UsageError(
                "--save-stats needs images in --data and Inception weights: "
                + why_not.get("fid", "--data names statistics")
            )
    return Inputs(recipe, settings, model, reference, task, extractor, statistics, data, remarks)


def remark_on_models(recipe: EvalRecipe, model: Subject, reference: Subject | None, remarks: Remarks) -> None:
    """What about these checkpoints bears on the numbers."""
    if scheduler_config_path(model.component) is None:
        remarks.add("no scheduler beside the model: assuming the default DDPM schedule (linear, 1000 steps)")
    if model.latent:
        remarks.add(
            "the network works on latents: SSIM and PSNR compare latents, scaled by the range of the "
            "reference's, and there is no FID, KID or picture"
        )
    if reference is not None and not same_noise(model, reference):
        remarks.add("the reference comes with another scheduler: both models are sampled with the model's")
    labels = {model.label, reference.label if reference else None}
    if recipe.protocol == "ddpm-cifar10" and NOT_EMA in labels:
        remarks.add(f"the protocol is for EMA weights, and {NOT_EMA} does not hold them: its FID is 11 to 12")


def quality_extractor(
    recipe: EvalRecipe,
    settings: Settings,
    model: Subject,
    why_not: dict[str, str],
    remarks: Remarks,
    device: torch.device,
    *,
    offline: bool,
) -> Extractor | None:
    """The extractor for FID and KID; or None, and the reason in `why_not`."""
    reason = ""
    if model.latent:
        reason = "the model works on latents"
    elif recipe.data is None:
        reason = "--data names no real images"
    if reason:
        why_not["fid"] = reason
        if recipe.inception is not None or recipe.inception_sha256 is not None:
            raise UsageError(f"--inception is for FID and KID, but {reason}")
        if not model.latent:
            remarks.add(f"no FID and KID: {reason}")
        return None
    try:
        found = find_extractor(
            recipe.inception,
            recipe.inception_sha256,
            settings.fid_mode,
            offline=offline,
            device=device,
            progress=remarks.progress,
        )
    except Unavailable as error:
        why_not["fid"] = str(error)
        remarks.add(f"no FID and KID: {error}")
        return None
    if found.fid != "fid":
        why_not["fid"] = f"{recipe.inception} is not Inception"
        remarks.add(f"{recipe.inception} is not Inception: its distances are called {found.fid}, {found.kid}")
    return found


def loss_images(
    recipe: EvalRecipe, model: Subject, shape: tuple[int, ...], progress: Progress
) -> torch.Tensor | None:
    """Images of `--data` to measure the loss on; None if it names none, or the network works on latents."""
    if recipe.data is None or is_statistics(recipe.data) or model.latent:
        return None
    loaded = load_images(
        recipe.data,
        size=(shape[1], shape[2]),
        channels=shape[0],
        limit=LOSS_DRAWS,
        seed=recipe.seed,
        progress=progress,
    )
    if len(loaded) < 2:
        raise UsageError(f"--data {recipe.data} holds {len(loaded)} image: at least 2 are needed")
    return loaded
