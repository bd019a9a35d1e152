"""What scoring and a prune run cost: gradients, memory, seconds.

    python benchmarks/cost.py

Prints, for the demo: the cost of one Hessian-gradient product in gradients (median of interleaved repeats)
and its error against float64; the peak memory of a prune run beside that of one dense training step; the
wall time of the main job. Memory is the peak of the resident set of a fresh process, less the resident set
after the imports.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import DEMO, resolve
from gfprune_cli.data.images import to_model_range
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.flow.energy import Loss, Weights, exact_product, finite_difference_product, gradient, norm
from gfprune_cli.flow.loop import scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import silent
from gfprune_cli.recipes.finetune import FinetuneRecipe

MEASURE = """
import resource, sys
import torch, diffusers, torch_pruning
import gfprune_cli.pruning
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.source import DEMO, resolve
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
start, batch = resident(), int(sys.argv[2])
if sys.argv[1] == "step":
    model = load_model(inspect(resolve("demo"))).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        x = torch.randn(batch, 3, 32, 32)
        (model(x, torch.full((batch,), 5)).sample - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
elif sys.argv[1] == "prune":
    gfprune_cli.prune("demo", criterion=sys.argv[3], out=sys.argv[4], iterations=3, recover=3, images=32,
                      sample_steps=2)
with open("/proc/self/status") as file:  # not ru_maxrss: that one is inherited from the parent
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
print(peak - start)
"""


def scoring_problem(dtype: torch.dtype, batch: int) -> tuple[list[Loss], Weights]:
    """The demo's denoising loss over four chunks of draws, and the weights it is taken at."""
    component = inspect(resolve("demo"))
    process = noising_process(load_scheduler(component))
    with np.load(DEMO / "images.npz") as data:
        images = to_model_range(torch.from_numpy(data["x"]).permute(0, 3, 1, 2).contiguous())
    masked = MaskedModel(load_model(component, dtype=dtype), ())
    draws = Draws(images.to(dtype), process.steps, 0)
    weights = {name: weight.detach() for name, weight in masked.weights.items()}
    return scoring_losses(masked, process, draws, 1, 4 * batch, batch, silent), weights


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


def peak_memory(*arguments: str) -> float:
    """Peak resident bytes of a fresh process, above what its imports took."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def memory_costs() -> None:
    batch = FinetuneRecipe.batch  # of recovery
    step = peak_memory("step", str(batch))
    teacher = 4 * 1_740_323
    print(f"\n| run at batch {batch} | peak memory, MB | of one training step plus teacher |")
    print("|---|---|---|")
    print(f"| dense training step | {step / 1e6:.0f} | |")
    for criterion in ("taylor", "gradient-flow-abs"):
        with tempfile.TemporaryDirectory() as folder:
            peak = peak_memory("prune", str(batch), criterion, folder + "/out")
        print(f"| prune, {criterion} | {peak / 1e6:.0f} | {peak / (step + teacher):.2f} |")


def main_job() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "gfprune_cli", "prune", "--model", "demo", "--sparsity", "0.5", "-q"]
        subprocess.run([*command, "--out", folder + "/out"], check=True, capture_output=True)
        print(
            f"\nmain job on the demo, default settings: {time.perf_counter() - start:.0f} s, "
            f"{torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="draws per pass of a product")
    parser.add_argument("--no-job", action="store_true", help="leave the main job out")
    options = parser.parse_args()
    product_costs(options.repeats, options.batch)
    memory_costs()
    if not options.no_job:
        main_job()
