"""The denoiser of a pipeline for its ControlNet or T2I adapter, which is worth what it does to that.

    receiver = load_receiver(component, device)
    recording = received(recording, network, receiver)

What the pipeline passes to both is recorded together, as arguments of the denoiser, and told apart here.
"""

import inspect as inspection
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.layout import predicts
from gfprune_cli.checkpoint.reader import inspect, load_model, sha256_of_weights
from gfprune_cli.diffusion.conditions import NESTED, Receiver
from gfprune_cli.families.table import added_arguments
from gfprune_cli.inputs.arguments import SAMPLE_NAMES, TIMESTEP_NAMES
from gfprune_cli.inputs.observer import ADDING, Adding
from gfprune_cli.inputs.pipeline import local_source, stored_form
from gfprune_cli.inputs.recording import Recording

OF_ADDING = f"{ADDING}{NESTED}"


@dataclass(frozen=True)
class Denoiser:
    """The denoiser beside a network, and the entry of the pipeline that it is."""

    name: str
    network: nn.Module
    fingerprint: str


def receiving(component: Component) -> Component | None:
    """The denoiser that takes what a component returns; None for one that predicts something itself.

    Raises:
        GfpruneError: the pipeline has none, or its weights cannot be had; UsageError: it has several.
    """
    if predicts(component.class_name) or not component.weights:
        return None
    source = local_source(component.root)
    found = inspect(source, weights_required=False)
    variant = stored_form(found.folder, textual=False).get("variant")
    return inspect(source, component=found.name, variant=variant)


def load_receiver(component: Component, device: torch.device) -> Denoiser | None:
    """The same with its weights, frozen, in float32; see `receiving`."""
    found = receiving(component)
    if found is None:
        return None
    network = nn.Module.to(load_model(found).requires_grad_(False), device)
    return Denoiser(found.name, network, "".join(sha256_of_weights(found).values()))


def noisy_names(network: Any) -> tuple[str, ...]:
    """Names of the noisy sample and the noise level; none where a network is told neither."""
    parameters = inspection.signature(network.forward).parameters
    timestep = next((name for name in TIMESTEP_NAMES if name in parameters), None)
    sample = next((name for name in SAMPLE_NAMES if name in parameters), None)
    return () if timestep is None or sample is None else (sample, timestep)


def adding(network: Any) -> Adding:
    """What an observer has to know of a network that adds to the states of another."""
    return Adding(network, noisy_names(network), added_arguments(network))


def received(recording: Recording, network: Any, denoiser: Denoiser) -> Recording:
    """A recording of the denoiser's arguments and the network's as one of the network's."""
    both = recording.conditions

    def part(entries: Mapping[str, Any], *, own: bool) -> dict[str, Any]:
        return {
            name.removeprefix(OF_ADDING): value
            for name, value in entries.items()
            if name.startswith(OF_ADDING) == own
        }

    given = replace(both, tensors=part(both.tensors, own=False), shared=part(both.shared, own=False))
    sample, timestep = noisy_names(network) or (None, None)
    own = replace(
        both,
        tensors=part(both.tensors, own=True),
        shared=part(both.shared, own=True),
        sample=sample,
        timestep=timestep,
        lists=(),
        twins=(),
        sign=1.0,
        plain="return_dict" not in inspection.signature(network.forward).parameters,
        receiver=Receiver(denoiser.network, added_arguments(network), given, denoiser.fingerprint),
    )
    remark = (
        f"{type(network).__name__} is shown plain pictures, of --data or drawn: the maps that it was trained "
        "for (edges, depth, poses) are not made here"
    )
    return replace(recording, conditions=own, remarks=(*recording.remarks, remark))
