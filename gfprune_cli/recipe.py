"""What to do, as data: one place for every option's name, default, range and help.

A recipe is YAML with these keys; flags override it; the resolved recipe travels in the output's
`gfprune.json`, and running it again reproduces the output.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from gfprune_cli.errors import UsageError

RECIPE_BYTES = 1 << 20
CriterionName = Literal["gradient-flow", "gradient-flow-abs", "taylor", "diff-pruning", "magnitude", "random"]


@dataclass(frozen=True)
class Help:
    """What `--help` says of an option."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PruneRecipe:
    """Everything that decides the bytes of a prune run's output."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    model: Annotated[str, Help("demo, a local diffusers folder, or a Hub id owner/name.")] = "demo"
    revision: Annotated[str | None, Help("Hub branch, tag or commit.")] = None
    variant: Annotated[str | None, Help("Weights variant to read, such as fp16.")] = None
    component: Annotated[str | None, Help("Pipeline component to prune (default: the denoiser).")] = None
    sparsity: Annotated[float, Gt(0), Lt(1), Help("Fraction of the budget to remove, between 0 and 1.")] = 0.5
    budget: Annotated[Literal["params", "macs"], Help("What the sparsity counts.")] = "params"
    layout: Annotated[
        Literal["adaptive", "native"],
        Help("adaptive: every layer its own width; native: loads in the stock diffusers class."),
    ] = "adaptive"
    criterion: Annotated[CriterionName, Help("How units are scored (docs/method.md).")] = "taylor"
    iterations: Annotated[int, Ge(1), Le(1000), Help("Iterations in which the budget tightens.")] = 10
    steps_per_iteration: Annotated[int, Ge(0), Le(10**6), Help("Training steps in each iteration.")] = 30
    draws: Annotated[int, Ge(1), Le(10**6), Help("Noisy samples per scoring.")] = 64
    bound: Annotated[float, Gt(0), Le(1), Help("Largest move of a mask entry in one iteration.")] = 0.5
    one_shot: Annotated[bool, Help("Score once and remove at once: no soft masks, no training.")] = False
    coarse: Annotated[bool, Help("Score at every fourth iteration only.")] = False
    batch: Annotated[int, Ge(1), Le(65536), Help("Samples per training step.")] = 16
    learning_rate: Annotated[float, Gt(0), Le(1), Help("Peak learning rate between mask steps.")] = 5e-4
    distill: Annotated[
        float, Ge(0), Le(1), Help("Share of distillation from the dense model in the loss.")
    ] = 0.9
    align: Annotated[
        int | None, Ge(1), Le(1024), Help("Round widths to a multiple (default: 8 on CUDA, else 4).")
    ] = None
    data: Annotated[
        str | None, Help("Image folder, .npz or Hugging Face dataset id (default: drawn from the model).")
    ] = None
    images: Annotated[int, Ge(2), Le(10**7), Help("Calibration images to draw, or to take from --data.")] = (
        256
    )
    sample_steps: Annotated[int, Ge(1), Le(1000), Help("Sampling steps of a drawn calibration image.")] = 20
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        Help("Of training passes (default: bf16 on CUDA, else fp32); scores are always fp32."),
    ] = None
    seed: Annotated[int, Ge(0), Lt(2**63), Help("Of every random number in the run.")] = 0

    def document(self) -> dict[str, Any]:
        """The resolved recipe, as it is written and read."""
        return asdict(self)


def option_help(name: str) -> str:
    """What `--help` says of a recipe key."""
    hints = get_type_hints(PruneRecipe, include_extras=True)
    return next(part.text for part in hints[name].__metadata__ if isinstance(part, Help))


def option_names() -> list[str]:
    return [field.name for field in fields(PruneRecipe)]


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe.

    Raises:
        UsageError: not a readable YAML mapping.
    """
    import yaml

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
    from pydantic import TypeAdapter, ValidationError

    given = {name: value for name, value in flags.items() if value is not None}
    values = (read_recipe(config) if config else {}) | given
    try:
        return TypeAdapter(PruneRecipe).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "recipe"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            where = "unknown setting" if name in given else f"--config {config}: unknown recipe key"
            raise UsageError(f"{where} {name!r}; known keys: {', '.join(sorted(option_names()))}") from error
        where = flag(name) if name in given else f"--config {config}: {name}"
        raise UsageError(
            f"{where} {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from error


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")
