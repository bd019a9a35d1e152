"""The graphs of a text-to-image pipeline, with the names by which the pipelines of optimum call them.

Names are those of optimum-onnx 0.1 (`exporters/onnx/model_configs.py`, `onnxruntime/modeling_diffusion.py`)
and optimum-intel 2.0 (`intel/openvino/modeling_diffusion.py`). Inputs and outputs are float32 and int64.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.files import read_json
from gfprune_cli.checkpoint.layout import stock_name
from gfprune_cli.checkpoint.reader import build_meta, cast_model, inspect, load_model
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.checkpoint.writer import variant_of
from gfprune_cli.deploy.format import DTYPES, Format, Job
from gfprune_cli.deploy.graph import Axes, Graph
from gfprune_cli.deploy.halves import LatentDecoder, LatentEncoder
from gfprune_cli.deploy.network import Denoiser, Exported, program_of, traced
from gfprune_cli.deploy.parity import Inputs, Runner, draw_inputs
from gfprune_cli.deploy.safetensors import run_model
from gfprune_cli.diffusion.draws import generator
from gfprune_cli.errors import UsageError
from gfprune_cli.inputs.component_files import check_folder
from gfprune_cli.inputs.pipeline import load_component
from gfprune_cli.recipes.export import DtypeName, ExportRecipe

PIPELINES = re.compile(r"(StableDiffusion(XL|3)?|Flux)(Img2Img|Inpaint)?Pipeline")
AUTOENCODER = "vae"
# Text encoders -> their first outputs, in the order in which pipelines index them.
ENCODERS = {
    "CLIPTextModel": ("last_hidden_state", "pooler_output"),
    "CLIPTextModelWithProjection": ("text_embeds", "last_hidden_state"),
    "T5EncoderModel": ("last_hidden_state",),
}
POOLED = ("text_embeds", "pooler_output")
LENGTHS = (16, 24)  # of the token sequences that text encoders are compared on


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph of a pipeline.

    Args:
        name: of its folder.
        source: what it has to compute, in float32.
        batches: what the two are compared on, under the names that the source takes, in the graph's order.
        dtype: of its weights.
        config: for its config.json.
    """

    name: str
    dtype: DtypeName
    graph: Graph
    source: Runner
    batches: list[Inputs]
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Spelling:
    """What a pipeline calls the output and the free sizes of a network.

    Args:
        scale: a size of the output, written with that of the input.
        inputs: names that differ from those of the class.
    """

    output: str
    sizes: Mapping[str, str] = field(default_factory=lambda: {"height": "height", "width": "width"})
    scale: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)

    def axes(self, found: Exported) -> tuple[Axes, Axes]:
        """Those of the inputs, and of the output, which is shaped like the first input."""
        growth = found.signature.growth
        axes = {
            self.inputs.get(name, name): {
                axis: self.size(growth[name].get(axis, frozenset())) for axis in sorted(free)
            }
            for name, free in found.free.items()
        }
        first = next(iter(axes.values()))
        output = {axis: name + self.scale * (name != "batch_size") for axis, name in first.items()}
        return axes, {self.output: output}

    def size(self, labels: frozenset[str]) -> str:
        if len(labels) > 1:
            return "packed_height_width"
        return next((self.sizes.get(label, "sequence_length") for label in labels), "batch_size")


def is_whole(component: Component, form: Format) -> bool:
    """Whether the component belongs to a pipeline that a format holds as a whole."""
    name = str((component.pipeline or {}).get("_class_name"))
    return form.optimum is not None and PIPELINES.fullmatch(name) is not None


def text_encoders(component: Component) -> list[str]:
    """The names of the pipeline's text encoders.

    Raises:
        UsageError: one of a class, or an autoencoder of one, that no pipeline of optimum calls.
    """
    found = [name for name in component.entries if name.startswith("text_encoder")]
    for name in (*found, AUTOENCODER):
        class_name = component.entries.get(name, ("", "nothing"))[1]
        if class_name not in ENCODERS and stock_name(class_name) != "AutoencoderKL":
            raise UsageError(
                f"the pipeline's {name} is {class_name}, which pipelines of optimum do not take: "
                f"export the network alone with --component {component.name}"
            )
    return found


def sibling(component: Component, name: str, *, weights_required: bool = True) -> Component:
    """Another network of the same pipeline, of the same variant where it has that."""
    source = Source(str(component.root), component.root, "local", None)
    found = partial(inspect, source, component=name, weights_required=weights_required)
    variant = variant_of(component)
    if variant is not None:
        with suppress(UsageError):
            return found(variant=variant)
    return found()


