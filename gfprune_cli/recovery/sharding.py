"""Networks in pieces: every process keeps its share of each weight (FSDP2), as accelerate is configured.

The pieces that are put together for a pass, and taken apart after it, are the blocks of a network. What a
process computes is its share of each batch, as where every process holds a whole network.
"""

import warnings

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.reader import load_empty, load_model, wanted_type
from gfprune_cli.errors import UsageError
from gfprune_cli.progress import Event, Progress
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.runtime.half import with_parameters
from gfprune_cli.runtime.processes import Processes, Together

# of DiT: the embeddings of time and class lie in its first block, and are called by the network as well
CALLED_ALONE = ("CombinedTimestepLabelEmbeddings",)


def check_sharded(recipe: FinetuneRecipe, processes: Processes, *, offload_teacher: bool) -> None:
    """Refuse settings that do not go with networks in pieces.

    Raises:
        UsageError: which one, and what does.
    """
    refused = {
        "--lora": (recipe.lora is not None, "train all weights, or start it with --multi_gpu"),
        "--by-block": (recipe.by_block, "drop it, or start it with --multi_gpu"),
        f"--optimizer {recipe.optimizer}": (
            recipe.optimizer not in (None, "adamw", "muon"),
            "use muon or adamw",
        ),
        "--compile": (recipe.compile, "drop it"),
        "--precision fp16": (recipe.precision == "fp16", "use bf16"),
        "--channels-last": (bool(recipe.channels_last), "drop it"),
        "--offload-teacher": (offload_teacher, "drop it: the dense model is in pieces, too"),
    }
    for what, (given, instead) in refused.items():
        if given:
            raise UsageError(f"{what} does not go with a network in pieces (FSDP): {instead}")
    count = processes.count
    if recipe.batch % count:
        near = max(count, recipe.batch // count * count)
        raise UsageError(
            f"--batch {recipe.batch} cannot be shared evenly by {count} processes that hold one network in "
            f"pieces (FSDP): use {near} or {near + count}"
        )


def load_sharded(component: Component, processes: Processes, dtype: torch.dtype | None = None) -> nn.Module:
    """A network in pieces on the devices of the processes: only the first one ever holds all of it.

    Args:
        dtype: of the weights; None: float32.

    Raises:
        GfpruneError: see `load_model`; UsageError: the network cannot be taken apart.
    """
    whole = load_model(component, dtype=dtype).state_dict() if processes.main else {}
    network = shard(load_empty(component, dtype=dtype), processes)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, about what it does itself
        set_model_state_dict(network, whole, options=options)
    return network.requires_grad_(False)


def shard(network: nn.Module, processes: Processes) -> nn.Module:
    """Take a network apart, in place, block by block; gradients are summed over the processes.

    Raises:
        UsageError: a weight is a single number.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise UsageError(f"{name} is a single number, which FSDP cannot share: start it with --multi_gpu")
    names = block_classes(network)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=names,
        cpu_ram_efficient_loading=False,
    )
    plugin.set_auto_wrap_policy(network)
    is_block = fsdp2_prepare_auto_wrap_policy(plugin, network)
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for module in reversed(list(network.modules())):  # from the innermost
        if module is network or (names and is_block(module)):
            # taken apart after every pass, as the optimiser's weights are the pieces
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            module.set_gradient_divide_factor(1.0)
    return network


def block_classes(network: nn.Module) -> list[str]:
    """Names of the classes of the blocks: what lies in lists of modules and holds two layers or more."""
    found = {
        type(module).__name__
        for modules in network.modules()
        if isinstance(modules, nn.ModuleList)
        for module in modules
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and layer_count(module) > 1
    }
    alone = {type(module).__name__ for module in network.modules()} & set(CALLED_ALONE)
    return sorted(found | alone)


def layer_count(module: nn.Module) -> int:
    """Modules within, or the module itself, that have weights of their own."""
    return sum(any(True for _ in layer.parameters(recurse=False)) for layer in module.modules())


def gathered(network: nn.Module, component: Component, processes: Processes) -> nn.Module | None:
    """The whole network in the main memory of the first process; None in the others.

    Args:
        component: whose class and configuration the network has.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(network, options=options)
    if not processes.main:
        return None
    whole = load_empty(component)
    whole.load_state_dict(tensors, assign=True)
    return whole


@torch.no_grad()
def round_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Round weights in place to what will be stored of them, in the type that they have."""
    for name, parameter in network.named_parameters():
        parameter.copy_(parameter.to(wanted_type(network, name, dtype)).to(parameter.dtype))


def stand_in(component: Component, device: torch.device) -> nn.Module:
    """A network of the right shapes that takes no memory: a single number, which is not finite, is all of it.

    For processes that only find what the first one has left in the cache.
    """
    network = with_parameters(
        load_empty(component), lambda weight: torch.full((), torch.nan, device=device).expand(weight.shape)
    )
    return network.requires_grad_(False)


def agreed(progress: Progress, processes: Processes) -> Progress:
    """A callback that stops all processes at the same event: each must report the same ones.

    A process that stopped alone would leave the others waiting for its part of the network.
    """
    together = Together(progress, processes)

    def report(event: Event) -> None:
        together(event)
        together.agree()

    return report
