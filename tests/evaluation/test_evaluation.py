"""Sampling and metrics against independent implementations: diffusers, scikit-image, scipy, clean-fid."""

import hashlib
import http.client
import importlib
import io
import math
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.evaluation.consistency import Consistency, psnr, quantised, ssim
from gfprune_cli.evaluation.footprint import peak_memory
from gfprune_cli.evaluation.inception import OFFICIAL, Extractor, Unavailable, find_extractor
from gfprune_cli.evaluation.protocols import PROTOCOLS, Settings, settings_of
from gfprune_cli.evaluation.quality import (
    Real,
    distances,
    is_statistics,
    read_statistics,
    real_features,
    statistics_bytes,
)
from gfprune_cli.evaluation.sampling import ddim, draw, make_sampling, timestep_list
from gfprune_cli.evaluation.statistics import (
    Gaussian,
    frechet_distance,
    gaussian,
    kernel_distance,
    squared_mmd,
)
from gfprune_cli.evaluation.teacher import denoising_losses
from gfprune_cli.outputs.samples import SampleStore
from gfprune_cli.progress import Event, silent
from gfprune_cli.recipes.evaluate import EvalRecipe

CPU = torch.device("cpu")
SHAPE = (3, 6, 5)


def fake_denoiser(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """A smooth function of each image and its noise level, image by image."""
    level = timesteps.to(x.dtype).view(-1, 1, 1, 1)
    return torch.tanh(0.7 * x + torch.sin(0.01 * level)) + 0.1 * x.roll(1, -1)


def drawn(sampling: Any, members: list[int]) -> torch.Tensor:
    return draw(sampling, fake_denoiser, members=members, shape=SHAPE, seed=3, device=CPU, what="fake")


@given(st.integers(1, 1000), st.sampled_from(["leading", "trailing", "linspace"]), st.integers(0, 1))
def test_timesteps_are_those_of_diffusers(steps: int, spacing: Any, offset: int) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    # rounding in diffusers' trailing spacing adds a step at -1 for some step counts, such as 103
    expected = [min(999, step) for step in scheduler.timesteps.tolist() if step >= 0]
    assert timestep_list(spacing, 1000, steps, offset) == expected


def test_uniform_and_quad_timesteps_are_those_of_the_ddim_code() -> None:
    assert timestep_list("uniform", 1000, 100) == list(range(0, 1000, 10))[::-1]
    assert timestep_list("uniform", 1000, 600)[0] == 998, "starts near pure noise at any step count"
    quad = [int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), 100) ** 2]
    assert timestep_list("quad", 1000, 100) == quad[::-1]
    assert (quad[-1], len(quad)) == (800, 100)


LIMITS: dict[str, dict[str, Any]] = {
    "none": dict(clip_sample=False, set_alpha_to_one=False),
    "clip": dict(clip_sample=True),
    "wider clip": dict(clip_sample=True, clip_sample_range=2.5),
    "threshold": dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5),
}


@pytest.mark.matrix(3)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize(
    ("spacing", "steps", "eta"),
    [("leading", 20, 0.0), ("trailing", 25, 0.0), ("trailing", 25, 0.6), ("linspace", 1000, 0.0)],
)
def test_ddim_is_that_of_diffusers(
    prediction: str, limits: str, spacing: Any, steps: int, eta: float
) -> None:
    """Where diffusers' previous timestep is the next one of the list: everywhere but in coarse linspace."""
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, timestep_spacing=spacing, **LIMITS[limits]
    )
    chosen = Settings(2, steps, "ddim", spacing, eta, "clean")
    process = noising_process(scheduler)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    ours = make_sampling(chosen, process, scheduler)(fake_denoiser, noise, generators)

    generators = [torch.Generator().manual_seed(i) for i in (7, 8)]
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        output = fake_denoiser(x, timestep.expand(2))
        x = scheduler.step(output, timestep, x, eta=eta, generator=generators if eta else None).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=2e-4)


