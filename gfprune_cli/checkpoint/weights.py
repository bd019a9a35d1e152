"""The safetensors files of one component: which they are and what their headers say; no weight is read."""

from pathlib import Path

from gfprune_cli.checkpoint.files import INDEX_BYTES, checked_file, quoted, read_json
from gfprune_cli.checkpoint.layout import pick_weights
from gfprune_cli.checkpoint.safetensors_header import TensorInfo, read_header
from gfprune_cli.errors import GfpruneError

MAX_SHARDS = 1024
LONGEST_NAME = 255  # bytes that a file system takes


def read_weights(
    folder: Path, variant: str | None, roots: tuple[Path, ...]
) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    names = {entry.name for entry in folder.iterdir()}
    main = folder / pick_weights(names, variant, str(folder))
    if main.suffix == ".safetensors":
        return (main,), read_header(checked_file(main, roots))
    return _read_shards(main, roots)


def _read_shards(index_path: Path, roots: tuple[Path, ...]) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The shards that an index names, and their tensors, each in the shard that the index says."""
    weight_map = read_json(index_path, roots, limit=INDEX_BYTES).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not named or not weight_map:
        raise GfpruneError(f"{index_path} has no weight_map from tensors to files")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise GfpruneError(f"{index_path} names {len(shards)} files, more than {MAX_SHARDS}")
    for shard in shards:
        plain = Path(shard).name == shard and "\\" not in shard and shard.isprintable()
        if not plain or len(shard.encode()) > LONGEST_NAME or not shard.endswith(".safetensors"):
            raise GfpruneError(f"{index_path} names {quoted(shard)}, which is no plain safetensors file name")
    tensors: dict[str, TensorInfo] = {}
    paths = []
    for shard in shards:
        path = checked_file(index_path.parent / shard, roots)
        header = read_header(path)
        for name in header:
            if weight_map.get(name) != shard:
                raise GfpruneError(
                    f"{path} holds tensor {quoted(name)}, which {index_path.name} does not place there"
                )
        paths.append(path)
        tensors |= header
    for name in weight_map:
        if name not in tensors:
            shard = quoted(weight_map[name])
            raise GfpruneError(
                f"{index_path} places tensor {quoted(name)} in {shard}, which has no such tensor"
            )
    return tuple(paths), tensors
