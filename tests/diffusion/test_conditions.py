"""Side inputs of networks, guidance in the loss, and noise as the schedulers of diffusers make it."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gfprune_cli.diffusion.conditions import Conditions, call
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.guidance import GuidedProcess, with_guidance
from gfprune_cli.diffusion.process import mean_part
from gfprune_cli.diffusion.schedulers import (
    FlowMatching,
    NoisingProcess,
    Reconstruction,
    VariancePreserving,
    noise_level,
    noising_process,
)
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.guidance_fit import fit_guidance, fit_time
from gfprune_cli.inputs.prompts import BUILT_IN, prompts_fingerprint, read_prompts

COUNT = 3


class Network:
    """Answers with its arguments, and with samples that tell the branches apart."""

    def __call__(self, **arguments: Any) -> Any:
        self.arguments = arguments
        text = arguments["text"].flatten(1).sum(1)
        return (arguments["sample"] + text.view(-1, 1, 1, 1),)


def conditions(branches: int = 2, **changes: Any) -> Conditions:
    values = torch.arange(COUNT * branches * 4, dtype=torch.float64).view(COUNT, branches, 4)
    tensors = {"text": values, "added.ids": values.long(), "added.vector": values[..., :2]}
    shared = {"rotary": (torch.ones(5), torch.zeros(5)), "flag": True, "added.scale": 3}
    return Conditions(tensors, shared, **{"branches": branches, "guidance": 5.0, **changes})


def test_branches_lie_side_by_side_and_come_back_apart() -> None:
    network, made = Network(), conditions()
    x = torch.randn(COUNT, 2, 2, 2)
    output = call(network, x, torch.tensor([1, 2, 3]), made)
    seen = network.arguments
    assert output.shape == (COUNT, 2, 2, 2, 2)
    torch.testing.assert_close(output[1, 0], x[1] + made.tensors["text"][1, 0].sum().float())
    torch.testing.assert_close(output[1, 1], x[1] + made.tensors["text"][1, 1].sum().float())
    assert seen["timestep"].tolist() == [1, 1, 2, 2, 3, 3]
    assert seen["text"].dtype == x.dtype
    assert set(seen["added"]) == {"ids", "vector", "scale"}
    assert seen["added"]["ids"].dtype == torch.long
    assert (seen["flag"], seen["return_dict"]) == (True, False)
    assert torch.equal(seen["rotary"][0], torch.ones(5))


@pytest.mark.parametrize("floats", [False, True])
def test_whole_timesteps_come_in_the_type_that_the_pipeline_passes(floats: bool) -> None:
    network = Network()
    call(network, torch.zeros(COUNT, 1, 2, 2), torch.tensor([1, 2, 3]), conditions(1, time_floats=floats))
    assert network.arguments["timestep"].dtype == (torch.float32 if floats else torch.int64)
    assert network.arguments["timestep"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (2, 5, 3, 3), (2, 4, 3, 6), (2, 4, 3, 3)])
def test_a_learned_variance_is_left_out_whichever_axis_holds_it(shape: tuple[int, ...]) -> None:
    """One for each channel, one for all of them, behind the features of tokens; or none."""
    output, like = torch.randn(shape), torch.zeros(2, 4, 3, 3)
    assert torch.equal(mean_part(output, like), output[:, :4, :, :3])


def test_without_guidance_there_is_no_dimension_of_branches() -> None:
    output = call(Network(), torch.zeros(COUNT, 1, 2, 2), torch.tensor([1, 2, 3]), conditions(1))
    assert output.shape == (COUNT, 1, 2, 2)


def test_the_network_is_told_the_timestep_as_its_pipeline_tells_it() -> None:
    network = Network()
    made = conditions(1, time_factor=-0.001, time_offset=1.0, sign=-1.0, timestep="t")
    output = call(network, torch.zeros(COUNT, 1, 2, 2), torch.tensor([0.0, 250.0, 1000.0]), made)
    torch.testing.assert_close(network.arguments["t"], torch.tensor([1.0, 0.75, 0.0]))
    torch.testing.assert_close(output[:, 0, 0, 0], -made.tensors["text"][:, 0].sum(1).float())


def test_a_second_name_of_the_noise_level_is_told_the_same() -> None:
    network = Network()
    made = conditions(1, time_factor=0.001, twins=("r",))
    call(network, torch.zeros(COUNT, 1, 2, 2), torch.tensor([0.0, 250.0, 1000.0]), made)
    torch.testing.assert_close(network.arguments["r"], torch.tensor([0.0, 0.25, 1.0]))


@settings(max_examples=30)
@given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=6), data=st.data())
def test_a_choice_of_a_choice_is_a_choice(rows: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    made = conditions()[rows]
    wanted = conditions().tensors["text"][[rows[number] for number in chosen]]
    assert len(made) == len(rows)
    assert torch.equal(made[chosen].to("cpu").tensors["text"], wanted)
    assert torch.equal(made[1:].to("cpu").tensors["text"], conditions().tensors["text"][rows[1:]])


def test_conditions_without_tensors_count_their_samples() -> None:
    made = Conditions(timestep=None, rows=(0, 1, 2, 3))
    assert len(made) == 4
    assert len(made[[0, 2]]) == 2
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(
        call(lambda sample, return_dict: (2 * sample,), x, torch.zeros(2), made[[0, 2]]), 2 * x
    )


def test_a_batch_brings_the_conditions_of_its_images() -> None:
    images = torch.arange(COUNT).float().view(-1, 1, 1, 1).expand(-1, 2, 2, 2)
    batch = Draws(images, 10, 0, conditions()).batch("train", 0, 5)
    assert isinstance(batch.condition, Conditions)
    wanted = conditions().tensors["text"][batch.images[:, 0, 0, 0].long()]
    assert torch.equal(batch.condition.tensors["text"], wanted)


# --- guidance ----------------------------------------------------------------------------------------------


def test_guidance_loss_and_distance_by_formula() -> None:
    plain = VariancePreserving(torch.linspace(0.99, 0.01, 10), "epsilon")
    process = with_guidance(plain, conditions(guidance=4.0))
    assert isinstance(process, GuidedProcess)
    assert with_guidance(plain, conditions(1)) is plain
    output, reference = torch.randn(COUNT, 2, 2, 3, 3), torch.randn(COUNT, 2, 2, 3, 3)
    images, noise, index = torch.randn(COUNT, 2, 3, 3), torch.randn(COUNT, 2, 3, 3), torch.tensor([1, 5, 9])

    losses = (output - noise[:, None]).square().flatten(1).mean(1)
    torch.testing.assert_close(process.losses(output, images, noise, index), losses)

    u, c = (output - reference).unbind(1)
    branches = (u.square().flatten(1).mean(1) + c.square().flatten(1).mean(1)) / 2
    guided = (u + 4 * (c - u)).square().flatten(1).mean(1) / (4**2 + 3**2)
    torch.testing.assert_close(process.distance(output, reference, index), (branches + guided) / 2)


def test_guided_sampling_follows_the_guided_output() -> None:
    plain = FlowMatching(torch.linspace(0.01, 1, 100), 1.0)
    process = GuidedProcess(plain, 3.0)
    noise = torch.randn(2, 1, 2, 2)
    made = process.sample(lambda x, t: torch.stack([0.5 * x, 0.7 * x], 1), noise, 5)
    torch.testing.assert_close(made, plain.sample(lambda x, t: 1.1 * x, noise, 5))


@settings(max_examples=40)
@given(
    scale=st.floats(1.5, 20),
    flipped=st.booleans(),
    sign=st.sampled_from([1.0, -1.0]),
    learned=st.booleans(),
)
def test_guidance_is_read_off_what_the_scheduler_was_given(
    scale: float, flipped: bool, sign: float, learned: bool
) -> None:
    source = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=source)
    outputs = torch.randn(2, 8 if learned else 4, 8, 8, generator=source)
    u, c = outputs[:, :4].flip(0) if flipped else outputs[:, :4]
    found = fit_guidance(outputs, sign * (u + scale * (c - u))[None], sample, None, "P")
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert (found.order, found.sign) == ((1, 0) if flipped else (0, 1), sign)
    assert found.remarks == ()


def test_renormalised_guidance_keeps_its_order_and_sign() -> None:
    outputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    c, u = outputs
    guided = u + 4 * (c - u)
    combined = -guided * (c.norm(dim=0) / guided.norm(dim=0))
    found = fit_guidance(outputs, combined[None], outputs[:1], 4.0, "OddPipeline")
    assert (found.scale, found.order, found.sign) == (4.0, (1, 0), -1.0)
    assert "OddPipeline" in found.remarks[0]


def test_guidance_of_another_kind_is_remarked_on() -> None:
    outputs = torch.randn(2, 4, 8, 8)
    found = fit_guidance(outputs, outputs.prod(0)[None], outputs[:1], 6.0, "OddPipeline")
    assert found.scale == 6.0
    assert "OddPipeline" in found.remarks[0]


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([(999.0, 999.0), (749.0, 749.0)], (1.0, 0.0)),
        ([(1000.0, 1.0), (750.0, 0.75)], (0.001, 0.0)),
        ([(1000.0, 0.0), (750.0, 0.25)], (-0.001, 1.0)),
        ([(1000.0, 998.0), (752.0, 752.0)], (1.0, 0.0)),  # rounded to bfloat16
        ([(0.99, 0.99)], (1.0, 0.0)),
        ([(1000.0, 500.0), (500.0, 250.0)], (0.5, 0.0)),
    ],
)
def test_timesteps_as_the_network_is_told_them(pairs: Any, wanted: tuple[float, float]) -> None:
    assert fit_time(pairs, 1000) == pytest.approx(wanted)


def test_a_timestep_that_cannot_be_told_is_an_error() -> None:
    with pytest.raises(GfpruneError, match="one noise level"):
        fit_time([(1000.0, 500.0)], 1000)


# --- noise as the schedulers make it -----------------------------------------------------------------------

BETAS: dict[str, Any] = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
SCHEDULERS: dict[str, Any] = {
    "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "ddpm sample": diffusers.DDPMScheduler(clip_sample=False, prediction_type="sample"),
    "ddim": diffusers.DDIMScheduler(**BETAS, clip_sample=False),
    "ddim v": diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction"),
    "pndm": diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True),
    "euler": diffusers.EulerDiscreteScheduler(**BETAS),
    "euler v": diffusers.EulerDiscreteScheduler(**BETAS, prediction_type="v_prediction"),
    "euler continuous": diffusers.EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", timestep_type="continuous"
    ),
    "dpm": diffusers.DPMSolverMultistepScheduler(**BETAS),
    "dpm flow": diffusers.DPMSolverMultistepScheduler(**FLOW),
    "unipc": diffusers.UniPCMultistepScheduler(**BETAS),
    "unipc flow": diffusers.UniPCMultistepScheduler(**FLOW),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow shift": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow dynamic": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "flow heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "edm": diffusers.EDMEulerScheduler(),
    "edm dpm v": diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction"
    ),
    "cogvideox": diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}
MU = 1.1


def process_of(name: str) -> NoisingProcess:
    return noising_process(SCHEDULERS[name], MU if "dynamic" in name else None)


def levels(process: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] factors of image and noise in the network's input."""
    if isinstance(process, FlowMatching):
        return 1 - process.sigmas, process.sigmas
    return process.signal.sqrt(), (1 - process.signal).sqrt()