def test_ddpm_and_ddim_with_full_noise_are_the_same_chain() -> None:
    """DDIM at eta 1 is DDPM with the small variance (arXiv 2010.02502, section 4.1)."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    process = noising_process(scheduler)
    found = [
        drawn(make_sampling(Settings(4, 20, name, "leading", eta, "clean"), process, scheduler), [0, 1])
        for name, eta in (("ddpm", 0.0), ("ddim", 1.0))
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=2e-4)


def test_repeated_timesteps_of_quad_change_nothing() -> None:
    process = noising_process(diffusers.DDPMScheduler(clip_sample=False))
    grid = timestep_list("quad", 1000, 100)
    assert len(set(grid)) < len(grid)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    once = list(dict.fromkeys(grid))
    found = [ddim(process, g, 0.5, 1.0, fake_denoiser, noise, seeds()) for g in (grid, once)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=2e-4)


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in (7, 8)]


@pytest.mark.parametrize(
    ("sampler", "spacing", "eta", "scheduler"),
    [
        ("ddim", "quad", 0.8, diffusers.DDPMScheduler()),
        ("ddpm", "quad", 0.0, diffusers.DDPMScheduler()),
        ("pipeline", None, 0.0, diffusers.EulerAncestralDiscreteScheduler()),
        ("pipeline", "trailing", 0.0, diffusers.DPMSolverMultistepScheduler()),
        ("pipeline", None, 0.0, diffusers.PNDMScheduler()),
        ("euler", None, 0.0, diffusers.ScoreSdeVeScheduler()),
    ],
    ids=["ddim", "ddpm", "euler-ancestral", "dpm-solver", "pndm", "probability-flow"],
)
def test_an_image_does_not_depend_on_its_batch(
    sampler: Any, spacing: Any, eta: float, scheduler: Any
) -> None:
    process = noising_process(scheduler)
    sampling = make_sampling(Settings(5, 10, sampler, spacing, eta, "clean"), process, scheduler)
    whole = drawn(sampling, [0, 1, 2, 3, 4])
    apart = torch.cat([drawn(sampling, [0, 1]), drawn(sampling, [2]), drawn(sampling, [3, 4])])
    assert torch.equal(whole, apart)
    assert len({float(image.sum()) for image in whole}) == 5


def test_schedulers_that_cannot_be_seeded_or_spaced_are_refused() -> None:
    process = noising_process(diffusers.DDPMScheduler())
    for spacing, scheduler, words in (
        ("quad", diffusers.DDIMScheduler(), "quad"),
        (None, type("DPMSolverSDEScheduler", (), {})(), "seeded"),
    ):
        settings = Settings(2, 5, "pipeline", spacing, 0.0, "clean")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=words):
            make_sampling(settings, process, scheduler)


def test_a_protocol_sets_everything_and_flags_override_it() -> None:
    process = noising_process(diffusers.DDPMScheduler())
    found = settings_of(EvalRecipe(protocol="ddpm-cifar10"), process)
    assert found == Settings(50_000, 100, "ddim", "quad", 0.0, "legacy_pytorch")
    for name in PROTOCOLS:
        spacing = settings_of(EvalRecipe(protocol=name), process).timestep_spacing  # type: ignore[arg-type]
        assert spacing == ("quad" if name == "ddpm-cifar10" else "uniform")
    own = settings_of(EvalRecipe(protocol="celeba64", samples=64, eta=0.5, fid_mode="clean"), process)
    assert own == Settings(64, 100, "ddim", "uniform", 0.5, "clean")


@pytest.mark.parametrize(
    ("scheduler", "settings", "words"),
    [
        (diffusers.ScoreSdeVeScheduler(), {"sampler": "ddim"}, "explodes"),
        (diffusers.ScoreSdeVeScheduler(), {"protocol": "celeba64"}, "explodes"),
        (diffusers.DDPMScheduler(), {"sampler": "euler"}, "euler"),
        (diffusers.DDPMScheduler(), {"sampler": "ddpm", "eta": 0.5}, "--eta"),
        (diffusers.DDPMScheduler(num_train_timesteps=20), {"steps": 21}, "--steps"),
    ],
)
def test_settings_that_contradict_are_refused(scheduler: Any, settings: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settings_of(EvalRecipe(**settings), noising_process(scheduler))


def pair(channels: int, seed: int = 0, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of smooth images [count, channels, 19, 23] in [0, 1] that resemble each other."""
    source = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=source)
    images = torch.nn.functional.interpolate(coarse, (19, 23), mode="bilinear")
    return images, (images + 0.1 * torch.randn(images.shape, generator=source)).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_and_psnr_are_those_of_scikit_image(channels: int) -> None:
    for prepare in (lambda images: images, quantised):
        first, second = (prepare(images) for images in pair(channels))
        for i, (found, ratio) in enumerate(zip(ssim(first, second), psnr(first, second), strict=True)):
            one, other = (images[i].permute(1, 2, 0).double().numpy() for images in (first, second))
            expected = structural_similarity(
                one,
                other,
                data_range=1.0,
                channel_axis=2,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            assert float(found) == pytest.approx(expected, abs=1e-6)
            assert float(ratio) == pytest.approx(peak_signal_noise_ratio(one, other, data_range=1.0))


def test_equal_images_have_ssim_exactly_one_and_no_finite_psnr() -> None:
    images = torch.cat([pair(3)[0], torch.zeros(1, 3, 19, 23), torch.full((1, 3, 19, 23), 0.3)])
    found = Consistency()
    found.add(images, images, eight_bit=True)
    metrics = found.metrics()
    assert metrics["ssim"] == {"value": 1.0, "ci95": [1.0, 1.0], "n": 5}
    assert metrics["ssim_8bit"]["value"] == 1.0
    assert metrics["psnr"] == {"value": None, "ci95": None, "n": 5, "identical": 5}


def test_equal_pairs_are_counted_apart_from_the_mean_psnr() -> None:
    first, second = pair(3, count=4)
    second[0] = first[0]
    found = Consistency()
    found.add(first, second, eight_bit=False)
    expected = psnr(first[1:], second[1:]).mean()
    assert found.metrics()["psnr"]["value"] == pytest.approx(float(expected))
    assert found.metrics()["psnr"]["identical"] == 1


def test_the_interval_is_the_normal_one() -> None:
    first, second = pair(1, count=40)
    found = Consistency()
    found.add(first[:7], second[:7], eight_bit=False)
    found.add(first[7:], second[7:], eight_bit=False)
    values = ssim(first, second).numpy()
    half = 1.96 * values.std(ddof=1) / math.sqrt(40)
    assert found.metrics()["ssim"]["ci95"] == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=1e-5
    )


