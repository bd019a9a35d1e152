"""Adapters of the dense network on the pruned one: fused, then removed, is removed, then carried."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, FluxPipeline, StableDiffusionPipeline
from pruned_folders import Pruned
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import gfprune_cli
from gfprune_cli.carrying.target import find_target
from gfprune_cli.checkpoint.correspondence import Stays
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import receivers
from gfprune_cli.cli.main import app
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.progress import silent
from gfprune_cli.pruning.units import find_units
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.structure.removal import remove

Tensors = dict[str, torch.Tensor]
RANK = 3
FILE = "pytorch_lora_weights.safetensors"
CASES = {
    "stable-diffusion": {},
    "sdxl": dict(blocks=True),
    "sd3": dict(width=True),
    "flux": dict(blocks=True),
    "wan": {},
}

XLABS = {
    "image_proj.": "ip_adapter_proj_model.",
    "ip_adapter.": "double_blocks.",
    "to_k_ip": "processor.ip_adapter_double_stream_k_proj",
    "to_v_ip": "processor.ip_adapter_double_stream_v_proj",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pruned]:
    """Pruned pipelines by family, each made once."""
    return cache(lambda family: Pruned(family, tmp_path_factory.mktemp(family), **CASES[family]))


def layers_of(network: nn.Module) -> dict[str, Any]:
    """Linear layers and convolutions that a LoRA can sit on."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1
    }


def lora(network: nn.Module, *, dora: bool = False) -> Tensors:
    """A random LoRA on every layer, without the name of a component."""
    source = torch.Generator().manual_seed(1)
    found = {}
    for name, layer in layers_of(network).items():
        out, into, *kernel = layer.weight.shape
        found[f"{name}.lora_A.weight"] = torch.randn(RANK, into, *kernel, generator=source) / into
        found[f"{name}.lora_B.weight"] = torch.randn(out, RANK, *[1] * len(kernel), generator=source)
        if dora:
            lengths = torch.rand(out, generator=source) + 0.5
            found[f"{name}.lora_magnitude_vector"] = lengths.view(1, -1, 1, 1) if kernel else lengths
    return found


def fused(network: nn.Module, adapter: Tensors, scale: float = 1.0) -> nn.Module:
    """W + scale B A in the place of W; with DoRA, its rows at the lengths that the adapter gives them."""
    layers = layers_of(network)
    for name in {key.partition(".lora_")[0] for key in adapter}:
        weight, down, up = (
            layers[name].weight.data,
            adapter[f"{name}.lora_A.weight"],
            adapter[f"{name}.lora_B.weight"],
        )
        new = weight.flatten(1) + scale * up.flatten(1) @ down.flatten(1)
        lengths = adapter.get(f"{name}.lora_magnitude_vector")
        if lengths is not None:
            new *= (lengths.flatten() / new.norm(dim=1)).unsqueeze(1)
        weight.copy_(new.view_as(weight))
    return network


def stored(path: Path, adapter: Tensors, prefix: str) -> Path:
    """An adapter as diffusers stores it."""
    save_file({f"{prefix}.{name}": value.clone() for name, value in adapter.items()}, path)
    return path


def carried(path: Path, pruned: Pruned, out: Path, **settings: Any) -> Tensors:
    """What `carry` makes of an adapter, without the name of the component."""
    gfprune_cli.carry(path, pruned.folder, out=out, **settings)
    begin = f"{pruned.component.name}."
    return {name.removeprefix(begin): value for name, value in load_file(out / FILE).items()}


def check_equal(pruned: Pruned, before: nn.Module, after: Tensors) -> None:
    """(fused, then removed) is (removed, then carried), to rounding."""
    wanted = remove(before, pruned.groups, pruned.kept).state_dict()
    found = fused(gfprune_cli.load(pruned.folder), after).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6 * max(1, float(tensor.abs().max()))
        )