def perfect(process: Any, images: torch.Tensor) -> Any:
    """A network that knows the images: its output is the target at the level it is told."""
    times = process.timesteps(torch.arange(process.steps)).float()

    def network(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        now = int((times - float(timestep.flatten()[0])).abs().argmin())
        if isinstance(process, FlowMatching):  # between the levels of the schedule, too
            sigma = timestep.flatten()[0] / process.scale
            return (x - (1 - sigma) * images) / sigma - images
        signal, rest = (values[now] for values in levels(process))
        noise = (x - signal * images) / rest
        return process.target(images, noise, torch.tensor([now] * len(x)))

    return network


def draw_one(scheduler: Any, network: Any, noise: torch.Tensor, **timesteps: Any) -> torch.Tensor:
    """The loop of a diffusers pipeline."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(10, **timesteps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, timestep.reshape(1)), timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_draws_what_a_network_knows_that_is_perfect_for_the_process(name: str) -> None:
    """Inputs, prediction and noise levels are the scheduler's, or its steps would lead elsewhere."""
    process: Any = process_of(name)
    source = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=source)
    noise = torch.randn(2, 3, 4, 4, generator=source)
    shift = {"mu": MU} if "dynamic" in name else {}
    scale = SCHEDULERS[name].config.get("sigma_data", 1.0)  # the process counts images in its units
    made = draw_one(SCHEDULERS[name], perfect(process, images), noise, **shift) / scale
    assert float((made - images).square().mean().sqrt()) < 0.06


