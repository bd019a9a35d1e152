"""What to give in the place of a path that is no diffusers folder, by the files that lie there.

Nothing is loaded: names of files, and at most one header or record. Every sentence names what can be done
today, with methods that exist.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import CONVERSION, quoted, read_json
from gfprune_cli.checkpoint.safetensors_header import read_header, read_metadata
from gfprune_cli.errors import GfpruneError

RECORD, RECORD_BYTES = "gfprune.json", 64 << 20
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
GRAPHS = (".onnx", ".pt2", ".xml", ".engine", ".plan", ".tflite", ".mlmodel", ".mlpackage")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".xz", ".7z")
# What accelerate saves to go on from: of the network, its weights at most, and not what network they are of.
TRAINING = ("optimizer.bin", "optimizer.pt", "random_states_0.pkl", "scheduler.bin", "trainer_state.json")
DESCRIPTIONS = ("model_index.json", "config.json", "scheduler_config.json")
SINGLE_FILE = (
    "load it with from_single_file of its pipeline's class (StableDiffusionPipeline.from_single_file, "
    "StableDiffusionXLPipeline.from_single_file, ...), then save_pretrained, and give that folder"
)
SHARDED = "from_pretrained(..., use_safetensors=False) and save_pretrained of its class"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
STATE = (
    "the state of a training run, which does not say what network it is of: give what the script saved at "
    "its end, or load the state in the script and call save_pretrained of the network"
)
LORA = "merge it into its model first: load_lora_weights, fuse_lora and save_pretrained of the pipeline"


# networks that are not pruned, by their names -> why, and what to do
REFUSED = {
    r"Multi(ControlNetModel|Adapter)$": "holds several networks: prune each in a pipeline that has it alone",
    r"^ControlNetUnionModel$": (
        "is given several pictures at once: prune the denoiser, and make it fit with gfprune carry, or keep "
        "it as it is with --keep-interfaces"
    ),
    r"ControlNet|Adapter$": (
        "adds to the states of the denoiser at places that are not known here, nor to gfprune carry: use it "
        "with the dense denoiser, or with a U-Net that was pruned with --keep-interfaces"
    ),
    r"^AsymmetricAutoencoderKL$": (
        "joins what it makes of a mask to the states of its decoder, which no loss here sees: leave it as "
        "it is"
    ),
    r"^AutoencoderTiny$": (
        "rounds its latents to bytes, so that no gradient reaches its encoder: leave it as it is"
    ),
    r"^AutoencoderDC$": (
        "averages groups of channels beside its layers, and its norms see all channels at once: leave it as "
        "it is"
    ),
    r"^AutoencoderKL(HunyuanImage|KVAE)$": (
        "averages and repeats groups of channels beside its layers: leave it as it is"
    ),
    r"^AutoencoderRAE$": "is made of vision transformers, whose layers no rule here knows: leave it as it is",
    r"^ConsistencyDecoder|DiffusionDecoder": (
        "decodes by denoising, beside the denoiser of the pipeline: leave it as it is"
    ),
    r"^(?!.*(Projection|ConditionEncoder|Embedder)).*(Oobleck|Audio|Vocoder|SAME|LongCat|Music)": (
        "encodes sounds, and the loss is one of images: leave it as it is"
    ),
    r"^Autoencoder|VAE$": "decodes videos, and the loss is one of images: leave it as it is",
}


def why_not(class_name: str) -> str:
    """Why a network of a pipeline is not pruned: the end of a sentence; "" where nothing is known."""
    return next((why for pattern, why in REFUSED.items() if re.search(pattern, class_name)), "")


def instead_of_file(path: Path) -> str:
    """What a file is that was given as the model, and what to do about it: the end of a sentence.

    "" for one that may be a network, in the naming of its authors.
    """
    suffix = path.suffix.lower()
    if suffix in GRAPHS:
        return "is a graph, whose layers cannot be removed any more: give the folder that it was made from"
    if path.name in DESCRIPTIONS or (path.parent / "config.json").is_file():
        return f"is one file of a diffusers folder: give --model {_checkpoint_around(path)}"
    if any((path.parent / name).is_file() for name in TRAINING):
        return f"is a part of {STATE}"
    if suffix in ARCHIVES:
        return "is an archive: unpack it, and give the folder"
    if suffix == ".gguf":
        return (
            "is GGUF: its weights are packed in quantized blocks, which channels cannot be taken from; prune "
            "the safetensors that it was made from, and quantize the result"
        )
    if suffix == ".safetensors":
        return _of_tensors(path)
    return f"is no safetensors file, and gfprune reads no pickle: {SINGLE_FILE}"


def instead_of_folder(root: Path, networks: Sequence[str], roots: tuple[Path, ...]) -> str:
    """What lies in a folder that describes no network, and what to give instead; "" if nothing is known.

    Args:
        networks: its subfolders that hold a network or a pipeline.
    """
    names = sorted(entry.name for entry in root.iterdir())
    if (root / RECORD).is_file() and (found := _own_output(root, roots)):
        return found
    if found := _of_the_cache(root):
        return found
    if networks:
        others = f", or {root / networks[1]}" if len(networks) > 1 else ""
        return f", but holds {' and '.join(networks[:4])}: give --model {root / networks[0]}{others}"
    if (root.parent / "model_index.json").is_file():
        return f", but a part of one: give --model {root.parent}"
    if any(name.endswith("_lora_weights.safetensors") for name in names):
        return f", but holds a LoRA: {LORA}"
    if any(name in TRAINING for name in names):
        return f", but {STATE}"
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        found = _of_tensors(root / tensors[0])
        what = f", which {found}" if found else f": give --model {root / tensors[0]}"
        return f", only {quoted(tensors[0])}{what}"
    return pickle_hint(names)


def _of_the_cache(root: Path) -> str:
    """What to give for the folder that the Hub's client keeps a repository in; "" if it is none."""
    owner, _, name = root.resolve().name.removeprefix("models--").partition("--")
    snapshots = sorted(path for path in root.glob("snapshots/*") if path.is_dir())
    if not snapshots or not root.resolve().name.startswith("models--"):
        return ""
    return f", but the Hub's cache of one: give --model {owner}/{name}, or {snapshots[-1]}"