def parts_of(job: Job, form: Format) -> Iterator[Part]:
    """One graph after the other: memory holds one network at a time, as it is traced and in float32."""
    unet = job.component.name == "unet"
    yield network_part(
        job,
        form,
        job.component.name,
        job.component,
        Spelling("out_sample" if unet else "out_hidden_states"),
        one_time=unet,
    )
    for name in text_encoders(job.component):
        yield text_part(job, form, name)
    vae = sibling(job.component, AUTOENCODER)
    job = replace(job, recipe=replace(job.recipe, dtype=autoencoder_dtype(vae, job.recipe)))
    scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    names = {"height": "sample_height", "width": "sample_width"}
    encoder = Spelling("latent_parameters", names, f" / {scale}")
    yield network_part(job, form, "vae_encoder", vae, encoder, LatentEncoder)
    names = {"height": "latent_height", "width": "latent_width"}
    decoder = Spelling("sample", names, f" * {scale}", {"latent": "latent_sample"})
    yield network_part(job, form, "vae_decoder", vae, decoder, LatentDecoder)


def autoencoder_dtype(vae: Component, recipe: ExportRecipe) -> DtypeName:
    """That of the recipe, but for autoencoders that overflow in float16."""
    return "fp32" if vae.config.get("force_upcast") else recipe.dtype


def network_part(
    job: Job,
    form: Format,
    name: str,
    component: Component,
    spelling: Spelling,
    half: Callable[[nn.Module], nn.Module] = lambda network: network,
    *,
    one_time: bool = False,
) -> Part:
    """A network of diffusers, or half of it."""
    dtype = form.traced_type(job.dtype)
    network = half(load_model(component, dtype=dtype))
    found = traced(Denoiser(network, dtype), job.scheduler, one_time=one_time)
    source, signature = half(load_model(component)), found.signature
    seed = job.recipe.seed
    return Part(
        name=name,
        dtype=job.recipe.dtype,
        graph=Graph(found.program, *spelling.axes(found)),
        source=run_model(source, signature),
        batches=draw_inputs(source, job.scheduler, signature, free=found.labels, seed=seed),
        config=component.stock_config,  # no class loads a graph
    )


class TextStates(nn.Module):
    """A text encoder with one tensor for every output, in float32.

    Args:
        model: of a class in `ENCODERS`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.heads = ENCODERS[type(model).__name__]
        self.deep = len(self.heads) > 1  # pipelines take states of layers from CLIP
        self.eval().requires_grad_(False)

    @property
    def axes(self) -> Axes:
        """The outputs and their free dimensions."""
        layers = self.model.config.num_hidden_layers + 1 if self.deep else 0
        names = (*self.heads, *(f"hidden_states.{number}" for number in range(layers)))
        length = {0: "batch_size", 1: "sequence_length"}
        return {name: {0: "batch_size"} if name in POOLED else length for name in names}

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """input_ids [N, L] -> the heads, then states [N, L, C] before the first layer and after each."""
        found = self.model(input_ids=input_ids, output_hidden_states=self.deep, return_dict=True)
        states = found.hidden_states if self.deep else ()
        return tuple(tensor.float() for tensor in (*(found[name] for name in self.heads), *states))


def text_part(job: Job, form: Format, name: str) -> Part:
    """A text encoder of transformers."""
    cpu = torch.device("cpu")
    network = TextStates(cast_model(load_component(job.component, name, cpu), form.traced_type(job.dtype)))
    vocabulary = network.model.config.vocab_size
    batches = [
        {"input_ids": torch.randint(vocabulary, (count, length), generator=generator(job.recipe.seed, name))}
        for count, length in zip((1, 3), LENGTHS, strict=True)
    ]
    free = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO}}
    program = program_of(network, batches[1], free)
    source = TextStates(load_component(job.component, name, cpu).float())

    @torch.no_grad()
    def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = source(**inputs)
        return found

    inputs = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    return Part(
        name=name,
        dtype=job.recipe.dtype,
        graph=Graph(program, inputs, network.axes),
        source=run,
        batches=batches,
        config=read_json(job.component.root / name / "config.json", job.component.roots),
    )


def sizes_of_parts(component: Component, recipe: ExportRecipe) -> dict[str, int]:
    """Folder -> bytes of its weights, from shapes alone."""
    texts = text_encoders(component)
    autoencoder = sibling(component, AUTOENCODER, weights_required=False)
    vae, wider = build_meta(autoencoder), autoencoder_dtype(autoencoder, recipe)
    networks: dict[str, tuple[nn.Module, DtypeName]] = {
        component.name: (build_meta(component), recipe.dtype),
        "vae_encoder": (LatentEncoder(vae), wider),
        "vae_decoder": (LatentDecoder(vae), wider),
        **{name: (text_skeleton(component, name), recipe.dtype) for name in texts},
    }
    return {
        name: sum(tensor.numel() * DTYPES[dtype].itemsize for tensor in network.state_dict().values())
        for name, (network, dtype) in networks.items()
    }


def text_skeleton(component: Component, name: str) -> nn.Module:
    """A text encoder without weights."""
    import transformers

    folder = component.root / name
    check_folder(folder, component.roots)
    found = getattr(transformers, component.entries[name][1])
    with torch.device("meta"):
        network: nn.Module = found(found.config_class.from_pretrained(folder, local_files_only=True))
    return network