@pytest.mark.parametrize(("name", "white"), [("edm", 2.0), ("edm dpm v", 1.0), ("ddpm", 1.0)])
def test_pixels_are_scaled_as_the_network_sees_them(name: str, white: float) -> None:
    """The EDM family divides images by sigma_data, in training and so in all that is measured and shown."""
    assert process_of(name).value_range == (-white, white)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_network_has_no_loss_and_samples_the_images(name: str) -> None:
    process: Any = process_of(name)
    images, noise = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    network = perfect(process, images)
    for level in (process.steps // 50, process.steps // 2, int(process.steps * 0.9)):
        index = torch.full((4,), level)
        x = process.add_noise(images, noise, index)
        output = network(x, process.timesteps(index))
        torch.testing.assert_close(output, network(x, process.timesteps(index)))
        assert float(process.losses(output, images, noise, index).max()) < 1e-5
        variance = torch.cat([output, torch.randn_like(output)], 1)
        assert float(process.losses(variance, images, noise, index).max()) < 1e-5
        assert float(process.distance(output, output, index).max()) == 0
        assert bool((process.min_snr(index, 5.0) > 0).all())
    made = process.sample(network, noise, 4)
    torch.testing.assert_close(made, images, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_ascends_with_the_index_to_almost_nothing_but_noise(name: str) -> None:
    signal, rest = levels(process_of(name))
    assert bool((rest.diff() >= 0).all())
    assert bool((signal.diff() < 0).all())
    assert float(rest[0]) < 0.35
    assert float(signal[-1]) < 0.1


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "cogvideox"])
def test_noisy_inputs_are_those_of_add_noise(name: str) -> None:
    images, noise, index = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([3, 500, 990])
    wanted = SCHEDULERS[name].add_noise(images, noise, index)
    torch.testing.assert_close(process_of(name).add_noise(images, noise, index), wanted)


