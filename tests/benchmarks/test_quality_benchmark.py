"""The benchmark compares like with like: equal rows, limits on gradients, shares and choices that add up."""

import argparse
import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare
import contenders
import grid
import peers
import provenance
import quality
import report_quality
import shrink_images
import subjects
import train_demo
import yardstick

from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover

TOY = grid.Form(
    lengths=(400, 800),
    seeds=(2, 1),
    sparsities=(0.5,),
    methods=("gfprune", "magnitude", "magnitude, tuned"),
    once=("taylor", "random"),
    tunings=(("adamw", 5e-4), ("adamw", 1.5e-3)),
    samples=4,
    sample_steps=2,
    training={},
    prune={"iterations": 2, "draws": 8},
)
PEERS = ("magnitude", "taylor", "diff-pruning", "diff-pruning, tuned")


@pytest.fixture(scope="module")
def place(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> subjects.Place:
    """The tiny pipeline with random pictures."""
    path = tmp_path_factory.mktemp("toy") / "images.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(path, x=pictures[:8], held_out=pictures[8:])
    return subjects.Place("toy", str(pipeline_folder), path)


@pytest.fixture(scope="module")
def toy(place: subjects.Place) -> yardstick.Subject:
    return place.open()


@pytest.fixture(scope="module")
def uniform(toy: yardstick.Subject) -> Any:
    """What the peers' rule leaves of it."""
    return pruned(toy, "random")


def pruned(toy: yardstick.Subject, peer: str) -> Any:
    draws = contenders.draws_of(toy, 0)
    return peers.pruned_by(peer, lambda: copy.deepcopy(toy.dense), 0.5, toy.process, draws, 0)[0]


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.matrix(2)
@pytest.mark.parametrize("method", PEERS)
def test_every_peer_keeps_the_same_widths_within_the_gradients_allowed(
    toy: yardstick.Subject, uniform: Any, method: str
) -> None:
    outcome = contenders.by_peer(toy, grid.Cell("toy", method, 0.5, 0, 100, "adamw", 1e-3))
    assert 100 - grid.PUBLISHED["batch"] < outcome.gradients <= 100
    size, dense = contenders.Size.of(outcome.model), contenders.Size.of(toy.dense)
    assert size == contenders.Size.of(uniform)
    assert 3 * size.macs <= outcome.work / outcome.gradients < 4 * dense.macs


def test_gfprune_keeps_the_share_that_it_is_asked_for_and_recovery_is_left_to_finetune(
    toy: yardstick.Subject, uniform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def prune(model: str, **settings: Any) -> Any:
        asked["prune"] = settings
        return argparse.Namespace(scoring_gradients=99.5)

    monkeypatch.setattr(contenders.gfprune, "prune", prune)
    monkeypatch.setattr(contenders.gfprune, "finetune", lambda *a, **settings: asked.update(tune=settings))
    monkeypatch.setattr(contenders.gfprune, "load", lambda folder: uniform)
    cell = grid.Cell("toy", "gfprune", 0.5, 3, 400)
    outcome = contenders.by_gfprune(toy, cell, TOY, 0.5)
    batch = FinetuneRecipe(model="").batch
    assert asked["prune"]["sparsity"] == pytest.approx(0.5)
    assert (asked["prune"]["budget"], asked["prune"]["recover"], asked["prune"]["seed"]) == ("both", 0, 3)
    assert asked["tune"]["steps"] == (400 - 100) // batch
    assert not {"batch", "learning_rate", "optimizer"} & set(asked["tune"])
    assert outcome.gradients == 100 + (300 // batch) * batch


@pytest.mark.parametrize(
    ("peers", "parameters", "share", "tries"),
    [
        (contenders.Size(0.24, 0.28), 0.8, 0.28, 1),  # fewer parameters than MACs: all of theirs are spent
        (contenders.Size(0.24, 0.28), 0.92, 0.26, 3),  # no more parameters than theirs: 0.92 of 0.26
        (contenders.Size(0.24, 0.28), 1.0, 0.24, 3),
        (contenders.Size(0.57, 0.53), 0.8, 0.53, 3),  # the MACs are those that it is asked for
        (contenders.Size(0.255, 0.25), 1.0, 0.25, 0),  # equal as they are: nothing is tried
    ],
)
def test_gfprune_is_asked_for_as_much_as_the_peers_keep(
    toy: yardstick.Subject,
    monkeypatch: pytest.MonkeyPatch,
    peers: contenders.Size,
    parameters: float,
    share: float,
    tries: int,
) -> None:
    """Its network keeps the MACs that it is asked for, and `parameters` times that of the parameters."""
    dense = contenders.Size.of(toy.dense)
    asked = []

    def size(network: Any) -> contenders.Size:
        if network is toy.dense:
            return dense
        kept = 1 - asked[-1]["sparsity"]
        return contenders.Size(parameters * kept * dense.params, kept * dense.macs)

    monkeypatch.setattr(contenders.gfprune, "prune", lambda *a, **settings: asked.append(settings))
    monkeypatch.setattr(contenders.gfprune, "load", lambda folder: folder)
    monkeypatch.setattr(contenders.Size, "of", size)
    found = contenders.share_for_gfprune(toy, grid.Cell("toy", "gfprune", 0.5, 3, 400), TOY, peers)
    assert (found, len(asked)) == (pytest.approx(share), tries)


def test_rows_that_are_not_equal_are_refused() -> None:
    peer = contenders.Size(0.56, 0.52)
    contenders.check_equal(contenders.Size(0.569, 0.40), peer)
    contenders.check_equal(contenders.Size(0.30, 0.529), peer)
    for kept in (contenders.Size(0.58, 0.50), contenders.Size(0.50, 0.54)):
        with pytest.raises(ValueError, match="not equal"):
            contenders.check_equal(kept, peer)


def test_work_counts_a_backward_pass_twice_and_the_teacher_once() -> None:
    dense, small = contenders.Size(0, 10), contenders.Size(0, 4)
    assert contenders.work_of(dense, small, 2, 5, distilled=False) == 3 * 10 * 2 + 3 * 4 * 5
    assert contenders.work_of(dense, small, 2, 5, distilled=True) == 3 * 10 * 2 + (3 * 4 + 10) * 5


def test_published_peers_train_with_the_plain_loss_and_tuned_ones_as_finetune_does() -> None:
    published = grid.peer_recipe(grid.Cell("toy", "magnitude", 0.5))
    assert (published.denoise, published.distill) == (1.0, 0.0)
    assert (published.optimizer, published.learning_rate, published.batch) == ("adamw", 5e-4, 16)
    tuned = grid.peer_recipe(grid.Cell("toy", "magnitude, tuned", 0.5, 2, 400, "muon", 3e-3))
    even = {"image_weight": 0.0, "features": 0.0, "timesteps": "stratified"}
    assert tuned == FinetuneRecipe(model="", seed=2, optimizer="muon", learning_rate=3e-3, **even)
    plain = grid.peer_recipe(grid.Cell("toy", "magnitude, finetuned", 0.5, 2, 400))
    assert plain == FinetuneRecipe(model="", seed=2)


def test_peers_that_finetune_trains_have_the_rate_that_it_gives_them(
    toy: yardstick.Subject, uniform: Any
) -> None:
    """It asks for the loss: a network far from the dense one trains at a higher rate, if the run is long."""
    recipe = grid.peer_recipe(grid.Cell("toy", "magnitude, finetuned", 0.5), steps=8000)
    draws = contenders.draws_of(toy, 0)
    rates = []
    for scale in (1.0, 3.0):
        model = copy.deepcopy(uniform)
        model.conv_out.weight.data *= scale
        rates.append(peers.at_rate(recipe, model, toy.dense, toy.process, draws).learning_rate)
    assert rates[0] < rates[1]
    given = replace(recipe, learning_rate=0.5)
    assert peers.at_rate(given, uniform, toy.dense, toy.process, draws) == given


def test_a_tuned_peer_that_diverges_has_lost_that_trial(
    place: subjects.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any) -> Any:
        raise contenders.GfpruneError("the training loss at step 3 is not finite")

    monkeypatch.setattr(contenders, "by_peer", diverge)
    monkeypatch.setattr(contenders, "uniform_share", lambda *arguments: contenders.Size(1, 1))
    cell = grid.Cell("toy", "magnitude, tuned", 0.5, 0, 400, "adamw", 1.0)
    assert contenders.run(cell, TOY, place, tmp_path)["loss"] == math.inf
    with pytest.raises(contenders.GfpruneError):
        contenders.run(replace(cell, method="magnitude"), TOY, place, tmp_path)


def test_peers_remove_the_same_index_from_every_group_of_a_norm(toy: yardstick.Subject) -> None:
    """What is compared with is Torch-Pruning's own selection, not ours."""
    model = pruned(toy, "magnitude")
    groups = toy.dense.config.norm_num_groups  # type: ignore[union-attr]
    kept = torch.isin(toy.dense.conv_in.bias, model.conv_in.bias).view(groups, -1)  # type: ignore[union-attr,arg-type]
    assert kept.any()
    assert not kept.all()
    assert bool((kept == kept[0]).all())


def test_diff_pruning_stops_where_the_loss_gets_small(toy: yardstick.Subject) -> None:
    taken: list[int] = []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> Any:
            """The loss is 1 up to timestep 500 and 0.01 after it."""
            taken.append(int(timesteps[0]))
            batch = contenders.draws_of(toy, 0).batch("score", 1, peers.DIFF_PRUNING_IMAGES)
            off = 1.0 if taken[-1] <= 500 else 0.1
            return type("Output", (), {"sample": batch.noise + off * self.weight})

    count = peers.diff_pruning_gradients(Watched(), toy.process, contenders.draws_of(toy, 0), 40)
    assert taken == [0, 111, 222, 333, 444, 555]
    assert count == len(taken) * peers.DIFF_PRUNING_IMAGES


def test_a_network_is_at_no_distance_from_itself(
    toy: yardstick.Subject, uniform: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "dense.safetensors"
    first = yardstick.Yardstick(toy, 4, 2, draws=16, cache=cache)
    rule = yardstick.Yardstick(toy, 4, 2, draws=16, cache=cache)
    assert torch.equal(first.images, rule.images)
    same = rule.measure(toy.dense)
    assert same["ssim"] == 1
    assert same["fd_teacher"] == pytest.approx(0, abs=1e-6)
    assert [same["loss"], *same["bins"]] == rule.losses.tolist()
    other = rule.measure(uniform)
    assert other["ssim"] < 1
    assert other["fd_teacher"] > 0
    assert other["loss"] == pytest.approx(np.mean(other["bins"]), rel=0.05)


# --- the grid and its store ----------------------------------------------------------------------


def store_of(path: Path, form: grid.Form = TOY, network: str = "a") -> grid.Store:
    return grid.Store(path, form, {"toy": network})


def test_runs_that_are_done_are_kept_and_those_of_other_settings_do_not_count(tmp_path: Path) -> None:
    path, cell = tmp_path / "results.jsonl", grid.Cell("toy", "magnitude", 0.5, 0, 400)
    store_of(path).add(cell, {"loss": 1.0})
    assert store_of(path).get(cell) == {"loss": 1.0, "key": json.loads(path.read_text())["key"]}
    assert store_of(path).get(replace(cell, seed=1)) is None
    assert store_of(path, replace(TOY, samples=5)).get(cell) is None
    assert store_of(path, network="b").get(cell) is None
    assert grid.Store(path, TOY, {}).get(cell) is None
    assert store_of(path, replace(TOY, lengths=(400,), seeds=(5,))).get(cell), "a part counts for the whole"


def test_defaults_of_gfprune_decide_whether_its_runs_count_and_not_whether_those_of_published_peers_do(
    tmp_path: Path,
) -> None:
    path = tmp_path / "results.jsonl"
    ours, theirs = grid.Cell("toy", "gfprune", 0.5, 0, 400), grid.Cell("toy", "magnitude", 0.5, 0, 400)
    for cell in (ours, theirs):
        store_of(path).add(cell, {"loss": 1.0})
    changed = store_of(path, replace(TOY, prune={"draws": 9}))
    assert changed.get(ours) is None
    assert changed.get(theirs)


def test_a_tuned_peer_takes_the_best_of_its_trials_to_every_seed_and_length(tmp_path: Path) -> None:
    store = store_of(tmp_path / "results.jsonl")
    far = grid.Cell("toy", "magnitude, tuned", 0.5, 0, 800)
    trials = grid.trials(TOY, far)
    assert {(cell.gradients, cell.seed) for cell in trials} == {(400, 0)}
    assert [(cell.optimizer, cell.rate) for cell in trials] == list(TOY.tunings)
    assert grid.ready([far], store) == trials
    store.add(trials[0], {"loss": 0.3})
    assert store.resolved(far).waits
    assert grid.ready([far], store) == trials[1:]
    store.add(trials[1], {"loss": 0.2})
    assert grid.ready([far], store) == [replace(far, optimizer="adamw", rate=1.5e-3)]
    assert grid.ready([replace(far, gradients=400)], store) == [], "one of the trials is that run"
    assert grid.ready([replace(far, gradients=400, seed=1)], store)[0].rate == 1.5e-3


def test_what_has_not_run_is_missing_and_only_the_chosen_trial_is_a_row(tmp_path: Path) -> None:
    store = store_of(tmp_path / "results.jsonl")
    planned = grid.cells(TOY, "toy")
    assert len(planned) == len(set(planned)) == 1 + 2 * 3 + 2 + 3
    assert grid.collect(TOY, ["toy"], store).missing == planned
    for rate, loss in ((5e-4, 0.3), (1.5e-3, 0.2)):
        store.add(grid.Cell("toy", "magnitude, tuned", 0.5, 0, 400, "adamw", rate), {"loss": loss})
    found = grid.collect(TOY, ["toy"], store)
    assert [entry["loss"] for entry in found.entries] == [0.2]
    assert [entry["loss"] for entry in found.tried] == [0.3, 0.2]
    assert len(found.missing) == len(planned) - 1


def test_parts_of_the_grid_can_be_chosen() -> None:
    options = quality.arguments().parse_args(
        ["--lengths", "3200", "--seeds", "0", "2", "--methods", "gfprune"]
    )
    wanted = quality.chosen_by(options)
    kept = [cell for cell in grid.cells(grid.FULL, "demo") if wanted(cell)]
    assert {(cell.gradients, cell.seed, cell.method) for cell in kept} == {
        (3200, 0, "gfprune"),
        (3200, 2, "gfprune"),
    }
    everything = quality.chosen_by(quality.arguments().parse_args([]))
    assert all(everything(cell) for cell in grid.cells(grid.FULL, "demo"))


# --- the page ------------------------------------------------------------------------------------


def entry(method: str, seed: int = 0, gradients: int = 3200, **numbers: float) -> dict[str, Any]:
    cell = grid.Cell("toy", method, 0.5, seed, gradients)
    if method == "dense":
        cell = grid.Cell("toy", "dense")
    start = dict(
        params=100, macs=100, seconds=1, work=1e12, gradients_spent=3190, bins=[0.1, 0.2], commit="abc"
    )
    return vars(cell) | start | numbers


DENSE = entry("dense", loss=0.1, ssim=1.0, fd_teacher=0.0)
ENTRIES = [
    DENSE,
    entry("gfprune", loss=0.15, ssim=0.9, fd_teacher=1.0, params=54, macs=52),
    entry("gfprune", 1, loss=0.13, ssim=0.86, fd_teacher=3.0, params=54, macs=52),
    entry("magnitude", loss=0.3, ssim=0.6, fd_teacher=8.0, params=55, macs=53),
    entry("magnitude", 1, loss=0.3, ssim=0.6, fd_teacher=8.0, params=55, macs=53),
    entry("magnitude, tuned", loss=0.2, ssim=0.5, fd_teacher=10.0, params=55, macs=53),
    entry("magnitude, tuned", 1, loss=0.26, ssim=0.5, fd_teacher=10.0, params=55, macs=53),
]
BY_FINETUNE = [
    entry("magnitude, finetuned", seed, loss=0.18, ssim=0.6, fd_teacher=4.0, params=55, macs=53)
    for seed in (0, 1)
]
LONG = replace(TOY, lengths=(3200, 16_000))


def test_shares_are_of_the_best_peer_row_of_any_kind_with_the_spread_over_seeds() -> None:
    rows = compare.rows_of(ENTRIES, "toy", 0.5, 3200)
    loss, ssim, fd = (compare.verdict(rows, DENSE, metric, 3200) for metric in compare.GAPS)
    assert loss is not None
    assert (loss.peer, loss.goal, loss.passed) == ("magnitude, tuned", 0.35, True)
    assert loss.mean == pytest.approx(0.04 / 0.13)
    assert loss.seeds == pytest.approx((0.05 / 0.1, 0.03 / 0.16))
    assert ssim is not None
    assert (ssim.peer, ssim.passed) == ("magnitude", True)
    assert ssim.mean == pytest.approx(0.12 / 0.4)
    assert fd is not None
    assert (fd.mean, fd.passed) == (pytest.approx(0.25), False)
    assert compare.verdict(rows, DENSE, "loss", 777).passed is None  # type: ignore[union-attr]
    assert compare.verdict({"magnitude": rows["magnitude"]}, DENSE, "loss", 3200) is None


def test_the_goals_are_those_of_the_lengths() -> None:
    assert [compare.GOALS["loss"](length) for length in grid.FULL.lengths] == [0.35, 0.5, 0.6]
    assert {compare.GOALS["ssim"](length) for length in grid.FULL.lengths} == {0.5}
    assert {compare.GOALS["fd_teacher"](length) for length in grid.FULL.lengths} == {0.2}


def test_a_peer_without_a_gap_is_met_by_none_or_not_at_all() -> None:
    assert compare.share(-0.1, 0.0) == 0.0
    assert compare.share(0.1, -0.1) == math.inf


def test_the_page_says_what_passes_what_misses_and_what_has_not_run(tmp_path: Path) -> None:
    missing = [grid.Cell("toy", "gfprune", 0.5, seed, 16_000) for seed in (0, 1)]
    tried = [
        entry("magnitude, tuned", loss=loss) | {"optimizer": name, "rate": rate}
        for (name, rate), loss in zip(LONG.tunings, (0.25, 0.2), strict=True)
    ]
    found = grid.Found(ENTRIES + BY_FINETUNE, tried, missing)
    page = report_quality.write_report(found, LONG, tmp_path, command="the command").read_text()
    assert "`the command`" in page
    alone, _, with_ours = page.partition("peers that `gfprune finetune` has trained")
    assert "| toy | 0.5 | 3,200 | 0.31 (0.19 to 0.50): pass | 0.30 (0.25 to 0.35): pass |" in alone
    assert "| 0.25 (0.12 to 0.38): **miss** |" in alone
    assert "| toy | 0.5 | 3,200 | 0.50 (0.38 to 0.62): **miss** |" in with_ours
    assert "| toy | 0.5 | 16,000 | not run | not run | not run |" in alone
    assert "9 of 11 runs" in page
    assert "- toy at 0.5, 16,000 gradients: gfprune (2)" in page
    assert (
        "| **gfprune, defaults** | 2 | 54.0% | 52.0% | 3,190 | 1 | 1.00 T | 0.1400 (0.1300 to 0.1500) |"
        in page
    )
    assert "| toy | 0.5 | Torch-Pruning, magnitude, tuned | 0.2500 | **0.2000** |" in page
    assert "made at commit abc" in page
    assert (tmp_path / "quality.svg").stat().st_size > 1000


def test_a_complete_page_says_nothing_of_missing_runs_and_an_empty_one_can_be_written(tmp_path: Path) -> None:
    complete = report_quality.write_report(grid.Found(ENTRIES, [], []), LONG, tmp_path / "a", command="c")
    assert "Not complete" not in complete.read_text()
    _, _, with_ours = complete.read_text().partition("peers that `gfprune finetune` has trained")
    assert "| toy | 0.5 | 3,200 | not run | not run | not run |" in with_ours  # no peer was finetuned
    empty = grid.Found([], [], grid.cells(TOY, "toy"))
    assert "0 of 12 runs" in report_quality.write_report(empty, TOY, tmp_path / "b", command="c").read_text()
    assert not (tmp_path / "b" / "quality.svg").exists()


def test_pages_of_the_repository_are_made_from_a_clean_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "commit", lambda: "abc-dirty")
    monkeypatch.setattr(sys, "argv", ["quality.py", "--page-only"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "clean commit" in capsys.readouterr().err


def test_new_files_in_the_package_make_a_commit_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "gfprune_cli").mkdir()
    (tmp_path / "gfprune_cli" / "a.py").touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "start")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not provenance.commit().endswith("-dirty")
    (tmp_path / "gfprune_cli" / "b.py").touch()
    assert provenance.commit().endswith("-dirty")


# --- all of it -----------------------------------------------------------------------------------


@pytest.mark.thorough  # peers, cells and pages have tests
@pytest.mark.slow
def test_a_grid_runs_to_a_page_and_a_second_time_from_what_is_kept(
    place: subjects.Place, tmp_path: Path
) -> None:
    form = replace(TOY, lengths=(240, 480), seeds=(1, 1), once=(), prune={"draws": 4})

    def made() -> grid.Found:
        results = tmp_path / "results.jsonl"
        run = quality.Grid(
            form, {"toy": place}, tmp_path, lambda cell: cell.gradients == 240, "abc", results, 1
        )
        run.run()
        return grid.collect(form, ["toy"], run.store)

    found = made()
    lines = (tmp_path / "results.jsonl").read_text()
    assert {cell.gradients for cell in found.missing} == {480}
    assert len(found.entries) == 1 + 3
    assert len(found.tried) == len(TOY.tunings)
    dense = found.entries[0]
    for entry in found.entries[1:]:
        assert 240 - 32 < entry["gradients_spent"] <= 240
        assert entry["commit"] == "abc"
    shares = {e["method"]: (e["params"] / dense["params"], e["macs"] / dense["macs"]) for e in found.entries}
    for method in ("gfprune", "magnitude, tuned"):
        assert shares[method][0] <= shares["magnitude"][0] + contenders.TOLERANCE
        assert shares[method][1] <= shares["magnitude"][1] + contenders.TOLERANCE
    page = report_quality.write_report(found, form, tmp_path, command="c").read_text()
    assert "4 of 7 runs" in page
    assert made() == found
    assert (tmp_path / "results.jsonl").read_text() == lines


# --- networks ------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_refused_in_one_line(
    place: subjects.Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = np.zeros((4, 16, 16, 1), np.uint8)
    np.savez(tmp_path / "grey.npz", x=grey, held_out=grey)
    np.savez(tmp_path / "half.npz", x=np.zeros((4, 16, 16, 3), np.uint8))
    for name, key in (("grey.npz", "'x'"), ("half.npz", "'held_out'")):
        with pytest.raises(UsageError, match=f"array {key}.*16, 16, 3"):
            replace(place, data=tmp_path / name).open()
    conditional = copy.deepcopy(place.open().dense)
    conditional.register_to_config(num_class_embeds=10)  # type: ignore[operator]
    monkeypatch.setattr(yardstick.gfprune, "load", lambda model: conditional)
    with pytest.raises(UsageError, match="unconditional"):
        place.open()


@pytest.mark.thorough  # of what is committed, and trains
@pytest.mark.slow
def test_the_networks_differ_in_kind_and_share_no_image(tmp_path: Path) -> None:
    """Trained by the benchmark, once; one step is enough to see what they are."""
    places = subjects.places_of(tmp_path)
    assert list(places) == ["demo", "second", "third"]
    for name in subjects.TRAININGS:
        subjects.train_network(places[name], 1)
    opened = {name: place.open() for name, place in places.items()}
    configs: dict[str, Any] = {name: found.dense.config for name, found in opened.items()}
    assert len({tuple(config.block_out_channels) for config in configs.values()}) == 3
    assert (configs["third"].in_channels, configs["third"].sample_size) == (1, 16)
    assert configs["third"].norm_num_groups not in (configs["demo"].norm_num_groups, 32)
    process: Any = opened["third"].process
    assert process.prediction == "v_prediction"
    assert not torch.equal(process.signal, opened["demo"].process.signal)  # type: ignore[attr-defined]
    assert 1e6 < contenders.Size.of(opened["third"].dense).params < 2e6
    for found in opened.values():
        assert len(found.held_out) >= 40
        seen = {image.numpy().tobytes() for image in yardstick.pictures_of(found)}
        assert not any(image.numpy().tobytes() in seen for image in found.held_out) or found.name != "third"
    weights = (tmp_path / "third" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    subjects.train_network(places["third"], 1)
    assert (tmp_path / "third" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_grey_network_is_pruned_and_measured(tmp_path: Path) -> None:
    model = train_demo.network((16, 16), size=8, channels=1, groups=4, attention=4)
    assert peers.macs_of(model) == CostModel(model, *discover(model)).before("macs"), "attention counts"
    before = peers.parameters(model)
    peers.prune_uniformly(model, peers.importance_of("magnitude")[0], 0.5)
    assert peers.parameters(model) < 0.4 * before
    assert model(**peers.example_inputs(model)).sample.shape == (1, 1, 8, 8)


def test_training_knows_the_velocity(tmp_path: Path) -> None:
    """v = sqrt(a) noise - sqrt(1 - a) x (arXiv 2202.00512)."""
    scheduler = train_demo.DDPMScheduler(prediction_type="v_prediction")
    images, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    timesteps = torch.tensor([10, 700])
    signal = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    wanted = signal.sqrt() * noise - (1 - signal).sqrt() * images
    torch.testing.assert_close(train_demo.target_of(scheduler, images, noise, timesteps), wanted)
    plain = train_demo.DDPMScheduler()
    assert train_demo.target_of(plain, images, noise, timesteps) is noise


def test_shrunk_images_are_grey_small_and_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "in.npz", x=pictures[[0, 1, 2, 1, 3, 4]], c=np.array(list("aaaabb")))
    arguments = ["--data", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out.npz"), "--size", "4"]
    monkeypatch.setattr(sys, "argv", ["shrink_images.py", *arguments, "--categories", "a", "--grey"])
    shrink_images.main()
    with np.load(tmp_path / "out.npz") as made:
        assert made["x"].shape == (3, 4, 4, 1)
        assert made["c"].tolist() == ["a"] * 3


# --- other scripts ---------------------------------------------------------------------------------


SCRIPTS = sorted(Path(quality.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "def main(" in path.read_text()], ids=lambda path: path.name
)
def test_a_script_with_a_main_calls_it(script: Path) -> None:
    assert 'if __name__ == "__main__":' in script.read_text()
