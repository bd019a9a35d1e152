"""How pipelines call their networks: what is joined to samples, what grows, what they insist on."""

from typing import Any

import pytest
import torch
from torch import nn

from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.arguments import Grown
from gfprune_cli.inputs.joined import Joined, find_joined
from gfprune_cli.inputs.observer import Enough, Observer
from gfprune_cli.inputs.pictures import Pictures
from gfprune_cli.inputs.pipeline_run import PipelineOptions, PipelineRun, call_arguments, fit_area

FRAMES, NOISY = 5, 4  # the first frame is given
CHANNELS, OWN = 9, 4


def video() -> torch.Tensor:
    return torch.randn(1, FRAMES, 6, 6, CHANNELS)


def test_a_sample_without_its_first_frame_is_found_among_joined_channels() -> None:
    """The given frame stays with the sample; what is joined along the channels is a condition."""
    given = video()
    found = find_joined(given, given[:, 1:, :, :, 2 : 2 + OWN], 1)
    assert found == Joined(4, 2, OWN, (FRAMES, 6, 6, OWN))


@pytest.mark.parametrize("frames", [1, 2])
def test_a_sample_of_few_of_the_frames_is_not_taken_for_all(frames: int) -> None:
    given = video()
    assert find_joined(given, given[:, :frames, :, :, :OWN], 1) is None


class Network(nn.Module):
    """Answers for as many samples as it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.config: dict[str, Any] = {}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> Any:
        return (self.layer(sample),)


class Pipeline:
    """Draws with a network, and wants a negative prompt where it is asked to."""

    asks: bool = False

    def __init__(self, network: nn.Module) -> None:
        self.network, self.components = network, {"network": network}

    def __call__(self, prompt: Any = None, negative_prompt: Any = None, max_area: int = 1024**2) -> None:
        if self.asks and len(negative_prompt) != len(prompt):
            raise ValueError("one for each prompt")
        for count in (2, 1):
            self.network(torch.zeros(count * len(prompt), 3), torch.ones(1))


class Asking(Pipeline):
    asks = True


def first_run(kind: type[Pipeline]) -> PipelineRun:
    network = Network()
    observer = Observer(network, scheduler=None)
    run = PipelineRun(kind(network), observer, PipelineOptions(), Pictures(), ["a fox"])
    with observer.watching(run.pipeline):
        run.first()
    return run


def test_further_calls_are_answered_for_their_own_samples() -> None:
    """Guidance by several calls, of which the first has two branches and the second one."""
    outputs = first_run(Pipeline).observer.outputs
    assert [len(output) for output in outputs] == [2, 1]
    assert not torch.equal(outputs[0][:1], outputs[1])


def test_a_negative_prompt_is_given_only_where_the_pipeline_fails_without() -> None:
    assert not first_run(Pipeline).emptied
    assert first_run(Asking).emptied


class OneByOne(Pipeline):
    def __call__(self, prompt: Any, negative_prompt: Any = None) -> None:
        if not isinstance(prompt, str):
            raise ValueError("no list of prompts")
        super().__call__([prompt])


def test_a_prompt_comes_alone_only_where_the_pipeline_takes_no_list() -> None:
    assert not first_run(Pipeline).alone
    assert first_run(OneByOne).alone


class Failing(Pipeline):
    def __call__(self, prompt: Any = None, negative_prompt: Any = None) -> None:
        raise ValueError("no prompt" if negative_prompt is None else "still none")


def test_the_first_failure_is_the_one_that_is_told() -> None:
    with pytest.raises(GfpruneError, match="no prompt"):
        first_run(Failing)


def test_the_size_asked_for_reaches_pipelines_that_scale_to_an_area() -> None:
    made = call_arguments(SizedPipeline(Network()), PipelineOptions(size="32x64"))
    assert (made["height"], made["width"], made["max_area"]) == (32, 64, 32 * 64)
    assert "max_area" not in call_arguments(SizedPipeline(Network()), PipelineOptions())


class SizedPipeline(Pipeline):
    def __call__(self, prompt: Any, height: int = 8, width: int = 8, max_area: int = 1024**2) -> None:
        raise Enough


def test_what_is_joined_along_the_batch_grows_with_it() -> None:
    """Rows of tensors and of lists of batches grow; tables of positions and flags do not."""
    table = torch.zeros(2, 7)
    given = {"text": torch.zeros(2, 5), "features": [torch.zeros(2, 3), torch.zeros(2, 6)], "table": table}
    double = {"text": torch.zeros(4, 5), "features": [torch.zeros(4, 3), torch.zeros(4, 6)], "table": table}
    found = Grown.of(given, double, branches=2, factor=2)
    assert found.own == {"text", "features.0", "features.1"}
    assert found.nested == {"features"}


def test_lists_of_what_each_frame_is_given_grow_without_a_second_call() -> None:
    """As of AnimateDiff with a ControlNet: two branches of three frames, and nothing to compare with."""
    given = {
        "residuals": [torch.zeros(6, 4, 8, 8), torch.zeros(6, 8, 4, 4)],
        "tables": [torch.zeros(6, 5), torch.zeros(6, 5)],
        "sizes": [torch.zeros(2, 3, 3), 7],
    }
    found = Grown.most(given, [], 2, pictured=True)
    assert found.own == {"residuals.0", "residuals.1"}
    assert found.nested == {"residuals"}


@pytest.mark.parametrize(("pictured", "own"), [(True, {"features"}), (False, set())])
def test_features_of_a_picture_are_rows_where_a_pipeline_looks_at_the_first_alone(
    pictured: bool, own: set[str]
) -> None:
    """Of two pictures Shap-E draws twice as many samples, and gives them the features of one."""
    given = {"features": torch.zeros(2, 5, 3)}
    assert Grown.most(given, [given], 2, pictured=pictured).own == own
    assert Grown.most(
        {"text": torch.zeros(2, 5)}, [{"text": torch.zeros(4, 5)}], 2, pictured=pictured
    ).own == {"text"}


@pytest.mark.parametrize(("size", "edge"), [(None, 128), ("32x128", 8)])
def test_the_size_asked_for_is_the_area_that_others_are_scaled_to(size: str | None, edge: int) -> None:
    pipeline: Any = Pipeline(Network())
    pipeline.default_sample_size, pipeline.vae_scale_factor = 128, 8
    fit_area(pipeline, PipelineOptions(size=size).pixels())
    assert pipeline.default_sample_size == edge
