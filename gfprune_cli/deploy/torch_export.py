"""torch-export: a graph of PyTorch operators in one .pt2 file, which needs no class to load."""

import io
from pathlib import Path

import torch

from gfprune_cli.deploy.format import Artefact, Format, Job
from gfprune_cli.deploy.parity import Runner

FILE = "model.pt2"


def run_program(path: Path) -> Runner:
    """A .pt2 file in PyTorch."""
    module = torch.export.load(path).module()
    return lambda inputs: (module(**inputs),)


def write(job: Job, folder: Path) -> Artefact:
    """Write model.pt2, a zip of the graph in JSON and the weights as plain bytes, and run the file."""
    found, buffer = job.traced(job.dtype), io.BytesIO()
    torch.export.save(found.program, buffer)  # PyTorch's own writer ends the process when the disk is full
    (folder / FILE).write_bytes(buffer.getbuffer())
    return Artefact.of_graph(found, run_program(folder / FILE), folder / FILE)


FORMAT = Format(
    write=write,
    files=lambda weights: {FILE: weights},
    loading=lambda job, name: f'import torch\nmodel = torch.export.load("{name}/{FILE}").module()',
)
