"""SOAP: a matrix moves in the eigenbases of what its gradients have been."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gfprune_cli.recipes.finetune import MUON_RATE, RATE, SMALL_NETWORK, SOAP_RATE, FinetuneRecipe
from gfprune_cli.recovery import soap
from gfprune_cli.recovery.optimizers import make_optimizer, soap_numbers
from gfprune_cli.recovery.trainer import Trainer


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 6)])
def test_in_its_bases_it_is_adam_that_looks_ahead(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], turned: bool
) -> None:
    """On gradients that are turned into them, and its steps turned back; the mean has Nesterov's form."""
    source = torch.Generator().manual_seed(0)
    bases = {
        n: torch.linalg.qr(torch.randn(n, n, generator=source))[0] if turned else torch.eye(n) for n in shape
    }
    monkeypatch.setattr(soap, "closer", lambda products, basis: bases[len(products)])
    monkeypatch.setattr(soap, "FLOOR", 0.0)
    letters = "abc"[: len(shape)]
    terms = ",".join(letter + letter.upper() for letter in letters)
    turn = lambda tensor, form: torch.einsum(form, tensor, *(bases[n] for n in shape))  # noqa: E731
    tensor, twin = torch.zeros(shape), torch.zeros(shape)
    mean, squares = torch.zeros(shape), torch.zeros(shape)
    state = soap.empty_state(tensor)
    for step in range(1, 12):
        gradient = torch.randn(shape, generator=source)
        soap.precondition(tensor, gradient, state, step, lr=1e-2, decay=0.0)
        given = turn(gradient, f"{letters},{terms}->{letters.upper()}")
        mean = soap.MOMENTUM * mean + (1 - soap.MOMENTUM) * given
        squares = soap.POWER * squares + (1 - soap.POWER) * given.square()
        ahead = soap.MOMENTUM * mean + (1 - soap.MOMENTUM) * given
        size = (squares / (1 - soap.POWER**step)).sqrt()
        twin -= 1e-2 / (1 - soap.MOMENTUM**step) * ahead / size
    expected = turn(twin, f"{letters.upper()},{terms}->{letters}")
    torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_how_a_convolution_is_stored_changes_nothing(memory_format: torch.memory_format) -> None:
    """Its modes are found in either order, and a kernel of one position is none."""
    source = torch.Generator().manual_seed(0)
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 1, bias=False)])
    for layer in network.layers:
        nn.init.zeros_(layer.weight)
    optimizer = make_optimizer("soap", network.to(memory_format=memory_format), lr=0.01, weight_decay=0.0)
    for _ in range(4):
        for layer in network.layers:
            layer.weight.grad = torch.randn(layer.weight.shape, generator=source).to(
                memory_format=memory_format
            )
        optimizer.step()
    ends = [layer.weight.detach() for layer in network.layers]
    lengths = [
        sorted(len(state[key]) for key in state if key.startswith("basis"))
        for state in optimizer.state.values()
    ]
    assert lengths == [[4, 6, 9], [4, 6]]
    source = torch.Generator().manual_seed(0)
    by_hand = [(torch.zeros(6, 4, 9), {}), (torch.zeros(6, 4), {})]
    for step in range(1, 5):
        for tensor, state in by_hand:
            if not state:
                state |= soap.empty_state(tensor)
            gradient = torch.randn(*tensor.shape, generator=source)
            soap.precondition(tensor, gradient, state, step, lr=0.01, decay=0.0)
    for end, (tensor, _) in zip(ends, by_hand, strict=True):
        torch.testing.assert_close(end.flatten(), tensor.flatten(), rtol=1e-4, atol=1e-6)


