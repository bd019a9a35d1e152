"""What finetuning's defaults are worth: each is changed alone, on three networks, at two lengths.

    python benchmarks/training.py
    python benchmarks/training.py --subjects demo --gradients 3200 --seeds 1

Networks are pruned to a quarter of their parameters and MACs, and finetuned on their training images with
each setting for the same number of gradients, counted in samples: a larger batch takes fewer steps. Measured
on held-out images and on samples from the same noise. Networks other than the demo are those that
`quality.py` trains. Runs that are done are kept in --work, for as long as network and settings are the same.
Writes docs/benchmarks/training.md.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import flags
from study import ALL_IMAGES, QUALITY, QUALITY_HEAD, Study, cells, head, once, write_study
from subjects import Place
from yardstick import Yardstick

import gfprune_cli as gfprune
from gfprune_cli.recipes.finetune import FinetuneRecipe

Settings = dict[str, Any]
Numbers = dict[str, float]
SAMPLES, SAMPLE_STEPS = 128, 20
GRADIENTS = [400, 3200]  # what `prune` recovers with, and a short run of `finetune`
PRUNING: Settings = dict(sparsity=0.75, recover=0)
SETTINGS: list[Settings] = [
    {},
    *({"learning_rate": rate} for rate in (3e-3, 6e-3)),
    {"optimizer": "muon"},
    *({"optimizer": "muon", "learning_rate": rate} for rate in (1e-3, 3e-3)),
    {"optimizer": "adamw"},
    *({"optimizer": "adamw", "learning_rate": rate} for rate in (5e-4, 3e-3)),
    *({"batch": size} for size in (4, 16)),
    {"ema": 0.0},
    {"timesteps": "stratified"},
    {"image_weight": 0.0},
    {"min_snr": 5.0},
    {"distill": 1.0, "denoise": 0.0},
    {"distill": 0.0, "denoise": 1.0},
    {"features": 0.0},
    {"by_block": True},
]


def measure(place: Place, lengths: list[int], work: Path, seed: int) -> list[list[Numbers]]:
    """[lengths][SETTINGS] the networks that are finetuned from one pruned one."""
    target = place.open()
    yardstick = Yardstick(target, SAMPLES, SAMPLE_STEPS)
    data: Settings = dict(data=str(place.data), images=ALL_IMAGES, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        pruned, out = Path(folder) / "pruned", Path(folder) / "out"
        gfprune.prune(target.model, out=pruned, **PRUNING, **data)
        before = target.fingerprint + hashlib.sha256((pruned / "gfprune.json").read_bytes()).hexdigest()

        def tuned(settings: Settings) -> Numbers:
            brief = dict(save_every=0, sample_every=0, force=True)
            done = gfprune.finetune(pruned, out=out, **brief, **data, **settings)
            return {**yardstick.measure(gfprune.load(out)), "seconds": done.seconds}

        def kept(gradients: int, settings: Settings) -> Numbers:
            batch = FinetuneRecipe(model="", **settings).batch
            chosen = settings | {"steps": gradients // batch}
            recipe = FinetuneRecipe(model="", seed=seed, **chosen).settled(1, left=1 - PRUNING["sparsity"])
            resolved = {"denoise": recipe.denoise_weight, "features": recipe.feature_weight}
            key = json.dumps([before, recipe.document() | resolved], sort_keys=True)
            name = f"training-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
            return dict(once(work / name, lambda: tuned(chosen)))

        return [[kept(gradients, settings) for settings in SETTINGS] for gradients in lengths]


def lines(study: Study) -> Iterator[str]:
    yield "Mean, lowest and highest seed in brackets."
    lengths, subjects = study.own.gradients, study.subjects.items()
    started = {name: study.start(measure, place, lengths, study.work) for name, place in subjects}
    for name, waiting in started.items():
        by_seed = waiting()
        for number, gradients in enumerate(lengths):
            title = f"## {name}, {gradients:,} gradients"
            yield from ("", title, *head("settings", QUALITY_HEAD, "seconds"))
            for row, settings in enumerate(SETTINGS):
                name_of_row = f"`{flags(settings)}`" if settings else "defaults"
                runs = [found[number][row] for found in by_seed]
                yield f"| {name_of_row} | {cells(runs, {**QUALITY, 'seconds': 0})} |"


if __name__ == "__main__":
    write_study(__file__, str(__doc__), "Settings of finetuning", lines, gradients=GRADIENTS)