def test_noisy_inputs_of_flow_matching_are_those_of_scale_noise() -> None:
    scheduler, process = SCHEDULERS["flow shift"], process_of("flow shift")
    images, noise, index = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([3, 500, 990])
    timesteps = scheduler.timesteps.flip(0)[index]
    torch.testing.assert_close(process.timesteps(index), timesteps)
    wanted = scheduler.scale_noise(images, timesteps, noise)
    torch.testing.assert_close(process.add_noise(images, noise, index), wanted)


def test_stable_audio_is_told_angles() -> None:
    pytest.importorskip("torchsde")
    scheduler = diffusers.CosineDPMSolverMultistepScheduler()
    process: Any = noising_process(scheduler)
    index = torch.tensor([0, 500, 999])
    told = process.timesteps(index)
    torch.testing.assert_close(told, scheduler.timesteps.flip(0)[index], rtol=1e-4, atol=1e-5)
    # an angle of a right angle's fraction: image and noise are its cosine and sine
    torch.testing.assert_close(
        process.signal[index].sqrt(), (told * torch.pi / 2).cos(), rtol=1e-4, atol=1e-4
    )


def test_what_an_unknown_scheduler_does_is_not_guessed() -> None:
    with pytest.raises(GfpruneError, match="not supported"):
        noising_process(diffusers.AmusedScheduler(mask_token_id=0))


