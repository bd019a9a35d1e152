"""Pipelines that want more than a prompt: what they join to noisy samples, where their images come from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from image_pipelines import PIPELINES

from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.diffusion.conditions import AFTER, BEFORE, call
from gfprune_cli.inputs.conditioning import Asked
from gfprune_cli.inputs.pictures import Pictures
from gfprune_cli.inputs.pipeline import open_pipeline
from gfprune_cli.inputs.pipeline_run import PipelineOptions
from gfprune_cli.inputs.recording import Recording, record

SIZE = PipelineOptions(size="16")


def recorded(
    name: str, folder: Path, pictures: Pictures | None = None, component: str | None = None, **options: Any
) -> tuple[Recording, torch.nn.Module]:
    """What a tiny pipeline passes to its denoiser for two prompts."""
    path = PIPELINES[name](folder)
    found = inspect(Source(str(path), path, "local", None), component=component)
    model = load_model(found).requires_grad_(False)
    pipeline = open_pipeline(found, model, load_scheduler(found))
    wanted = PipelineOptions(**{"size": "16"} | options)
    return record(pipeline, model, ["a red fox", "an old boat at sea"], wanted, pictures=pictures), model


# pipeline -> (what is joined, along which axis, how much of it)
JOINED = {"inpaint": (AFTER, 1, 5), "pix2pix": (AFTER, 1, 4), "fill": (AFTER, 2, 16 + 4 * 4)}


@pytest.mark.parametrize("name", sorted(JOINED))
def test_masks_and_images_are_told_from_noise(name: str, tmp_path: Path) -> None:
    """The noisy sample keeps its own channels; what the pipeline adds is a condition of each prompt."""
    found, model = recorded(name, tmp_path)
    place, axis, count = JOINED[name]
    joined = found.conditions.tensors[place]
    assert found.conditions.axis == axis
    assert joined.shape[axis + 1] == count
    assert not torch.equal(joined[0], joined[1]), "every prompt has a picture of its own"
    for batch in (1, 3):
        rows = found.conditions[[number % 2 for number in range(batch)]]
        x = torch.randn(batch, *found.shape)
        output = call(model, x, torch.full((batch,), 500.0), rows)
        own = output if found.conditions.branches == 1 else output[:, 0]
        assert own.shape == x.shape


def test_images_come_from_the_users_data_where_there_is_some(tmp_path: Path) -> None:
    black = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    drawn, _ = recorded("pix2pix", tmp_path / "drawn")
    given, _ = recorded("pix2pix", tmp_path / "given", Pictures(black))
    assert not torch.equal(drawn.conditions.tensors[AFTER], given.conditions.tensors[AFTER])
    image = given.conditions.tensors[AFTER]
    assert torch.equal(image[0], image[1]), "two black pictures are one"


def test_a_picture_goes_with_the_caption_that_came_with_it() -> None:
    """The first one, where a caption comes with several."""
    asked = Asked.each(["a fox", "a cat", "a fox", "a dog"])
    data = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    pictures = Pictures(data, order=asked.firsts())
    colours = [pictures.image(None, number, (8, 8)).getpixel((0, 0))[0] for number in range(3)]
    assert (asked.distinct, colours) == (["a fox", "a cat", "a dog"], [0, 1, 3])


def test_three_branches_count_as_the_one_with_all_conditions(tmp_path: Path) -> None:
    """Instruct-pix2pix guides by text and by image: text and image, image, neither."""
    found, _ = recorded("pix2pix", tmp_path)
    assert found.conditions.branches == 1
    assert any("3 branches" in remark for remark in found.remarks)


def test_both_experts_of_a_pipeline_can_be_recorded(tmp_path: Path) -> None:
    """The expert that is not worked on has no weights, and answers with noise."""
    for component in ("transformer", "transformer_2"):
        found, model = recorded("two experts", tmp_path / component, component=component, frames=5)
        output = call(model, torch.randn(1, *found.shape), torch.tensor([500.0]), found.conditions[[0]])
        assert output.isfinite().all()


def test_lists_of_samples_and_texts_of_any_length(tmp_path: Path) -> None:
    """Z-Image takes lists, one entry for each sample; texts are cut to the shortest."""
    found, model = recorded("z-image", tmp_path)
    assert {"x", "cap_feats"} <= set(found.conditions.lists)
    x = torch.randn(3, *found.shape)
    output = call(model, x, torch.full((3,), 0.5), found.conditions[[0, 1, 0]])
    assert (output if found.conditions.branches == 1 else output[:, 0]).shape == x.shape


def test_tables_that_are_plain_attributes_are_loaded(tmp_path: Path) -> None:
    """Qwen-Image keeps its rotary angles in neither parameters nor buffers."""
    found, model = recorded("qwen-image", tmp_path)
    output = call(model, torch.randn(2, *found.shape), torch.full((2,), 0.5), found.conditions[[0, 1]])
    assert output.isfinite().all()
    assert BEFORE not in found.conditions.tensors