@pytest.mark.matrix(3)
@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fused_then_removed_is_removed_then_carried(
    made: Callable[[str], Pruned], family: str, dora: bool, tmp_path: Path
) -> None:
    pruned = made(family)
    adapter = lora(pruned.network, dora=dora)
    path = stored(tmp_path / "style.safetensors", adapter, pruned.component.name)
    check_equal(pruned, fused(pruned.load(), adapter), carried(path, pruned, tmp_path / "out"))


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_loads_what_was_carried(
    made: Callable[[str], Pruned], family: str, dora: bool, tmp_path: Path
) -> None:
    """Through diffusers' own loader: the network computes what the fused and pruned one computes."""
    pytest.importorskip("peft")
    pruned = made(family)
    adapter = lora(pruned.network, dora=dora)
    path = stored(tmp_path / "style.safetensors", adapter, pruned.component.name)
    gfprune_cli.carry(path, pruned.folder, out=tmp_path / "out")
    network: Any = gfprune_cli.load(pruned.folder)
    network.load_lora_adapter(load_file(tmp_path / "out" / FILE), prefix=pruned.component.name)
    wanted = remove(fused(pruned.load(), adapter), pruned.groups, pruned.kept)
    given = example_inputs(wanted)
    with torch.no_grad():
        found, expected = network(**given).sample, wanted(**given).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_scales_by_block_of_a_carried_lora(made: Callable[[str], Pruned], tmp_path: Path) -> None:
    """`set_adapters` of the pipeline: each part of the network with its own share of the LoRA."""
    pytest.importorskip("peft")
    pruned = made("stable-diffusion")
    adapter = {name: value for name, value in lora(pruned.network).items() if ".attn1.to_q." in name}
    path = stored(tmp_path / "style.safetensors", adapter, "unet")
    after = carried(path, pruned, tmp_path / "out")
    network: Any = gfprune_cli.load(pruned.folder)
    pipeline = StableDiffusionPipeline.from_pretrained(pruned.dense, unet=network)
    pipeline.load_lora_weights(tmp_path / "out", adapter_name="style")
    scales = {"down": 0.5, "mid": 0.0, "up": {"block_1": [1.0, 2.0]}}
    pipeline.set_adapters("style", {"unet": scales})
    wanted: Any = gfprune_cli.load(pruned.folder)
    shares = {
        "down_blocks": 0.5,
        "mid_block": 0.0,
        "up_blocks.1.attentions.0": 1.0,
        "up_blocks.1.attentions.1": 2.0,
    }
    for begin, share in shares.items():
        part = {name: value for name, value in after.items() if name.startswith(begin)}
        assert part
        fused(wanted, part, share)
    given = example_inputs(wanted)
    with torch.no_grad():
        found, expected = network(**given).sample, wanted(**given).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_layers_of_blocks_that_are_gone_are_dropped_and_counted(
    made: Callable[[str], Pruned], tmp_path: Path
) -> None:
    pruned = made("flux")
    adapter = {name: value for name, value in lora(pruned.network).items() if "transformer_blocks.0." in name}
    adapter |= {name.replace("blocks.0", "blocks.1"): value for name, value in adapter.items()}
    path = stored(tmp_path / "style.safetensors", adapter, "transformer")
    found = gfprune_cli.carry(path, pruned.folder, out=tmp_path / "out")
    total = len(adapter) // 2
    assert found.layers["total"] == total
    assert found.layers["dropped"] == found.layers["moved"] == total // 2
    assert set(found.dropped) == {name.partition(".lora_")[0] for name in adapter if "blocks.0." in name}
    names = {name.split(".")[2] for name in load_file(tmp_path / "out" / FILE)}
    assert names == {"0"}


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_dense_network_is_known_without_its_checkpoint(family: str, tmp_path: Path) -> None:
    """Its layers by name and order, those of blocks that are gone, too: by these, adapters are read."""
    pruned = Pruned(family, tmp_path, blocks=True)
    recipe = CarryRecipe(adapter="none", model=str(pruned.folder))
    target = find_target(recipe, RunOptions(offline=True), silent)
    assert target.map.gone
    assert list(target.dense_network.state_dict()) == list(pruned.network.state_dict())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_names_of_kohya_and_alphas(made: Callable[[str], Pruned], dora: bool, tmp_path: Path) -> None:
    """alpha / rank of each layer, convolutions too, goes into the product; the text encoder's part stays."""
    pruned = made("stable-diffusion")
    adapter = lora(pruned.network, dora=dora)
    assert any(value.ndim == 4 and value.shape[-1] > 1 for value in adapter.values())
    spelled: Tensors = {}
    for name in {key.partition(".lora_")[0] for key in adapter}:
        stem = "lora_unet_" + name.replace(".", "_")
        spelled[f"{stem}.lora_down.weight"] = adapter[f"{name}.lora_A.weight"]
        spelled[f"{stem}.lora_up.weight"] = adapter[f"{name}.lora_B.weight"]
        spelled[f"{stem}.alpha"] = torch.tensor(2 * RANK * 1.0)
        if dora:
            spelled[f"{stem}.dora_scale"] = adapter[f"{name}.lora_magnitude_vector"]
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    down, up = torch.randn(RANK, 32), torch.randn(32, RANK)
    spelled |= {
        f"{text}.lora_down.weight": down,
        f"{text}.lora_up.weight": up,
        f"{text}.alpha": torch.tensor(1.5),
    }
    save_file({name: value.contiguous() for name, value in spelled.items()}, tmp_path / "kohya.safetensors")
    found = carried(tmp_path / "kohya.safetensors", pruned, tmp_path / "out")
    begin = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    assert torch.equal(found.pop(f"{begin}.down.weight"), down)
    assert torch.allclose(found.pop(f"{begin}.up.weight"), up * 1.5 / RANK)
    check_equal(pruned, fused(pruned.load(), adapter, 2.0), found)