def test_images_under_the_window_have_no_ssim() -> None:
    small = torch.rand(2, 3, 10, 32)
    with pytest.raises(GfpruneError, match="11 x 11"):
        ssim(small, small)
    found = Consistency()
    found.add(small, small, eight_bit=True)
    assert set(found.metrics()) == {"psnr", "psnr_8bit"}


def features(seed: int, count: int, dimensions: int) -> np.ndarray:
    source = np.random.default_rng(seed)
    mixing = source.normal(size=(dimensions, dimensions))
    return source.normal(size=(count, dimensions)) @ mixing + source.normal(size=dimensions)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_frechet_distance_is_the_one_by_scipys_matrix_root(seed: int, dimensions: int) -> None:
    first, second = (gaussian(features(seed + i, 60, dimensions)) for i in (0, 1))
    root = np.atleast_2d(sqrtm(first.covariance @ second.covariance)).real
    expected = (
        np.sum((first.mean - second.mean) ** 2)
        + np.trace(first.covariance)
        + np.trace(second.covariance)
        - 2 * np.trace(root)
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_frechet_distance_holds_where_covariances_are_singular(seed: int, count: int) -> None:
    """Fewer vectors than dimensions: nothing but the shift may remain between a set and its translate."""
    values = features(seed, count, 12)
    moved = gaussian(values + 3.0)
    scale = np.trace(moved.covariance)
    assert frechet_distance(gaussian(values), gaussian(values)) <= 1e-6 * scale
    assert frechet_distance(gaussian(values), moved) == pytest.approx(12 * 9.0, abs=1e-6 * scale + 1e-9)


@pytest.fixture(scope="module")
def cleanfid() -> Any:
    """clean-fid's own scores. Where no torchvision fits, a stand-in for the one function that they use."""
    pytest.importorskip("cleanfid.resize")
    try:
        importlib.import_module("torchvision.transforms")
        return importlib.import_module("cleanfid.fid")
    except (ImportError, RuntimeError, AttributeError):
        modules = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        inception = types.ModuleType("torchvision.models.inception")
        for block in ("InceptionA", "InceptionC", "InceptionE"):
            setattr(inception, block, torch.nn.Module)
        modules |= {
            "torchvision.models": types.ModuleType("torchvision.models"),
            "torchvision.models.inception": inception,
        }
        modules["torchvision"].transforms = modules["torchvision.transforms"]  # type: ignore[attr-defined]
        modules["torchvision"].models = modules["torchvision.models"]  # type: ignore[attr-defined]
        modules["torchvision.models"].inception = inception  # type: ignore[attr-defined]
        modules["torchvision.transforms"].ToTensor = (  # type: ignore[attr-defined]
            lambda: lambda array: torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        )
        with patch.dict(sys.modules, modules):
            found = importlib.import_module("cleanfid.fid")
        package = importlib.import_module("cleanfid")
        for name in ("features", "inception_pytorch", "utils"):  # built on the stand-in: not for others
            sys.modules.pop(f"cleanfid.{name}", None)
            vars(package).pop(name, None)
        return found


class Pooled(torch.nn.Module):
    """A stand-in for Inception: colours of nine regions, and how they vary."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / 255
        mean = torch.nn.functional.adaptive_avg_pool2d(x, (3, 3))
        square = torch.nn.functional.adaptive_avg_pool2d(x * x, (3, 3))
        return torch.cat([mean, square], 1).flatten(1)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A TorchScript network, and its SHA-256."""
    path = tmp_path_factory.mktemp("network") / "Pooled colours.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Pooled()).save(path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def extractor_of(network_file: tuple[Path, str], mode: Any = "clean") -> Extractor:
    path, digest = network_file
    return find_extractor(str(path), digest, mode, offline=True, device=CPU, progress=silent)


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def random_images(seed: int, count: int, tint: int = 0) -> np.ndarray:
    """uint8 [count, 24, 24, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 200, (count, 6, 6, 3))
    return (coarse.repeat(4, 1).repeat(4, 2) + tint).astype(np.uint8)


@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_distances_are_those_of_clean_fid_on_the_same_folders(
    mode: Any, cleanfid: Any, network_file: tuple[Path, str], tmp_path: Path
) -> None:
    real, drawn = random_images(0, 40), random_images(1, 30, tint=20)
    folders = write_images(tmp_path / "real", real), write_images(tmp_path / "drawn", drawn)
    extractor = extractor_of(network_file, mode)
    options = dict(mode=mode, num_workers=0, device=CPU, verbose=False)
    expected = cleanfid.compute_fid(
        str(folders[1]), str(folders[0]), custom_feat_extractor=extractor.network, **options
    )
    found = distances(
        extractor.features(torch.from_numpy(drawn).permute(0, 3, 1, 2)),
        real_features(str(folders[0]), extractor, size=(24, 24), channels=3, progress=silent),
        extractor,
        seed=0,
    )
    assert found["fd_pooled_colours"]["value"] == pytest.approx(expected, rel=1e-5)


def test_the_kernel_distance_is_that_of_clean_fid(cleanfid: Any) -> None:
    """A subset as large as the set is the set: nothing is left to chance."""
    first, second = features(0, 50, 8), features(1, 50, 8)
    expected = cleanfid.kernel_distance(first, second, num_subsets=1)
    assert squared_mmd(first, second) == pytest.approx(expected)
    assert kernel_distance(first, second, seed=0)["value"] == pytest.approx(expected)


def test_kid_subsets_come_from_the_seed() -> None:
    first, second = features(0, 60, 8), features(1, 40, 8)
    found = [kernel_distance(first, second, seed)["value"] for seed in (5, 5, 6)]
    assert found[0] == found[1] != found[2]


def test_only_inception_is_called_fid(network_file: tuple[Path, str]) -> None:
    extractor = extractor_of(network_file)
    images = torch.from_numpy(random_images(0, 8)).permute(0, 3, 1, 2)
    values = extractor.features(images)
    found = distances(values, Real(gaussian(values), values), extractor, seed=0)
    assert set(found) == {"fd_pooled_colours", "kd_pooled_colours"}
    assert found["fd_pooled_colours"]["value"] == pytest.approx(0, abs=1e-6)
    grey = extractor.features(images[:, :1])
    assert np.array_equal(grey, extractor.features(images[:, :1].repeat(1, 3, 1, 1)))


def test_no_byte_of_unverified_weights_is_loaded(network_file: tuple[Path, str], tmp_path: Path) -> None:
    path, digest = network_file
    changed = tmp_path / "changed.pt"
    changed.write_bytes(path.read_bytes() + b"x")
    with patch("torch.jit.load") as jit, patch("torch.load") as load:
        for name, expected, words in (
            (str(changed), digest, "has SHA-256"),
            (str(path), None, "--inception-sha256"),
            (str(tmp_path / "absent.pt"), digest, "No such file"),
            (None, digest, "give both"),
        ):
            with pytest.raises(UsageError, match=words):
                find_extractor(name, expected, "clean", offline=True, device=CPU, progress=silent)
    assert not jit.called
    assert not load.called


def test_a_damaged_download_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from the cache nor from the network; and without network the message says what to do."""
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path))
    cached = tmp_path / "inception" / OFFICIAL["clean"].name
    cached.parent.mkdir()
    cached.write_bytes(b"not the weights")
    (cached.parent / f".{cached.name}.gfprune-staging-1").mkdir()  # of a run that was killed
    with pytest.raises(Unavailable, match="--inception"):
        find_extractor(None, None, "clean", offline=True, device=CPU, progress=silent)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    with (
        patch("urllib.request.urlopen", return_value=io.BytesIO(b"neither are these")),
        pytest.raises(Unavailable, match="is not the file with SHA-256"),
    ):
        find_extractor(None, None, "clean", offline=False, device=CPU, progress=silent)
    with patch("urllib.request.urlopen", side_effect=OSError("no route")), pytest.raises(Unavailable):
        find_extractor(None, None, "clean", offline=False, device=CPU, progress=silent)
    assert list(cached.parent.iterdir()) == [cached]


