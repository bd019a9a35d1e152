"""torch-export: a graph of PyTorch operators in one .pt2 file, which needs no class to load."""

import io
from pathlib import Path

import torch

from gfprune_cli.deploy.format import Format
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.parity import Runner
from gfprune_cli.recipes.export import ExportRecipe

FILE = "model.pt2"


def run_program(path: Path) -> Runner:
    """A .pt2 file in PyTorch."""
    module = torch.export.load(path).module()
    return lambda inputs: (module(**inputs),)


def write_program(folder: Path, graph: Graph, recipe: ExportRecipe) -> Runner:
    """Write model.pt2, a zip of the graph in JSON and the weights as plain bytes, and load it."""
    buffer = io.BytesIO()
    torch.export.save(graph.program, buffer)  # PyTorch's own writer ends the process when the disk is full
    (folder / FILE).write_bytes(buffer.getbuffer())
    return run_program(folder / FILE)


FORMAT = Format(
    graph=write_program,
    files=lambda weights: {FILE: weights},
    loading=lambda job, name: f'import torch\nmodel = torch.export.load("{name}/{FILE}").module()',
)
