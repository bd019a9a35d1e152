"""Commands on a device that is not the main memory, where there is none: nothing mixes the two.

pytest tests/reliability/test_devices.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_zoo
from diffusers import DDIMScheduler
from second_device import CARD, SecondDevice

import gfprune_cli
from gfprune_cli.families.family import Sizes
from gfprune_cli.progress import silent
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.timing.measure import measured_table
from gfprune_cli.timing.runtimes import Bench

SMALL: dict[str, Any] = dict(images=8, sample_steps=2, draws=8, recover=2, device=str(CARD))


MIXES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a layer": lambda card, host: torch.nn.functional.linear(card, host.expand(2, 3)),
    "an index": lambda card, host: host[card.long()],
    "a list": lambda card, host: torch.cat([card, host]),
    "numpy": lambda card, _: (card * 2).numpy(),
    "a generator": lambda card, _: torch.randn(3, device=card.device, generator=torch.Generator()),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_the_watch_sees_a_mix(mix: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    with SecondDevice():
        card, host = torch.ones(3, device=CARD), torch.ones(3)
        with pytest.raises((RuntimeError, TypeError), match="card"):
            mix(card, host)


def test_the_watch_lets_pass_what_cuda_does() -> None:
    with SecondDevice():
        card, host = torch.ones(3, device=CARD), torch.arange(3)
        assert (card + host[0]).device == CARD
        assert card[host].device == CARD
        assert card.copy_(host).device == CARD
        assert card.cpu().device == torch.device("cpu")
        assert host.to(card).device == CARD
        torch.nn.Linear(3, 2).to(CARD)(card)


RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "the flow": dict(criterion="gradient-flow", bound=0.5, recover=0),
    "several": dict(sparsity=[0.3, 0.5], recover=0),
    "a limit": dict(keep_loss=1.5, recover=0, refit=False),
}
LONGER = {"several": pytest.mark.thorough}  # a limit makes several networks, too


@pytest.mark.parametrize(
    "settings",
    [pytest.param(RUNS[name], id=name, marks=LONGER.get(name, ())) for name in RUNS],
)
def test_prune(settings: dict[str, Any], smallest_folder: Path, tmp_path: Path) -> None:
    with SecondDevice():
        gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", **SMALL | settings)


def test_prune_a_transformer(tmp_path: Path) -> None:
    transformers_zoo.build("dit", dtype=torch.float32).save_pretrained(tmp_path / "transformer")
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with SecondDevice():
        gfprune_cli.prune(str(tmp_path / "transformer"), out=tmp_path / "out", **SMALL | dict(sparsity=0.2))


def test_times_in_half_precision(smallest_folder: Path) -> None:
    """Layers and whole networks; the structure that tells which layers run is in float32."""
    network = gfprune_cli.load(smallest_folder)
    cost = CostModel(network, *discover(network))
    with SecondDevice():
        table = measured_table(network, cost, Bench("eager", CARD, "bf16", 2, Sizes()), silent)
    assert table.ms[0] > 0


@pytest.fixture(scope="module")
def pruned(smallest_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("devices") / "pruned"
    gfprune_cli.prune(str(smallest_folder), out=out, **SMALL | {"device": "cpu"})
    return out


TRAININGS: dict[str, dict[str, Any]] = {
    "default": dict(save_every=2, sample_every=2),
    "adapters": dict(lora=4, optimizer="adafactor", ema=0.0, teacher_precision="bf16"),
    "more losses": dict(features=0.1, jacobian=0.1, micro_batch=2),
}


@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS.keys())
def test_finetune(settings: dict[str, Any], pruned: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = dict(steps=3, batch=4, images=8, sample_steps=2, save_every=0, sample_every=0)
    with SecondDevice():
        gfprune_cli.finetune(pruned, out=tmp_path / "out", device=str(CARD), **common | settings)


def test_evaluate_and_analyze(pruned: Path, smallest_folder: Path, tmp_path: Path) -> None:
    with SecondDevice():
        gfprune_cli.evaluate(pruned, out=tmp_path / "eval", samples=4, device=str(CARD))
        gfprune_cli.analyze(str(smallest_folder), sensitivity=True, device=str(CARD))
