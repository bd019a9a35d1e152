"""The noise scheduler that a checkpoint comes with."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import check_config, first_line, quoted, read_json
from gfprune_cli.errors import GfpruneError


def scheduler_config_path(component: Component) -> Path | None:
    """Where the checkpoint's scheduler is described, or None if it has none."""
    places = (component.root / component.scheduler_name, component.root)
    paths = (place / "scheduler_config.json" for place in places)
    return next((path for path in paths if path.exists()), None)


def load_scheduler(component: Component) -> SchedulerMixin | None:
    """The checkpoint's noise scheduler.

    Returns:
        The scheduler; for a bare model folder without one a default `DDPMScheduler` (tell the user:
        `scheduler_config_path` is None); None for a pipeline that has no scheduler.

    Raises:
        GfpruneError: the file is missing or broken, or names something that is no diffusers scheduler.
    """
    path = scheduler_config_path(component)
    if path is None:
        if component.pipeline is None:
            return diffusers.DDPMScheduler()
        if (name := component.scheduler_name) in component.entries:
            raise GfpruneError(
                f"{component.root / name / 'scheduler_config.json'} is missing: fetch it again"
            )
        return None
    config = read_json(path, component.roots, constants=("-Infinity",))
    if config.get("lambda_min_clipped") == float("-inf"):
        del config["lambda_min_clipped"]  # the multistep solvers' default, which diffusers writes out
    check_config(config, path)
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        raise GfpruneError(  # diffusers ignores the key since 0.13, and would take the images for noise
            f'{path} is of an early diffusers: write "prediction_type": "sample" for its '
            '"predict_epsilon": false'
        )
    scheduler_class = _scheduler_class(path, config.get("_class_name"))
    betas, steps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps):
        raise GfpruneError(f"{path}: 'trained_betas' has to be a list of {quoted(steps)} numbers")
    try:
        scheduler: SchedulerMixin = scheduler_class.from_config(config)
    except Exception as error:  # as for a model's config
        raise GfpruneError(f"{path} does not describe a valid scheduler: {first_line(error)}") from error
    return scheduler


def _scheduler_class(path: Path, name: object) -> Any:
    # The name first: looking up anything in diffusers imports a module.
    known = isinstance(name, str) and name.isidentifier() and name.endswith("Scheduler")
    found = getattr(diffusers, str(name), None) if known else None
    lacking = [name for name in getattr(found, "_backends", ()) if name != "torch"]
    if known and lacking:  # diffusers puts a dummy in the place of what it cannot import
        raise GfpruneError(f"{path} names {name}, which needs {lacking[0]}: pip install {lacking[0]}")
    if not (
        isinstance(found, type)
        and found.__module__.startswith("diffusers.schedulers.")
        and issubclass(found, diffusers.SchedulerMixin)
    ):
        raise GfpruneError(f"{path} names {quoted(name)}, which is no scheduler of diffusers")
    return found
