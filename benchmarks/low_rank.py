"""Two ideas beside modulation folding: text projections at a low rank, and a basis that layers share.

    python benchmarks/low_rank.py shared
    python benchmarks/low_rank.py text --text-encoder FOLDER [--prompts FILE]

`text`: the states that a text encoder (a folder of transformers) gives for prompts, behind a
random projection [out x in], so that a low rank can come from the states alone; at the largest rank at which
two factors save anything, and at half of it. Three quarters of the prompts are fitted, the others judged.
`shared`: layers that read the same embedding, folded each by itself, and all by one basis. Prints tables.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from depth import STEPS, trained_dit
from folding_networks import DEMO_FAMILY, Family, one_class
from torch import nn

import gfprune_cli as gfprune
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.flow.folding import Samples, break_even, factors, fold, output_basis, relative_error
from gfprune_cli.inputs.prompts import read_prompts
from gfprune_cli.progress import silent
from gfprune_cli.pruning.fold import MARGIN, Folder
from gfprune_cli.pruning.probes import Probes
from gfprune_cli.structure.modulation import feeders, hidden_run, visited

TOLERANCES = (0.01, 0.03, 0.1)
FITTED_PROMPTS = 0.75
WIDTHS = {"text projection of every token": 4, "first layer for pooled text": 4}  # out, times in


def kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@torch.no_grad()
def states(folder: Path, prompts: list[str]) -> list[torch.Tensor]:
    """[tokens, width] of each prompt."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
    return [encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0] for prompt in prompts]


def text(options: argparse.Namespace) -> None:
    found = states(options.text_encoder, list(read_prompts(options.prompts)))
    split = round(len(found) * FITTED_PROMPTS)
    pooled = [state.mean(0, keepdim=True) for state in found]
    print("| layer | rows fitted, judged | rank | saved | error on fitted | on held out | tolerance met |")
    print("|---" * 7 + "|")
    for (name, times), given in zip(WIDTHS.items(), (found, pooled), strict=True):
        width = given[0].shape[1]
        weight = torch.randn(times * width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
        known, judged = (
            Samples(rows, rows @ weight.T) for rows in (torch.cat(given[:split]), torch.cat(given[split:]))
        )
        most = break_even(weight, None)
        for rank in (most // 4, most // 2, most):
            short = factors(weight, output_basis(weight, known)[:, :rank], known, kept)
            errors = [relative_error(short(rows.x), rows.y) for rows in (known, judged)]
            met = [f"{limit:g}" for limit in TOLERANCES if fold(weight, None, known, judged, limit, kept)]
            print(
                f"| {name}, {times * width} x {width} | {len(known.x)}, {len(judged.x)} | {short.rank} | "
                f"{1 - short.size / weight.numel():.0%} | {errors[0]:.1%} | {errors[1]:.1%} | "
                f"{', '.join(met) or 'none'} |"
            )


def shared(options: argparse.Namespace) -> None:
    options.work.mkdir(parents=True, exist_ok=True)
    print("| network | tolerance | layers | parameters | each by itself | ranks | with one basis | rank |")
    print("|---" * 8 + "|")
    for tolerance in TOLERANCES:
        print(shared_row("demo", gfprune.load("demo"), DEMO_FAMILY, None, tolerance), flush=True)
    network, family, _, _ = trained_dit(0, options.steps, options.work)
    for tolerance in TOLERANCES:
        print(shared_row("DiT", network, family, one_class(1), tolerance), flush=True)


def shared_row(name: str, network: Any, family: Family, condition: Any, tolerance: float) -> str:
    process, shape = noising_process(family.scheduler()), (3, family.size, family.size)
    probes = Probes(process, condition, shape, torch.device("cpu"), 0)
    folder = Folder(network, probes, tolerance, torch.float32, silent)
    names = folder.find()
    reading = set(names) - feeders(network, folder.runs(network, {"find": 2}), names)
    inputs = inputs_of(folder, network, sorted(reading))
    first = next(iter(inputs.values()))
    layers = [one for one, x in inputs.items() if x.shape == first.shape and torch.equal(x, first)]
    return row_of(name, tolerance, network, layers, first, folder.fitted["fit"] * probes.branches)


def inputs_of(folder: Folder, network: Any, names: list[str]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, _layer: Any, x: torch.Tensor, _output: torch.Tensor) -> None:
        found[name] = x.reshape(-1, x.shape[-1])

    with visited(network, names, keep):
        hidden_run(folder.runs(network, folder.fitted))
    return found


def row_of(
    name: str, tolerance: float, network: nn.Module, layers: list[str], x: torch.Tensor, fitted: int
) -> str:
    """One line: layers of one input, folded in both ways to the same error of each."""
    weights = [network.get_submodule(layer).weight.detach() for layer in layers]
    limit, into = tolerance * MARGIN, x.shape[1]
    ranks, alone = [], 0
    for weight in weights:
        y = x @ weight.T
        found = fold(weight, torch.zeros(len(weight)), Samples(x[:fitted], y[:fitted]),
                     Samples(x[fitted:], y[fitted:]), limit, kept)  # fmt: skip
        ranks.append(0 if found is None else found.rank)
        alone += weight.numel() + len(weight) if found is None else found.size
    # outputs of equal size, so that the basis serves all alike
    stacked = torch.cat([weight / (x @ weight.T).norm() for weight in weights])
    known = Samples(x[:fitted], x[:fitted] @ stacked.T)
    basis = output_basis(stacked, known)
    rank = next(
        (rank for rank in range(1, basis.shape[1] + 1) if serves(stacked, basis[:, :rank], known, x[fitted:],
                                                                 [len(weight) for weight in weights], limit)),
        None,
    )  # fmt: skip
    outputs = sum(len(weight) for weight in weights)
    together = "none" if rank is None else f"{rank * (into + outputs) + outputs:,}"
    dense = sum(weight.numel() + len(weight) for weight in weights)
    return (
        f"| {name} | {tolerance:g} | {len(layers)} | {dense:,} | {alone:,} | {min(ranks)} to {max(ranks)} | "
        f"{together} | {rank} |"
    )


def serves(
    stacked: torch.Tensor, basis: torch.Tensor, known: Samples, judged: torch.Tensor, sizes: list[int],
    limit: float,
) -> bool:  # fmt: skip
    """Whether the error of every layer is within the limit."""
    found, wanted = factors(stacked, basis, known, kept)(judged), judged @ stacked.T
    pairs = zip(found.split(sizes, 1), wanted.split(sizes, 1), strict=True)
    return all(relative_error(one, other) <= limit for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["shared", "text"])
    parser.add_argument("--text-encoder", type=Path, help="folder of a text encoder of transformers")
    parser.add_argument("--prompts", help="one a line (default: the built-in ones)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the DiT, as in depth.py")
    parser.add_argument("--work", type=Path, default=Path("build/benchmark/depth"))
    options = parser.parse_args()
    if options.part == "text" and options.text_encoder is None:
        parser.error("text needs --text-encoder FOLDER")
    (text if options.part == "text" else shared)(options)


if __name__ == "__main__":
    main()
