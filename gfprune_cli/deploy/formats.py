"""The formats: each writes its files into a folder and comes back with what runs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v1 import PrunedModel
from gfprune_cli.checkpoint.reader import Component, load_model
from gfprune_cli.deploy import onnx_model, openvino_model, torch_program, weights
from gfprune_cli.deploy.network import Denoiser, Signature, trace
from gfprune_cli.deploy.parity import Runner
from gfprune_cli.deploy.plan import DTYPES, opset_of, shard_limit, variant_of
from gfprune_cli.recipes.export import ExportRecipe


@dataclass(frozen=True)
class Artefact:
    """What one format wrote.

    Args:
        run: the files as written, loaded again into the target runtime.
        files: without configuration, scheduler and card.
        inputs: name -> dtype and shape of a graph's inputs; None where a model class loads the artefact.
        free_size: whether height and width are free.
    """

    run: Runner
    files: tuple[Path, ...]
    inputs: Mapping[str, Any] | None
    free_size: bool


@dataclass(frozen=True)
class Job:
    """What is exported, and how."""

    recipe: ExportRecipe
    component: Component
    signature: Signature

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.recipe.dtype]

    def network(self) -> nn.Module:
        """The network in the export's dtype, a copy of its own."""
        return load_model(self.component, dtype=self.dtype)


def write_safetensors(job: Job, folder: Path) -> Artefact:
    variant = variant_of(job.recipe)
    files = weights.write_pipeline(folder, job.network(), job.component, variant, shard_limit(job.recipe))
    run = weights.run_folder(folder, job.component, variant, job.dtype)
    return Artefact(run, tuple(files), None, True)


def write_torch_export(job: Job, folder: Path) -> Artefact:
    program, free_size = trace(Denoiser(job.network(), job.dtype), job.signature)
    torch_program.write_program(folder, program)
    path = folder / torch_program.FILE
    inputs = job.signature.describe(free_size=free_size)
    return Artefact(torch_program.run_program(path), (path,), inputs, free_size)


def write_onnx(job: Job, folder: Path) -> Artefact:
    program, free_size = trace(Denoiser(job.network(), job.dtype), job.signature)
    opset = opset_of(job.recipe) or onnx_model.DEFAULT_OPSET
    onnx_model.write_onnx(folder, program, list(job.signature.inputs), opset)
    files = tuple(sorted(folder.glob(f"{onnx_model.FILE}*")))
    inputs = job.signature.describe(free_size=free_size)
    return Artefact(onnx_model.run_onnx(folder / onnx_model.FILE), files, inputs, free_size)


def write_openvino(job: Job, folder: Path) -> Artefact:
    """Through ONNX in float32: OpenVINO narrows the weights itself and keeps the arithmetic free."""
    model = load_model(job.component)
    program, free_size = trace(Denoiser(model, torch.float32), job.signature)
    names = list(job.signature.inputs)
    onnx_model.write_onnx(folder, program, names, onnx_model.DEFAULT_OPSET)
    onnx_path = folder / onnx_model.FILE
    openvino_model.write_openvino(folder, onnx_path, half=job.recipe.dtype == "fp16")
    for path in folder.glob(f"{onnx_model.FILE}*"):
        path.unlink()
    files = tuple(sorted(folder.glob("openvino_model.*")))
    inputs = job.signature.describe(free_size=free_size)
    return Artefact(openvino_model.run_openvino(folder / openvino_model.FILE), files, inputs, free_size)


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
