"""Each denoiser class of diffusers as a bare folder: the tiny network of its model test, and no pipeline."""

import contextlib
import copy
import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cases
import diffusers
import journey
import torch
import untested
from torch.utils import _pytree as pytree

SEVERAL = re.compile(r"^Multi|MultiControlNet")  # networks in one, which no folder holds
CONFIG = "config.json"
Makers = dict[str, Callable[[], Any]]


def class_names() -> list[str]:
    """The denoisers that diffusers exports, and what adds to their states."""
    from gfprune_cli.checkpoint.layout import is_autoencoder, is_denoiser

    found = []
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)) or is_autoencoder(name):
            continue
        if is_denoiser("diffusers", name) or ("ControlNet" in name and not SEVERAL.search(name)):
            found.append(name)
    return found


def makers(checkout: Path) -> Makers:
    """Class name -> what makes its network: the model test of a checkout of diffusers, or `untested.py`."""
    sys.path.insert(0, str(checkout))
    found: Makers = {}
    for path in sorted((checkout / "tests" / "models").glob("*/test_models_*.py")):
        name = f"tests.models.{path.parent.name}.{path.stem}"
        with contextlib.suppress(Exception, SystemExit):  # a library that is not installed
            for value in vars(importlib.import_module(name)).values():
                if isinstance(value, type) and value.__module__ == name and (kind := class_of(value)):
                    found.setdefault(kind, partial(network_of, value))
    for kind, config in untested.CONFIGS.items():
        if hasattr(diffusers, kind):
            found.setdefault(kind, partial(getattr(diffusers, kind), **config))
    return found


def class_of(test_class: type) -> str:
    """The class of diffusers that a model test is about; "" for other tests."""
    made = hasattr(test_class, "get_init_dict") or hasattr(
        test_class, "prepare_init_args_and_inputs_for_common"
    )
    with contextlib.suppress(Exception):  # a property that asks for more than the class
        return str(object.__new__(test_class).model_class.__name__) if made else ""
    return ""


def network_of(test_class: Any) -> Any:
    """The network that a model test runs."""
    test = object.__new__(test_class)
    if hasattr(test, "get_init_dict"):
        return test.model_class(**test.get_init_dict())
    return test.model_class(**test.prepare_init_args_and_inputs_for_common()[0])


def build_all(checkout: Path, names: list[str], pipelines: Path, folder: Path) -> journey.Row:
    """Save the networks that are not there yet; class name -> why one could not be built.

    Args:
        pipelines: the tiny ones, where a network lies that no model test makes.
    """
    made, closed = makers(checkout), {}
    for name in names:
        try:
            build(made.get(name), name, pipelines, folder / name)
        except Exception as error:
            shutil.rmtree(folder / name, ignore_errors=True)
            closed[name] = f"{type(error).__name__}: {error}"[:300]
    return {"status": "passed", "unbuilt": closed}


def build(made: Callable[[], Any] | None, name: str, pipelines: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if made is not None:
        torch.manual_seed(0)
        network = made()
        for parameter in network.parameters():  # not a number where diffusers leaves it to a checkpoint
            parameter.data.nan_to_num_()
        cases.vary(network)
        network.save_pretrained(folder, safe_serialization=True)
        return
    for config in sorted(pipelines.glob(f"*/*/{CONFIG}")):
        if json.loads(config.read_text()).get("_class_name") == name:
            shutil.copytree(config.parent, folder)
            return
    raise LookupError("no test makes it")


def walk(model: Path, folder: Path) -> journey.Row:
    """Analyze, prune, and load the result without gfprune; what was seen."""
    return journey.walk_through(lambda row: steps(row, str(model), folder), folder)


def steps(row: journey.Row, model: str, folder: Path) -> Iterator[str]:
    """Each step, named before it is taken."""
    import gfprune_cli

    gaps, _ = journey.watch_removal({})
    yield "analyze"
    row["groups"] = len(gfprune_cli.analyze(model).groups)
    yield "prune"
    _, row["prune"] = journey.prune_nearest(model, None, {}, folder / "pruned", whole=True)
    journey.check_gaps(row, gaps)
    yield "diffusers"
    inputs = inputs_of(model)
    # copies, as diffusers leaves weights where a file has them, and kernels choose by where that is
    own = copy.deepcopy(gfprune_cli.load(folder / "pruned"))
    plain = copy.deepcopy(journey.loaded_plainly(folder / "pruned"))
    assert same(answer(own, inputs), answer(plain, inputs)), "plain diffusers gives another output"
    row["diffusers"] = "yes"


def inputs_of(model: str) -> dict[str, Any]:
    """What a network takes, with noise for its sample and its texts."""
    import gfprune_cli
    from gfprune_cli.inputs.examples import example_inputs
    from gfprune_cli.pruning.verify import noisy

    return dict(noisy(example_inputs(gfprune_cli.load(model)), torch.float32))


def answer(network: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    accepted = inspect.signature(network.forward).parameters
    tuples = {"return_dict": False} if "return_dict" in accepted else {}
    with torch.no_grad():
        found = network(**inputs, **tuples)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two outputs agree bit for bit, and are there."""
    return bool(one) and len(one) == len(other) and all(map(torch.equal, one, other))