def test_official_weights_are_called_fid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of the official TorchScript file, walked with a stand-in under its hash and name."""

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(3, 2048, 1), torch.nn.Flatten()
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    base = Base().eval()
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(base), stream)
    path = tmp_path / "weights.pt"
    path.write_bytes(stream.getvalue())
    digest = hashlib.sha256(stream.getvalue()).hexdigest()
    official = types.SimpleNamespace(**vars(OFFICIAL["clean"]) | {"sha256": digest})
    monkeypatch.setitem(OFFICIAL, "clean", official)
    extractor = find_extractor(str(path), None, "clean", offline=True, device=CPU, progress=silent)
    assert (extractor.fid, extractor.kid) == ("fid", "kid")
    images = torch.full((2, 3, 24, 24), 192, dtype=torch.uint8)
    with torch.no_grad():  # clean-fid shifts and scales by 128
        expected = base(torch.full((2, 3, 299, 299), 0.5)).double().numpy()
    np.testing.assert_allclose(extractor.features(images), expected, rtol=1e-5, atol=1e-6)


def test_the_network_of_legacy_pytorch_takes_verified_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """pytorch-fid's network is built by clean-fid, and its weights come from the file alone."""
    try:
        from cleanfid import inception_pytorch
    except (ImportError, RuntimeError, AttributeError):
        pytest.skip("needs a torchvision that fits torch")
    with (
        patch.object(torch.nn.Module, "load_state_dict", lambda *_: None),
        patch.object(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {}),
    ):
        made = inception_pytorch.fid_inception_v3()
    path = tmp_path / "weights.pth"
    torch.save(made.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    official = types.SimpleNamespace(**vars(OFFICIAL["legacy_pytorch"]) | {"sha256": digest})
    monkeypatch.setitem(OFFICIAL, "legacy_pytorch", official)
    extractor = find_extractor(str(path), None, "legacy_pytorch", offline=True, device=CPU, progress=silent)
    assert extractor.fid == "fid"
    assert extractor.features(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 2048)


def test_saved_statistics_stand_for_their_images(network_file: tuple[Path, str], tmp_path: Path) -> None:
    extractor = extractor_of(network_file)
    values = features(0, 50, 54)
    path = tmp_path / "stats.npz"
    path.write_bytes(statistics_bytes(gaussian(values), extractor))
    assert is_statistics(str(path))
    found, told = read_statistics(path, extractor)
    assert (found.count, told) == (50, [])
    assert frechet_distance(found, gaussian(values)) == pytest.approx(0, abs=1e-4)
    assert statistics_bytes(found, extractor) == path.read_bytes()
    other = extractor_of(network_file, "legacy_pytorch")
    with pytest.raises(UsageError, match="mode 'clean', not 'legacy_pytorch'"):
        read_statistics(path, other)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "sigma"),
        ({"mu": np.full(54, np.nan), "sigma": np.eye(54)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.array([{}], dtype=object)}, "not readable"),
    ],
)
def test_damaged_statistics_are_refused(
    arrays: Any, words: str, network_file: tuple[Path, str], tmp_path: Path
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(GfpruneError, match=words):
        read_statistics(path, extractor_of(network_file))


def test_published_statistics_without_a_name_are_taken_with_a_warning(
    network_file: tuple[Path, str], tmp_path: Path
) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(54), sigma=np.eye(54))
    found, told = read_statistics(path, extractor_of(network_file))
    assert found.count is None
    assert "does not name its extractor and mode" in told[0]
    values = features(0, 50, 54)
    entry = distances(values, Real(found, None), extractor_of(network_file), seed=0)
    assert set(entry) == {"fd_pooled_colours"}  # no kernel distance without the features themselves


