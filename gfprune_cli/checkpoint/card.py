"""The model card that travels with an output."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gfprune_cli.checkpoint.files import checked_file, shortened, trusted_roots
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.strict_yaml import load_mapping

PICTURE = "samples.png"  # beside the card
FLAG = [
    "The flag lets diffusers read the one Python file that lies beside the weights: layers have widths of "
    "their own, which the stock class cannot hold.",
    "",
]
CARD_BYTES = 1 << 17  # of it are read: what the front matter may take, and PyYAML in a second or two


def inherited(root: Path) -> dict[str, Any]:
    """Licence and tags from the card of the source, if it has one; text and lists of text, nothing else."""
    path = root / "README.md"
    try:
        checked_file(path, trusted_roots(root))
        with path.open("rb") as stream:
            text = stream.read(CARD_BYTES)
        _, front, _ = text.split(b"---", 2) if text.startswith(b"---") else (b"", b"", b"")
        document = load_mapping(front)
    except (GfpruneError, OSError, ValueError, ArithmeticError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    wanted = ("license", "license_name", "license_link", "datasets", "language", "pipeline_tag")
    return {key: document[key] for key in wanted if _is_text(document.get(key))}


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


@dataclass(frozen=True)
class Picture:
    """Samples of the dense network above samples of the pruned one, each column from the same noise.

    Args:
        png: the file.
        samples: in a row.
        steps: of the sampler.
        of_teacher: whether the upper row is of a teacher that is not the dense network.
        asked: the prompt or class of each column; empty where there is none.
    """

    png: bytes
    samples: int
    steps: int
    of_teacher: bool = False
    asked: tuple[str, ...] = ()


def write_card(
    path: Path,
    *,
    root: Path,
    base_model: str | None,
    loading: str,
    record: Mapping[str, Any],
    picture: Picture | None = None,
) -> None:
    """Write README.md: front matter for the Hub, samples, the loading line, the numbers.

    Args:
        root: the source checkpoint, whose licence is inherited.
        base_model: Hub id, for Hub sources only.
        loading: the code that loads the result.
        record: the document that `gfprune.json` holds.
        picture: lies beside the card, as `PICTURE`.
    """
    others = record.get("others") or {}
    source = inherited(root)
    front = {
        "library_name": "diffusers",
        **source,
        "tags": ["gfprune", "pruned"],
        **lineage(base_model, (record, *others.values())),
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {base_model or Path(record['source']['label']).name}, pruned",
        "",
        *picture_lines(picture),
        "## Loading",
        "",
        "```python",
        loading,
        "```",
        "",
        *(FLAG if "trust_remote_code" in loading else []),
    ]
    for one in (record, *others.values()):
        lines += [f"## {one['component']}: {one['class_name']}" if others else "## Numbers", ""]
        lines += component_lines(one)
    lines += licence_lines(source)
    lines += ["The loss is taken on calibration images. The resolved recipe is in `gfprune.json`.", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def lineage(base_model: str | None, records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What the Hub is told of where a model comes from.

    Of the four relations that it knows (adapter, finetune, merge, quantized) one fits a network that was
    trained after pruning. None fits one that was not: it is left to the Hub, which then infers one.
    """
    if base_model is None:
        return {}
    trained = {"base_model_relation": "finetune"} if any(map(is_trained, records)) else {}
    return {"base_model": base_model, **trained}


def is_trained(record: Mapping[str, Any]) -> bool:
    """Whether weights were trained after pruning."""
    recovered = (record.get("loss") or {}).get("recovered") is not None
    return recovered or bool(record.get("finetune"))


def picture_lines(picture: Picture | None) -> list[str]:
    """Samples, and what they are."""
    if picture is None:
        return []
    above = "the teacher of the finetuning" if picture.of_teacher else "the dense model"
    # as a block of code: prompts may hold what Markdown would act on
    asked = ["    " + shortened(" ".join(text.split())) for text in picture.asked]
    return [
        f"![Samples of {above} above, of this model below]({PICTURE})",
        "",
        f"Above {above}, below this one, from the same noise in {picture.steps} steps. "
        f"{picture.samples} {'seed' if picture.samples == 1 else 'seeds'}, none left out.",
        "",
        *(["Columns, from the left:", "", *asked, ""] if asked else []),
    ]


def licence_lines(source: Mapping[str, Any]) -> list[str]:
    """The licence of the source, where its card names one."""
    names = source.get("license_name") or source.get("license")
    if names is None:
        return []
    text = names if isinstance(names, str) else ", ".join(names)
    link = source.get("license_link")
    where = f" ({link})" if isinstance(link, str) else ""
    return [f"Licence: {text}{where}, as the dense model's card has it.", ""]


