"""The formats: each writes its files into a folder and comes back with what runs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import PrunedModel
from gfprune_cli.checkpoint.reader import load_model
from gfprune_cli.deploy import onnx as onnx_model
from gfprune_cli.deploy import openvino as openvino_model
from gfprune_cli.deploy import safetensors as weights
from gfprune_cli.deploy import torch_export as torch_program
from gfprune_cli.deploy.network import Denoiser, Exported, deployed, traced
from gfprune_cli.deploy.parity import Runner
from gfprune_cli.deploy.plan import DTYPES, opset_of, shard_limit, variant_of
from gfprune_cli.deploy.signature import Signature, workable
from gfprune_cli.inputs.unknown_classes import with_inputs
from gfprune_cli.progress import Report
from gfprune_cli.recipes.export import ExportRecipe


@dataclass(frozen=True)
class Artefact:
    """What one format wrote.

    Args:
        run: the files as written, loaded again into the target runtime.
        files: without configuration, scheduler and card.
        inputs: name -> dtype and shape of a graph's inputs; None where a model class loads the artefact.
        signature: what to compare it on.
        free: the sizes (fields of `Sizes`) that may differ from those of the signature.
    """

    run: Runner
    files: tuple[Path, ...]
    inputs: Mapping[str, Any] | None
    signature: Signature
    free: frozenset[str]


@dataclass(frozen=True)
class Job:
    """What is exported, and how."""

    recipe: ExportRecipe
    component: Component
    scheduler: Any
    report: Report

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.dtype]

    def network(self) -> nn.Module:
        """The network in the export's dtype, a copy of its own."""
        return load_model(self.component, dtype=self.dtype)

    def known(self, model: nn.Module) -> nn.Module:
        """A network whose inputs are known."""
        return with_inputs(model, self.component, self.scheduler, self.report)

    def traced(self, dtype: torch.dtype) -> Exported:
        """Its graph in any dtype."""
        network = deployed(self.known(load_model(self.component, dtype=dtype)))
        return traced(Denoiser(network, dtype), self.scheduler)

    def as_class(self, run: Runner, files: tuple[Path, ...], signature: Signature) -> Artefact:
        """An artefact that the model's class loads: what sizes it takes is the class's affair."""
        free = frozenset({"width"}) if "sample" in signature.inputs else frozenset[str]()
        return Artefact(run, files, None, signature, free & signature.labels)


def write_safetensors(job: Job, folder: Path) -> Artefact:
    variant = variant_of(job.recipe)
    network = job.network()
    signature = workable(job.known(network), job.scheduler, job.dtype)
    files = weights.write_pipeline(folder, network, job.component, variant, shard_limit(job.recipe))
    run = weights.run_folder(folder, job.component, variant, job.dtype, signature)
    return job.as_class(run, tuple(files), signature)


def write_torch_export(job: Job, folder: Path) -> Artefact:
    found = job.traced(job.dtype)
    torch_program.write_program(folder, found.program)
    path = folder / torch_program.FILE
    run = torch_program.run_program(path)
    return Artefact(run, (path,), found.describe(), found.signature, found.labels)


def write_onnx(job: Job, folder: Path) -> Artefact:
    found = job.traced(job.dtype)
    opset = opset_of(job.recipe) or onnx_model.DEFAULT_OPSET
    onnx_model.write_onnx(folder, found.program, list(found.signature.inputs), opset)
    files = tuple(sorted(folder.glob(f"{onnx_model.FILE}*")))
    run = onnx_model.run_onnx(folder / onnx_model.FILE)
    return Artefact(run, files, found.describe(), found.signature, found.labels)


def write_openvino(job: Job, folder: Path) -> Artefact:
    """Through ONNX in float32: OpenVINO narrows the weights itself and keeps the arithmetic free."""
    found = job.traced(torch.float32)
    onnx_model.write_onnx(folder, found.program, list(found.signature.inputs), onnx_model.DEFAULT_OPSET)
    onnx_path = folder / onnx_model.FILE
    openvino_model.write_openvino(folder, onnx_path, half=job.recipe.dtype == "fp16")
    for path in folder.glob(f"{onnx_model.FILE}*"):
        path.unlink()
    files = tuple(sorted(folder.glob("openvino_model.*")))
    run = openvino_model.run_openvino(folder / openvino_model.FILE)
    return Artefact(run, files, found.describe(), found.signature, found.labels)


WRITERS: dict[str, Callable[[Job, Path], Artefact]] = {
    "safetensors": write_safetensors,
    "torch-export": write_torch_export,
    "onnx": write_onnx,
    "openvino": write_openvino,
}


def loading_lines(job: Job, destination: Path, *, pruned: bool) -> str:
    """The Python that loads the artefact, for the model card."""
    name = destination.name
    if job.recipe.format == "onnx":
        return f'import onnxruntime\nsession = onnxruntime.InferenceSession("{name}/{onnx_model.FILE}")'
    if job.recipe.format == "torch-export":
        return f'import torch\nmodel = torch.export.load("{name}/{torch_program.FILE}").module()'
    if job.recipe.format == "openvino":
        return (
            f'import openvino\nmodel = openvino.Core().compile_model("{name}/{openvino_model.FILE}", "CPU")'
        )
    bare = job.component.pipeline is None
    stock = ("AutoModel" if pruned else job.component.class_name) if bare else "DiffusionPipeline"
    options = [f'"{name}"']
    if job.recipe.dtype != "fp32":
        options.append(f"torch_dtype={DTYPES[job.recipe.dtype]}")
    if job.recipe.as_variant:
        options.append(f'variant="{job.recipe.dtype}"')
    if pruned:
        options.append("trust_remote_code=True")
    torch_line = "import torch\n" if job.recipe.dtype != "fp32" else ""
    variable = "model" if bare else "pipeline"
    loader = f"{stock}.from_pretrained({', '.join(options)})"
    return f"{torch_line}from diffusers import {stock}\n{variable} = {loader}"


def is_non_uniform(model: nn.Module) -> bool:
    """Whether the network needs the class that travels beside its weights."""
    return isinstance(model, PrunedModel)