def test_names_that_diffusers_converts(made: Callable[[str], Pruned], tmp_path: Path) -> None:
    """A LoRA of Flux as kohya's trainer names it: one product for queries, keys and values."""
    pruned = made("flux")
    width = pruned.network.config.num_attention_heads * pruned.network.config.attention_head_dim
    down, up = torch.randn(RANK, width), torch.randn(3 * width, RANK)
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    given = {
        f"{stem}.lora_down.weight": down,
        f"{stem}.lora_up.weight": up,
        f"{stem}.alpha": torch.tensor(1.0),
    }
    save_file(given, tmp_path / "kohya.safetensors")
    adapter = {}
    for index, leaf in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer_blocks.1.attn.{leaf}"
        adapter[f"{name}.lora_A.weight"] = down
        adapter[f"{name}.lora_B.weight"] = up[index * width : (index + 1) * width] / RANK
    check_equal(
        pruned,
        fused(pruned.load(), adapter),
        carried(tmp_path / "kohya.safetensors", pruned, tmp_path / "out"),
    )


@pytest.mark.parametrize("settings", [{"lora_alpha": 6}, {"lora_alpha": 1, "alpha_pattern": {"to_q": 6}}])
def test_alphas_of_peft(made: Callable[[str], Pruned], settings: dict[str, Any], tmp_path: Path) -> None:
    """The configuration beside the tensors, in both ways in which it is written."""
    pruned = made("stable-diffusion")
    adapter = {name: value for name, value in lora(pruned.network).items() if ".to_q." in name}
    text = json.dumps({f"unet.{key}": value for key, value in settings.items()})
    tensors = {f"unet.{name}": value for name, value in adapter.items()}
    save_file(tensors, tmp_path / "one.safetensors", metadata={"lora_adapter_metadata": text})
    folder = tmp_path / "peft"
    folder.mkdir()
    stored(folder / "adapter_model.safetensors", adapter, "base_model.model")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    before = fused(pruned.load(), adapter, 6 / RANK)
    for index, path in enumerate((tmp_path / "one.safetensors", folder)):
        check_equal(pruned, before, carried(path, pruned, tmp_path / f"out-{index}"))


def test_a_record_without_a_map_is_read_with_the_dense_model(
    made: Callable[[str], Pruned], tmp_path: Path
) -> None:
    pruned = made("flux")
    path = stored(tmp_path / "style.safetensors", lora(pruned.network), "transformer")
    wanted = carried(path, pruned, tmp_path / "with")
    record = pruned.folder / "gfprune.json"
    text = record.read_text()
    try:
        document = json.loads(text)
        del document["map"]
        record.write_text(json.dumps(document))
        found = carried(path, pruned, tmp_path / "without")
    finally:
        record.write_text(text)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("family", CASES)
