"""torch-export: a graph of PyTorch operators in one .pt2 file, which needs no class to load."""

import io
from pathlib import Path

import torch

from gfprune_cli.deploy.format import Artefact, Format, Job
from gfprune_cli.deploy.parity import Inputs, Runner

FILE = "model.pt2"


def write_program(folder: Path, program: torch.export.ExportedProgram) -> None:
    """Write model.pt2: a zip of the graph in JSON and the weights as plain bytes.

    Through memory, because PyTorch's own writer ends the process when the disk is full.
    """
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (folder / FILE).write_bytes(buffer.getbuffer())


def run_program(path: Path) -> Runner:
    """A .pt2 file in PyTorch."""
    module = torch.export.load(path).module()

    def run(inputs: Inputs) -> torch.Tensor:
        output: torch.Tensor = module(**inputs)
        return output

    return run


def write(job: Job, folder: Path) -> Artefact:
    """Write the traced network, and run the file."""
    found = job.traced(job.dtype)
    write_program(folder, found.program)
    return Artefact.of_graph(found, run_program(folder / FILE), folder / FILE)


FORMAT = Format(
    write=write,
    files=lambda weights: {FILE: weights},
    loading=lambda job, name: f'import torch\nmodel = torch.export.load("{name}/{FILE}").module()',
)