def moved(shape: tuple[int, int], noise: float, steps: int = 25) -> torch.Tensor:
    """Where a matrix ends that is given gradients of rank 2, and noise of this size."""
    source, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    rows, columns = torch.randn(shape[0], 2, generator=source), torch.randn(2, shape[1], generator=source)
    matrix = torch.zeros(shape)
    state = soap.empty_state(matrix)
    for step in range(1, steps + 1):
        middle = torch.diag(torch.randn(2, generator=source))
        gradient = rows @ middle @ columns
        gradient = gradient * (1 + noise * torch.randn(shape, generator=other))
        soap.precondition(matrix, gradient, state, step, lr=1e-2, decay=0.0)
    return matrix


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_rounding_of_gradients_does_not_grow(shape: tuple[int, int]) -> None:
    """Processes add up gradients in another order; directions without gradients must not follow that."""
    whole, rounded = moved(shape, 0.0), moved(shape, 1e-7)
    assert float(whole.norm()) > 0.01
    assert float((whole - rounded).norm()) < 1e-3 * float(whole.norm())


def test_bases_come_to_be_eigenvectors() -> None:
    source = torch.Generator().manual_seed(0)
    mixed = torch.randn(5, 5, generator=source)
    matrix, scale = torch.zeros(5, 400), torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05]).unsqueeze(1)
    state = soap.empty_state(matrix)
    basis = torch.linalg.qr(mixed)[0]
    for step in range(1, 400):
        gradient = basis @ (scale * torch.randn(5, 400, generator=source))
        soap.precondition(matrix, gradient, state, step, lr=0.0, decay=0.0)
    overlap = (state["basis_0"].T @ basis).abs()
    torch.testing.assert_close(overlap, torch.eye(5), rtol=0, atol=0.05)


def test_wide_layers_are_moved_as_muon_moves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Muon's own rate, within blocks; outside of them by AdamW, at its own."""
    monkeypatch.setattr(soap, "LONGEST", 8)
    source = torch.Generator().manual_seed(0)
    shapes = [(8, 9), (9, 8), (8, 8), (4, 2)]
    gradients = [torch.randn(shape, generator=source) for shape in shapes]
    muon = 0.1 * MUON_RATE / SOAP_RATE
    ends = []
    for by, rate, others in (("soap", 0.1, 0.1 * RATE / SOAP_RATE), ("muon", muon, muon)):
        network = nn.Module()
        network.blocks = nn.ModuleList([nn.Linear(width, height, bias=False) for height, width in shapes])
        network.first, network.last = nn.Linear(9, 2, bias=False), nn.Linear(3, 2, bias=False)
        network.outside = nn.Parameter(torch.zeros(3))
        optimizer = make_optimizer(by, network, lr=rate, weight_decay=0.0)  # type: ignore[arg-type]
        network.outside.grad = torch.tensor([1.0, -2.0, 3.0])
        layers = [*network.blocks, network.first, network.last]
        for layer, gradient in zip(layers, [*gradients, torch.ones(2, 9), torch.ones(2, 3)], strict=True):
            nn.init.zeros_(layer.weight)
            layer.weight.grad = gradient.clone()
        optimizer.step()
        outside = [network.outside.detach() / others, network.first.weight.detach() / others]
        ends.append([*outside, *(layer.weight.detach() for layer in network.blocks)])
        moved = network.last.weight.detach() / others
        assert torch.allclose(moved, -torch.ones(2, 3), rtol=1e-3) == (by == "muon")  # AdamW's first step
        if by == "soap":
            kept = sum(
                tensor.numel()
                for state in optimizer.state.values()
                for key, tensor in state.items()
                if key != "step"
            )
            assert kept == soap_numbers(network)
    close = [torch.allclose(*pair, rtol=1e-5) for pair in zip(*ends, strict=True)]
    assert close == [True, True, True, True, False, False]


@pytest.mark.parametrize(("batch", "every"), [(64, 5), (8, 5), (4, 10), (1, 40)])
def test_the_bases_of_small_batches_follow_less_often(batch: int, every: int) -> None:
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Linear(6, 5, bias=False)])
    optimizer = make_optimizer("soap", network, lr=0.01, weight_decay=0.0, batch=batch)
    (weight,) = network.parameters()
    moved, source = [], torch.Generator().manual_seed(0)
    for step in range(1, 42):
        before = optimizer.state[weight]["basis_0"].clone() if optimizer.state[weight] else torch.eye(5)
        weight.grad = torch.randn(5, 6, generator=source)
        optimizer.step()
        if not torch.equal(optimizer.state[weight]["basis_0"], before):
            moved.append(step)
    assert moved == [*range(1, soap.FIRST_STEPS + 1), *range(every, 42, every)]