def test_the_map_says_what_each_weight_was(made: Callable[[str], Pruned], family: str) -> None:
    """Read as docs/checkpoint-format.md shows it."""
    document = json.loads((made(family).folder / "gfprune.json").read_text())["map"]

    def indices(text: str) -> list[int]:
        ranges = [part.split("-") for part in text.partition(" of ")[0].split(",")]
        return [index for part in ranges for index in range(int(part[0]), int(part[-1]) + 1)]

    def before(name: str) -> str:
        block = next((block for block in document["blocks"] if name.startswith(f"{block}.")), "")
        return document["blocks"].get(block, "") + name.removeprefix(block)

    dense, pruned = made(family).load().state_dict(), gfprune_cli.load(made(family).folder).state_dict()
    for name, tensor in pruned.items():
        layer, _, leaf = name.rpartition(".")
        alone = name in document["layers"]  # a parameter of its own, cut in its last dimension
        entry = document["layers"].get(name if alone else layer, {})
        was = entry.get("was", before(name if alone else layer))
        old = dense[was if alone else f"{was}.{leaf}".removeprefix(".")]
        if "out" in entry:
            old = old.index_select(-1 if alone else 0, torch.tensor(indices(entry["out"])))
        if "in" in entry and old.ndim > 1:
            old = old.index_select(1, torch.tensor(indices(entry["in"])))
        assert torch.equal(tensor, old * entry.get("scale", 1)), name
    gone = {block.rpartition(".")[0] for block in document["gone"]}
    assert bool(gone) == ("blocks" in CASES[family])


