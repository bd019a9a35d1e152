"""What users of diffusers call on a pruned pipeline, in a process without gfprune: see test_clients.py.

python client_calls.py PRUNED_PIPELINE SCRATCH: prints one JSON document, call -> "ok" or the error.
"""

import copy
import json
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.peft import _SET_ADAPTER_SCALE_FN_MAPPING as SCALES
from diffusers.training_utils import EMAModel
from twins import assert_same

TRUST = dict(trust_remote_code=True)


def same(first: Any, second: Any) -> None:
    """Both networks compute the same."""
    assert_same(first, second, torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 7, 32))


def spawned(unet: Any) -> None:
    """Send a network to a process that begins anew."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=answer, args=(unet, answers))
    process.start()
    assert answers.get(timeout=120) == "PrunedUNet2DConditionModel"
    process.join(60)


def answer(unet: Any, answers: Any) -> None:
    answers.put(type(unet).__name__)


def saved_whole(unet: Any, path: Path) -> None:
    torch.save(unet, path)
    same(torch.load(path, weights_only=False), unet)


def trained(folder: str, scratch: Path) -> None:
    """The frame of diffusers' text-to-image script: average, checkpoint, resume, a pipeline at the end."""
    unet = AutoModel.from_pretrained(folder, subfolder="unet", **TRUST)
    kind = type(unet)
    average = EMAModel(copy.deepcopy(unet).parameters(), model_cls=kind, model_config=unet.config)
    accelerator = Accelerator(cpu=True)

    def save(models: list[Any], weights: list[Any], where: str) -> None:
        average.save_pretrained(f"{where}/unet_ema")
        for model in models:
            model.save_pretrained(f"{where}/unet")
            weights.pop()

    def load(models: list[Any], where: str) -> None:
        average.load_state_dict(EMAModel.from_pretrained(f"{where}/unet_ema", kind).state_dict())
        while models:
            loaded = kind.from_pretrained(where, subfolder="unet")
            model = models.pop()
            model.register_to_config(**loaded.config)
            model.load_state_dict(loaded.state_dict())

    def step() -> None:
        source = torch.Generator().manual_seed(0)
        given = torch.randn(2, 4, 8, 8, generator=source), torch.tensor([5, 900]), torch.ones(2, 7, 32)
        accelerator.backward(unet(*given, return_dict=False)[0].square().mean())
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    unet.train().enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    step()
    accelerator.save_state(str(scratch / "checkpoint"))
    step()
    expected = [parameter.detach().clone() for parameter in unet.parameters()]
    accelerator.load_state(str(scratch / "checkpoint"))
    assert average.optimization_step == 1
    step()
    assert all(map(torch.equal, expected, unet.parameters()))
    average.copy_to(unet.parameters())
    pipeline = StableDiffusionPipeline.from_pretrained(folder, unet=accelerator.unwrap_model(unet))
    pipeline.save_pretrained(scratch / "final")
    same(DiffusionPipeline.from_pretrained(scratch / "final", **TRUST).unet, pipeline.unet.eval())


def main(where: Path, scratch: Path) -> None:
    said = {}

    def attempt(label: str, call: Callable[[], object]) -> None:
        try:
            call()
            said[label] = "ok"
        except Exception as error:
            said[label] = f"{type(error).__name__}: {error}"

    def misread() -> Any:
        return UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", ignore_mismatched_sizes=True, low_cpu_mem_usage=False
        )

    folder = str(where)
    unet = AutoModel.from_pretrained(f"{folder}/unet", **TRUST)
    pipeline = DiffusionPipeline.from_pretrained(folder, **TRUST)  # runs the file once more
    image = StableDiffusionImg2ImgPipeline.from_pipe
    automatic = AutoModel.from_pretrained
    attempt("AutoModel, subfolder", lambda: same(automatic(folder, subfolder="unet", **TRUST), unet))
    attempt("AutoModel, another subfolder", lambda: automatic(folder, subfolder="vae", **TRUST).decoder)
    attempt("pipeline with a network", lambda: DiffusionPipeline.from_pretrained(folder, unet=unet))
    attempt("pipeline without one", lambda: DiffusionPipeline.from_pretrained(folder, unet=None, **TRUST))
    attempt("pickle", lambda: same(pickle.loads(pickle.dumps(unet)), unet))
    attempt("pickle of the second load", lambda: same(pickle.loads(pickle.dumps(pipeline.unet)), unet))
    attempt("torch.save", lambda: saved_whole(unet, scratch / "whole.pt"))
    attempt("spawn", lambda: spawned(unet))
    attempt("from_pipe", lambda: same(image(pipeline).unet, unet))
    attempt("from_pipe, automatic", lambda: same(AutoPipelineForImage2Image.from_pipe(pipeline).unet, unet))
    attempt("stock class", lambda: UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))
    attempt("stock class, mismatches ignored", misread)
    attempt("training script", lambda: trained(folder, scratch))
    attempt("scales by block", lambda: SCALES["PrunedUNet2DConditionModel"](unet, [{"down": 0.5}]))
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
