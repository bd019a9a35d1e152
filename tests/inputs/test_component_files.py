"""What may lie in the folder of a text model or tokenizer."""

import json
from pathlib import Path

import pytest

from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.component_files import check_folder


def check(folder: Path, **config: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    check_folder(folder, (folder,))


@pytest.mark.parametrize(
    "config",
    [
        {"special_tokens_map_file": "./special_tokens_map.json"},  # Stable Diffusion 1.5
        {"special_tokens_map_file": "/root/.cache/huggingface/0a1b2c"},  # T5: transformers ignores the key
        {"vocab_file": "vocab.json"},
        {"vocab_file": "./vocab.json"},
        {"vocab_file": None},
    ],
)
def test_files_beside_a_tokenizer_may_be_named(config: dict[str, object], tmp_path: Path) -> None:
    check(tmp_path, **config)


@pytest.mark.parametrize(
    "value", ["../vocab.json", "/etc/passwd", "./../vocab.json", "a/vocab.json", "..", 7]
)
def test_files_elsewhere_may_not(value: object, tmp_path: Path) -> None:
    with pytest.raises(GfpruneError, match="names a file elsewhere"):
        check(tmp_path, vocab_file=value)
