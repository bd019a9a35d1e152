"""How much memory `finetune` holds beside activations, from the sizes of its networks."""

from gfprune_cli.recipes.finetune import FinetuneRecipe

FLOAT = 4  # bytes of weights, gradients, moments and averages
# numbers that an optimiser keeps for each that trains; Muon's is that of matrices, which are nearly all, and
# SOAP's is that of square ones: of a convolution's it keeps less
MOMENTS = {"soap": 6.0, "adamw": 2.0, "muon": 1.0, "adamw8bit": 0.5, "adafactor": 0.0}
TEACHER = {"fp32": 4, "bf16": 2}


def held_bytes(
    recipe: FinetuneRecipe,
    *,
    student: float,
    training: float,
    teacher: float,
    denoiser: float = 0,
    moments: float | None = None,
) -> dict[str, float]:
    """Bytes of what a run holds from its first step to its last, by kind.

    Args:
        recipe: settled.
        student: parameters of the pruned network.
        training: those that train: all of them, or its adapters'.
        teacher: parameters of the dense network.
        denoiser: of that which takes what both return, if they predict nothing themselves.
        moments: numbers that the optimiser keeps, if they have been counted.
    """
    assert recipe.optimizer is not None
    adapters = training if recipe.lora else 0
    held = {
        "weights": FLOAT * (student + adapters),
        "gradients": FLOAT * training,
        "moments": FLOAT * (MOMENTS[recipe.optimizer] * training if moments is None else moments),
        "average": FLOAT * training * (recipe.ema > 0),
        "teacher": TEACHER[recipe.teacher_precision] * teacher,
    }
    return held | ({"denoiser": FLOAT * denoiser} if denoiser else {})


def memory_text(held: dict[str, float]) -> str:
    """One line for people."""
    parts = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in held.items())
    return f"training holds about {sum(held.values()) / 1e9:.2f} GB beside activations ({parts})"
