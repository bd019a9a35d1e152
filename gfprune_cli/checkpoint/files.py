"""Reading files that somebody else wrote: where they may lie, how large they may be, what JSON may say."""

import json
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from gfprune_cli.errors import GfpruneError
from gfprune_cli.outputs.digests import sha256_of

CONVERSION = "DiffusionPipeline.from_pretrained(...).save_pretrained(..., safe_serialization=True)"

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 16 << 20

# The largest value of each config key that sets how much a network or a scheduler allocates. A key holds a
# number or a (nested) list of numbers, at most `MAX_ITEMS` long.
LIMITS = {
    **dict.fromkeys(("block_out_channels", "in_channels", "out_channels", "sample_size"), 65536),
    **dict.fromkeys(("attention_head_dim", "num_attention_heads"), 65536),
    **dict.fromkeys(("norm_num_groups", "attn_norm_num_groups"), 65536),
    **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), 64),
    **dict.fromkeys(("cross_attention_dim", "time_embedding_dim"), 1 << 20),
    "num_class_embeds": 1 << 24,
    "num_train_timesteps": 1_000_000,
}
# The same for the many names that transformers give to their sizes: name pattern -> largest value.
PATTERNS = (
    (re.compile(r"(?:num|n)_(?:\w+_)?(?:layers|blocks)|depth"), 512),
    (re.compile(r"pos_embed_max_size"), 4096),
    (re.compile(r"axes_lens"), 1 << 17),  # tables of positions, made in main memory
)
MAX_ITEMS = 64
MAX_LAYERS = 512  # blocks times layers per block: keeps even the empty network small
MAX_INNER_LAYERS = 2048  # the same with the transformer layers in each
MAX_COUNT = 1 << 24  # no real configuration has a larger whole number, bases of rotary embeddings aside
MAX_NUMBER = 2**53  # beyond it a JSON number is no longer exact
MAX_DEPTH = 64  # of nested objects and lists: what walks through them later may recurse
MAX_CONTAINERS = 1_000_000  # objects and lists in one document: an empty one takes 30 times its text


def quoted(name: object) -> str:
    """A name from a file as it may appear in a message: quoted, no control characters, not endless."""
    if isinstance(name, (list, dict)):  # may be huge, or nested beyond what repr can do
        return f"a {type(name).__name__} of {len(name)}"
    text = repr(str(name))
    return text if len(text) <= 160 else text[:157] + "...'"


def first_line(error: Exception) -> str:
    """An exception of another library in one line: its type and the start of its message, whole words."""
    lines = str(error).strip().splitlines() or [""]
    text = shortened("".join(character for character in lines[0] if character.isprintable()))
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def shortened(text: str, length: int = 200) -> str:
    """The start of a text, cut between two words: half an address leads nowhere."""
    if len(text) <= length:
        return text
    words = text[: length + 1].rpartition(" ")[0] or text[:length]
    return f"{words} ..."


def trusted_roots(folder: Path) -> tuple[Path, ...]:
    """The folders that the files of a checkpoint may resolve into.

    A Hub snapshot is made of links into `models--owner--name/blobs`, which may in turn be links into the
    cache's shared `blobs`; everything else has to stay inside its own folder.
    """
    real = folder.resolve()
    for snapshot in (real, *real.parents):
        repo = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repo.name.startswith("models--"):
            return (real, repo, repo.parent / "blobs")
    return (real,)


def checked_file(path: Path, roots: tuple[Path, ...]) -> Path:
    """Make sure that a path is a regular file inside one of the trusted folders.

    Returns:
        The path as it was given.

    Raises:
        GfpruneError: it is missing, leads out of the folders, or is no regular file.
    """
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise GfpruneError(f"{path} is missing: the checkpoint is incomplete, fetch it again") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise GfpruneError(f"{path} cannot be read: {error}") from None
    if not any(real.is_relative_to(root) for root in roots):
        raise GfpruneError(f"{path} leads out of the checkpoint's folder: replace the link by the file")
    if not stat.S_ISREG(mode):  # opening a pipe or a device would hang
        raise GfpruneError(f"{path} is not a regular file")
    return path


