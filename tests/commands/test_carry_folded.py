"""A LoRA of the dense network on layers that were folded: beside the two factors it is what it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file

import gfprune_cli
from gfprune_cli.checkpoint.correspondence import Stays
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import BESIDE, FactoredLinear
from gfprune_cli.inputs.examples import example_inputs

FILE = "pytorch_lora_weights.safetensors"
RANK = 3
SETTINGS = dict(fold=0.4, budget="params", images=4, sample_steps=2, size="16x16")
Folded = tuple[Path, Any, Any]  # folder, the dense network, the folded one


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Folded]:
    """Pipelines whose modulation is folded, some of them with channels gone as well, each made once."""
    found: dict[tuple[str, float], Folded] = {}

    def make(family: str, sparsity: float) -> Folded:
        if (family, sparsity) not in found:
            place = tmp_path_factory.mktemp(family)
            dense = FAMILIES[family](place / "dense")
            more = {"recover": 0, "draws": 4} if sparsity else {}
            gfprune_cli.prune(str(dense), sparsity=sparsity, out=place / "out", **SETTINGS, **more)
            found[family, sparsity] = place / "out", gfprune_cli.load(dense), gfprune_cli.load(place / "out")
        return found[family, sparsity]

    return make


def factored_layers(network: Any) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, FactoredLinear)]


def lora_of(dense: Any, names: list[str], *, dora: bool = False) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    found = {}
    for name in names:
        out, into = dense.get_submodule(name).weight.shape
        found[f"{name}.lora_A.weight"] = torch.randn(RANK, into, generator=source) / into**0.5
        found[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=source)
        if dora:
            found[f"{name}.lora_magnitude_vector"] = torch.rand(out, generator=source)
    return found


def carried(adapter: dict[str, torch.Tensor], folder: Path, place: Path) -> tuple[Any, dict[str, Any]]:
    save_file({f"transformer.{name}": value for name, value in adapter.items()}, place / "style.safetensors")
    done = gfprune_cli.carry(place / "style.safetensors", folder, out=place / "carried")
    return done, load_file(place / "carried" / FILE)


def output_of(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(**example_inputs(network)).sample
    return found


@pytest.mark.parametrize(
    ("family", "sparsity"), [("flux", 0.0), pytest.param("sd3", 0.3, marks=pytest.mark.slow)]
)
def test_it_adds_what_it_added(
    folded: Callable[[str, float], Folded], family: str, sparsity: float, tmp_path: Path
) -> None:
    """Each folded layer gives its output and B (A x), at the rows and columns left; unloaded, as before."""
    folder, dense, _ = folded(family, sparsity)
    network: Any = gfprune_cli.load(folder)
    names, before = factored_layers(network), output_of(network)
    adapter = lora_of(dense, names)
    done, tensors = carried(adapter, folder, tmp_path)
    assert done.layers["total"] == len(names) > 2
    assert done.layers["dropped"] == 0
    layers = json.loads((folder / "gfprune.json").read_text())["map"]["layers"]

    def left(name: str, side: str, size: int) -> list[int]:
        said = layers.get(name, {}).get(side)
        return list(range(size)) if said is None else list(Stays.parse(said).indices)

    hooks = []
    for name in names:
        down, up = adapter[f"{name}.lora_A.weight"], adapter[f"{name}.lora_B.weight"]
        down = down[:, left(f"{name}.0", "in", down.shape[1])]
        up = up[left(f"{name}.1", "out", up.shape[0])]
        hook = lambda layer, args, output, down=down, up=up: output + args[0] @ down.T @ up.T  # noqa: E731
        hooks.append(network.get_submodule(name).register_forward_hook(hook))
    wanted = output_of(network)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(wanted, before, rtol=1e-2)
    network.load_lora_adapter(tensors, prefix="transformer", adapter_name="style")
    torch.testing.assert_close(output_of(network), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    with pytest.raises(ValueError, match="cannot be fused into layers that are two factors"):
        network.fuse_lora()
    network.load_lora_adapter(tensors, prefix="transformer", adapter_name="again")
    network.delete_adapters("again")
    network.unload_lora()
    assert torch.equal(output_of(network), before)
    assert network.state_dict().keys() == gfprune_cli.load(folder).state_dict().keys()


def test_a_pipeline_of_flux_loads_it_twice(folded: Callable[[str, float], Folded], tmp_path: Path) -> None:
    """diffusers looks at sizes before it loads, and finds none of what lies beside factors."""
    from diffusers import FluxPipeline

    folder, dense, network = folded("flux", 0.0)
    names = factored_layers(network)
    carried(lora_of(dense, names), folder, tmp_path)
    network = gfprune_cli.load(folder)
    pipeline = FluxPipeline(
        scheduler=None, vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=network,
    )  # fmt: skip
    for name in ("one", "two"):
        pipeline.load_lora_weights(tmp_path / "carried", adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.5, 0.5])
    once = gfprune_cli.load(folder)
    once.load_lora_adapter(load_file(tmp_path / "carried" / FILE), prefix="transformer")
    torch.testing.assert_close(output_of(network), output_of(once), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(folded: Callable[[str, float], Folded]) -> None:
    """A LoRA of the dense layer, and one for a place beside factors where there are none."""
    folder, dense, _ = folded("flux", 0.0)
    network: Any = gfprune_cli.load(folder)
    name = factored_layers(network)[0]
    whole = next(name for name, _ in dense.named_modules() if name.endswith("to_q"))
    beside = {
        key.replace(whole, f"{whole}.{BESIDE}"): tensor for key, tensor in lora_of(dense, [whole]).items()
    }
    for adapter in (lora_of(dense, [name]), beside):
        with pytest.raises(ValueError, match=r"two factors.*gfprune carry"):
            network.load_lora_adapter(adapter, prefix=None)


def test_dora_of_folded_layers_is_dropped_and_counted(
    folded: Callable[[str, float], Folded], tmp_path: Path
) -> None:
    """It scales the rows of a weight that is not there; what sits on other layers is carried."""
    folder, dense, network = folded("flux", 0.0)
    names = factored_layers(network)[:2]
    other = next(name for name, _ in dense.named_modules() if name.endswith("to_q"))
    done, tensors = carried(lora_of(dense, [*names, other], dora=True), folder, tmp_path)
    assert set(done.dropped) == set(names)
    assert done.layers["dropped"] == 2
    assert {name.partition(".lora_")[0] for name in tensors} == {f"transformer.{other}"}