def test_a_flow_with_inverted_levels_ends_where_its_scheduler_ends() -> None:
    """OmniGen's flow runs from 0 to 1 and predicts images minus noise; the ideal network draws the image."""
    process = noising_process(
        diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0, invert_sigmas=True)
    )
    image, noise = torch.full((1, 1, 4, 4), 0.5), torch.randn(1, 1, 4, 4)
    index = torch.tensor([process.steps - 1])
    assert float(process.timesteps(index)) == 0.0, "pure noise is at 0"
    assert float(process.losses(image - noise, image, noise, index)) == 0.0
    drawn = process.sample(lambda x, timesteps: image - noise, noise, 4)
    torch.testing.assert_close(drawn, image)


def test_the_schedule_of_angles_is_a_flow_to_its_network() -> None:
    """Sana-Sprint: the scheduler counts angles, the network is told a share of noise (arXiv 2503.09641)."""
    scheduler = diffusers.SCMScheduler()
    process = noising_process(scheduler)
    angle = torch.tensor(1.1)
    share = noise_level(scheduler, float(angle))
    image, noise = torch.full((1, 1, 4, 4), 0.5), torch.randn(1, 1, 4, 4)
    index = torch.tensor([round(share * process.steps) - 1])
    seen = (angle.cos() * image + angle.sin() * noise) / (angle.cos() + angle.sin())
    torch.testing.assert_close(process.add_noise(image, noise, index), seen, rtol=0, atol=5e-3)


def test_consistency_models_predict_what_their_scheduler_takes_for_the_image() -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    process = noising_process(scheduler)
    image, noise = torch.full((1, 1, 4, 4), 0.5), torch.randn(1, 1, 4, 4)
    data = scheduler.config.sigma_data
    index = torch.tensor([process.steps // 2])
    sigma = torch.as_tensor(scheduler.sigmas).flip(0)[scheduler.sigmas.flip(0) > 0][index]
    seen = (data * image + sigma * noise) / (sigma**2 + data**2).sqrt()
    torch.testing.assert_close(process.add_noise(image, noise, index), seen.float(), rtol=1e-4, atol=1e-4)


def test_reconstruction_adds_nothing_and_wants_the_input_back() -> None:
    process, images = Reconstruction(), torch.randn(2, 3, 4, 4)
    index = torch.zeros(2, dtype=torch.long)
    assert process.steps == 1
    assert torch.equal(process.add_noise(images, torch.randn(2, 3, 4, 4), index), images)
    wanted = images.square().flatten(1).mean(1)
    torch.testing.assert_close(process.losses(2 * images, images, images, index), wanted)


# --- prompts -----------------------------------------------------------------------------------------------


def test_the_built_in_prompts_are_many_and_different() -> None:
    assert read_prompts(None) == BUILT_IN
    assert len(set(BUILT_IN)) == len(BUILT_IN) == 64
    assert all(0 < len(prompt) < 80 for prompt in BUILT_IN)


def test_a_prompt_file_is_utf_8_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffein Käse \r\n\r\n  \n狐\n".encode())
    assert read_prompts(str(tmp_path / "p.txt")) == ["ein Käse", "狐"]
    assert prompts_fingerprint(str(tmp_path / "p.txt")) != prompts_fingerprint(None)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff", b"a" * 5000, b"x\n" * 100_001])
def test_a_prompt_file_that_is_none_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_prompts(str(path))
    assert str(caught.value).startswith(f"--prompts {path}")
    assert "\n" not in str(caught.value)