def test_losses_by_timestep_add_up_to_the_loss(pipeline_folder: Path) -> None:
    import gfprune_cli

    model = gfprune_cli.load(pipeline_folder)
    process = noising_process(diffusers.DDPMScheduler())
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = denoising_losses(model, model, process, Draws(images, 1000, 0), precision="fp32", progress=silent)
    rows = found.by_timestep()
    assert (rows[0]["from"], rows[-1]["to"]) == (0, 1000)
    assert [row["from"] for row in rows[1:]] == [row["to"] for row in rows[:-1]]
    total = sum(row["loss"] * row["n"] for row in rows) / sum(row["n"] for row in rows)
    assert total == pytest.approx(found.metrics()["loss"]["value"])
    assert found.metrics()["loss_reference"] == found.metrics()["loss"]
    assert all(row["loss"] == row["loss_reference"] for row in rows)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SampleStore]:
    made = SampleStore(tmp_path / "state", {"seed": 1, "steps": 5}, count=7, chunk=3)
    made.begin(resume=False)
    yield made
    made.clear()
    assert not made.folder.exists()


def test_a_store_gives_back_what_was_put(store: SampleStore) -> None:
    images = torch.randn(7, 3, 4, 4)
    for chunk in store.chunks:
        store.put("model", chunk, images[list(store.members(chunk))])
    assert torch.equal(torch.cat(list(store.images("model"))), images)
    assert not store.has("reference", 0)
    store.path("model", 1).write_bytes(b"torn")
    with pytest.raises(GfpruneError, match="--resume"):
        store.get("model", 1)


