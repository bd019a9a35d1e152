"""U-Nets of images, with and without text."""

from typing import Any

from gfprune_cli.errors import GfpruneError
from gfprune_cli.families.family import Family, Inputs, Request, Sizes

HINT = 4  # channels that an image becomes beside the latents


def unet(request: Request) -> Inputs:
    model, config = request.model, request.config
    size = config.sample_size or 8 * 2 ** len(config.block_out_channels)
    height, width = request.area(*((size, size) if isinstance(size, int) else size))
    if not hasattr(config, "cross_attention_dim") and request.sizes == Sizes():
        check_halvings(config, height, width)
    hint = HINT if getattr(config, "addition_embed_type", None) == "image_hint" else 0  # the class joins it
    channels = config.in_channels - hint
    inputs = {"sample": request.zeros(1, channels, height, width), "timestep": request.time()}
    if config.time_embedding_type == "learned":
        inputs["timestep"] = inputs["timestep"].long()
    if getattr(config, "num_class_embeds", None) is not None and config.class_embed_type is None:
        inputs["class_labels"] = request.index(1)
    elif config.class_embed_type == "timestep":
        inputs["class_labels"] = request.time()
    elif config.class_embed_type == "identity":
        inputs["class_labels"] = request.zeros(1, model.time_embedding.linear_2.out_features)
    elif config.class_embed_type in ("projection", "simple_projection"):
        inputs["class_labels"] = request.zeros(1, config.projection_class_embeddings_input_dim)
    if hasattr(config, "cross_attention_dim"):
        inputs |= conditioning_inputs(request, height, width)
    return inputs


def check_halvings(config: Any, height: int, width: int) -> None:
    """Refuse a size that `UNet2DModel`, whose upsampling only doubles, does not come back to.

    Raises:
        GfpruneError: the network cannot be run at the size that its configuration says.
    """
    times = len(config.block_out_channels) - 1
    if height % 2**times or width % 2**times:
        raise GfpruneError(
            f"'sample_size' {config.sample_size} in the network's config.json is no multiple of {2**times}, "
            f"and its {times + 1} stages halve what they get: set the size that it was trained at"
        )


def conditioning_inputs(request: Request, height: int, width_of_images: int) -> Inputs:
    """Text states, and the added conditioning of the SDXL and Kandinsky families, as zeros."""
    config, model = request.config, request.model
    width = config.encoder_hid_dim or config.cross_attention_dim
    inputs: Inputs = {
        "encoder_hidden_states": request.text(77, width if isinstance(width, int) else width[0])
    }
    if config.addition_embed_type == "text_time":
        time_width = config.addition_time_embed_dim * 6
        text = request.zeros(1, config.projection_class_embeddings_input_dim - time_width)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": request.zeros(1, 6)}
    elif config.addition_embed_type in ("image", "text_image", "image_hint"):
        embedding = model.add_embedding
        added = {"image_embeds": request.zeros(1, embedding.image_proj.in_features)}
        if config.addition_embed_type == "text_image":
            added["text_embeds"] = request.zeros(1, embedding.text_proj.in_features)
        if config.addition_embed_type == "image_hint":
            added["hint"] = request.zeros(1, 3, 8 * height, 8 * width_of_images)
        inputs["added_cond_kwargs"] = added
    return inputs


FAMILY = Family(
    classes=("UNet2DModel", "UNet2DConditionModel"),
    inputs=unet,
)
