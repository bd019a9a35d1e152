"""The model card: what it tells the Hub, and that it speaks of the network that lies beside it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from gfprune_cli.checkpoint.card import Picture, write_card

PNG = Picture(b"", 8, 20)
ORIGIN = {"label": "owner/dense", "kind": "hub", "commit": None, "weights": {"a.safetensors": "1"}}
TUNED: dict[str, Any] = {
    "recipe": {"steps": 70, "distill": 0.9, "lora": None},
    "teacher": ORIGIN | {"weights": {"a.fp16.safetensors": "1"}},
    "loss": {"teacher": 0.01, "before": 0.03, "after": 0.02},
}


def record(recovered: float | None = None, *tuned: dict[str, Any]) -> dict[str, Any]:
    """Of a network that lost half."""
    half = {"before": 2000, "after": 1000}
    return {
        "recipe": {"criterion": "taylor", "layout": "adaptive", "recover": 50},
        "source": ORIGIN,
        "class_name": "PrunedUNet2DModel",
        "component": "unet",
        **dict.fromkeys(("params", "macs", "bytes"), half),
        "loss": {"before": 0.011, "removed": 0.05, "recovered": recovered},
        **({"finetune": list(tuned)} if tuned else {}),
    }


def card(folder: Path, document: dict[str, Any], **given: Any) -> tuple[dict[str, Any], str]:
    """(front matter, text) of a card whose source names the licence `other`."""
    front = "license: other\nlicense_name: mine\nlicense_link: https://example.org"
    (folder / "README.md").write_text(f"---\n{front}\n---\n")
    given = {"base_model": "owner/dense", "loading": "load()", **given}
    write_card(folder / "card.md", root=folder, record=document, **given)
    _, found, text = (folder / "card.md").read_text().split("---\n", 2)
    return yaml.safe_load(found), text


@pytest.mark.parametrize(
    ("document", "relation"),
    [(record(), None), (record(0.02), "finetune"), (record(None, TUNED), "finetune")],
)
def test_the_hub_is_told_a_relation_where_it_knows_one(
    tmp_path: Path, document: dict[str, Any], relation: str | None
) -> None:
    front, _ = card(tmp_path, document)
    assert front["base_model"] == "owner/dense"
    assert front.get("base_model_relation") == relation
    assert not {"base_model", "base_model_relation"} & card(tmp_path, document, base_model=None)[0].keys()


def test_the_licence_of_the_source_is_read_by_hub_and_people(tmp_path: Path) -> None:
    front, text = card(tmp_path, record())
    assert (front["license"], front["license_name"]) == ("other", "mine")
    assert "Licence: mine (https://example.org)" in text


def test_no_picture_is_shown_that_is_not_there(tmp_path: Path) -> None:
    assert "![" not in card(tmp_path, record())[1]
    assert "(samples.png)" in card(tmp_path, record(), picture=PNG)[1]


def test_prompts_are_shown_as_they_are_and_cannot_act(tmp_path: Path) -> None:
    """They may be anybody's captions."""
    text = card(tmp_path, record(), picture=Picture(b"", 2, 20, asked=("a\n\n# <b>fox</b>", "x" * 300)))[1]
    assert "\n    a # <b>fox</b>\n    xxx" in text
    assert "x" * 201 not in text


def test_the_table_speaks_of_the_weights_that_lie_there(tmp_path: Path) -> None:
    """After recovery, and after the last finetuning; another teacher is no dense model."""
    assert "| denoising loss | 0.0110 | 0.0500 |" in card(tmp_path, record())[1]
    assert "| denoising loss | 0.0110 | 0.0200 |" in card(tmp_path, record(0.02))[1]
    last = TUNED | {"loss": {"teacher": 0.01, "before": 0.02, "after": 0.015}}
    assert "| denoising loss | 0.0100 | 0.0150 |" in card(tmp_path, record(0.02, TUNED, last))[1]
    foreign = TUNED | {"teacher": ORIGIN | {"label": "owner/other", "weights": {"a.safetensors": "2"}}}
    text = card(tmp_path, record(0.02, foreign))[1]
    assert "| denoising loss |  | 0.0200 |" in text
    assert "with owner/other as teacher" in text


def test_how_a_network_was_finetuned_stands_in_the_card(tmp_path: Path) -> None:
    adapters = TUNED | {"recipe": {"steps": 70, "distill": 0.9, "lora": 16}}
    assert "adapters of rank 16" in card(tmp_path, record(None, adapters))[1]
    alone = TUNED | {"recipe": {"steps": 70, "distill": 0.0, "features": 0.0, "jacobian": 0.0, "lora": None}}
    text = card(tmp_path, record(None, alone))[1]
    assert "70 steps on the denoising loss alone:" in text
    assert "adapters" not in text
