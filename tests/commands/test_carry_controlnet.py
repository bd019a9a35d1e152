"""ControlNets and T2I adapters, which add to streams: for those that are left of a pruned network."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pruned_folders
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    SanaControlNetModel,
    SD3ControlNetModel,
    T2IAdapter,
)
from pipelines import flux
from pruned_folders import Pruned

import gfprune_cli
from gfprune_cli.checkpoint.correspondence import Stays
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class, skipped, streams_of_unet
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs

CASES = {"stable-diffusion": {}, "flux": dict(blocks=True, width=True), "sd3": dict(width=True)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pruned]:
    """Pruned pipelines by family, each made once."""
    return cache(lambda family: Pruned(family, tmp_path_factory.mktemp(family), **CASES[family]))


def filled(network: Any) -> Any:
    """With last layers that are not zero."""
    for name, parameter in network.named_parameters():
        if name.startswith("controlnet_"):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    return network.eval()


def kept_channels(pruned: Pruned, layer: str, side: str) -> list[int] | slice:
    """Of a layer of the dense network, by the record."""
    layers = json.loads((pruned.folder / "gfprune.json").read_text())["map"]["layers"]
    entry = layers.get(layer, {})
    return list(Stays.parse(entry[side]).indices) if side in entry else slice(None)


class TestControlNet:
    """What it adds to the streams of the U-Net has the channels that are left."""

    @pytest.fixture
    def controlnet(self, made: Callable[[str], Pruned], tmp_path: Path) -> Path:
        """One of the dense U-Net, whose outputs are not zero."""
        network = ControlNetModel.from_unet(made("stable-diffusion").load().train())
        for name, parameter in network.named_parameters():
            if name.startswith("controlnet_"):
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
        network.save_pretrained(tmp_path / "controlnet")
        return tmp_path / "controlnet"

    def outputs(self, network: Any) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(5)
        sample, text = torch.randn(1, 4, 8, 8, generator=source), torch.randn(1, 7, 32, generator=source)
        picture = torch.randn(1, 3, 64, 64, generator=source)
        with torch.no_grad():
            down, middle = network(sample, torch.tensor([5]), text, picture, return_dict=False)
        return [*down, middle]

    def test_its_outputs_are_those_of_the_dense_one_at_the_channels_that_are_left(
        self, made: Callable[[str], Pruned], controlnet: Path, tmp_path: Path
    ) -> None:
        pruned = made("stable-diffusion")
        found = gfprune_cli.carry(controlnet, pruned.folder, out=tmp_path / "out")
        assert (found.kind, found.layers["total"], found.layers["dropped"]) == ("controlnet", 5, 0)
        assert found.layers["narrowed"] > 0
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"config.json", "gfprune_models_v2.py", "gfprune.json", "README.md"} < names
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        carried: Any = pruned_class("ControlNetModel").from_pretrained(tmp_path / "out")
        assert config["_class_name"] == type(carried).__name__ == "PrunedControlNetModel"
        network: Any = gfprune_cli.load(pruned.folder)
        layers = json.loads((pruned.folder / "gfprune.json").read_text())["map"]["layers"]
        streams = ["conv_in", "down_blocks.0.attentions.0.proj_out", "down_blocks.0.downsamplers.0.conv"]
        streams += ["down_blocks.1.resnets.0.conv2", "mid_block.resnets.1.conv2"]
        dense = self.outputs(ControlNetModel.from_pretrained(controlnet))
        left = self.outputs(carried.eval())
        for before, after, stream in zip(dense, left, streams, strict=True):
            entry = layers.get(stream, {})
            if "out" in entry:
                before = before[:, list(Stays.parse(entry["out"]).indices)]
            assert after.shape[1] == network.get_submodule(stream).weight.shape[0]
            torch.testing.assert_close(after, before)
        source = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
        down = dict(down_block_additional_residuals=left[:-1], mid_block_additional_residual=left[-1])
        assert network(*source, **down).sample.isfinite().all()
        down = dict(down_block_additional_residuals=dense[:-1], mid_block_additional_residual=dense[-1])
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            network(*source, **down)

    def test_one_for_another_network_is_refused(
        self, made: Callable[[str], Pruned], controlnet: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(GfpruneError, match="no U-Net"):
            gfprune_cli.carry(controlnet, made("flux").folder, out=tmp_path / "out")


def test_one_for_several_conditions_goes_the_same_way(made: Callable[[str], Pruned], tmp_path: Path) -> None:
    pruned = made("stable-diffusion")
    config = {key: value for key, value in pruned.network.config.items() if not key.startswith("_")}
    known = ControlNetUnionModel._get_init_keys(ControlNetUnionModel)
    given = {key: value for key, value in config.items() if key in known}
    given |= dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=48)
    given |= dict(num_trans_channel=24, num_trans_head=2)
    filled(ControlNetUnionModel(**given)).save_pretrained(tmp_path / "union")
    gfprune_cli.carry(tmp_path / "union", pruned.folder, out=tmp_path / "out")
    union: Any = pruned_class("ControlNetUnionModel").from_pretrained(tmp_path / "out")
    streams, _, middle = streams_of_unet(gfprune_cli.load(pruned.folder))
    assert [layer.out_channels for layer in union.controlnet_down_blocks] == streams
    assert union.controlnet_mid_block.out_channels == middle


class TestThePrunedClass:
    """Checks what is added to its streams, in eager mode and in graphs."""

    def test_the_number_of_samples(self) -> None:
        """Where blocks are gone, only one for each block that is left goes where it belongs."""
        made = dict(attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8, in_channels=4)
        made |= dict(pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), num_layers=2, num_single_layers=1)
        torch.manual_seed(10)
        whole, fewer = (
            pruned_class("FluxTransformer2DModel")(gfprune={"modules": {}, **more}, **made).eval()
            for more in ({}, {"dense": {"num_layers": 4}})
        )
        given, sample = example_inputs(whole), torch.zeros(1, 1, 16)
        for network, count in ((whole, 1), (whole, 2), (fewer, 2)):
            assert network(**given, controlnet_block_samples=[sample] * count).sample.isfinite().all()
        for network, count in ((whole, 3), (fewer, 1), (fewer, 4)):
            with pytest.raises(
                ValueError, match=rf"{count} tensors for 2 blocks; carry it over with `gfprune"
            ):
                network(**given, controlnet_block_samples=[sample] * count)

    @pytest.mark.slow
    def test_residuals_are_traced(self, made: Callable[[str], Pruned], thorough: bool) -> None:
        network: Any = gfprune_cli.load(made("stable-diffusion").folder)
        streams, _, middle = streams_of_unet(network)
        source = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
        sides = [8, 8, 4, 4]
        down = tuple(torch.randn(1, width, side, side) for width, side in zip(streams, sides, strict=True))
        added = dict(
            down_block_additional_residuals=down,
            mid_block_additional_residual=torch.randn(1, middle, 4, 4),
        )
        with torch.no_grad():
            wanted = network(*source, **added).sample
            compiled: Any = torch.compile(network, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(*source, **added).sample, wanted)
            if thorough:  # which is traced like the other
                exported = torch.export.export(network, source, added).module()
                torch.testing.assert_close(exported(*source, **added).sample, wanted)


class TestTransformers:
    """Samples are spread over the blocks of the dense network, and stay with those that are left."""

    def controlnet(self, pruned: Pruned, **settings: Any) -> Any:
        """One of the dense network, with as many blocks as it."""
        cls = FluxControlNetModel if "Flux" in pruned.component.class_name else SD3ControlNetModel
        config = {key: value for key, value in pruned.network.config.items() if not key.startswith("_")}
        known = cls._get_init_keys(cls)
        given = {key: value for key, value in config.items() if key in known}
        torch.manual_seed(6)
        return filled(cls(**{**given, **settings}))

    def samples(self, controlnet: Any, network: Any) -> list[Any]:
        """What it puts out, by stack."""
        given = dict(example_inputs(network))
        given.pop("return_dict", None)
        states = given["hidden_states"]
        side = 16 * round(states.shape[1] ** 0.5)
        hint = getattr(controlnet, "input_hint_block", None) is not None
        shape = (len(states), 3, side, side) if hint else states.shape
        condition = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return list(controlnet(**given, controlnet_cond=condition, return_dict=False))

    @pytest.mark.parametrize("family", ["flux", "sd3"])
    def test_outputs_are_those_of_the_dense_one_at_the_channels_and_blocks_that_are_left(
        self, made: Callable[[str], Pruned], family: str, tmp_path: Path
    ) -> None:
        pruned = made(family)
        dense = self.controlnet(pruned)
        dense.save_pretrained(tmp_path / "controlnet")
        found = gfprune_cli.carry(tmp_path / "controlnet", pruned.folder, out=tmp_path / "out")
        assert (found.kind, found.layers["narrowed"]) == ("controlnet", found.layers["total"])
        carried = pruned_class(type(dense).__name__).from_pretrained(tmp_path / "out").eval()
        stays = kept_channels(pruned, "proj_out", "in")
        before, after = self.samples(dense, pruned.load()), self.samples(carried, pruned.load())
        for one, other in zip(before, after, strict=True):
            wanted = [sum(one)] if family == "flux" else one  # the first of two blocks is gone
            for left, whole in zip(other, wanted, strict=True):
                torch.testing.assert_close(left, whole[..., stays])
        network = gfprune_cli.load(pruned.folder)
        names = ["controlnet_block_samples", "controlnet_single_block_samples"]
        names = names if family == "flux" else ["block_controlnet_hidden_states"]
        given = example_inputs(network)
        assert network(**given, **dict(zip(names, after, strict=True))).sample.isfinite().all()
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            network(**given, **dict(zip(names, before, strict=True)))

    @pytest.mark.matrix(3)
    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("xlabs", [False, True])
    def test_the_network_computes_what_the_dense_one_does_without_the_blocks(
        self, count: int, xlabs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of three blocks the second is gone; outputs are spread, or begin again (XLabs)."""

        def chosen(groups: Any) -> dict[str, torch.Tensor]:
            return {
                group.name: torch.full((group.units,), not (group.stack and group.name.endswith("blocks.1")))
                for group in groups
            }

        monkeypatch.setattr(pruned_folders, "chosen", chosen)
        monkeypatch.setitem(
            pruned_folders.FAMILIES,
            "flux",
            lambda folder: flux(folder, num_layers=3, num_single_layers=3),
        )
        pruned = Pruned("flux", tmp_path / "model", blocks=True)
        settings = dict(num_layers=count, num_single_layers=count)
        if xlabs:
            settings |= dict(conditioning_embedding_channels=4, patch_size=2)
        controlnet = self.controlnet(pruned, **settings)
        controlnet.save_pretrained(tmp_path / "controlnet")
        gfprune_cli.carry(tmp_path / "controlnet", pruned.folder, out=tmp_path / "out")
        carried = pruned_class("FluxControlNetModel").from_pretrained(tmp_path / "out").eval()
        dense = pruned.load()
        for stack in (dense.transformer_blocks, dense.single_transformer_blocks):
            stack[1] = skipped(stack[1], True)
        outputs = []
        for network, adapter in ((dense, controlnet), (gfprune_cli.load(pruned.folder), carried)):
            double, single = self.samples(adapter, network)
            added = dict(controlnet_block_samples=double, controlnet_single_block_samples=single)
            with torch.no_grad():
                outputs.append(
                    network(**example_inputs(network), **added, controlnet_blocks_repeat=xlabs).sample
                )
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


