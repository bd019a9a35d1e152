"""The blocks of docs/clients.md that quantize a pruned model run as they are written, in plain diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import examples
from pipelines import stable_diffusion_1

import gfprune_cli

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
MEANING = {
    "torchao": ("Int8WeightOnlyConfig", "again ="),
    "optimum.quanto": ("QuantoConfig",),
    "gguf": ("gguf",),
}
# what a user would see: the network answers nearly as it did, from weights of eight bits
CHECK = """
import torch
from diffusers import AutoModel

def answer(network):
    given = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 7, 32)
    given = [one.to(network.dtype) if one.is_floating_point() else one for one in given]
    with torch.no_grad():
        return network(*given).sample.float()

plain = AutoModel.from_pretrained("sd-half", subfolder="unet", trust_remote_code=True)
error = (answer(unet) - answer(plain)).norm() / answer(plain).norm()
assert 0 < error < 0.1, error
kinds = {type(part).__name__ for part in (*unet.modules(), *unet.parameters())}
assert kinds & {"Int8Tensor", "QLinear", "GGUFLinear"}, kinds
assert "again" not in globals() or torch.equal(answer(again), answer(unet))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned pipeline of the name that the page has for it."""
    folder = tmp_path_factory.mktemp("quantizing")
    settings = dict(one_shot=True, refit=False, recover=0, images=4, sample_steps=2, draws=4)
    gfprune_cli.prune(
        str(stable_diffusion_1(folder / "dense")), sparsity=0.4, out=folder / "sd-half", **settings
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "package",
    [pytest.param(name, marks=[pytest.mark.thorough] if name == "gguf" else []) for name in MEANING],
)  # gguf is read as the others are
def test_blocks_of_the_page_run_as_written(home: Path, package: str) -> None:
    pytest.importorskip(package, exc_type=ImportError)
    blocks = [block for block in examples(PAGE, "python") if any(word in block for word in MEANING[package])]
    assert len(blocks) == 1 + (package != "optimum.quanto")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([*blocks, CHECK])],
        cwd=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
