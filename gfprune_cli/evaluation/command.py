"""How good a model is, how close to its original, how much faster and smaller."""

from gfprune_cli.evaluation.job import continues, evaluate
from gfprune_cli.evaluation.result import EvalResult

__all__ = ["EvalResult", "continues", "evaluate"]
