"""What to do, as data: one place for every option's name, default, range and help.

A recipe is YAML with these keys; flags override it; the resolved recipe travels in the output's
`gfprune.json`, and running it again reproduces the output.
"""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gfprune_cli.errors import UsageError

RECIPE_BYTES = 1 << 20
CriterionName = Literal["gradient-flow", "gradient-flow-abs", "taylor", "diff-pruning", "magnitude", "random"]


class PruneRecipe(BaseModel):
    """Everything that decides the bytes of a prune run's output."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field("demo", description="demo, a local diffusers folder, or a Hub id owner/name.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    variant: str | None = Field(None, description="Weights variant to read, such as fp16.")
    component: str | None = Field(None, description="Pipeline component to prune (default: the denoiser).")
    sparsity: float = Field(0.5, gt=0, lt=1, description="Fraction of the budget to remove, between 0 and 1.")
    budget: Literal["params", "macs"] = Field(
        "params", description="What the sparsity counts: params or macs."
    )
    layout: Literal["adaptive", "native"] = Field(
        "adaptive",
        description="adaptive: every layer its own width; native: loads in the stock diffusers class.",
    )
    criterion: CriterionName = Field("taylor", description="How units are scored (see docs/method.md).")
    iterations: int = Field(10, ge=1, le=1000, description="Steps in which the budget tightens.")
    steps_per_iteration: int = Field(
        30, ge=0, le=1_000_000, description="Training steps between two scorings."
    )
    draws: int = Field(64, ge=1, le=1_000_000, description="Noisy samples per scoring.")
    bound: float = Field(0.5, gt=0, le=1, description="Largest move of a mask entry in one iteration.")
    one_shot: bool = Field(
        False, description="Score once and remove at once, without soft masks or training."
    )
    coarse: bool = Field(False, description="Score at every fourth iteration only.")
    batch: int = Field(16, ge=1, le=65536, description="Samples per training step.")
    learning_rate: float = Field(5e-4, gt=0, le=1, description="Peak learning rate between mask steps.")
    distill: float = Field(
        0.9, ge=0, le=1, description="Share of distillation from the dense model in the loss."
    )
    align: int | None = Field(
        None, ge=1, le=1024, description="Round widths to a multiple (default: 8 on CUDA, else 4)."
    )
    data: str | None = Field(
        None, description="Image folder, .npz or Hugging Face dataset id (default: drawn from the model)."
    )
    images: int = Field(
        256, ge=2, le=10_000_000, description="Calibration images to draw or to take from --data."
    )
    sample_steps: int = Field(20, ge=1, le=1000, description="Sampling steps of a calibration image.")
    precision: Literal["fp32", "bf16"] | None = Field(
        None, description="Of training passes (default: bf16 on CUDA, else fp32); scores are always fp32."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of every random number in the run.")


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe.

    Raises:
        UsageError: not a readable YAML mapping.
    """
    try:
        if path.stat().st_size > RECIPE_BYTES:
            raise UsageError(f"--config {path}: larger than {RECIPE_BYTES} bytes; this is no recipe")
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(f"--config {path}: a recipe is a mapping of option names to values")
    return document


def resolve_recipe(config: Path | None, flags: dict[str, Any]) -> PruneRecipe:
    """Defaults, then the recipe file, then the flags that were given (those that are not None).

    Raises:
        UsageError: an unknown key or a value out of range, named as the flag that sets it.
    """
    values = read_recipe(config) if config else {}
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return PruneRecipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        where = f"--config {config}: {name}" if name not in flags or flags[name] is None else flag(name)
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(PruneRecipe.model_fields))
            raise UsageError(
                f"--config {config}: unknown recipe key {name!r}; known keys: {known}"
            ) from error
        raise UsageError(
            f"{where} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from error


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
