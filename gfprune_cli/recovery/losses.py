"""What a pruned network learns from: the data, and the dense network it was cut from.

Four terms, each a mean over the samples of a batch, added with the weights of the recipe:

denoise    the training loss of the checkpoint itself (arXiv 2006.11239, eq. 14)
distill    |student(x_t) - teacher(x_t)|^2, in the units of the denoising loss (arXiv 1503.02531)
features   the same on the outputs of the layers, against the teacher's kept channels: width pruning needs no
           projector. Relative to the teacher's power, layer by layer (arXiv 1412.6550)
jacobian   the squared length of J v for a random direction v, a projection of J^T J (arXiv 2506.05398),
           here as the relative difference of student and teacher

The first two are weighted by noise level: by default the error of the predicted image counts beside that of
the noise, or it would not show where noise is high and a sample gets its colours and outline. Min-SNR
weighting (arXiv 2303.09556) can take its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from gfprune_cli.diffusion.conditions import Condition, call
from gfprune_cli.diffusion.draws import Batch
from gfprune_cli.diffusion.schedulers import NoisingProcess, mean_square
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.teacher import LAYERS, Correspondence
from gfprune_cli.runtime.device import Precision, autocast

JACOBIAN_STEP = 1e-2  # along a direction of unit variance; the difference is taken in float32
SMALL = 1e-6  # of the denominators of relative differences


class FeaturePair:
    """Outputs of the same layers in student and teacher, caught by hooks.

    Args:
        student, teacher: the two networks.
        layers: how the student's layers lie in the teacher.

    Raises:
        GfpruneError: no layer of the two can be compared.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Correspondence) -> None:
        self.layers, self.scales = layers, layers.scales
        self.device = next(student.parameters()).device
        self.positions: dict[str, torch.Tensor] = {}
        self.dimensions: dict[str, int] = {}
        self.caught: dict[str, dict[str, torch.Tensor]] = {"student": {}, "teacher": {}}
        self.on = False
        modules = dict(student.named_modules())
        for name, index in layers.positions.items():
            layer: Any = modules.get(name)
            layer = getattr(layer, "base_layer", layer)  # below its adapter, if it has one
            if isinstance(layer, LAYERS) and len(index) == layer.weight.shape[0]:
                self.positions[name] = index
                self.dimensions[name] = -1 if isinstance(layer, nn.Linear) else 1
        if not self.positions:
            raise GfpruneError("no layer of student and teacher can be compared: use --features 0")
        self.hooks = []
        for name in self.positions:
            theirs = teacher.get_submodule(layers.names[name])
            self.hooks.append(modules[name].register_forward_hook(self.catcher("student", name)))
            self.hooks.append(theirs.register_forward_hook(self.catcher("teacher", name)))

    def catcher(self, role: str, name: str) -> Any:
        index, dimension = self.positions[name], self.dimensions[name]

        def catch(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if self.on and role == "student":
                self.caught[role][name] = output
            elif self.on:  # what is not compared is let go at once
                self.caught[role][name] = output.detach().index_select(dimension, index.to(output.device))

        return catch

    def close(self) -> None:
        """Leave both networks as they were."""
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Catch outputs in the block; where it fails, they are let go."""
        self.on = True
        try:
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            self.on = False

    def forget(self) -> None:
        for caught in self.caught.values():
            caught.clear()

    def distance(self, samples: int) -> torch.Tensor:
        """[samples] mean over layers of |student - teacher|^2 / |teacher|^2; forgets what was caught."""
        terms = []
        for name in self.positions:
            mine, theirs = (self.caught[role].pop(name, None) for role in ("student", "teacher"))
            if mine is None or theirs is None or mine.ndim < 3:
                continue  # a layer that does not run; the time embedding: no image in it
            theirs = theirs.float() * self.scales.get(name, 1.0)
            relative = mean_square(mine.float() - theirs) / mean_square(theirs).clamp_min(SMALL)
            if not len(relative) % samples:  # branches and frames of a sample lie together
                terms.append(relative.view(samples, -1).mean(1))
        self.forget()
        return torch.stack(terms).mean(0) if terms else torch.zeros(samples).to(self.device)


class RecoveryLoss:
    """The weighted sum of the four terms.

    Args:
        student: called with gradients; may be compiled.
        teacher: called without, in the type of its weights.
        process: noising process of both.
        recipe: weights of the terms; that of the features is the one at the first step.
        features: caught layers; None if their weight is 0.
        precision: of the passes; the Jacobian term is always taken in float32.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        process: NoisingProcess,
        recipe: FinetuneRecipe,
        features: FeaturePair | None,
        precision: Precision,
    ) -> None:
        self.student, self.teacher, self.process = student, teacher, process
        self.recipe, self.features, self.precision = recipe, features, precision
        self.teacher_type = getattr(teacher, "dtype", torch.float32)

    def terms(
        self, batch: Batch, probe: torch.Tensor | None, progress: float
    ) -> dict[str, tuple[float, torch.Tensor]]:
        """Term -> (its weight now, [N] loss of each sample).

        Args:
            batch: what to denoise.
            probe: [N, C, H, W] random directions, if the Jacobian has a weight.
            progress: share of the steps that compare features that is done, in [0, 1]; their weight decays
                with it.
        """
        recipe, process = self.recipe, self.process
        noisy = process.add_noise(batch.images, batch.noise, batch.index)
        timesteps = process.timesteps(batch.index)
        features = recipe.feature_weight * (1 - progress)
        catch = self.features if features else None
        with catch.catching() if catch else nullcontext(), autocast(noisy.device, self.precision):
            output = call(self.student, noisy, timesteps, batch.condition).float()
            reference = output
            if recipe.distill or catch is not None:
                with torch.no_grad():
                    given = noisy.to(self.teacher_type)
                    reference = call(self.teacher, given, timesteps, batch.condition).float()
        if recipe.min_snr is not None:
            scale = process.min_snr(batch.index, recipe.min_snr)
        else:
            scale = process.image_weight(batch.index, recipe.image_weight)
        denoise = process.losses(output, batch.images, batch.noise, batch.index) * scale
        terms = {"denoise": (recipe.denoise_weight, denoise)}
        if recipe.distill:
            terms["distill"] = recipe.distill, process.distance(output, reference, batch.index) * scale
        if catch is not None:
            terms["features"] = features, catch.distance(len(batch))
        if recipe.jacobian:
            assert probe is not None
            terms["jacobian"] = recipe.jacobian, self.jacobian(noisy, timesteps, batch.condition, probe)
        return terms

    def not_finite(self, batch: Batch) -> torch.Tensor:
        """[2, N] bool: where an output of the student, and of the teacher, is not finite."""
        noisy = self.process.add_noise(batch.images, batch.noise, batch.index)
        timesteps = self.process.timesteps(batch.index)
        rows = []
        for network, dtype in ((self.student, noisy.dtype), (self.teacher, self.teacher_type)):
            with autocast(noisy.device, self.precision):
                output = call(network, noisy.to(dtype), timesteps, batch.condition)
            rows.append(~output.isfinite().flatten(1).all(1))
        return torch.stack(rows)

    def jacobian(
        self, x: torch.Tensor, timesteps: torch.Tensor, condition: Condition, probe: torch.Tensor
    ) -> torch.Tensor:
        """[N] squared relative difference of |J v|^2 between student and teacher, v = `probe`."""

        def stretch(network: nn.Module) -> torch.Tensor:
            ahead = call(network, x + JACOBIAN_STEP * probe, timesteps, condition)
            return mean_square((ahead - call(network, x, timesteps, condition)) / JACOBIAN_STEP)

        mine = stretch(self.student)
        with torch.no_grad():
            theirs = stretch(self.teacher)
        return ((mine - theirs) / (theirs + SMALL)).square()