def pickle_hint(names: Sequence[str]) -> str:
    """That a folder holds pickles alone, if it does."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        return ""
    if any(_SHARD.search(name) for name in pickles):  # which a plain from_pretrained does not find
        return (
            f", only {quoted(pickles[0])}, and gfprune reads no pickle: convert the component with {SHARDED}"
        )
    return f", only {quoted(pickles[0])}, and gfprune reads no pickle: convert it with {CONVERSION}"


def other_weights_hint(names: Sequence[str], wanted: str) -> str:
    """That weights lie there under another name, if they do; `names` in order."""
    others = [name for name in names if name.endswith(".safetensors")]
    return f", only {quoted(others[0])}: if these are its weights, rename it to {wanted}" if others else ""


def refuse_export(root: Path, roots: tuple[Path, ...]) -> None:
    """Refuse a folder that `gfprune export` wrote in a format whose layers cannot be removed any more.

    Raises:
        GfpruneError: it is one; the line names what it was exported from.
    """
    if (root / RECORD).is_file() and (found := _own_output(root, roots)):
        raise GfpruneError(f"{root} is no diffusers folder{found}")


def _own_output(root: Path, roots: tuple[Path, ...]) -> str:
    """What gfprune itself wrote there that is no checkpoint; "" if it is one, or the record tells nothing."""
    try:
        document = read_json(root / RECORD, roots, limit=RECORD_BYTES)
    except GfpruneError:  # whoever needs the record will say so
        return ""
    entry = document.get("export")
    settings: Any = entry.get("recipe") if isinstance(entry, dict) else None
    kind = settings.get("format") if isinstance(settings, dict) else None
    if isinstance(entry, dict) and isinstance(kind, str) and kind != "safetensors":
        source = _label(entry.get("model"))
        return f", but gfprune's export to {quoted(kind)}: give what it was exported from{source}"
    if document.get("command") == "eval":
        return ", but samples that gfprune eval wrote: give the model that they were drawn from"
    return ""


def _label(origin: Any) -> str:
    label = origin.get("label") if isinstance(origin, dict) else None
    return f", --model {quoted(label)}" if isinstance(label, str) else ""


def _of_tensors(path: Path) -> str:
    """What one file of tensors is, and what to do with it; "" for one that may be a network."""
    try:
        if "gfprune" in read_metadata(path):
            return "gfprune exported: give the folder that it was exported from"
        if any("lora" in name.lower() for name in read_header(path)):
            return f"is a LoRA: {LORA}; or prune the model, and gfprune carry --adapter makes it fit"
    except GfpruneError:  # damaged, or something else by that name: whatever loads it will say so
        pass
    return ""


def _checkpoint_around(path: Path) -> Path:
    """The pipeline that a file belongs to, or else the folder it lies in."""
    for folder in (path.parent, path.parent.parent):
        if (folder / "model_index.json").is_file():
            return folder
    return path.parent