def test_samples_of_another_run_are_neither_mixed_nor_thrown_away_unasked(store: SampleStore) -> None:
    other = SampleStore(store.folder, {"seed": 2, "steps": 5}, count=7, chunk=3)
    with pytest.raises(UsageError, match="--resume"):
        store.check(resume=False, force=False)
    with pytest.raises(UsageError, match="other seed"):
        other.check(resume=True, force=False)
    store.check(resume=True, force=False)
    other.check(resume=False, force=True)


def test_a_gaussian_of_one_dimension_is_still_one() -> None:
    found = gaussian(np.array([[1.0], [3.0]]))
    assert isinstance(found, Gaussian)
    assert found.covariance.shape == (1, 1)


def test_features_that_are_not_finite_are_no_perfect_score() -> None:
    good = Gaussian(np.zeros(2), np.eye(2), 10)
    for bad in (
        Gaussian(np.array([np.nan, 0]), np.eye(2), 10),
        Gaussian(np.zeros(2), np.full((2, 2), np.nan), 10),
        Gaussian(np.zeros(2), np.eye(2) * 1e308, 10),
    ):
        with pytest.raises(GfpruneError, match="cannot be compared"):
            frechet_distance(bad, good)


def any_extractor(dimensions: int, network: Any = None) -> Extractor:
    return Extractor("x", "clean", "fd_x", "kd_x", network, CPU, dimensions)


