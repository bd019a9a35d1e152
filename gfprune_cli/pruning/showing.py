"""What the networks of a run do beside the dense one: samples from the same noise, and time."""

from collections.abc import Sequence

from gfprune_cli.evaluation.command import evaluate
from gfprune_cli.evaluation.result import EvalResult
from gfprune_cli.progress import Progress
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions

SAMPLES = 16
STEPS = 20


def evaluate_networks(
    networks: Sequence[PruneResult], recipe: PruneRecipe, options: RunOptions, progress: Progress
) -> list[EvalResult]:
    """An evaluation of each network against the one that its record says it was made of."""
    shared = {
        name: getattr(recipe, name) for name in ("component", "prompts", "size", "frames", "guidance", "seed")
    }
    run = RunOptions(device=options.device, offline=options.offline)
    found = []
    for network in networks:
        asked = EvalRecipe(model=str(network.output), samples=SAMPLES, steps=STEPS, **shared)
        result = evaluate(asked, run, progress)
        assert result is not None, "one process"
        found.append(result)
    return found
