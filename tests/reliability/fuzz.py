"""What is fuzzed: readers of bytes that somebody else wrote. Each may raise `GfpruneError` and nothing else.

    python tests/reliability/fuzz.py header -runs=20000     # coverage-guided, by atheris (Linux)

The arguments behind the target's name are libFuzzer's. `any` takes the target from the first byte.
"""

import io
import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MESSAGE = 4000  # characters of an error, the path of the file included
Target = Callable[[Path, bytes], None]

ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "class_embed_type": None,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 1,
    "dropout": 0.0,
    "freq_shift": 0,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
# What stands in the place of a value, or is put between bytes.
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        2**64,
        10**30,
        0.5,
        -0.0,
        1e308,
        5e-324,
        "",
        "evil",
        "../evil",
    ),
    *("\ud800", "\x1b[2J", "a" * 5000, [], {}, [[]], {"a": {}}, [None], [1, "a"], [2**40] * 3, "DownBlock2D"),
)
TOKENS = tuple(
    text.encode()
    for text in (
        *('"', "{", "}", "[", "]", ":", ",", "null", "true", "NaN", "-Infinity", "1e999", "0x1f", "-1", '""'),
        *("\\ud800", "\\u0000", "__metadata__", "data_offsets", "dtype", "shape", "weight_map", "9" * 40),
        *(
            "&a ",
            "*a ",
            "<<: ",
            "!!python/object/apply:os.system ",
            "!!binary ",
            "!!set ",
            "? ",
            "- ",
            "| ",
            "---\n",
        ),
        *(
            "seed: ",
            "1:59:59",
            "2024-13-45",
            ".inf",
            "~",
            "\\UFFFFFFFF",
            "\r",
            "\x85",
            "#",
            "%YAML 9.9\n",
            "'",
        ),
    )
) + (b"\0", b"\xff", b"\xff\xff\xff\xff", b"PK\x01\x02", b"\x93NUMPY", b"\xef\xbb\xbf", bytes(8))


def header(folder: Path, data: bytes) -> None:
    """The header of a safetensors file: `data` is all of the file."""
    from gfprune_cli.checkpoint.safetensors_header import read_header, read_metadata

    path = folder / "x.safetensors"
    path.write_bytes(data)
    read_header(path)
    read_metadata(path)


def config(folder: Path, data: bytes) -> None:
    """config.json of a network, without building it."""
    from gfprune_cli.checkpoint.files import read_config
    from gfprune_cli.checkpoint.layout import locate_all

    (folder / "config.json").write_bytes(data)
    read_config(folder / "config.json", (folder,))
    locate_all(folder)


def network(folder: Path, data: bytes) -> None:
    """A configuration in which pairs of bytes choose other values, and the network that it describes."""
    from gfprune_cli.checkpoint.reader import build_meta, inspect
    from gfprune_cli.checkpoint.source import Source

    (folder / "config.json").write_text(json.dumps(changed(CONFIG, data)))
    build_meta(inspect(Source("x", folder, "local", None), weights_required=False))


def pipeline(folder: Path, data: bytes) -> None:
    """model_index.json."""
    from gfprune_cli.checkpoint.components import check_entries
    from gfprune_cli.checkpoint.layout import locate

    (folder / "model_index.json").write_bytes(data)
    place = locate(folder)
    check_entries(place.pipeline or {}, folder / "model_index.json")


def index(folder: Path, data: bytes) -> None:
    """The index of two shards."""
    from gfprune_cli.checkpoint.weights import read_weights

    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(tensors({name: ENTRY}, b"ab"))
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
    read_weights(folder, None, (folder,))


def record(folder: Path, data: bytes) -> None:
    """gfprune.json."""
    from gfprune_cli.checkpoint.record import read_record

    (folder / "gfprune.json").write_bytes(data)
    read_record(folder)


def recipe(folder: Path, data: bytes) -> None:
    """The recipe of `prune`."""
    from gfprune_cli.recipes.options import resolve_recipe
    from gfprune_cli.recipes.prune import PruneRecipe

    (folder / "recipe.yaml").write_bytes(data)
    resolve_recipe(PruneRecipe, folder / "recipe.yaml", {})


def card(folder: Path, data: bytes) -> None:
    """The model card, which licences are inherited from: it is taken or left, never an error."""
    from gfprune_cli.checkpoint.card import inherited

    (folder / "README.md").write_bytes(data)
    json.dumps(inherited(folder))


def npz(folder: Path, data: bytes) -> None:
    """An archive of images."""
    _images(folder / "images.npz", data)


def image(folder: Path, data: bytes) -> None:
    """One image, of whatever format its first bytes say."""
    (folder / "images").mkdir(exist_ok=True)
    _images(folder / "images" / "a.png", data)


def _images(path: Path, data: bytes) -> None:
    from gfprune_cli.data.images import load_images

    path.write_bytes(data)
    source = path if path.suffix == ".npz" else path.parent
    load_images(str(source), size=(8, 8), channels=3, limit=2)


