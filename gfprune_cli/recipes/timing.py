"""Options of `prune` and `analyze` that say where a network will run."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.options import Help, changed, flag, refuse_idle

Runtime = Annotated[
    Literal["eager", "compile", "onnx", "openvino"],
    Help("What will run the network, and what it is timed in: PyTorch, torch.compile, or an export."),
]
TimeBatch = Annotated[int, Ge(1), Le(1 << 16), Help("Samples of one timed evaluation.")]
TimeSize = Annotated[
    str | None,
    Help("What the network is given when it is timed, 64 or height x width 64x96 (default: its own size)."),
]
Times = Annotated[
    str | None,
    Help("Times that analyze --times-out wrote on the machine that will run it; none are taken here."),
]
Speedup = Annotated[float, Gt(1), Le(1000)]
Latency = Annotated[float, Gt(0), Le(1e9)]
PLACE = ("runtime", "time_batch", "time_size")


def check_time_options(recipe: Any, asked: bool, needs: str) -> None:
    """Refuse options of timing that have no effect.

    Args:
        asked: whether a budget of time was.
        needs: the flags that ask for one.

    Raises:
        UsageError: names the flag.
    """
    if recipe.times is not None:
        refuse_idle(recipe, "--times", *PLACE)
    if not asked and (found := changed(recipe, *PLACE, "times")):
        raise UsageError(f"{flag(found[0])} has no effect without {needs}: add one, or drop the flag")
