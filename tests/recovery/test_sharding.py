"""Networks in pieces: several processes train what one does, stop together, go on from what they saved."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Outcome, Server
from pipelines import FAMILIES
from pruned_folders import Pruned
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.sharded_state import file_numbers
from gfprune_cli.recovery.sharded_trainer import ShardedTrainer
from gfprune_cli.recovery.sharding import check_sharded, gathered, load_sharded, shard, stand_in
from gfprune_cli.runtime.processes import Processes

STEPS = 6
BRIEF = f"--steps {STEPS} --batch 6 --images 12 --sample-steps 2 --device cpu --optimizer adamw".split()
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned DiT of 112 k parameters."""
    return Pruned("dit", tmp_path_factory.mktemp("dit")).folder


@pytest.fixture(scope="module")
def alone(server: Server, dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = server.run("finetune", "--model", dit, "--out", out, *BRIEF)
    assert done.code == 0, done.stderr
    return out


def together(server: Server, count: int, *arguments: Any, **how: Any) -> list[Outcome]:
    """One `finetune` by several processes, the networks in pieces."""
    return server.together(count, "finetune", *arguments, environment=SHARDED, phase="finetune", **how)


def weights(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def moved_apart(start: Path, one: Path, other: Path) -> float:
    """How far two results lie apart, beside how far training went."""
    return float((weights(one) - weights(other)).norm() / (weights(one) - weights(start)).norm())


def states(out: Path) -> list[Path]:
    return StateFolder(out, {}).states()


@pytest.mark.parametrize(
    ("count", "more"),
    [
        pytest.param(2, [], marks=pytest.mark.thorough),  # the others do more
        (3, ["--features", "0.1", "--jacobian", "0.01", "--checkpointing", "--micro-batch", "1"]),
        (2, ["--teacher-precision", "bf16", "--ema", "0"]),
    ],
)
def test_pieces_train_what_a_whole_network_does(
    server: Server, dit: Path, alone: Path, tmp_path: Path, count: int, more: list[str]
) -> None:
    """Losses and weights to float tolerance; in the record it says that the network lay in pieces."""
    one, several = alone, tmp_path / "several"
    if more:
        one = tmp_path / "one"
        done = server.run("finetune", "--model", dit, "--out", one, *BRIEF, *more)
        assert done.code == 0, done.stderr
    outcomes = together(server, count, "--model", dit, "--out", several, *BRIEF, *more)
    assert [outcome.code for outcome in outcomes] == [0] * count, [outcome.stderr for outcome in outcomes]
    assert outcomes[0].stdout == f"{several}\n"
    assert [outcome.stdout for outcome in outcomes[1:]] == [""] * (count - 1)
    assert moved_apart(dit, one, several) < 0.001
    entries = [json.loads((out / "gfprune.json").read_text())["finetune"][0] for out in (one, several)]
    assert entries[1]["loss"] == pytest.approx(entries[0]["loss"], rel=1e-5)
    assert entries[1]["resolved"] | {"sharded": True, "processes": count} == entries[1]["resolved"]
    assert states(several) == []


def test_muon_moves_pieces_as_it_moves_whole_matrices(server: Server, dit: Path, tmp_path: Path) -> None:
    """It orthogonalises in bfloat16, where other sums round otherwise: 3 % here."""
    one, several = tmp_path / "one", tmp_path / "several"
    flags = [*BRIEF[:-1], "muon"]
    assert server.run("finetune", "--model", dit, "--out", one, *flags).code == 0
    outcomes = together(server, 2, "--model", dit, "--out", several, *flags)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert moved_apart(dit, one, several) < 0.1


def test_all_stop_when_one_is_told_to_and_another_number_goes_on(
    server: Server, dit: Path, alone: Path, tmp_path: Path
) -> None:
    """Only one process hears the signal; the state has no pickle, and is read by three as by two."""
    out = tmp_path / "out"
    flags = ["--model", dit, "--out", out, *BRIEF]
    outcomes = together(server, 2, *flags, signals={1: signal.SIGTERM}, nth=2)
    assert [outcome.code for outcome in outcomes] == [128 + signal.SIGTERM] * 2, outcomes[0].stderr
    assert "the state is saved, continue with --resume" in outcomes[0].error
    (state,) = states(out)
    names = sorted(path.name for path in state.iterdir())
    assert [Path(name).suffix for name in names] == [".safetensors", ".safetensors", ".json"]
    assert json.loads((state / "state.json").read_text())["numbers"]["done"] == 3
    whole = server.run("finetune", *flags, "--resume")
    assert (whole.code, "is of a run with other sharding" in whole.error) == (2, True), whole.stderr
    outcomes = together(server, 3, *flags, "--resume")
    assert [outcome.code for outcome in outcomes] == [0] * 3, outcomes[0].stderr
    assert "continuing after step 3" in outcomes[0].stderr
    assert outcomes[0].phases.count("finetune") == STEPS - 3
    assert moved_apart(dit, alone, out) < 0.001


def test_a_process_that_dies_ends_the_run_and_the_state_stands(
    server: Server, dit: Path, alone: Path, tmp_path: Path
) -> None:
    """Those that are left end by themselves, with an error of one line; and `--resume` ends in the same."""
    out = tmp_path / "out"
    flags = ["--model", dit, "--out", out, *BRIEF, "--save-every", "2"]
    outcomes = together(server, 2, *flags, signals={1: signal.SIGKILL}, nth=4)
    assert [outcome.code for outcome in outcomes] == [1, -signal.SIGKILL], outcomes[0].stderr
    assert outcomes[0].error.startswith("another process of the run ended"), outcomes[0].stderr
    done = [json.loads((state / "state.json").read_text())["numbers"]["done"] for state in states(out)]
    assert done == [2, 4]
    outcomes = together(server, 2, *flags, "--resume")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert "continuing after step 4" in outcomes[0].stderr
    assert moved_apart(dit, alone, out) < 0.001


def test_a_damaged_state_is_passed_over_by_all(
    server: Server, dit: Path, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--model", dit, "--out", out, *BRIEF, "--save-every", "2"]
    together(server, 2, *flags, signals={0: signal.SIGTERM, 1: signal.SIGTERM}, nth=4)
    newest = states(out)[-1]
    piece = sorted(newest.glob("*.safetensors"))[1]
    content = piece.read_bytes()
    piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    outcomes = together(server, 2, *flags, "--resume")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert "continuing after step 4" in outcomes[0].stderr
    assert moved_apart(dit, alone, out) < 0.001


def test_a_state_is_written_in_files_of_limited_size() -> None:
    """Each is put together in memory before it is written: numbers have no gaps, large tensors their own."""
    tensors = {name: torch.zeros(size) for name, size in zip("abcde", (1, 2, 50, 1, 1), strict=True)}
    assert file_numbers(tensors, 16) == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2}
    assert file_numbers(tensors, 10**6) == dict.fromkeys("abcde", 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(lora=4), r"--lora does not go with a network in pieces \(FSDP\): train all weights"),
        (dict(optimizer="adafactor"), "--optimizer adafactor .*: use muon or adamw"),
        (dict(optimizer="adamw8bit"), "--optimizer adamw8bit .*: use muon or adamw"),
        (dict(compile=True), "--compile does not go"),
        (dict(precision="fp16"), "--precision fp16 .*: use bf16"),
        (dict(channels_last=True), "--channels-last does not go"),
        (dict(batch=7), "--batch 7 cannot be shared evenly by 3 .*: use 6 or 9"),
    ],
)
def test_what_does_not_go_with_pieces_is_refused(settings: dict[str, Any], words: str) -> None:
    recipe = FinetuneRecipe(**{"model": "x", "batch": 6} | settings)
    with pytest.raises(UsageError, match=words):
        check_sharded(recipe, processes_of(3), offload_teacher=False)
    check_sharded(FinetuneRecipe(model="x", batch=6), processes_of(3), offload_teacher=False)
    with pytest.raises(UsageError, match="--offload-teacher"):
        check_sharded(FinetuneRecipe(model="x", batch=6), processes_of(3), offload_teacher=True)