class TestRefused:
    """In one line that says what to do."""

    def carry(self, tensors: Tensors, pruned: Pruned, tmp_path: Path) -> None:
        save_file(tensors, tmp_path / "a.safetensors")
        gfprune_cli.carry(tmp_path / "a.safetensors", pruned.folder, out=tmp_path / "out")

    def test_products_that_do_not_slice(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        with pytest.raises(GfpruneError, match="fuse it into the dense model and prune that"):
            self.carry({"lora_unet_a.lokr_w1": torch.ones(2, 2)}, made("flux"), tmp_path)

    def test_another_network(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        adapter = {
            "transformer.foo.lora_A.weight": torch.ones(2, 2),
            "transformer.foo.lora_B.weight": torch.ones(2, 2),
        }
        with pytest.raises(GfpruneError, match="has none of that name"):
            self.carry(adapter, made("flux"), tmp_path)

    def test_one_that_was_carried_before(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        pruned = made("stable-diffusion")
        adapter = lora(gfprune_cli.load(pruned.folder))
        with pytest.raises(GfpruneError, match="was the adapter made for the pruned one"):
            self.carry({f"unet.{name}": value for name, value in adapter.items()}, pruned, tmp_path)

    def test_one_of_which_nothing_is_left(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        pruned = made("flux")
        adapter = {
            key: value
            for key, value in lora(pruned.network).items()
            if key.startswith("transformer_blocks.0.")
        }
        with pytest.raises(GfpruneError, match="nothing to carry over"):
            self.carry({f"transformer.{name}": value for name, value in adapter.items()}, pruned, tmp_path)

    def test_a_model_that_was_not_pruned(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        save_file({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
        with pytest.raises(UsageError, match="was not pruned"):
            gfprune_cli.carry(tmp_path / "a.safetensors", "demo", out=tmp_path / "out")

    def test_a_pickle(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="reads no pickle"):
            gfprune_cli.carry(tmp_path / "a.bin", "demo", out=tmp_path / "out")

    def test_a_damaged_map(self, made: Callable[[str], Pruned], tmp_path: Path) -> None:
        pruned = made("stable-diffusion")
        record = pruned.folder / "gfprune.json"
        text = record.read_text()
        try:
            document = json.loads(text)
            next(iter(document["map"]["layers"].values()))["out"] = "5-3 of 8"
            record.write_text(json.dumps(document))
            with pytest.raises(GfpruneError, match="damaged: map"):
                self.carry({"unet.a.lora_A.weight": torch.ones(2, 2)}, pruned, tmp_path)
        finally:
            record.write_text(text)


class TestImagePrompts:
    """IP-Adapters: keys and values of heads that are left, for layers numbered anew."""

    @pytest.fixture(scope="class")
    def pruned(self, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
        """A U-Net whose attention to the prompt alone lost heads."""
        return Pruned("stable-diffusion", tmp_path_factory.mktemp("heads"), only="attn2.to_v")

    def adapter(self, network: Any) -> Tensors:
        source = torch.Generator().manual_seed(2)
        sizes = {"image_proj.proj.weight": (4 * 32, 12), "image_proj.proj.bias": (4 * 32,)}
        sizes |= {f"image_proj.norm.{leaf}": (32,) for leaf in ("weight", "bias")}
        names = [name.removesuffix(".processor") for name in network.attn_processors if "attn2" in name]
        for index, name in enumerate(names):
            layer = network.get_submodule(name).to_k
            sizes |= {f"ip_adapter.{2 * index + 1}.to_{leaf}_ip.weight": layer.weight.shape for leaf in "kv"}
        return {name: torch.randn(size, generator=source) for name, size in sizes.items()}

    def output(self, network: Any, adapter: Tensors) -> torch.Tensor:
        """What the network makes of noise, text and an image."""
        parts: dict[str, Tensors] = {"image_proj": {}, "ip_adapter": {}}
        for name, value in adapter.items():
            part, _, leaf = name.partition(".")
            parts[part][leaf] = value
        network._load_ip_adapter_weights([parts])
        source = torch.Generator().manual_seed(3)
        sample, text = torch.randn(1, 4, 8, 8, generator=source), torch.randn(1, 7, 32, generator=source)
        image = {"image_embeds": [torch.randn(1, 1, 12, generator=source)]}
        with torch.no_grad():
            found: torch.Tensor = network(sample, torch.tensor([5]), text, added_cond_kwargs=image).sample
        return found

    def test_the_pruned_network_computes_what_the_dense_one_does_without_the_heads(
        self, pruned: Pruned, tmp_path: Path
    ) -> None:
        dense, adapter = pruned.load(), self.adapter(pruned.load())
        for group in pruned.groups:
            gone = ~pruned.kept[group.name].repeat_interleave(group.unit_size)
            if "attn2.to_v" in group.name:
                readers = dense.get_submodule(group.name.replace("to_v", "to_out.0"))
                readers.weight[:, gone] = 0
        save_file(adapter, tmp_path / "ip.safetensors")
        found = gfprune_cli.carry(tmp_path / "ip.safetensors", pruned.folder, out=tmp_path / "out")
        assert (found.kind, found.layers["narrowed"]) == ("ip-adapter", found.layers["total"])
        carried = load_file(tmp_path / "out" / "ip_adapter.safetensors")
        left = self.output(gfprune_cli.load(pruned.folder), carried)
        wanted = self.output(dense, adapter)
        torch.testing.assert_close(left, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))

    def test_one_of_the_dense_network_is_refused(self, pruned: Pruned) -> None:
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            self.output(gfprune_cli.load(pruned.folder), self.adapter(pruned.load()))

    def test_layers_are_numbered_anew_where_blocks_are_gone(
        self, made: Callable[[str], Pruned], tmp_path: Path
    ) -> None:
        pruned = made("sdxl")
        adapter = self.adapter(pruned.load())
        save_file(adapter, tmp_path / "ip.safetensors")
        found = gfprune_cli.carry(tmp_path / "ip.safetensors", pruned.folder, out=tmp_path / "out")
        assert 0 < found.layers["dropped"] < found.layers["total"]
        carried = load_file(tmp_path / "out" / "ip_adapter.safetensors")
        numbers = sorted({int(name.split(".")[1]) for name in carried if name.startswith("ip_adapter")})
        assert numbers == list(range(1, 2 * len(numbers), 2))
        network: Any = gfprune_cli.load(pruned.folder)
        rows = [
            network.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for name in network.attn_processors
            if "attn2" in name
        ]
        assert rows == [carried[f"ip_adapter.{number}.to_k_ip.weight"].shape[0] for number in numbers]


class TestImagePromptsOfFlux:
    """What heads make of the image goes to the stream as it is: to the channels that the heads had."""

    @pytest.fixture(scope="class")
    def pruned(self, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
        """Attention with fewer heads, and the stream as wide as before."""
        return Pruned("flux", tmp_path_factory.mktemp("heads"), only="attn")

    def adapter(self, network: Any) -> Tensors:
        """In diffusers' names."""
        source = torch.Generator().manual_seed(2)
        sizes = {"image_proj.proj.weight": (4 * 32, 12), "image_proj.proj.bias": (4 * 32,)}
        sizes |= {f"image_proj.norm.{leaf}": (32,) for leaf in ("weight", "bias")}
        for number in range(len(network.transformer_blocks)):
            for leaf in ("to_k_ip", "to_v_ip"):
                sizes[f"ip_adapter.{number}.{leaf}.weight"] = (network.inner_dim, 32)
                sizes[f"ip_adapter.{number}.{leaf}.bias"] = (network.inner_dim,)
        return {name: torch.randn(size, generator=source) for name, size in sizes.items()}

    def stored(self, path: Path, adapter: Tensors, *, xlabs: bool) -> Path:
        spelled = {}
        for name, value in adapter.items():
            for own, theirs in XLABS.items() if xlabs else ():
                name = name.replace(own, theirs)
            spelled[name] = value
        save_file(spelled, path)
        return path

    def output(self, network: Any, folder: Path, file: str, pruned: Pruned) -> torch.Tensor:
        """What the network makes of noise and an image, with an adapter that the pipeline loads."""
        pipeline = FluxPipeline.from_pretrained(pruned.dense, transformer=network)
        pipeline.load_ip_adapter(folder, weight_name=file, image_encoder_pretrained_model_name_or_path=None)
        given = example_inputs(network)
        batch = len(given["hidden_states"])
        image = [torch.randn(batch, 1, 12, generator=torch.Generator().manual_seed(3))]
        with torch.no_grad():
            found: torch.Tensor = network(
                **given, joint_attention_kwargs={"ip_adapter_image_embeds": image}
            ).sample
        return found

    @pytest.mark.parametrize("xlabs", [False, True], ids=["diffusers", "xlabs"])
    def test_the_pruned_network_computes_what_the_dense_one_does_without_the_heads(
        self, pruned: Pruned, xlabs: bool, tmp_path: Path
    ) -> None:
        dense, adapter = pruned.load(), self.adapter(pruned.load())
        path = self.stored(tmp_path / "ip.safetensors", adapter, xlabs=xlabs)
        found = gfprune_cli.carry(path, pruned.folder, out=tmp_path / "out")
        assert (found.kind, found.layers["narrowed"]) == ("ip-adapter", found.layers["total"])
        layers = json.loads((pruned.folder / "gfprune.json").read_text())["map"]["layers"]
        for name, entry in layers.items():
            if "out" in entry and name.endswith(".to_v"):
                gone = torch.ones(dense.inner_dim, dtype=torch.bool)
                gone[list(Stays.parse(entry["out"]).indices)] = False
                block, attention = name.split(".")[1], name.removesuffix(".to_v")
                if name.startswith("single"):
                    readers = dense.get_submodule(attention.removesuffix(".attn")).proj_out.weight
                    readers[:, : len(gone)][:, gone] = 0
                    continue
                for leaf in ("to_out.0", "to_add_out"):
                    dense.get_submodule(f"{attention}.{leaf}").weight[:, gone] = 0
                for leaf in ("weight", "bias"):
                    adapter[f"ip_adapter.{block}.to_v_ip.{leaf}"][gone] = 0
        self.stored(tmp_path / "without.safetensors", adapter, xlabs=xlabs)
        wanted = self.output(dense, tmp_path, "without.safetensors", pruned)
        left = self.output(
            gfprune_cli.load(pruned.folder), tmp_path / "out", "ip_adapter.safetensors", pruned
        )
        torch.testing.assert_close(left, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))

    def test_layers_are_numbered_anew_where_blocks_are_gone(
        self, made: Callable[[str], Pruned], tmp_path: Path
    ) -> None:
        pruned = made("flux")
        path = self.stored(tmp_path / "ip.safetensors", self.adapter(pruned.load()), xlabs=True)
        found = gfprune_cli.carry(path, pruned.folder, out=tmp_path / "out")
        assert (found.layers["total"], found.layers["dropped"], found.layers["moved"]) == (2, 1, 1)
        network = gfprune_cli.load(pruned.folder)
        assert self.output(network, tmp_path / "out", "ip_adapter.safetensors", pruned).isfinite().all()

    def test_a_stream_that_became_narrower_gets_its_own_channels(self, tmp_path: Path) -> None:
        pruned = Pruned("flux", tmp_path / "narrow", width=True)
        adapter = self.adapter(pruned.load())
        path = self.stored(tmp_path / "ip.safetensors", adapter, xlabs=False)
        gfprune_cli.carry(path, pruned.folder, out=tmp_path / "out")
        layers = json.loads((pruned.folder / "gfprune.json").read_text())["map"]["layers"]
        carried = load_file(tmp_path / "out" / "ip_adapter.safetensors")
        heads, stream = (
            Stays.parse(layers[f"transformer_blocks.0.attn.{leaf}"]["out"]).indices
            for leaf in ("to_v", "to_out.0")
        )
        wanted = [heads.index(channel) if channel in heads else len(heads) for channel in stream]
        assert carried["ip_adapter.0.places"].tolist() == wanted
        network = gfprune_cli.load(pruned.folder)
        assert self.output(network, tmp_path / "out", "ip_adapter.safetensors", pruned).isfinite().all()

    def test_one_of_the_dense_network_is_refused(self, pruned: Pruned, tmp_path: Path) -> None:
        self.stored(tmp_path / "ip.safetensors", self.adapter(pruned.load()), xlabs=True)
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            self.output(gfprune_cli.load(pruned.folder), tmp_path, "ip.safetensors", pruned)


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_kept_interfaces_take_adapters_of_the_dense_network(family: str, tmp_path: Path) -> None:
    """ControlNets and T2I adapters find their streams, IP-Adapters their heads, as they were."""
    pruned = Pruned(family, tmp_path, interfaces=True)
    network: Any = gfprune_cli.load(pruned.folder)
    dense = pruned.load()
    assert 0 < len(pruned.groups) < len(find_units(pruned.component, silent, width=False, blocks=False)[1])
    assert sum(map(torch.numel, network.parameters())) < sum(map(torch.numel, dense.parameters()))
    for _, name in receivers(dense):
        assert network.get_submodule(name).to_k.out_features == dense.get_submodule(name).to_k.out_features
    if family == "stable-diffusion":
        source = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 7, 32)
        controlnet = ControlNetModel.from_unet(dense)
        down, middle = controlnet(*source, torch.randn(1, 3, 64, 64), return_dict=False)
        added = dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
        assert network(*source, **added).sample.isfinite().all()


def test_kept_interfaces_exclude_blocks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep-interfaces keeps what --blocks takes away"):
        gfprune_cli.prune("demo", keep_interfaces=True, blocks=True, out=tmp_path / "out", dry_run=True)


class TestThePrunedClassRefuses:
    """What does not fit, in a line that names the command, and stays as it was."""

    def test_a_lora_of_the_dense_network(self, made: Callable[[str], Pruned]) -> None:
        for family in ("stable-diffusion", "flux"):
            pruned = made(family)
            network = gfprune_cli.load(pruned.folder)
            with pytest.raises(ValueError, match="gfprune carry --adapter"):
                network.load_lora_adapter(lora(pruned.network), prefix=None)

    def test_one_that_flux_would_widen_layers_for(self, made: Callable[[str], Pruned]) -> None:
        pruned = made("flux")
        network: Any = gfprune_cli.load(pruned.folder)
        before = {name: value.shape for name, value in network.state_dict().items()}
        adapter = {f"transformer.{name}": value for name, value in lora(pruned.network).items()}
        with pytest.raises(ValueError, match="gfprune carry --adapter"):
            FluxPipeline._maybe_expand_transformer_param_shape_or_error_(network, adapter)
        assert {name: value.shape for name, value in network.state_dict().items()} == before


def test_the_command(made: Callable[[str], Pruned], tmp_path: Path) -> None:
    """One JSON document; a dry run writes nothing; what stands there stays without --force."""
    pruned = made("stable-diffusion")
    path = stored(tmp_path / "style.safetensors", lora(pruned.network), "unet")
    out = tmp_path / "out"
    ask = ["carry", "--adapter", str(path), "--model", str(pruned.folder), "--out", str(out), "-q", "--json"]
    planned = json.loads(CliRunner().invoke(app, [*ask, "--dry-run"]).stdout)
    assert planned["output"] is None
    assert not out.exists()
    written = json.loads(CliRunner().invoke(app, ask).stdout)
    assert written["layers"] == planned["layers"]
    assert written["bytes"]["after"] < written["bytes"]["before"]
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    assert first.keys() == {FILE, "README.md", "gfprune.json"}
    again = CliRunner().invoke(app, ask)
    assert (again.exit_code, "--force" in again.stderr) == (2, True)
    assert CliRunner().invoke(app, [*ask, "--force"]).exit_code == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == first