class TestT2IAdapter:
    """Its features keep the channels of the streams they are added to."""

    @pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
    def test_features_are_those_of_the_dense_one_at_the_channels_that_are_left(
        self, made: Callable[[str], Pruned], kind: str, tmp_path: Path
    ) -> None:
        pruned = made("stable-diffusion")
        widths = list(pruned.network.config.block_out_channels)
        channels = widths if kind == "full_adapter" else widths[:1]
        torch.manual_seed(9)
        adapter = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=8, adapter_type=kind)
        adapter.save_pretrained(tmp_path / "t2i")
        if kind == "light_adapter":  # its last two stages are of one width
            with pytest.raises(GfpruneError, match="another network"):
                gfprune_cli.carry(tmp_path / "t2i", pruned.folder, out=tmp_path / "out")
            return
        found = gfprune_cli.carry(tmp_path / "t2i", pruned.folder, out=tmp_path / "out")
        assert (found.kind, found.layers["total"]) == ("t2i-adapter", len(widths))
        carried = pruned_class("T2IAdapter").from_pretrained(tmp_path / "out")
        picture = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            dense, left = adapter.eval()(picture), carried.eval()(picture)
        streams = ["down_blocks.0.attentions.0.proj_out", "down_blocks.1.resnets.0.conv2"]
        for before, after, stream in zip(dense, left, streams, strict=True):
            assert torch.equal(after, before[:, kept_channels(pruned, stream, "out")])
        network: Any = gfprune_cli.load(pruned.folder)
        source = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
        given = dict(down_intrablock_additional_residuals=list(left))
        assert network(*source, **given).sample.isfinite().all()
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            network(*source, down_intrablock_additional_residuals=list(dense))


def test_a_controlnet_that_is_not_carried_is_refused_with_the_reason(
    made: Callable[[str], Pruned], tmp_path: Path
) -> None:
    network = SanaControlNetModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )
    network.save_pretrained(tmp_path / "sana")
    with pytest.raises(GfpruneError, match="SanaControlNetModel is none of ControlNetModel"):
        gfprune_cli.carry(tmp_path / "sana", made("flux").folder, out=tmp_path / "out")
