"""A network that adds to the states of a denoiser is fitted to what it returned, whatever becomes of that."""

import copy

import torch
from diffusers import T2IAdapter
from pipelines import conditional_unet, filled

from gfprune_cli.diffusion.conditions import Conditions, Receiver
from gfprune_cli.families.table import added_arguments
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.passing import given_weights
from gfprune_cli.flow.refit import Refit
from gfprune_cli.flow.residuals import find_residuals
from gfprune_cli.pruning.verify import random_part
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.tracing import outputs_of

COUNT = 16


def test_a_refit_brings_what_is_added_closer_to_what_it_was() -> None:
    torch.manual_seed(0)
    dense = filled(T2IAdapter(3, [24, 32], num_res_blocks=1, downscale_factor=2)).requires_grad_(False)
    denoiser = filled(conditional_unet()).requires_grad_(False)
    text, pictures = torch.randn(COUNT, 1, 7, 32), torch.rand(COUNT, 1, 3, 16, 16)
    receiver = Receiver(denoiser, added_arguments(dense), Conditions({"encoder_hidden_states": text}))
    given = Conditions({"x": pictures}, sample=None, timestep=None, plain=True, receiver=receiver)
    groups, _ = discover(dense)
    masks = {name: kept.double() for name, kept in random_part(groups).items()}
    masked = MaskedModel(copy.deepcopy(dense), groups, masks)
    inputs = {"x": pictures.flatten(0, 1)}
    expected = outputs_of(dense, inputs)

    def gaps() -> list[float]:
        with torch.no_grad(), given_weights(masked.model, masked.passing()):
            found = outputs_of(masked.model, inputs)
        return [float((one - other).norm()) for one, other in zip(found, expected, strict=True)]

    before = gaps()
    refit = Refit(masked, dense, find_residuals(dense, inputs), 0)
    changed = refit.fit(torch.randn(COUNT, 4, 8, 8), torch.full((COUNT,), 500), given, 0)
    assert changed
    assert all(after < 0.9 * gap for after, gap in zip(gaps(), before, strict=True))