def test_small_networks_take_it_and_large_ones_muon() -> None:
    recipe = FinetuneRecipe(model="m")
    names = [recipe.settled(count).optimizer for count in (1, SMALL_NETWORK, SMALL_NETWORK + 1)]
    assert names == ["soap", "soap", "muon"]
    assert recipe.settled(1, sharded=True).optimizer == "muon"
    adapters = FinetuneRecipe(model="m", lora=4).settled(1)
    assert (adapters.optimizer, adapters.learning_rate) == ("muon", 1e-2)
    rates = {
        name: FinetuneRecipe(model="m", steps=400, optimizer=name).settled(1).learning_rate for name in RATES
    }
    assert rates == RATES
    assert FinetuneRecipe(model="m", learning_rate=0.5).settled(1, trained=9).learning_rate == 0.5


@pytest.mark.parametrize(("width", "share"), [(6, 0.25), (4, 0.5), (2, 0.75), (8, 0.1)])
def test_what_has_lost_little_trains_at_a_low_rate(width: int, share: float) -> None:
    """SOAP's rate follows the share of the parameters that is gone, but not to 0; other rates do not."""
    peaks = {}
    for name in ("soap", "muon"):
        student, teacher = nn.Linear(width, 3, bias=False), nn.Linear(8, 3, bias=False)
        recipe = FinetuneRecipe(model="m", steps=400, optimizer=name, timesteps="uniform")  # type: ignore[arg-type]
        loss = SimpleNamespace(teacher=teacher, precision="fp32")
        processes = SimpleNamespace(sharded=False, device=torch.device("cpu"))
        trainer = Trainer(student, loss, None, recipe, processes)  # type: ignore[arg-type]
        peaks[name] = trainer.peak_rate
    assert peaks == {"soap": pytest.approx(RATES["soap"] * share), "muon": RATES["muon"]}


def test_a_long_run_trains_at_a_low_rate() -> None:
    """SOAP's rate falls with the root of the samples, whatever the batch; other rates do not."""
    recipe = FinetuneRecipe(model="m", steps=1600, batch=8)
    for given in (recipe, FinetuneRecipe(model="m", steps=3200, batch=4)):
        assert given.settled(1).learning_rate == pytest.approx(RATES["soap"] / 2)
    assert FinetuneRecipe(model="m", steps=1600, optimizer="muon").settled(1).learning_rate == RATES["muon"]
    assert FinetuneRecipe(model="m", steps=1600, learning_rate=0.01).settled(1).learning_rate == 0.01


def test_a_run_is_long_later_for_what_has_farther_to_go() -> None:
    """What loses more than the dense network's own loss has as many more samples at the full rate."""
    recipe = FinetuneRecipe(model="m", steps=1600, batch=8)
    rates = [recipe.settled(1, excess=excess).learning_rate for excess in (-0.1, 0.5, 1.0, 2.25, 4.0, 50.0)]
    assert rates == pytest.approx([RATES["soap"] * share for share in (0.5, 0.5, 0.5, 0.75, 1.0, 1.0)])


def test_what_has_been_trained_before_goes_on_at_a_lower_rate() -> None:
    """A short run at the full rate would undo what was reached."""
    rates = [
        FinetuneRecipe(model="m", steps=20).settled(1, trained=steps).learning_rate for steps in (0, 20, 60)
    ]
    assert rates == [RATES["soap"], RATES["soap"] / 2, RATES["soap"] / 4]


RATES = {"soap": 6e-3, "muon": 2e-3, "adamw": 1.5e-3, "adamw8bit": 1.5e-3, "adafactor": 1e-2}