def tensors(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(document: dict[str, Any], data: bytes) -> dict[str, Any]:
    """`document` with up to eight other values; pairs of bytes say where and what."""
    result = dict(document)
    names = sorted(document)
    for where, what in zip(data[:16:2], data[1:16:2], strict=False):
        name = names[where % len(names)]
        result[name] = NASTY[what % len(NASTY)]
        if where >= 128 and isinstance(document[name], list):  # inside the list
            result[name] = [*document[name][1:], NASTY[what % len(NASTY)]]
    return result


def mutant(seed: bytes, number: int) -> bytes:
    """The mutant of that number: a few bytes of a sound input removed, replaced, repeated or moved."""
    draw = random.Random(number)
    data = bytearray(seed)
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((0, 1, 1, 2, 8, 64)))
        other = draw.randrange(len(data) + 1)
        data[start:stop] = draw.choice(
            (
                b"",
                draw.randbytes(draw.choice((1, 2, 8))),
                draw.choice(TOKENS),
                draw.choice(TOKENS) * draw.choice((1, 2, 100)),
                data[other : other + draw.choice((1, 8, 64))],
                bytes(byte ^ (1 << draw.randrange(8)) for byte in data[start:stop]),
            )
        )
    return bytes(data)


def npz_seed() -> bytes:
    import numpy as np

    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3))
    return stream.getvalue()


def image_seeds() -> list[bytes]:
    import numpy as np
    from PIL import Image

    found = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        stream = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, kind)
        found.append(stream.getvalue())
    return found


def seeds(name: str) -> list[bytes]:
    """Sound inputs of a target."""
    two = {"a": "a.safetensors", "b": "b.safetensors"}
    unet = ["diffusers", "UNet2DModel"]
    document: dict[str, Any] = {
        "source": {"label": "demo", "kind": "demo", "commit": None, "weights": {"a": "0" * 64}},
        "kept": {"a": [0, 1, 5]},
        **{"component": "unet", "class_name": "PrunedUNet2DModel"},
        "recipe": {"criterion": "taylor", "layout": "adaptive"},
        "sparsity": {"achieved": 0.5, "of": "params"},
        **{key: {"before": 2, "after": 1} for key in ("params", "macs", "bytes")},
        "loss": {"before": 0.5, "removed": 0.25},
    }
    if name == "npz":
        return [npz_seed()]
    if name == "image":
        return image_seeds()
    return {
        "header": [
            tensors({"a": ENTRY, "__metadata__": {"format": "pt"}}, b"ab"),
            tensors({"a": ENTRY, "b": ENTRY | {"data_offsets": [2, 4]}}, b"abcd"),
        ],
        "config": [json.dumps(CONFIG).encode()],
        "network": [b""],
        "pipeline": [json.dumps({"_class_name": "DDPMPipeline", "unet": unet, "vae": [None, None]}).encode()],
        "index": [json.dumps({"metadata": {"total_size": 4}, "weight_map": two}).encode()],
        "record": [json.dumps(document).encode()],
        "recipe": [
            b"model: demo\nsparsity: 0.5\nseed: 1\none_shot: true\ndata: null\n",
            b"{criterion: taylor, bound: 5e-1, images: 0x10}\n",
        ],
        "card": [b"---\nlicense: apache-2.0\ndatasets:\n- a\n- b\nlanguage: [en]\n---\n# Title\n"],
    }[name]


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (header, config, network, pipeline, index, record, recipe, card, npz, image)
}


def attempt(name: str, folder: Path, data: bytes) -> None:
    """One input: read, or refused in one line.

    Raises:
        AssertionError: the message is not one line. Anything else that a reader lets through: a defect.
    """
    from gfprune_cli.errors import GfpruneError

    try:
        TARGETS[name](folder, data)
    except GfpruneError as error:
        text = str(error)
        assert text.strip(), "an error without a message"
        assert "\n" not in text, text
        assert len(text) < MESSAGE, text[:MESSAGE]


def fuzz(name: str, arguments: list[str]) -> None:
    """Let libFuzzer choose the inputs by what they cover; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["gfprune_cli", "yaml"]):
        import gfprune_cli.checkpoint.card
        import gfprune_cli.checkpoint.components
        import gfprune_cli.checkpoint.record
        import gfprune_cli.checkpoint.weights
        import gfprune_cli.recipes.options
    if name in ("any", "npz", "image"):
        with atheris.instrument_imports(include=["gfprune_cli"]):
            import gfprune_cli.data.images  # noqa: F401
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=arguments.pop(0)))
    corpus = folder / "corpus"
    corpus.mkdir()
    names = sorted(TARGETS)
    for number, target in enumerate(names):
        if name in ("any", target):
            first = bytes([number] if name == "any" else [])
            for count, seed in enumerate(seeds(target)):
                (corpus / f"{target}-{count}").write_bytes(first + seed)
    place = folder / "input"
    place.mkdir()

    def one_input(data: bytes) -> None:
        if name != "any":
            attempt(name, place, data)
        elif data:
            target = names[data[0] % len(names)]
            for leftover in place.glob("*.json"):  # of another target
                leftover.unlink()
            attempt(target, place, data[1:])

    dictionary = folder / "tokens"
    lines = ("".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS)
    dictionary.write_text("".join(f'"{line}"\n' for line in lines))
    flags = [f"-dict={dictionary}", f"-artifact_prefix={folder}/", *arguments, str(corpus)]
    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