def component_lines(record: Mapping[str, Any]) -> list[str]:
    """What became of one network."""
    recipe, params, macs, size = record["recipe"], record["params"], record["macs"], record["bytes"]
    shares = [1 - pair["after"] / pair["before"] for pair in (params, macs)]
    return [
        f"gfprune removed {shares[0]:.1%} of the parameters and {shares[1]:.1%} of the multiply-accumulates "
        f"of the network (criterion {recipe['criterion']}, layout {recipe['layout']}).",
        "",
        "| | dense | pruned | left |",
        "|---|--:|--:|--:|",
        number_row("parameters", params),
        number_row("multiply-accumulates", macs),
        number_row("weights, bytes", size),
        loss_row(record),
        "",
        *time_lines(record),
        *fold_lines(record),
        *finetune_lines(record),
    ]


def number_row(title: str, pair: Mapping[str, int]) -> str:
    """One count, before and after."""
    left = f"{pair['after'] / pair['before']:.1%}" if pair["before"] else ""
    return f"| {title} | {pair['before']:,} | {pair['after']:,} | {left} |"


def loss_row(record: Mapping[str, Any]) -> str:
    """The loss of the dense network and of the one that lies here: after its last finetuning."""
    tuned, loss = record.get("finetune"), record["loss"]
    if not tuned:
        left = loss["removed"] if loss.get("recovered") is None else loss["recovered"]
        return f"| denoising loss | {loss['before']:.4f} | {left:.4f} | |"
    loss = tuned[-1]["loss"]
    dense = f"{loss['teacher']:.4f}" if has_own_teacher(tuned[-1], record) else ""
    return f"| denoising loss | {dense} | {loss['after']:.4f} | |"


def time_lines(record: Mapping[str, Any]) -> list[str]:
    """How fast it is, where time was the budget."""
    time = record.get("time")
    if not time:
        return []
    asked = ", ".join(f"{name} {value:g}" for name, value in time["asked"].items())
    predicted, measured = time["predicted"], time["measured"]
    found = f"predicted {predicted['speedup']:.2f} times as fast ({predicted['ms']:.3g} ms)"
    if measured is None:
        found += ", not measured"
    else:
        found += (
            f", measured {measured['speedup']:.2f} times (quartiles {measured['low']:.2f} to "
            f"{measured['high']:.2f}): {measured['ms']:.3g} ms instead of {measured['ms_dense']:.3g}"
        )
        found += "" if measured["steady"] else ", on a busy machine"
    where = f"{time['runtime']}, batch {time['batch']}, {time['precision']}, on {time['device']}"
    return [f"Time of one evaluation in {where}: asked for {asked}, {found}.", ""]


def fold_lines(record: Mapping[str, Any]) -> list[str]:
    """What was factored, and how well."""
    fold = record.get("fold")
    if not fold:
        return []
    params = fold["params"]
    return [
        f"{len(fold['layers'])} linear layers that see timestep and pooled conditions alone were factored "
        f"without training: {params['before']:,} parameters became {params['after']:,}. Relative error at "
        f"timesteps and conditions that were held out: at most {fold['layer_error']:.2%} of a layer's "
        f"outputs, {fold['output_error']:.2%} of the network's.",
        "",
    ]


def finetune_lines(record: Mapping[str, Any]) -> list[str]:
    """One line per training after removal, oldest first."""
    lines, loss = [], record["loss"]
    if loss.get("recovered") is not None:
        lines += [
            f"{record['recipe']['recover']} steps of training with the dense model as teacher took the "
            f"denoising loss from {loss['removed']:.4f} to {loss['recovered']:.4f}; the dense model has "
            f"{loss['before']:.4f}.",
            "",
        ]
    for entry in record.get("finetune") or []:
        loss, recipe = entry["loss"], entry["recipe"]
        lines += [
            f"Then finetuned for {recipe['steps']} steps{trained_how(entry, record)}: denoising loss "
            f"{loss['before']:.4f} before, {loss['after']:.4f} after, {loss['teacher']:.4f} for the teacher, "
            "on images that training did not see.",
            "",
        ]
    return lines


def has_own_teacher(entry: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether the teacher of a finetuning was the pruned network's own; files may have other names."""
    first, second = (sorted(origin["weights"].values()) for origin in (entry["teacher"], record["source"]))
    return first == second


def trained_how(entry: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What a finetuning learned from, and what of the network it changed."""
    recipe, teacher = entry["recipe"], "the dense model"
    if not has_own_teacher(entry, record):
        label = entry["teacher"]["label"]
        teacher = label if entry["teacher"]["kind"] == "hub" else Path(label).name
    taught = any(recipe.get(name) for name in ("distill", "features", "jacobian"))
    how = f" with {teacher} as teacher" if taught else " on the denoising loss alone"
    if recipe.get("lora"):
        how += f", through adapters of rank {recipe['lora']} that were merged into the pruned layers"
    return how
