"""The model card that travels with an output."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gfprune_cli.checkpoint.files import checked_file, trusted_roots
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.strict_yaml import load_mapping

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


def write_card(
    path: Path, *, root: Path, base_model: str | None, loading: str, record: Mapping[str, Any]
) -> None:
    """Write README.md: front matter for the Hub, the loading line, the numbers.

    Args:
        root: the source checkpoint, whose licence is inherited.
        base_model: Hub id, for Hub sources only.
        loading: the code that loads the result.
        record: the document that `gfprune.json` holds.
    """
    front: dict[str, Any] = {"library_name": "diffusers", **inherited(root), "tags": ["gfprune", "pruned"]}
    if base_model:
        front["base_model"] = base_model
    if record.get("finetune") and base_model:
        front["base_model_relation"] = "finetune"
    others = record.get("others") or {}
    what = "pipeline" if others else record["class_name"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {record['source']['label'] if base_model else what}, pruned",
        "",
        "```python",
        loading,
        "```",
        "",
    ]
    for one in (record, *others.values()):
        lines += [f"## {one['component']}: {one['class_name']}", ""] if others else []
        lines += component_lines(one)
    lines += ["The loss is taken on calibration images. The resolved recipe is in `gfprune.json`.", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def component_lines(record: Mapping[str, Any]) -> list[str]:
    """What became of one network."""
    removed = removed_shares(record["params"], record["macs"])
    recipe, params, macs, loss = record["recipe"], record["params"], record["macs"], record["loss"]
    return [
        f"gfprune removed {removed} (criterion {recipe['criterion']}, layout {recipe['layout']}).",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {params['before']:,} | {params['after']:,} |",
        f"| multiply-accumulates | {macs['before']:,} | {macs['after']:,} |",
        f"| weights, bytes | {record['bytes']['before']:,} | {record['bytes']['after']:,} |",
        f"| denoising loss | {loss['before']:.4f} | {loss_left(loss):.4f} |",
        "",
        *time_lines(record),
        *fold_lines(record),
        *finetune_lines(record),
    ]


def removed_shares(params: Mapping[str, int], macs: Mapping[str, int]) -> str:
    """Both shares that went, in words."""
    shares = [1 - pair["after"] / pair["before"] for pair in (params, macs)]
    return (
        f"{shares[0]:.1%} of the parameters and {shares[1]:.1%} of the multiply-accumulates of the denoiser"
    )


def loss_left(loss: Mapping[str, float | None]) -> float:
    """Of the network that was written: after recovery, where there was one."""
    left = loss["removed"] if loss.get("recovered") is None else loss["recovered"]
    assert left is not None
    return left


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
    """One line per finetuning, oldest first."""
    lines = []
    for entry in record.get("finetune") or []:
        loss, recipe = entry["loss"], entry["recipe"]
        lines.append(
            f"Then finetuned for {recipe['steps']} steps with the dense model as teacher: denoising loss "
            f"{loss['before']:.4f} before, {loss['after']:.4f} after, {loss['teacher']:.4f} for the teacher, "
            "on images that training did not see."
        )
        lines.append("")
    return lines
