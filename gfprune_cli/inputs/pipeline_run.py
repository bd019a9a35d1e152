"""Calling a pipeline as its users call it, for one prompt at a time, while an observer looks on."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.inputs.observer import Enough, Observer
from gfprune_cli.inputs.pictures import ONE_EACH, Pictures, fillings, is_required, picture_arguments
from gfprune_cli.inputs.refusals import not_run
from gfprune_cli.recipes.options import parsed_size

SECONDS = 5.0  # of sound
PRIOR_STEPS = 8  # in which another network draws what the network is conditioned by
STEPS = 4  # that the pipeline is asked for; it comes to the second


@dataclass(frozen=True)
class PipelineOptions:
    """What users may ask of a pipeline; None for its own default.

    Args:
        prompts: text file, one per line; None for the built-in ones.
        size: of drawn images in pixels, "512" or "512x768" (height x width).
        frames: of drawn videos.
        guidance: scale; 1 switches it off.
    """

    prompts: str | None = None
    size: str | None = None
    frames: int | None = None
    guidance: float | None = None

    @staticmethod
    def of(recipe: Any) -> "PipelineOptions":
        return PipelineOptions(recipe.prompts, recipe.size, recipe.frames, recipe.guidance)

    def pixels(self) -> tuple[int, int] | None:
        """(height, width) of `size`.

        Raises:
            UsageError: it is no size.
        """
        return None if self.size is None else parsed_size("--size", self.size)


@dataclass
class PipelineRun:
    """A pipeline that is called again and again, for one of the things asked for at a time.

    Args:
        filled: arguments that pictures are made for.
        several: whether each prompt has a picture of its own in one call, or all have one.
        emptied: whether the pipeline wants an empty negative prompt where users give none.
        alone: whether it takes one prompt, and no list of them.
    """

    pipeline: Any
    observer: Observer
    options: PipelineOptions
    pictures: Pictures
    asked: list[Any]
    filled: tuple[str, ...] = ()
    several: bool = False
    emptied: bool = False
    alone: bool = False

    def first(self) -> None:
        """The first run, to the second noise level; finds out which arguments want pictures.

        Raises:
            GfpruneError: the pipeline fails with any of them.
        """
        fit_area(self.pipeline, self.options.pixels())
        errors: list[GfpruneError] = []
        parameters = inspect.signature(type(self.pipeline).__call__).parameters
        ways = [(False, False)]
        ways += [(True, False)] if "negative_prompt" in parameters else []
        ways += [(False, True)] if "prompt" in parameters else []
        for way, names in product(ways, fillings(type(self.pipeline))):
            (self.emptied, self.alone), self.filled = way, names
            try:
                return self(0, limit=None)
            except (UsageError, Interrupted):
                raise
            except GfpruneError as error:
                errors.append(error)
        raise errors[0]

    def __call__(self, *numbers: int, limit: int | None) -> None:
        made = call_arguments(self.pipeline, self.options, filled=self.filled)
        size, network = self.options.pixels(), self.observer.network
        prompted = "prompt" in inspect.signature(type(self.pipeline).__call__).parameters
        each = [name for name in self.filled if self.several or not prompted or name in ONE_EACH]
        for names, shown in ((set(self.filled) - set(each), numbers[:1]), (each, numbers)):
            made |= picture_arguments(
                self.pipeline, network, names, self.pictures, shown, size, self.options.frames
            )
        if self.emptied:
            made["negative_prompt"] = [""] * len(numbers)
        asked = [self.asked[number] for number in numbers]
        if self.alone and len(asked) == 1:
            made["prompt"] = asked[0]
        run_pipeline(self.pipeline, self.observer, made, asked, limit)


def fit_area(pipeline: Any, size: tuple[int, int] | None) -> None:
    """Make the size asked for the one that some pipelines scale every other to."""
    factor = getattr(pipeline, "vae_scale_factor", None)
    if size is not None and isinstance(factor, int) and hasattr(pipeline, "default_sample_size"):
        pipeline.default_sample_size = max(1, round(math.prod(size) ** 0.5 / factor))


def call_arguments(
    pipeline: Any,
    options: PipelineOptions,
    *,
    steps: int = STEPS,
    output: str = "latent",
    filled: Sequence[str] = (),
) -> dict[str, Any]:
    """What the pipeline is called with, beside the prompt, the generator, and the pictures of `filled`.

    Raises:
        UsageError: an option that it does not have; GfpruneError: it needs something else than prompts.
    """
    name = type(pipeline).__name__
    parameters = inspect.signature(type(pipeline).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": steps, "output_type": output}
    given["use_resolution_binning"] = False  # the size asked for, not the nearest of a list
    given["intermediate_timesteps"] = None  # which two steps alone have
    given["_auto_resize"] = False  # references stay as large as they are
    given["use_mean_velocity"] = False  # of flow maps: the velocity of one noise level, as in training
    given["prior_num_inference_steps"] = PRIOR_STEPS
    given["strength"] = 1.0  # of changing an image: every noise level
    if "audio_duration_s" in parameters and parameters["audio_duration_s"].default is None:
        given["audio_duration_s"] = SECONDS  # else every text has a length of its own
    if "output_latent" in parameters:  # what these give back are maps, as arrays alone
        del given["output_type"]
    size = options.pixels()
    if size is not None:  # to which some scale what they are asked for
        given["max_area"] = size[0] * size[1]
    made = {key: value for key, value in given.items() if key in parameters}
    wanted: dict[str, dict[str, Any]] = {
        "--size": {} if size is None else {"height": size[0], "width": size[1]},
        "--frames": {} if options.frames is None else {"num_frames": options.frames},
        "--guidance": {} if options.guidance is None else {"guidance_scale": options.guidance},
    }
    if "height" not in parameters and filled:
        wanted["--size"] = {}  # that of the pictures
    for flag, values in wanted.items():
        if not values.keys() <= parameters.keys():
            raise UsageError(f"{flag}: {name} has no such setting; drop the flag")
        made |= values
    for key, parameter in parameters.items():
        if is_required(parameter) and key not in {"self", "prompt", "class_labels", *made, *filled}:
            raise GfpruneError(f"{name} needs {key}, which gfprune cannot make up: name another --component")
    return made


def run_pipeline(
    pipeline: Any, observer: Observer, arguments: dict[str, Any], asked: Sequence[Any], limit: int | None
) -> None:
    """Call the pipeline for some prompts until `observer` has seen enough.

    Raises:
        GfpruneError: the pipeline fails, or never calls the network.
    """
    observer.forget(limit)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    made = dict(arguments)
    for key in ("prompt", "class_labels"):
        if key in parameters:
            made.setdefault(key, list(asked))
            break
    if "generator" in parameters:
        made["generator"] = [generator(0, "recording", number) for number in range(len(asked))]
    if len(asked) == 1 and "generator" in made:
        made["generator"] = made["generator"][0]
    try:
        pipeline(**made)
    except Enough:
        pass
    except GfpruneError:
        raise
    except Exception as error:  # another library's pipeline: anything
        raise not_run(pipeline, observer.network, made, error) from error
    if not observer.calls:
        raise GfpruneError(
            f"{type(pipeline).__name__} never calls its {type(observer.network).__name__}:"
            " name another --component"
        )