def sha256_of_files(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Path -> SHA-256 of what the file holds.

    Raises:
        GfpruneError: a file leads out of the checkpoint's folder `root`, or cannot be read.
    """
    found, roots = {}, trusted_roots(root)
    for path in sorted(paths):
        found[f"{path.parent.name}/{path.name}"] = sha256_of(checked_file(path, roots))
    return found


def read_json(
    path: Path, roots: tuple[Path, ...], *, limit: int = CONFIG_BYTES, constants: Collection[str] = ()
) -> dict[str, Any]:
    """Read one JSON object with strict rules.

    Args:
        path: the file.
        roots: where it may lie (`trusted_roots`).
        limit: the largest size in bytes.
        constants: which of NaN, Infinity and -Infinity may stand for themselves.

    Raises:
        GfpruneError: too large, not UTF-8 JSON, not an object, a key given twice, or NaN or infinity.
    """
    checked_file(path, roots)
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise GfpruneError(f"{path} cannot be read: {error}") from None
    if len(data) > limit:
        raise GfpruneError(f"{path} is larger than {limit} bytes: this is no diffusers file of that name")
    return parse_json(data, str(path), constants)


def parse_json(data: bytes, where: str, constants: Collection[str] = ()) -> dict[str, Any]:
    """Parse one JSON object with the rules of `read_json`; `where` names the file in messages."""

    def constant(text: str) -> float:
        if text not in constants:
            raise ValueError(f"{text} is not a JSON number")
        return float(text)

    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise GfpruneError(f"{where} has too many objects and lists, more than {MAX_CONTAINERS:,}")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=constant)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise GfpruneError(f"{where} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise GfpruneError(f"{where} is not a JSON object")
    return value


def _check_depth(value: object) -> None:
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (item.values() if isinstance(item, dict) else item for item in level if item)
        level = [child for items in inner for child in items if isinstance(child, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested too deeply, more than {MAX_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ in which of two equal keys wins, so a file with both can show two faces.
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return result


def read_config(path: Path, roots: tuple[Path, ...]) -> dict[str, Any]:
    """Read a model's or scheduler's config and check every value that sets how much is allocated.

    Raises:
        GfpruneError: see `read_json`; also a value outside `LIMITS`, too many blocks, or an infinite number.
    """
    config = read_json(path, roots)
    check_config(config, path)
    return config


def check_config(config: dict[str, Any], path: Path) -> None:
    """The checks of `read_config`; `path` names the origin in messages."""
    for key, value in config.items():
        for number in _numbers(value):
            if not -MAX_NUMBER <= number <= MAX_NUMBER:  # false for NaN too
                raise GfpruneError(f"{path}: {quoted(key)} holds a number out of range")
            if isinstance(number, int) and number > MAX_COUNT and "theta" not in key:
                raise GfpruneError(f"{path}: {quoted(key)} is larger than {MAX_COUNT}")
    for key in LIMITS.keys() & config.keys():
        _check_limit(path, key, config[key])
    for key, value in config.items():
        for pattern, limit in PATTERNS:
            if pattern.fullmatch(key) and any(number > limit for number in _numbers(value)):
                raise GfpruneError(f"{path}: {quoted(key)} is larger than {limit}")
    blocks = len(list(_numbers(config.get("block_out_channels"))))
    layers = max([1, *_numbers(config.get("layers_per_block"))])
    if blocks * layers > MAX_LAYERS:
        raise GfpruneError(
            f"{path}: {blocks} blocks of {layers} layers are more than {MAX_LAYERS} layers in all"
        )
    inner = max([1, *_numbers(config.get("transformer_layers_per_block"))])
    if blocks * layers * inner > MAX_INNER_LAYERS:
        raise GfpruneError(
            f"{path}: 'transformer_layers_per_block' makes more than {MAX_INNER_LAYERS} layers in all"
        )
    for key in ("down_block_types", "up_block_types"):
        names = config.get(key, [])
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not named or len(names) > MAX_ITEMS:
            raise GfpruneError(f"{path}: {key!r} has to be a list of at most {MAX_ITEMS} block names")


def _check_limit(path: Path, key: str, value: object) -> None:
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        raise GfpruneError(f"{path}: {key!r} has {len(value)} entries, more than {MAX_ITEMS}")
    without = key == "num_attention_heads" and isinstance(value, list)  # stages that have no attention are -1
    for number in _numbers(value):
        if number != int(number) or not (1 <= number <= LIMITS[key] or (without and number == -1)):
            raise GfpruneError(f"{path}: {key!r} is {number}, but has to be from 1 to {LIMITS[key]}")


def _numbers(value: object) -> Iterator[float]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield item
