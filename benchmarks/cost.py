"""What one Hessian-gradient product costs in gradients, and how exact it is.

    python benchmarks/cost.py

Prints, for the demo, the cost of either way (median of interleaved repeats) and its error against float64.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from yardstick import demo, pictures_of

from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.flow.energy import Loss, Weights, exact_product, finite_difference_product, gradient, norm
from gfprune_cli.flow.loop import scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import silent


def scoring_problem(dtype: torch.dtype, batch: int) -> tuple[list[Loss], Weights]:
    """The demo's denoising loss over four chunks of draws, and the weights it is taken at."""
    subject = demo()
    masked = MaskedModel(nn.Module.to(subject.dense, dtype).requires_grad_(True), ())
    draws = Draws(pictures_of(subject).to(dtype), subject.process.steps, 0)
    weights = {name: weight.detach() for name, weight in masked.weights.items()}
    return scoring_losses(masked, subject.process, draws, 1, 4 * batch, batch, silent), weights


def product_costs(repeats: int, batch: int) -> None:
    """One Hessian-gradient product in units of one gradient, interleaved; errors against float64."""
    losses, weights = scoring_problem(torch.float32, batch)
    _, vector = gradient(losses, weights)
    ways = {"finite-difference": finite_difference_product, "exact": exact_product}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    products = {}
    for _ in range(repeats):
        start = time.perf_counter()
        gradient(losses, weights)
        one = time.perf_counter() - start
        for name, way in ways.items():
            start = time.perf_counter()
            products[name] = way(losses, weights, vector)
            ratios[name].append((time.perf_counter() - start) / one)
    losses, weights = scoring_problem(torch.float64, batch)
    reference = exact_product(losses, weights, {name: tensor.double() for name, tensor in vector.items()})
    print("| way | cost in gradients | relative error |")
    print("|---|---|---|")
    for name, product in products.items():
        gap = norm({key: value.double() - reference[key] for key, value in product.items()})
        print(f"| {name} | {statistics.median(ratios[name]):.2f} | {gap / norm(reference):.1e} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="draws per pass of a product")
    options = parser.parse_args()
    product_costs(options.repeats, options.batch)
