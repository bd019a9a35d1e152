"""Train a pruned network in memory, with the dense one as teacher: what `finetune` and `prune` share."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from gfprune_cli.data.sample_rows import Samples
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import NoisingProcess
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import Progress
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.by_block import BlockTrainer
from gfprune_cli.recovery.logs import Watch
from gfprune_cli.recovery.loop import Loop, State
from gfprune_cli.recovery.losses import FeaturePair, RecoveryLoss
from gfprune_cli.recovery.sharded_state import ShardedState
from gfprune_cli.recovery.sharded_trainer import ShardedTrainer
from gfprune_cli.recovery.trainer import Remedies, Trainer
from gfprune_cli.runtime.device import Precision
from gfprune_cli.runtime.processes import Processes


def recover(
    student: nn.Module,
    teacher: nn.Module,
    process: NoisingProcess,
    draws: Draws,
    recipe: FinetuneRecipe,
    *,
    processes: Processes,
    precision: Precision,
    state: State,
    progress: Progress,
    save_every: int,
    sample_every: int = 0,
    samples: Samples | None = None,
    open_watch: Callable[[int], Watch] | None = None,
    pair: FeaturePair | None = None,
    remedies: Remedies | None = None,
) -> None:
    """Train the student to the end of the recipe; it then holds the averaged weights, and is frozen.

    Args:
        student: float32 and in eval mode, which it stays in: dropout would blur what it is taught. With
            adapters where the recipe wants them, which alone are trained then. In pieces, as the teacher,
            where the processes work so.
        teacher: frozen, on the student's device.
        process: noising process of both.
        draws: where batches come from.
        recipe: steps, batch, rates, losses and seed; what it says of models, data and files is not read.
        processes: that share each batch; their device is the student's.
        precision: of the passes.
        state: where the run survives a kill, and goes on from.
        save_every: steps between saved states; 0 for the last step only.
        sample_every, samples, open_watch: what people see on the way, see `Loop`.
        pair: layers of both, if their features are compared; let go in the end.
        remedies: what the command can advise when training fails.

    Raises:
        Interrupted: raised by `progress`; the state is saved by then.
        GfpruneError: a loss or gradient is not finite, or a sample does not fit in memory.
    """
    if pair is None:
        recipe = replace(recipe, features=0.0)
    if recipe.checkpointing:
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    if recipe.lora is None:
        student.requires_grad_(not recipe.by_block)
    called = [torch.compile(network) if recipe.compile else network for network in (student, teacher)]
    loss = RecoveryLoss(called[0], called[1], process, recipe, pair, precision)  # type: ignore[arg-type]
    kind = BlockTrainer if recipe.by_block else ShardedTrainer if processes.sharded else Trainer
    trainer = kind(student, loss, draws, recipe, processes, remedies or Remedies())
    if isinstance(trainer, ShardedTrainer):
        assert isinstance(state, StateFolder)
        state = ShardedState(state, processes, trainer.room)
    try:
        Loop(trainer, state, progress, save_every, sample_every, samples, open_watch).run()
    finally:
        if pair is not None:
            pair.close()
    trainer.finish()
    student.requires_grad_(False)


def channels_last(network: nn.Module) -> nn.Module:
    """The network, its two-dimensional convolutions stored channels last, as the fastest kernels read them.

    `nn.Module.to` refuses networks that have three-dimensional ones as well.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network
