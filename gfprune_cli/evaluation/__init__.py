"""How good a model is, how close to its original, how much faster and smaller."""

from gfprune_cli.evaluation.result import EvalResult
from gfprune_cli.evaluation.run import continues, evaluate

__all__ = ["EvalResult", "continues", "evaluate"]