def processes_of(count: int) -> Processes:
    return Processes(SimpleNamespace(process_index=0, num_processes=count), torch.device("cpu"))


class OneOfOne(Processes):
    """A group of this process alone."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture
def group() -> Iterator[Processes]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield OneOfOne(SimpleNamespace(process_index=0, num_processes=1), torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.matrix(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_in_pieces(group: Processes, tmp_path: Path, family: str) -> None:
    """Outputs and gradients; blocks are put together when they are called, wherever from."""
    component = inspect(resolve(str(FAMILIES[family](tmp_path / "dense"))))
    whole = load_model(component).requires_grad_(True)
    pieces = load_sharded(component, group).requires_grad_(True)
    assert all(isinstance(parameter, DTensor) for parameter in pieces.parameters())
    inputs = example_inputs(whole)
    outputs = [network(**inputs, return_dict=False)[0] for network in (whole, pieces)]
    assert torch.allclose(*outputs, atol=1e-4)
    for output in outputs:
        output.square().mean().backward()
    for (name, one), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert isinstance(other.grad, DTensor)
            assert torch.allclose(one.grad, other.grad.full_tensor(), atol=1e-4), name
    together_again = gathered(pieces, component, group)
    assert together_again is not None
    for name, tensor in whole.state_dict().items():
        assert torch.equal(together_again.state_dict()[name], tensor), name


def test_a_stand_in_takes_no_memory_and_its_outputs_cannot_pass_for_images(dit: Path) -> None:
    network: Any = stand_in(inspect(resolve(str(dit))), torch.device("cpu"))
    assert sum(parameter.untyped_storage().nbytes() for parameter in network.parameters()) < 10_000
    assert next(network.parameters()).device.type == "cpu"
    assert not network(**example_inputs(network)).sample.isfinite().any()


def test_want_of_memory_ends_the_run_in_one_line(group: Processes, dit: Path) -> None:
    """Repeating a part of a step in halves would leave the other processes waiting."""

    class Full:
        precision, weights = "fp32", SimpleNamespace(distill=1, features=0, jacobian=0)
        teacher = nn.Linear(2, 2)

        def terms(self, *_: Any) -> Any:
            raise torch.OutOfMemoryError

    network = load_sharded(inspect(resolve(str(dit))), group).requires_grad_(True)
    recipe = FinetuneRecipe(model="x", batch=6, micro_batch=2, optimizer="adamw")
    draws: Any = SimpleNamespace(steps=10, batch=lambda *_, **__: None)
    trainer = ShardedTrainer(network, Full(), draws, recipe, group)  # type: ignore[arg-type]
    with pytest.raises(GfpruneError, match=r"out of memory with 2 samples .*--micro-batch, --checkpointing"):
        trainer.step(0, lambda: False)


def test_a_weight_that_cannot_be_shared_is_refused(group: Processes) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.tensor(1.0))

    with pytest.raises(UsageError, match="scale is a single number"):
        shard(Scaled(), group)
