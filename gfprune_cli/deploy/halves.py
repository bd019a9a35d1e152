"""The two halves of an autoencoder, which deployed pipelines run apart."""

from typing import Any

import torch
from torch import nn

from gfprune_cli.inputs.examples import Sizes


class Half(nn.Module):
    """Some modules of an autoencoder, one after the other.

    Args:
        autoencoder: an `AutoencoderKL` or `VQModel`, dense or pruned.
    """

    names: tuple[str, ...] = ()

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        for name in self.names:
            part = getattr(autoencoder, name, None)
            if part is not None:
                self.add_module(name, part)
        self.config = autoencoder.config

    def through(self, given: torch.Tensor) -> tuple[torch.Tensor]:
        for name, part in self.named_children():
            given = part(given)[0] if name == "quantize" else part(given)
        return (given,)

    def area(self, sizes: Sizes, edge: int) -> tuple[int, int]:
        return sizes.height or edge, sizes.width or edge


class LatentDecoder(Half):
    """What makes an image of a latent."""

    names = ("quantize", "post_quant_conv", "decoder")

    def forward(self, latent: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """latent [N, C, h, w], unscaled as `decode` of the autoencoder takes it -> image [N, C', H, W]."""
        return self.through(latent)

    def example(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """One latent of zeros for the images that the autoencoder was made for."""
        config: Any = self.config
        edge = max(1, config.sample_size // 2 ** (len(config.block_out_channels) - 1))
        channels = config.get("vq_embed_dim") or config.latent_channels
        latent = next(self.parameters()).new_zeros(1, channels, *self.area(sizes, edge))
        return {"latent": latent}


class LatentEncoder(Half):
    """What makes a latent's distribution of an image."""

    names = ("encoder", "quant_conv")

    def forward(self, sample: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """sample [N, C, H, W] -> mean and logarithm of the variance, [N, 2 C', h, w], unscaled."""
        return self.through(sample)

    def example(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """One image of zeros."""
        config: Any = self.config
        area = self.area(sizes, config.sample_size)
        return {"sample": next(self.parameters()).new_zeros(1, config.in_channels, *area)}
