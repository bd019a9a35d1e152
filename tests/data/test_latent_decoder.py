"""Latents become the pictures that their pipeline makes of them, or a reason why there are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CALLS, COMPONENTS, FAMILIES, flux2_vae, sample

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.data import latent_decoder
from gfprune_cli.data.latent_decoder import LatentDecoder, NotShown
from gfprune_cli.data.latents import as_encoded, as_image, laid_out, normalised
from gfprune_cli.errors import Interrupted

CPU = torch.device("cpu")


def decoder(folder: Path, family: str, size: tuple[int, int, int]) -> LatentDecoder:
    component = inspect(resolve(str(folder)), component=COMPONENTS[family])
    return LatentDecoder(component, load_scheduler(component), size, CPU)


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("stable-diffusion", (16, 16)),
        ("sdxl", (16, 16)),
        ("flux", (16, 24)),
        ("sd3", (16, 16)),
        ("sana", (32, 32)),
    ],
)
def test_pictures_are_those_of_the_pipeline(tmp_path: Path, family: str, size: tuple[int, int]) -> None:
    """Shift, scale and layout are taken back as the pipeline does, also where height and width differ."""
    folder = FAMILIES[family](tmp_path / "dense")
    shape = dict(height=size[0], width=size[1]) if "height" in CALLS[family] else {}
    latents = sample(family, folder, output_type="latent", **shape)
    wanted = torch.as_tensor(np.asarray(sample(family, folder, output_type="np", **shape)))
    found = decoder(folder, family, (*size, 0))(latents, nothing)
    shown = (found.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shown, wanted, atol=1e-5, rtol=0)


def test_squares_of_an_autoencoder_with_a_norm_are_taken_back() -> None:
    """As of FLUX.2: into tokens and out of them again."""
    torch.manual_seed(0)
    vae = flux2_vae()
    latents = torch.randn(1, 4, 8, 6)
    given = normalised(vae, latents, None)
    tokens = laid_out(given, (12, 16), (16, 12))
    image = as_image(tokens, (16, 12), 16)
    assert image is not None
    torch.testing.assert_close(as_encoded(vae, image, None), latents)


def test_large_pictures_are_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_decoder, "LARGEST", 8)
    folder = FAMILIES["stable-diffusion"](tmp_path / "dense")
    assert decoder(folder, "stable-diffusion", (16, 16, 0))(torch.zeros(2, 4, 8, 4), nothing).shape == (
        2,
        3,
        8,
        4,
    )


@pytest.mark.parametrize("case", ["video", "no weights", "no memory", "other latents"])
def test_what_cannot_be_shown_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """No failure of a picture ends a run."""
    folder = FAMILIES["stable-diffusion"](tmp_path / "dense")
    latents = torch.zeros(1, 5 if case == "other latents" else 4, 8, 8)
    if case == "no weights":
        next((folder / "vae").glob("*.safetensors")).unlink()
    if case == "no memory":
        monkeypatch.setattr(latent_decoder, "available", lambda device: 1000)
    reasons = {"no weights": "vae", "no memory": "no memory for the autoencoder"}
    with pytest.raises(NotShown, match=reasons.get(case, "no image")):
        decoder(folder, "stable-diffusion", (16, 16, 5 if case == "video" else 0))(latents, nothing)


def test_a_signal_ends_it(tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("stopped", 15)

    folder = FAMILIES["stable-diffusion"](tmp_path / "dense")
    with pytest.raises(Interrupted):
        decoder(folder, "stable-diffusion", (16, 16, 0))(torch.zeros(1, 4, 8, 8), stop)


def rows(folder: Path) -> tuple[Any, Any]:
    """The dense and the pruned row of a card's picture, without their names."""
    from PIL import Image

    from gfprune_cli.data.sample_rows import MARGIN

    page = np.asarray(Image.open(folder / "samples.png"))[:, MARGIN:]
    return np.split(page, 2)


BRIEF: dict[str, Any] = dict(images=8, sample_steps=2, draws=4, one_shot=True, refit=False, recover=0)


@pytest.mark.thorough  # pictures and cards have tests
def test_cards_of_a_text_to_image_pipeline_show_dense_above_pruned(tmp_path: Path) -> None:
    """The dense row is the same for every sparsity; the prompts of the columns stand beside it."""
    dense, prompts = FAMILIES["stable-diffusion"](tmp_path / "dense"), tmp_path / "prompts.txt"
    prompts.write_text("".join(f"thing number {number}\n" for number in range(8)))
    gfprune_cli.prune(str(dense), sparsity=[0.1, 0.3], out=tmp_path / "out", prompts=prompts, **BRIEF)
    (dense_one, one), (dense_two, two) = (rows(tmp_path / f"out-{share}") for share in (0.1, 0.3))
    assert one.shape == (64, 2 * 64, 3), "a quarter of the images is kept aside"
    assert np.array_equal(dense_one, dense_two)
    assert len({row.tobytes() for row in (dense_one, one, two)}) == 3
    card = (tmp_path / "out-0.3" / "README.md").read_text()
    assert "](samples.png)" in card
    assert "    thing number 6\n    thing number 7\n" in card

    tuned = tmp_path / "tuned"
    gfprune_cli.finetune(
        tmp_path / "out-0.3", out=tuned, steps=1, images=8, batch=2, sample_steps=2, sample_every=1,
        prompts=prompts,
    )  # fmt: skip
    grid = tmp_path / "tuned-logs" / "samples" / "step-000001.png"
    assert (tuned / "samples.png").read_bytes() == grid.read_bytes()
    assert "    thing number 7\n" in (tuned / "README.md").read_text()


def test_images_of_the_user_are_drawn_anew_under_their_captions(tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    lines = ["file_name,text"]
    for number in range(8):
        Image.new("RGB", (16, 16), (number * 30, 0, 0)).save(data / f"{number}.png")
        lines.append(f"{number}.png,red of {number}")
    (data / "metadata.csv").write_text("\n".join(lines))
    dense = FAMILIES["stable-diffusion"](tmp_path / "dense")
    gfprune_cli.prune(str(dense), sparsity=0.3, out=tmp_path / "out", data=str(data), **BRIEF)
    above, below = rows(tmp_path / "out")
    assert not np.array_equal(above, below)
    assert (tmp_path / "out" / "README.md").read_text().count("    red of ") == 2


def test_without_an_autoencoder_nothing_is_shown_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    dense = FAMILIES["dit"](tmp_path / "dense")
    gfprune_cli.prune(
        str(dense / "transformer"), sparsity=0.1, out=tmp_path / "out",
        progress=lambda event: said.append(event.text), **BRIEF,
    )  # fmt: skip
    assert "no samples are shown: there is no autoencoder beside this network" in said
    assert not (tmp_path / "out" / "samples.png").exists()
