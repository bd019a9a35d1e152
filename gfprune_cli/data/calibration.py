"""Calibration images: from the user's data, or drawn from the model itself so that none is needed."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import sha256_of_files
from gfprune_cli.checkpoint.layout import is_autoencoder
from gfprune_cli.data.annotations import SOURCES, Kind, class_labels
from gfprune_cli.data.drawing import (
    SAMPLE_BATCH,
    draw_labels,
    image_size,
    refuse_options,
    self_images,
    upscaling,
)
from gfprune_cli.data.image_source import ImageSource
from gfprune_cli.data.images import open_images, to_model_range
from gfprune_cli.data.latents import decoder_name, encode_images, pictures
from gfprune_cli.data.stored import StoredImages, store_images
from gfprune_cli.diffusion.conditions import Condition, Conditions, inputs_of, some_of
from gfprune_cli.diffusion.finite import refuse_zero_snr
from gfprune_cli.diffusion.guidance import with_guidance
from gfprune_cli.diffusion.schedulers import NoisingProcess, Reconstruction, noising_process
from gfprune_cli.errors import UsageError
from gfprune_cli.inputs.conditioning import (
    Asked,
    annotated_by,
    asked_of,
    batch_size,
    class_count,
    labels_of_pipeline,
    recorded,
    recording_fingerprint,
)
from gfprune_cli.inputs.made_up import made_up
from gfprune_cli.inputs.pictures import EDGE, Pictures, takes_pictures
from gfprune_cli.inputs.pipeline import open_pipeline, pipeline_class
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.inputs.prompts import prompts_fingerprint
from gfprune_cli.inputs.recording import Recording
from gfprune_cli.inputs.refusals import check_pipeline_class
from gfprune_cli.outputs.cache import cache_folder, cached
from gfprune_cli.progress import Progress, notice
from gfprune_cli.runtime.processes import ALONE, Processes

__all__ = [
    "ImageRequest", "Images", "PipelineOptions", "cache_folder", "draw_labels", "image_size",
    "training_process",
]  # fmt: skip


def training_process(component: Component, scheduler: Any) -> NoisingProcess:
    """The noise that a component was trained with; an autoencoder with none.

    `Images.process` is the one to work with: it also knows the shift for the images' size, and guidance.
    """
    return Reconstruction() if is_autoencoder(component.class_name) else noising_process(scheduler)


SeeInputs = Callable[[Mapping[str, Any], Mapping[str, Any] | None], None]
READ_AT_ONCE = 64  # images of `--data`


@dataclass(frozen=True)
class Images:
    """`images` [N, ...] as the network sees them, their `conditions`, the noise `process` that goes with
    both, and the `fingerprint` of data and prompts given; where a pipeline conditions the network, the
    prompts or class labels that images were `asked` for with, and its (height, width, frames) in `pixels`."""

    images: torch.Tensor | StoredImages
    conditions: Condition
    fingerprint: str | None
    process: NoisingProcess
    asked: tuple[Any, ...] = ()
    pixels: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class ImageRequest:
    """Which images a run works on.

    Args:
        data: what the user gave; None to draw images from the model.
        count: images to draw, or the most to take from `data`.
        sample_steps: sampling steps of a drawn image.
        seed: of the run.
        options: what the pipeline is asked for, where there is one that conditions its network.
        processes: that draw a share of the images each.
    """

    data: str | None
    count: int
    sample_steps: int
    seed: int
    options: PipelineOptions = field(default_factory=PipelineOptions)
    processes: Processes = ALONE

    def check(self, component: Component, config: Any, scheduler: Any) -> None:
        """Refuse what cannot be answered, as far as neither weights nor images have to be read for it.

        Args:
            config: of the network.

        Raises:
            UsageError: data or options that do not fit the network; GfpruneError: the network cannot be
                sampled.
        """
        self.options.pixels()
        kind = component.class_name.removeprefix("Pruned")
        if is_autoencoder(kind):
            if self.data is None and component.pipeline is None:
                raise UsageError("an autoencoder without its pipeline draws no images: pass --data")
            if self.data is not None and self.options.size is None:
                image_size(component, config)
            return
        process = noising_process(scheduler)
        if kind == "UNet2DModel" or component.pipeline is None:
            refuse_options(self.options, component)
        if kind == "UNet2DModel":
            image_size(component, config)
        elif self.data is not None and component.pipeline is None:
            raise UsageError(
                "--data: this network works on latents, and there is no pipeline with an autoencoder"
                " around it; drop --data"
            )
        elif component.pipeline is not None:
            check_pipeline_class(pipeline_class(component), config, self.options.size)
            asked_of(component, config, self.options, self.count, self.seed, shuffled=self.data is not None)
        if self.data is None:
            refuse_zero_snr(process, "pass --data")

    def answer(
        self,
        model: nn.Module,
        component: Component,
        scheduler: Any,
        hashes: Mapping[str, str],
        progress: Progress,
        see_inputs: SeeInputs | None = None,
    ) -> Images:
        """The images: read from the user's data, or drawn from `model` (once; they are cached).

        Args:
            component, hashes: what `model` was loaded from, and the hashes of its weight files.
            scheduler: of the pipeline.
            see_inputs: is shown what `model` is given for one sample, and the denoiser that takes what it
                returns if there is one, before any is drawn; may raise.

        Raises:
            UsageError: data or options that do not fit the network; GfpruneError: the network cannot be
                sampled.
        """
        network: Any = model
        self.check(component, network.config, scheduler)
        work = Work(self, model, component, scheduler, hashes, progress, see_inputs)
        if is_autoencoder(component.class_name):
            return work.of_autoencoder()
        if component.class_name.removeprefix("Pruned") == "UNet2DModel":
            return work.unconditional()
        return work.conditioned()


def hashed(*names: str) -> str:
    """SHA-256 of fingerprints together."""
    return hashlib.sha256("".join(names).encode()).hexdigest()


def with_annotations(name: str, said: Sequence[str] | None) -> str:
    """The fingerprint of images and what is said of them."""
    return name if said is None else hashed(name, *(f"\n{text}" for text in said))


@dataclass(frozen=True)
class Work:
    """One request and what it is about."""

    request: ImageRequest
    model: nn.Module
    component: Component
    scheduler: Any
    hashes: Mapping[str, str]
    progress: Progress
    see_inputs: SeeInputs | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def show_inputs(self, shape: tuple[int, ...], process: NoisingProcess, conditions: Condition) -> None:
        """What the network is given for one sample, on the way to `see_inputs`."""
        if self.see_inputs is not None:
            noisy, times = torch.zeros(1, *shape), process.timesteps(torch.zeros(1, dtype=torch.long))
            chosen = some_of(conditions, slice(1))
            receiver = chosen.receiver if isinstance(chosen, Conditions) else None
            beside = None if receiver is None else inputs_of(noisy, times, receiver.conditions)
            self.see_inputs(inputs_of(noisy, times, chosen), beside)

    def unconditional(self) -> Images:
        """Of a network that is given class labels at most: `UNet2DModel`, on pixels or latents."""
        request, config = self.request, self.config
        shape = (config.in_channels, *image_size(self.component, config))
        process = noising_process(self.scheduler)
        labels = draw_labels(config.num_class_embeds, request.count, request.seed)
        self.show_inputs(shape, process, labels)
        if request.data is None:
            return Images(self.drawn(process, labels, shape, SAMPLE_BATCH), labels, None, process)
        source = self.source("classes" if config.num_class_embeds else None)
        if decoder_name(self.component) is None:
            low, high = process.value_range
            images = self.stored(
                source,
                shape[1:],
                config.in_channels,
                lambda found: (to_model_range(found) + 1) * ((high - low) / 2) + low,
            )
            name = images.fingerprint()
        else:
            images, name = self.encoded(source, shape, (0, 0))
        if source.said is not None:
            labels = torch.tensor(self.labels(source, config.num_class_embeds))
        else:
            labels = draw_labels(config.num_class_embeds, len(images), request.seed)
        return Images(images, labels, with_annotations(name, source.said), process)

    def conditioned(self) -> Images:
        """Of a network that a pipeline conditions."""
        request, component = self.request, self.component
        source = None
        if request.data is not None:
            source = self.source(None if request.options.prompts else annotated_by(component))
        if component.pipeline is None:
            recording = made_up(self.model, request.count, request.seed, self.progress)
            asked = Asked([], list(range(request.count)))
        else:
            asked = self.asked(source)
            recording = recorded(
                self.model,
                component,
                self.scheduler,
                asked,
                request.options,
                self.progress,
                self.beside_prompts(source, asked) if source else None,
            )
        for remark in recording.remarks:
            notice(self.progress, remark)
        process = with_guidance(noising_process(self.scheduler, recording.mu), recording.conditions)
        named = prompts_fingerprint(request.options.prompts)
        self.show_inputs(recording.shape, process, recording.conditions.of_rows(asked.rows))
        if source is None:
            conditions = recording.conditions.of_rows(asked.rows)
            images = self.drawn(process, conditions, recording.shape, batch_size(recording.shape), recording)
            return Images(images, conditions, named, process, asked.each_of(asked.rows), recording.image)
        encoded, name = self.encoded(source, recording.shape, recording.image[:2])
        rows = asked.rows if source.said else asked.at_random(len(encoded), request.seed)
        named = with_annotations(name, source.said) if named is None else hashed(name, named)
        conditions = recording.conditions.of_rows(rows)
        return Images(encoded, conditions, named, process, asked.each_of(rows), recording.image)

    def asked(self, source: ImageSource | None) -> Asked:
        """What the pipeline is asked for: what comes with the user's images, else what is drawn for them."""
        request, config = self.request, self.config
        if source is None or source.said is None:
            return asked_of(
                self.component, config, request.options, request.count, request.seed, shuffled=bool(source)
            )
        if annotated_by(self.component) == "captions":
            return Asked.each(source.said)
        return Asked.each(self.labels(source, class_count(self.component, config)))

    def labels(self, source: ImageSource, classes: int) -> list[int]:
        """Labels of images, by the names of their classes; a notice says how they were found."""
        known = labels_of_pipeline(self.component)
        found, how = class_labels(source.said or (), source.classes, classes, known)
        notice(self.progress, how)
        return found

    def source(self, about: Kind | None) -> ImageSource:
        """The images of `--data`, with what is wanted beside them; a notice says if they come without."""
        request = self.request
        source = open_images(
            str(request.data), limit=request.count, seed=request.seed, about=about, progress=self.progress
        )
        if about and source.said is None:
            what = "paired with prompts" if about == "captions" else "given class labels"
            notice(
                self.progress, f"--data comes without {about} ({SOURCES[about]}): images are {what} at random"
            )
        elif request.options.prompts:
            notice(self.progress, "--prompts: images of --data are paired with them at random")
        return source

    def beside_prompts(self, source: ImageSource, asked: Asked) -> Pictures | None:
        """Images of `--data` for pipelines that take some; they bring them to their own size."""
        if not takes_pictures(pipeline_class(self.component)):
            return None
        images = self.stored(source, self.request.options.pixels() or (EDGE, EDGE), 3, lambda found: found)
        order = asked.firsts() if source.said else tuple(range(len(images)))
        return Pictures(images, order=order, fingerprint=images.fingerprint())

    def of_autoencoder(self) -> Images:
        """Pictures for an autoencoder to give back."""
        request, component = self.request, self.component
        process = Reconstruction()
        named: str | None
        images: torch.Tensor | StoredImages
        if request.data is not None:
            size = request.options.pixels() or image_size(component, self.config)
            images = self.stored(self.source(None), size, self.config.in_channels, to_model_range)
            named = images.fingerprint()
        else:
            images, named = self.pictures(), prompts_fingerprint(request.options.prompts)
        conditions = Conditions(timestep=None, rows=tuple(range(len(images))))
        return Images(images, conditions, named, process)

    def stored(
        self,
        source: ImageSource,
        size: tuple[int, ...],
        channels: int,
        scale: Callable[[torch.Tensor], torch.Tensor],
    ) -> StoredImages:
        """Images [N, channels, *size], kept as bytes."""
        batches = source.batches(
            size=(size[0], size[1]), channels=channels, batch=READ_AT_ONCE, progress=self.progress
        )
        images = store_images(batches, scale)
        if len(images) < 2:
            raise UsageError(f"--data {source.name} holds {len(images)} image: at least 2 are needed")
        return images

    def encoded(
        self, source: ImageSource, shape: tuple[int, ...], pixels: tuple[int, ...]
    ) -> tuple[StoredImages, str]:
        """Latents [N, *shape] of images, and the fingerprint of the images.

        Args:
            pixels: (height, width) of the images; zeros: as many as give latents of `shape`.
        """
        component = self.component
        name = decoder_name(component)
        if name is None:
            raise UsageError("--data: this pipeline has no autoencoder of images; drop --data")
        if not all(pixels):
            if len(shape) != 3:
                raise UsageError(f"--data: no image becomes what this network works on, {list(shape)}")
            factor = upscaling(component, name)
            pixels = (shape[1] * factor, shape[2] * factor)
        images = self.stored(source, pixels, 3, to_model_range)
        latents = encode_images(images, component, self.scheduler, shape, self.device, self.progress)
        return store_images(latents), images.fingerprint()

    def drawn(
        self,
        process: NoisingProcess,
        conditions: Condition,
        shape: tuple[int, ...],
        batch: int,
        recording: Recording | None = None,
    ) -> torch.Tensor:
        """[count, *shape] samples of the model, from the cache where they were drawn before."""
        request = self.request
        key: dict[str, Any] = {
            "weights": dict(self.hashes),
            "config": {name: value for name, value in dict(self.config).items() if not name.startswith("_")},
            "scheduler": dict(self.scheduler.config),
        }
        if request.processes.count > 1:  # in other batches, which round otherwise
            key["processes"] = request.processes.count
        if recording is not None:
            key["conditions"] = recording_fingerprint(recording)
            key["rows"] = conditions.rows if isinstance(conditions, Conditions) else None

        def draw() -> torch.Tensor:
            return self_images(
                self.model,
                process,
                count=request.count,
                steps=request.sample_steps,
                seed=request.seed,
                conditions=conditions,
                shape=shape,
                device=self.device,
                progress=self.progress,
                batch=batch,
                processes=request.processes,
            )

        return self.kept(key, draw, request.processes)

    def kept(
        self, key: Mapping[str, Any], draw: Callable[[], torch.Tensor], processes: Processes = ALONE
    ) -> torch.Tensor:
        """Images from the cache, where they were drawn before.

        Args:
            key: what they depend on, beside what every drawing does.
        """
        request = self.request
        every = {
            **{"images": request.count, "steps": request.sample_steps, "seed": request.seed},
            "device": self.device.type,
        }
        named = {name: repr(value) for name, value in {**every, **key}.items()}
        tensors, _ = cached(named, lambda: ({"images": draw()}, None), self.progress, processes=processes)
        return tensors["images"]

    def pictures(self) -> torch.Tensor:
        """[count, C, H, W] images in [-1, 1] that the pipeline draws."""
        request, component = self.request, self.component
        asked = asked_of(component, self.config, request.options, request.count, request.seed)
        asks = [ask for ask in asked.distinct if ask is not None]
        files = [path for path in component.root.glob("*/*") if path.is_file()]
        key = {
            "pipeline": dict(component.pipeline or {}),
            "files": sha256_of_files(files, component.root),
            "asked": (asks, asked.rows),
            "options": (request.options.size, request.options.frames, request.options.guidance),
        }

        def draw() -> torch.Tensor:
            return pictures(
                open_pipeline(component, self.model, self.scheduler, decode=True),
                [asks[row] for row in asked.rows] if asks else [],
                request.options,
                count=request.count,
                steps=request.sample_steps,
                seed=request.seed,
                progress=self.progress,
            ).cpu()

        return self.kept(key, draw)
