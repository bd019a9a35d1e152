"""`--by-block`: one block trains at a time, towards the layers of its dense twin."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers_zoo as zoo
from conftest import TINY
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn
from twins import assert_same

import gfprune_cli
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.progress import Event
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery import command
from gfprune_cli.recovery.by_block import BlockTrainer, largest_part, trained_parts
from gfprune_cli.recovery.losses import FeaturePair, RecoveryLoss
from gfprune_cli.recovery.teacher import layers_left
from gfprune_cli.runtime.processes import Processes
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

PROCESS = noising_process(DDPMScheduler())
ORDER = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out"]


def trainer(steps: int = 14, **settings: Any) -> BlockTrainer:
    """Of a U-Net without a fourth of every group."""
    torch.manual_seed(0)
    dense = UNet2DModel(**TINY).eval()
    groups, _ = discover(dense)
    kept = {group.name: torch.arange(group.units) % 4 > 0 for group in groups}
    student = remove(dense, groups, kept)
    pair = FeaturePair(student, dense.requires_grad_(False), layers_left(dense, groups, kept))
    recipe = FinetuneRecipe(model="m", by_block=True, steps=steps, batch=2, **settings)
    loss = RecoveryLoss(student, dense, PROCESS, recipe, pair, "fp32")
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return BlockTrainer(student, loss, Draws(images, 1000, 0), recipe, Processes(None, torch.device("cpu")))


def never() -> bool:
    return False


def test_blocks_train_in_the_order_in_which_they_run_and_one_at_a_time() -> None:
    made = trainer()
    assert made.blocks == ORDER
    before = {name: weight.clone() for name, weight in made.network.state_dict().items()}
    for step in range(14):
        made.step(step, never)
        block = ORDER[step // 2]
        wanting = {name for name, weight in made.network.named_parameters() if weight.requires_grad}
        assert wanting == {name for name in before if name.startswith(f"{block}.")}
        assert len(made.optimizer.state) <= len(wanting)
        moved = {name for name, weight in made.network.state_dict().items() if not weight.equal(before[name])}
        blocks = tuple(f"{done}." for done in ORDER[: step // 2 + 1])
        assert all(name.startswith(blocks) for name in moved)
        if step > 1:  # conv_in reads the image, and gives what its twin gives as it is
            assert any(name.startswith(f"{block}.") for name in moved)
    made.finish()
    hooks = [
        module._forward_hooks for network in (made.network, made.loss.teacher) for module in network.modules()
    ]
    assert not any(hooks)


def test_every_block_comes_closer_to_its_twin() -> None:
    made = trainer(steps=70)
    found = [made.step(step, never)["features"] for step in range(70)]
    for number in range(1, len(ORDER)):
        mine = found[10 * number : 10 * number + 10]
        assert sum(mine[-3:]) < sum(mine[:3])


def test_rates_of_a_block_warm_up_and_end_at_a_tenth() -> None:
    made = trainer(steps=140, warmup=5, learning_rate=1e-2)
    rates = []
    for step in range(40):
        made.enter(step // 20)
        rates.append(made.rate(step))
    assert rates[:20] == rates[20:]
    assert rates[0] == pytest.approx(2e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[19] < 1.3e-3


@pytest.mark.parametrize("at", [3, 4, 9])
def test_a_stopped_trainer_goes_on_as_if_it_had_not(at: int) -> None:
    """Within a block, and between two."""
    whole, first, second = trainer(), trainer(), trainer()
    for step in range(14):
        whole.step(step, never)
    for step in range(at):
        first.step(step, never)
    second.restore(*first.state())
    for step in range(at, 14):
        second.step(step, never)
    (expected, numbers), (found, others) = whole.state(), second.state()
    assert numbers == others
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_step_for_every_block_is_the_least() -> None:
    with pytest.raises(UsageError, match="--by-block trains 7 blocks, more than --steps 6"):
        trainer(steps=6)


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_blocks_of_every_family_are_found(name: str) -> None:
    """All of a list, each of them smaller than the network."""
    network = zoo.build(name)
    parts = trained_parts(network)
    lists = {
        f"{key}.{number}"
        for key, child in network.named_children()
        if isinstance(child, nn.ModuleList)
        for number in range(len(child))
    }
    assert lists
    assert lists <= parts.keys()
    assert largest_part(network) < sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def pruned(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("by-block") / "pruned"
    settings: Any = dict(images=8, sample_steps=2, draws=4, iterations=1, recover=0)
    gfprune_cli.prune(str(pipeline_folder), out=out, sparsity=0.4, **settings)
    return out


BRIEF: Any = dict(by_block=True, steps=14, batch=2, images=8, sample_steps=2)


def test_a_run_that_stops_goes_on_to_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    done = gfprune_cli.finetune(pruned, out=tmp_path / "whole", sample_every=5, **BRIEF)
    assert len(list((tmp_path / "whole-logs" / "samples").iterdir())) == 3
    assert done.loss["after"] != done.loss["before"]

    def stop(event: Event) -> None:
        if event.phase == "finetune" and event.step == 8:
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, out=tmp_path / "part", progress=stop, **BRIEF)
    gfprune_cli.finetune(pruned, out=tmp_path / "part", resume=True, **BRIEF)
    whole, part = (gfprune_cli.load(tmp_path / name) for name in ("whole", "part"))
    assert_same(whole, part, torch.ones(1, 3, 16, 16), 5)


def test_the_plan_holds_gradients_of_one_block(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[dict[str, float]] = []

    def hear(found: dict[str, float]) -> str:
        held.append(found)
        return ""

    monkeypatch.setattr(command, "memory_text", hear)
    for by_block in (False, True):
        gfprune_cli.finetune(pruned, dry_run=True, **BRIEF | {"by_block": by_block})
    whole, block = held
    assert {kind for kind in whole if block[kind] < whole[kind]} == {"gradients", "moments", "average"}
    assert block["gradients"] == 4 * largest_part(gfprune_cli.load(pruned))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        (dict(lora=2), "--lora"),
        (dict(features=0.1), "--features"),
        (dict(jacobian=0.1), "--jacobian"),
        (dict(min_snr=5.0), "--min-snr"),
        (dict(compile=True), "--compile"),
    ],
)
def test_what_needs_the_whole_network_is_refused(pruned: Path, settings: Any, flag: str) -> None:
    with pytest.raises(UsageError, match=f"drop {flag}|drop {flag.strip('-')}"):
        gfprune_cli.finetune(pruned, **BRIEF | settings)
