"""A whole text-to-image pipeline in the folders of optimum: a graph each, and what goes with them.

unet/model.onnx, vae_decoder/model.onnx, text_encoder/model.onnx, ..., tokenizer/, scheduler/
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.layout import PRUNED, stock_name
from gfprune_cli.checkpoint.writer import copy_component, index_without_absent, variant_of
from gfprune_cli.deploy.format import Format, Job
from gfprune_cli.deploy.parity import Inputs, Parity, Runner, compare
from gfprune_cli.deploy.parts import AUTOENCODER, Part, parts_of, text_encoders
from gfprune_cli.deploy.result import Made
from gfprune_cli.outputs.durable import write_json
from gfprune_cli.progress import Event


def write_whole(job: Job, form: Format, folder: Path, tolerance: float) -> Made:
    """Write every network of a pipeline as a graph, run it beside its source, and copy the rest.

    Its inputs are called "folder/name"; the distance is that of the graph that is furthest from its source.

    Raises:
        GateMissed: a graph does not compute what its source computes.
    """
    inputs: dict[str, Any] = {}
    found: dict[str, Parity] = {}
    for part in parts_of(job, form):
        job.progress(Event("export", text=f"writing {part.name}, {job.recipe.format}, {job.recipe.dtype}"))
        described = part.graph.described(part.batches[0].values())
        inputs |= {f"{part.name}/{name}": entry for name, entry in described.items()}
        found[part.name] = write_part(job, form, folder, part, tolerance)
        del part  # or its networks would lie beside the next one's
    copy_rest(folder, job.component)
    worst = max(found.values(), key=lambda parity: parity.max_rel or 0)
    count = sum(parity.inputs for parity in found.values())
    sizes = found[job.component.name].sizes
    files = {
        f"{part}/{path.name}": path.stat().st_size
        for part in found
        for path in sorted((folder / part).iterdir())
        if path.name != "config.json"
    }
    return inputs, files, replace(worst, inputs=count, sizes=sizes)


def write_part(job: Job, form: Format, folder: Path, part: Part, tolerance: float) -> Parity:
    """One graph in a folder of its own."""
    assert form.graph is not None
    target = folder / part.name
    target.mkdir()
    write_json(target / "config.json", part.config)
    recipe = replace(job.recipe, dtype=part.dtype)
    run = renamed(form.graph(target, part.graph, recipe), list(part.graph.inputs))
    return compare(part.source, run, part.batches, tolerance, job.progress)


def renamed(run: Runner, names: list[str]) -> Runner:
    """A graph that is given its inputs under the names of the source, in the same order."""

    def called(inputs: Inputs) -> Any:
        return run(dict(zip(names, inputs.values(), strict=True)))

    return called


def copy_rest(folder: Path, component: Component) -> None:
    """model_index.json with stock classes, and the parts that are no graphs: tokenizers, schedule, ..."""
    index = index_without_absent(component, {})
    index.pop("auto_map", None)  # no class loads a graph
    graphs = (component.name, AUTOENCODER, *text_encoders(component))
    for name, (_, class_name) in component.entries.items():
        if class_name.startswith(PRUNED):
            index[name] = ["diffusers", stock_name(class_name)]
        if name not in graphs and (component.root / name).is_dir():
            copy_component(component.root / name, folder / name, variant_of(component), component.roots)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def pipeline_loading(form: Format, name: str) -> str:
    """The Python that loads the pipeline, for the model card."""
    assert form.optimum is not None
    module, found = form.optimum
    return f'from {module} import {found}\npipeline = {found}.from_pretrained("{name}")'