@pytest.mark.parametrize("case", ["negative", "lopsided", "announced", "objects", "truncated"])
def test_statistics_that_are_none_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path, sigma = tmp_path / "stats.npz", np.eye(4)
    if case == "negative":
        sigma = -1e9 * sigma
    if case == "lopsided":
        sigma[0, 1] = 5
    np.savez(path, mu=np.zeros(4), sigma=sigma, n=10)
    if case == "announced":
        header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1))) | {"shape": (10**7, 10**7)}
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("mu.npy", stream.getvalue())
            archive.writestr("sigma.npy", stream.getvalue())
    if case == "objects":
        np.savez(path, mu=np.array([{}], dtype=object), sigma=sigma)
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(GfpruneError, match=r"--data .*stats.npz"):
        read_statistics(path, any_extractor(4))


@pytest.mark.parametrize("count", [0, 1, -7, 2.5, np.nan, np.inf, "many", [10, 10], True, None])
def test_a_number_of_images_that_none_can_have_is_refused(count: Any, tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), n=np.array(count))
    with pytest.raises(GfpruneError, match="not readable statistics") as caught:
        read_statistics(path, any_extractor(4))
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_byte_of_statistics_gives_one_line_at_most(position: int, byte: int) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, mu=np.arange(4.0), sigma=np.eye(4), n=10)
    content = bytearray(stream.getvalue())
    content[position % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats.npz"
        path.write_bytes(content)
        told = ""
        try:
            if is_statistics(str(path)):
                assert read_statistics(path, any_extractor(4))[0].mean.shape == (4,)
        except GfpruneError as error:
            told = str(error)
        assert "\n" not in told


def test_statistics_of_another_size_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.zeros(5), sigma=np.eye(5), n=10)
    with (
        patch("numpy.lib.format.read_array", side_effect=[np.array(10)]) as read,
        pytest.raises(UsageError, match="5 dimensions, but x gives 4"),
    ):
        read_statistics(path, any_extractor(4))
    assert read.call_count == 1  # n alone


def test_covariances_are_told_up_to_rounding(tmp_path: Path) -> None:
    """Singular and single-precision ones are covariances; unbounded ones with a negative variance are not."""
    path, values = tmp_path / "stats.npz", gaussian(features(0, 20, 54))
    for scale, dtype in ((1.0, np.float32), (0.0, np.float64), (1e300, np.float64)):
        np.savez(path, mu=values.mean, sigma=(values.covariance * scale).astype(dtype))
        assert read_statistics(path, any_extractor(54))[0].covariance.shape == (54, 54)
    wrong = np.eye(54)
    wrong[0, 0] = -1e-3
    indefinite = np.ones((54, 54)) - 0.5 * np.eye(54)
    for sigma in (wrong, 1e308 * wrong, indefinite):
        np.savez(path, mu=values.mean, sigma=sigma)
        with pytest.raises(GfpruneError, match="is no covariance"):
            read_statistics(path, any_extractor(54))


def test_features_must_be_finite_and_of_the_size_promised() -> None:
    pytest.importorskip("cleanfid.resize")
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for given_, words in (
        (torch.full((3, 4), torch.nan), "not finite"),
        (torch.zeros(3, 5), r"\[3, 5\] for 3 images, not \[3, 4\]"),
        ((torch.zeros(3, 4),), "a tuple for 3 images"),
        (torch.zeros(3, 4, dtype=torch.int64), "int64"),
    ):
        with pytest.raises(GfpruneError, match=words):
            any_extractor(4, lambda _, given_=given_: given_).features(images)


class Pair(torch.nn.Module):
    """A network that gives no tensor."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def test_networks_that_give_no_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pair.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Pair()).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(GfpruneError, match=r"pair gives a tuple for 2 images, not \[2, D\] features"):
        extractor_of((path, digest))


@pytest.mark.parametrize("name", ["teacher", "Teacher", "pooled_reference", "pooled reference"])
def test_an_extractor_does_not_take_the_name_of_another_distance(
    name: str, network_file: tuple[Path, str], tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.pt"
    path.write_bytes(network_file[0].read_bytes())
    with pytest.raises(UsageError, match="rename the file"):
        extractor_of((path, network_file[1]))
    assert extractor_of(network_file).dimensions == 54


def test_weights_too_large_to_be_any_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    with path.open("wb") as stream:
        stream.truncate((1 << 30) + 1)  # sparse
    for name in (path, tmp_path):
        with patch.object(Path, "read_bytes") as read, pytest.raises(UsageError, match="no regular file of"):
            extractor_of((name, "0" * 64))
        assert not read.called


@pytest.mark.parametrize(
    "error", [http.client.IncompleteRead(b"x"), http.client.BadStatusLine("a\nb"), TimeoutError()]
)
def test_a_broken_download_is_one_line(error: Exception, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    (tmp_path / "inception" / OFFICIAL["clean"].name).mkdir(parents=True)  # no file: fetched
    with (
        patch("urllib.request.urlopen", side_effect=error),
        pytest.raises(Unavailable, match="cannot be fetched") as caught,
    ):
        find_extractor(None, None, "clean", offline=False, device=CPU, progress=silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [2**40, 2**61, 2**62, 2**63])
def test_a_batch_beyond_any_memory_does_not_fit(batch: int, pipeline_folder: Path) -> None:
    import gfprune_cli

    events: list[Event] = []
    model = gfprune_cli.load(pipeline_folder)
    assert peak_memory(model, batch=batch, device=CPU, precision="fp32", progress=events.append) is None
    assert [event.text for event in events] == [
        f"peak memory is not measured: a batch of {batch} does not fit"
    ]


@pytest.mark.parametrize("sampler", ["ddpm", "pipeline"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_a_learned_variance_is_for_schedulers_that_ask_for_it(sampler: Any, variance: str) -> None:
    """A network with twice the channels (arXiv 2102.09672), through diffusers' own loop."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=variance)

    def denoise(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.cat([fake_denoiser(x, timesteps), 0.5 * torch.tanh(x)], 1)

    chosen = Settings(2, 10, sampler, "leading", 0.0, "clean")
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    ours = make_sampling(chosen, noising_process(scheduler), scheduler)(denoise, noise, seeds()[:2])
    again, x = seeds()[:2], noise
    scheduler.set_timesteps(10)
    for timestep in scheduler.timesteps:
        output = denoise(x, timestep.expand(2))
        output = output if variance == "learned_range" else output[:, :3]
        x = scheduler.step(output, timestep, x, generator=again).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=2e-4)
