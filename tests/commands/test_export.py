"""`export`: what is written computes what the source computes, loads elsewhere, repeats, or is not there."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import ONE_SHOT, SMALLER_DEMO, TINY, Gfprune, Shell, examples, fresh
from forked import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import build
from PIL import Image
from safetensors import SafetensorError

import gfprune_cli
from gfprune_cli.checkpoint import shards
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm
from gfprune_cli.deploy import onnx as onnx_model
from gfprune_cli.deploy import safetensors as weights
from gfprune_cli.deploy.format import DTYPES
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.network import ConstantGroupNorm, Denoiser, traced
from gfprune_cli.deploy.parity import draw_inputs
from gfprune_cli.deploy.signature import compact, signature_of
from gfprune_cli.errors import GateMissed, GfpruneError, Interrupted, UsageError
from gfprune_cli.inputs.unknown_classes import Passed, RecordedNetwork
from gfprune_cli.progress import Event
from gfprune_cli.recipes.export import ExportRecipe

FP16 = "unet/diffusion_pytorch_model.fp16"
PICKLES = [bytes([0x80, protocol]) for protocol in range(2, 6)]
JSON_KEYS = {
    "schema_version", "command", "model", "output", "component", "class_name", "format", "dtype", "opset",
    "shards", "bytes", "parity", "seconds",
}  # fmt: skip
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx_model.PACKAGES),
    reason="the extra onnx is not installed",
)

LOAD_ELSEWHERE = """
import sys
sys.modules["gfprune_cli"] = None  # an environment without gfprune
import torch
from diffusers import AutoModel, DiffusionPipeline
plain, variant, results = sys.argv[1:]
half = dict(torch_dtype=torch.float16, trust_remote_code=True)
found = {"plain": DiffusionPipeline.from_pretrained(plain, **half).unet}
found["variant"] = DiffusionPipeline.from_pretrained(variant, variant="fp16", **half).unet
found["auto"] = AutoModel.from_pretrained(variant + "/unet", variant="fp16", **half)
torch.save({name: model.state_dict() for name, model in found.items()}, results)
"""

WITHOUT_GFPRUNE = """
import json, sys
sys.modules["gfprune_cli"] = None
for script in json.loads(sys.argv[1]):
    exec(script, {})
"""

RUN_PROGRAM = """
import sys
sys.modules["gfprune_cli"] = sys.modules["diffusers"] = None  # neither the tool nor the model's class
import torch
model = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([model(**batch) for batch in inputs], sys.argv[3])
"""


@pytest.fixture(scope="module")
def pruned(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, half of its parameters gone; two of its norms are uneven."""
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, align=1, **ONE_SHOT)
    modules = json.loads((out / "unet" / "config.json").read_text())["gfprune"]["modules"]
    assert any(len(set(shape["groups"])) > 1 for shape in modules.values() if "groups" in shape)
    return out


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of one level, which is traced in half of the time."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("short") / "short"
    one = dict(block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDPMPipeline(UNet2DModel(**TINY | one), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def smaller_demo(short: Path, thorough: bool) -> dict[str, str]:
    """What `demo` is in the commands of the documents here."""
    return {} if thorough else {SMALLER_DEMO: str(short)}


@pytest.fixture(scope="module")
def printed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The command line exports to ONNX, in a process that has imported nothing before."""
    out = tmp_path_factory.mktemp("onnx") / "exported"
    return fresh("export", "--model", pruned, "--format", "onnx", "--out", out, "--quiet")


@pytest.fixture(scope="module")
def onnx_folder(printed: subprocess.CompletedProcess[str]) -> Path:
    return Path(printed.stdout.strip())


@pytest.fixture(scope="module")
def program_folder(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("program") / "exported"
    gfprune_cli.export(str(pruned), format="torch-export", out=out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_batches() -> list[dict[str, torch.Tensor]]:
    """Batches and sizes that no trace has seen, one of them past the 64 that diffusers treats apart."""
    return [
        {
            "sample": torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count)),
            "timestep": torch.arange(count) * 9,
        }
        for count, size in ((1, (16, 16)), (70, (16, 16)), (2, (24, 10)))
    ]


def expected(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(batch["sample"], batch["timestep"]).sample
    return output


def test_half_precision_and_shards_load_exactly_without_gfprune(pruned: Path, tmp_path: Path) -> None:
    """Plain names load with no variant=; as a variant, in shards, through pipeline and AutoModel."""
    plain = gfprune_cli.export(str(pruned), dtype="fp16", out=tmp_path / "plain")
    split = gfprune_cli.export(
        str(pruned), dtype="fp16", as_variant=True, max_shard_size="20KB", out=tmp_path / "variant"
    )
    assert plain.shards == 1
    assert split.shards is not None
    assert split.shards > 2
    assert all(name.startswith(f"{FP16}-") for name in split.files)
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
    script = [sys.executable, "-c", LOAD_ELSEWHERE, tmp_path / "plain", tmp_path / "variant", tmp_path / "pt"]
    subprocess.run(list(map(str, script)), check=True, env=environment, timeout=300)
    source = gfprune_cli.load(pruned).half().state_dict()
    for name, found in torch.load(tmp_path / "pt", weights_only=True).items():
        assert found.keys() == source.keys(), name
        assert all(torch.equal(found[key], source[key]) for key in source), name


def test_files_are_named_as_diffusers_names_them(pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    settings: list[tuple[str | None, str]] = [
        (None, "60KB"),
        ("fp16", "50KB"),
        (None, "1GB"),
        ("bf16", "1GB"),
    ]
    for number, (variant, size) in enumerate(settings):
        dtype = getattr(torch, {"fp16": "float16", "bf16": "bfloat16"}.get(str(variant), "float32"))
        theirs, ours = tmp_path / f"theirs{number}", tmp_path / f"ours{number}"
        UNet2DModel(**TINY).to(dtype).save_pretrained(theirs, variant=variant, max_shard_size=size)
        options = {"as_variant": True, "dtype": variant} if variant else {}
        gfprune_cli.export(str(pipeline_folder), max_shard_size=size, out=ours, **options)

        def pattern(folder: Path) -> set[str]:
            # tensors are packed in another order, so that the number of shards may differ
            return {path.name.split("-0")[0] for path in folder.iterdir()}

        assert pattern(ours / "unet") == pattern(theirs)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB", "dtype": "bf16"}])
def test_safetensors_exports_repeat_byte_for_byte(pruned: Path, tmp_path: Path, options: Any) -> None:
    for name in ("a", "b"):
        gfprune_cli.export(str(pruned), out=tmp_path / name / "out", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "out" / "unet" / "gfprune_models_v2.py").exists()


def test_an_export_is_a_checkpoint_and_keeps_the_record(pruned: Path, tmp_path: Path) -> None:
    """Whatever gfprune reads it exports, its own exports included; nothing in the source's record is lost."""
    gfprune_cli.export(str(pruned), dtype="fp16", out=tmp_path / "half")
    gfprune_cli.export(str(tmp_path / "half"), out=tmp_path / "again")
    before = json.loads((pruned / "gfprune.json").read_text())
    for folder, dtype in (("half", "fp16"), ("again", "fp32")):
        record = json.loads((tmp_path / folder / "gfprune.json").read_text())
        assert {key: value for key, value in record.items() if key != "export"} == before
        assert record["export"]["recipe"]["dtype"] == dtype
        assert record["export"]["parity"]["max_rel"] <= record["export"]["parity"]["tolerance"]
    assert "torch_dtype=torch.float16" in (tmp_path / "half" / "README.md").read_text()


def test_the_written_recipe_reproduces_the_export(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    gfprune_cli.export(str(pruned), dtype="bf16", as_variant=True, seed=7, out=tmp_path / "a" / "out")
    recipe = json.loads((tmp_path / "a" / "out" / "gfprune.json").read_text())["export"]["recipe"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = gfprune("export", "--config", tmp_path / "recipe.yaml", "--out", tmp_path / "b" / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'b' / 'out'}\n"
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_dense_bare_model_exports(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    UNet2DModel(**TINY).save_pretrained(tmp_path / "bare")
    result = gfprune_cli.export(str(tmp_path / "bare"), out=tmp_path / "out")
    assert result.component == ""
    assert result.parity.max_abs == 0
    record = json.loads((tmp_path / "out" / "gfprune.json").read_text())
    assert record["command"] == "export"
    assert record["kept"] == {}
    loaded = UNet2DModel.from_pretrained(tmp_path / "out")
    assert loaded.conv_in.out_channels == 16


def test_one_file_holds_weights_and_architecture(pruned: Path, tmp_path: Path) -> None:
    """One metadata key, the same bytes each time, and the same network when loaded."""
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        gfprune_cli.export(str(pruned), single_file=True, out=path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    data = paths[0].read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert list(metadata) == ["gfprune"]
    architecture = json.loads(metadata["gfprune"])
    assert architecture["class_name"] == "PrunedUNet2DModel"
    assert architecture["record"]["kept"] == json.loads((pruned / "gfprune.json").read_text())["kept"]
    source = gfprune_cli.load(pruned).state_dict()
    loaded = gfprune_cli.load(paths[0]).state_dict()
    assert loaded.keys() == source.keys()
    assert all(torch.equal(loaded[name], source[name]) for name in source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_one_file_replaces_and_reads_only_its_own_kind(pruned: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(pruned / "unet" / "diffusion_pytorch_model.safetensors", mine)
    before = mine.read_bytes()
    with pytest.raises(GfpruneError, match="does not say what network"):
        gfprune_cli.load(mine)
    for force, words in ((False, "--force"), (True, "only what gfprune wrote")):
        with pytest.raises(UsageError, match=words):
            gfprune_cli.export(str(pruned), single_file=True, out=mine, force=force)
    with pytest.raises(UsageError, match="ends in"):
        gfprune_cli.export(str(pruned), single_file=True, out=tmp_path / "folder")
    assert mine.read_bytes() == before
    ours = tmp_path / "ours.safetensors"
    gfprune_cli.export(str(pruned), single_file=True, out=ours)
    result = gfprune_cli.export(str(pruned), single_file=True, out=ours, force=True, dtype="fp16")
    assert result.bytes == ours.stat().st_size


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    dimensions=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_the_exported_norm_is_the_uneven_norm(sizes: list[int], dimensions: int, seed: int) -> None:
    torch.manual_seed(seed)
    channels = sum(sizes)
    norm = UnevenGroupNorm(sizes, 1e-5, torch.randn(channels), torch.randn(channels))
    x = 3 * torch.randn(2, channels, *[5] * dimensions) + 1
    torch.testing.assert_close(ConstantGroupNorm(norm)(x), norm(x), rtol=1e-4, atol=1e-4)
    half = x.to(torch.bfloat16)
    assert ConstantGroupNorm(norm)(half).dtype == torch.bfloat16


def test_inputs_cover_low_middle_and_high_noise_in_two_batches_and_sizes(pipeline_folder: Path) -> None:
    from diffusers import DDPMScheduler

    model = gfprune_cli.load(pipeline_folder)
    signature = signature_of(model, DDPMScheduler(), compact(model, own=True))
    free = frozenset({"height", "width"})
    batches = [draw_inputs(model, DDPMScheduler(), signature, free=free, seed=s) for s in (0, 0, 1)]
    for first, same, other in zip(*batches, strict=True):
        assert torch.equal(first["sample"], same["sample"])
        assert not torch.equal(first["sample"], other["sample"])
    assert {len(batch["sample"]) for batch in batches[0]} == {1, 3}
    assert {int(t) for batch in batches[0] for t in batch["timestep"]} == {0, 499, 999}
    assert {tuple(batch["sample"].shape[2:]) for batch in batches[0]} == {(16, 16), (16, 18)}


@NEEDS_ONNX
@pytest.mark.slow
def test_the_exporters_print_nothing(
    printed: subprocess.CompletedProcess[str], pruned: Path, tmp_path: Path, thorough: bool
) -> None:
    """Whatever the libraries log or warn of, stdout is the path and stderr is empty under --quiet."""
    assert (printed.returncode, printed.stderr) == (0, "")
    folder = Path(printed.stdout.removesuffix("\n"))
    assert folder.name == "exported"
    assert (folder / "model.onnx").is_file()
    if thorough:  # which is traced like the other
        out = tmp_path / "program"
        done = fresh("export", "--model", pruned, "--format", "torch-export", "--out", out, "--quiet")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")


@NEEDS_ONNX
def test_onnx_runs_other_batches_and_sizes(pruned: Path, onnx_folder: Path) -> None:
    """Checked by ONNX, run by ONNX Runtime with nothing but NumPy arrays."""
    import onnx
    import onnxruntime

    path = onnx_folder / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = gfprune_cli.load(pruned)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["sample", "timestep"]
    run_here = onnx_model.run_onnx(path, threads=1)
    for batch in other_batches():
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected(model, batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run_here(batch)[0], torch.from_numpy(found))


@NEEDS_ONNX
def test_onnx_folder_has_what_a_sampling_loop_needs_and_nothing_of_this_machine(
    pruned: Path, onnx_folder: Path
) -> None:
    from diffusers import DDIMScheduler

    assert DDIMScheduler.from_pretrained(onnx_folder / "scheduler").config.num_train_timesteps == 1000
    files = contents(onnx_folder)
    assert files.keys() == {
        "model.onnx", "config.json", "gfprune.json", "README.md", "scheduler/scheduler_config.json"
    }  # fmt: skip
    for trace_of_us in (b"site-packages", b".py", os.fsencode(Path.cwd()), b"UNet2D"):
        assert trace_of_us not in files["model.onnx"]
    card = files["README.md"].decode()
    assert "batch x 3 x 2*h x 2*w" in card
    assert "pruned" in card
    export = json.loads(files["gfprune.json"])["export"]
    assert export["opset"] == 20
    assert export["files"] == {"model.onnx": len(files["model.onnx"])}


@NEEDS_ONNX
def test_the_onnx_graph_has_constant_norms(onnx_folder: Path) -> None:
    """Nothing about the groups is worked out at run time."""
    import onnx

    model = onnx.load(onnx_folder / "model.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"CumSum", "GatherND", "Equal", "OneHot", "Range"}
    assert not model.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@NEEDS_ONNX
@pytest.mark.slow
def test_onnx_repeats_byte_for_byte(pruned: Path, onnx_folder: Path, tmp_path: Path) -> None:
    gfprune_cli.export(str(pruned), format="onnx", out=tmp_path / onnx_folder.name)
    assert contents(tmp_path / onnx_folder.name) == contents(onnx_folder)


@NEEDS_ONNX
@pytest.mark.slow
def test_large_onnx_weights_lie_beside_the_graph(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another precision and of another operator set."""
    monkeypatch.setattr(onnx_model, "EXTERNAL_BYTES", 1000)
    planned = gfprune_cli.export(str(short), format="onnx", dry_run=True)
    result = gfprune_cli.export(str(short), format="onnx", out=tmp_path / "apart", opset=18, dtype="fp16")
    assert result.files.keys() == planned.files.keys() == {"model.onnx", "model.onnx.data"}
    assert result.opset == 18
    assert result.parity.max_rel is not None
    assert 0 < result.parity.max_rel < 1e-2


@pytest.mark.parametrize("name", ["ncsnpp", "seams", "resnet-classes"])
def test_timesteps_are_what_the_network_was_trained_with(name: str) -> None:
    """Noise levels as floats for Fourier features, else whole numbers; labels where there are classes."""
    from diffusers import DDPMScheduler, ScoreSdeVeScheduler

    model = build(name)
    scheduler = ScoreSdeVeScheduler() if name == "ncsnpp" else DDPMScheduler()
    inputs = signature_of(model, scheduler, compact(model, own=True)).inputs
    assert inputs["timestep"].dtype == (torch.float32 if name == "ncsnpp" else torch.int64)
    assert ("class_labels" in inputs) == (name == "resnet-classes")


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.thorough  # other tests know their inputs, and graphs with labels as programs
@pytest.mark.parametrize("name", ["resnet-classes", "ncsnpp", "seams"])
def test_other_architectures_in_onnx(name: str, tmp_path: Path) -> None:
    """Noise levels as floats, class labels, FIR resampling, resampling inside residual blocks."""
    from diffusers import DDPMScheduler, ScoreSdeVeScheduler

    model = build(name)
    scheduler = ScoreSdeVeScheduler() if name == "ncsnpp" else DDPMScheduler()
    exported = traced(Denoiser(copy.deepcopy(model), torch.float32), scheduler)
    signature = exported.signature
    assert signature.inputs["timestep"].dtype == (torch.float32 if name == "ncsnpp" else torch.int64)
    assert exported.labels == {"height", "width"}
    onnx_model.write_onnx(tmp_path, exported.graph, 20)
    run, source = onnx_model.run_onnx(tmp_path / "model.onnx"), weights.run_model(model, signature)
    for batch in draw_inputs(model, scheduler, signature, free=exported.labels, seed=0):
        with torch.no_grad():
            (output,) = source(batch)
        torch.testing.assert_close(run(batch), (output,), rtol=1e-4, atol=1e-4 * float(output.abs().max()))


@NEEDS_ONNX
def test_an_operator_without_translation_is_one_line() -> None:
    class Unusual(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x)

    program = torch.export.export(Unusual(), (torch.eye(3),))
    with pytest.raises(GfpruneError, match=r"at opset 20: .*linalg_eig") as caught:
        onnx_model.to_onnx(Graph(program, {"x": {}}, {"output": {}}), 20)
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_be_traced_is_one_line() -> None:
    from diffusers import UNet2DModel

    class Moody(UNet2DModel):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
            return (sample * 2,) if bool((sample > 0).any()) else (sample,)

    with pytest.raises(GfpruneError, match=r"Moody cannot be traced") as caught:
        traced(Denoiser(Moody(**TINY), torch.float32), None)
    assert "\n" not in str(caught.value)


class Skipping(torch.nn.Module):
    """Empties a list of features, and repeats the one mask that its pipeline passes for the whole batch."""

    config: ClassVar[dict[str, Any]] = {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        features: list[torch.Tensor],
        mask: torch.Tensor,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        while features:
            hidden_states = hidden_states + features.pop()
        joined = torch.cat([hidden_states, mask.repeat(hidden_states.shape[0], 1)], 1)
        return (joined * timestep[:, None],)


def test_what_a_pipeline_passes_is_exported_as_it_is_passed() -> None:
    """Lists stay lists, which networks empty; what is passed once stays one in a batch of any size."""
    inputs = {
        "hidden_states": torch.zeros(1, 4),
        "timestep": torch.ones(1),
        "features": [torch.ones(1, 4), torch.ones(1, 4)],
        "mask": torch.ones(1, 2),
    }
    passed = Passed(inputs, time_factor=1.0, shared=frozenset({"mask"}))
    exported = traced(Denoiser(RecordedNetwork(Skipping(), passed), torch.float32), None)
    assert exported.signature.shared == {"mask"}
    assert exported.free["hidden_states"] == exported.free["features_1"] == {0}
    given = {name: tensor.expand(3, *tensor.shape[1:]) for name, tensor in exported.signature.inputs.items()}
    given["mask"], given["timestep"] = inputs["mask"], torch.arange(3)
    output = exported.program.module()(**given)
    assert output.tolist() == [[2.0 * step] * 4 + [1.0 * step] * 2 for step in range(3)]


def test_the_program_runs_without_gfprune_and_without_the_class(
    pruned: Path, program_folder: Path, tmp_path: Path
) -> None:
    torch.save(other_batches(), tmp_path / "inputs")
    script = [sys.executable, "-c", RUN_PROGRAM, program_folder / "model.pt2", tmp_path / "inputs"]
    subprocess.run([*map(str, script), str(tmp_path / "outputs")], check=True, timeout=300)
    model = gfprune_cli.load(pruned)
    outputs = torch.load(tmp_path / "outputs", weights_only=True)
    for batch, found in zip(other_batches(), outputs, strict=True):
        torch.testing.assert_close(found, expected(model, batch), rtol=1e-4, atol=1e-4)


def test_the_program_holds_no_pickle_and_nothing_of_this_machine(program_folder: Path) -> None:
    with zipfile.ZipFile(program_folder / "model.pt2") as archive:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith(".json"):
                assert b"site-packages" not in data, name
                assert b".py" not in data, name
                assert b'"use_pickle": true' not in data, name
            else:
                assert not data.startswith((b"PK", *PICKLES)), name


def test_the_program_repeats_byte_for_byte(pruned: Path, program_folder: Path, tmp_path: Path) -> None:
    gfprune_cli.export(str(pruned), format="torch-export", out=tmp_path / program_folder.name)
    assert contents(tmp_path / program_folder.name) == contents(program_folder)


@pytest.mark.slow
def test_openvino_computes_the_same(pruned: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    result = gfprune_cli.export(str(pruned), format="openvino", dtype="fp16", out=tmp_path / "out")
    assert result.files.keys() == {"openvino_model.xml", "openvino_model.bin"}
    compiled = openvino.Core().compile_model(
        tmp_path / "out" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    model = gfprune_cli.load(pruned)
    for batch in other_batches():
        found = compiled({name: tensor.numpy() for name, tensor in batch.items()})["output"]
        torch.testing.assert_close(torch.from_numpy(found), expected(model, batch), rtol=1e-2, atol=1e-2)


def test_a_missed_tolerance_leaves_nothing(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    for options in ({"out": "x.safetensors", "single_file": True}, {"out": "out"}):
        out = tmp_path / str(options.pop("out"))
        with pytest.raises(GateMissed, match="--tolerance"):
            gfprune_cli.export(str(pruned), dtype="fp16", tolerance=1e-9, out=out, **options)
    done = gfprune("export", "--model", pruned, "--dtype", "bf16", "--tolerance", "0", "--quiet",
                   "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 3
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_damage_between_writing_and_publishing_is_found(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared is what was written, not what was meant to be."""
    write = shards.write_tensors

    def wrong(path: Path, tensors: Any, **options: Any) -> None:
        write(path, {name: tensor * 1.001 for name, tensor in tensors.items()}, **options)

    monkeypatch.setattr(shards, "write_tensors", wrong)
    with pytest.raises(GateMissed, match="nothing was written"):
        gfprune_cli.export(str(pruned), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "missing"),
    [("onnx", ["onnxruntime"]), ("onnx", ["onnx", "onnxscript"]), ("openvino", ["openvino"])],
)
def test_a_missing_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, missing: list[str]
) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        "gfprune_cli.deploy.format.find_spec", lambda name: None if name in missing else find("json")
    )
    with pytest.raises(UsageError, match=rf"pip install 'gfprune\[{extra}\]'"):
        gfprune_cli.export("demo", format=extra, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "onnx", "as_variant": True}, "--as-variant"),
        ({"format": "torch-export", "max_shard_size": "1GB"}, "--max-shard-size"),
        ({"format": "onnx", "single_file": True}, "--single-file"),
        ({"opset": 20}, "--opset"),
        ({"single_file": True, "max_shard_size": "1GB"}, "--single-file"),
        ({"as_variant": True}, "--as-variant"),
        ({"max_shard_size": "two"}, "--max-shard-size"),
        ({"max_shard_size": "0GB"}, "--max-shard-size"),
        ({"format": "tflite"}, "--format"),
        ({"dtype": "int8"}, "--dtype"),
        ({"tolerance": -1}, "--tolerance"),
        ({"tolerance": float("nan")}, "--tolerance"),
        ({"format": "onnx", "opset": 9}, "--opset"),
    ],
)
def test_settings_that_do_not_fit_are_refused_first(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        gfprune_cli.export("demo", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@NEEDS_ONNX
def test_bfloat16_is_refused_where_nothing_could_verify_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bfloat16"):
        gfprune_cli.export("demo", format="onnx", dtype="bf16", out=tmp_path / "out")


@pytest.mark.parametrize("when", ["before", "safetensors", "graph", "stopped"])
def test_a_run_that_fails_leaves_nothing(
    pruned: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A disk that is full from the start or gets full, and a signal."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full_too(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    def stop(event: Event) -> None:
        if when == "stopped" and event.phase == "verify":
            raise Interrupted("stopped", 15)

    if when == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    if when == "safetensors":
        monkeypatch.setattr("gfprune_cli.outputs.durable.save_file", full)
    if when == "graph":
        monkeypatch.setattr(Path, "write_bytes", full_too)
    error, words = (Interrupted, "stopped") if when == "stopped" else (GfpruneError, "no space left")
    model, form = (short, "torch-export") if when == "graph" else (pruned, "safetensors")
    with pytest.raises(error, match=words):
        gfprune_cli.export(str(model), format=form, out=tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_or_around_the_source_is_refused(pruned: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("keep me")
    for force, words in ((False, "--force"), (True, "only what gfprune wrote")):
        with pytest.raises(UsageError, match=words):
            gfprune_cli.export(str(pruned), out=mine, force=force)
    copied = tmp_path / "copy"
    shutil.copytree(pruned, copied)
    with pytest.raises(UsageError, match="would replace --model"):
        gfprune_cli.export(str(copied), out=copied, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(GfpruneError, match="file"):
        gfprune_cli.export(str(pruned), out=tmp_path / "file" / "out")
    assert contents(copied) == contents(pruned)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_weights_too_large_for_half_precision_are_named(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_out.bias"] += 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GfpruneError, match=r"conv_out\.bias.*float16"):
        gfprune_cli.export(str(folder), dtype="fp16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dry_run_names_the_files_and_writes_nothing(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    flags = ["--model", pruned, "--dtype", "fp16", "--max-shard-size", "20KB", "--json", "--quiet"]
    planned = json.loads(gfprune("export", *flags, "--dry-run", cwd=tmp_path).stdout)
    assert list(tmp_path.iterdir()) == []
    assert planned["output"] is None
    assert planned["parity"] == {
        "max_abs": None, "max_rel": None, "tolerance": 1e-2, "inputs": 0, "sizes": []
    }  # fmt: skip
    done = gfprune("export", *flags, cwd=tmp_path)
    written = json.loads(done.stdout)
    assert written.keys() >= JSON_KEYS
    assert written["parity"].keys() >= {"max_abs", "max_rel", "tolerance", "inputs"}
    assert (written["command"], written["schema_version"]) == ("export", 1)
    assert written["files"].keys() == planned["files"].keys()
    assert written["bytes"] == sum((tmp_path / "pruned-safetensors-fp16" / name).stat().st_size
                                   for name in written["files"])  # fmt: skip
    assert done.stderr == ""


@settings(max_examples=50)
@given(number=st.integers(1, 999), unit=st.sampled_from(sorted(weights.UNITS)))
def test_shard_sizes_are_decimal(number: int, unit: str) -> None:
    assert weights.parse_size(f"{number}{unit}") == number * weights.UNITS[unit]
    assert weights.parse_size(f" {number}.5 {unit.lower()}") == int((number + 0.5) * weights.UNITS[unit])


def test_every_dtype_has_a_tolerance_and_a_type() -> None:
    from typing import get_args, get_type_hints

    from gfprune_cli.deploy.parity import TOLERANCES

    names = set(get_args(get_type_hints(ExportRecipe)["dtype"]))
    assert names == set(TOLERANCES) == set(DTYPES)


@pytest.mark.thorough  # every format is written and run in other tests
@pytest.mark.slow
@NEEDS_ONNX
def test_the_examples_of_the_documentation_run_as_written(
    tmp_path: Path, shell: Shell, server: Server
) -> None:
    """The commands, then a sampling loop per format; only the single file may use gfprune."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    page = Path(__file__).parents[2] / "docs" / "export.md"
    for script in examples(page, "sh"):
        shell(["bash", "-euc", script])
    # optimum's pins keep it out of this environment; test_export_pipeline draws from the folders without it
    found = [script for script in examples(page, "python") if "from optimum" not in script]
    assert len(found) == 5
    own = [script for script in found if "import gfprune_cli" in script]
    others = [script for script in found if script not in own]
    for example in own:
        done = server.run(script=example, folder=str(tmp_path))
        assert done.code == 0, done.stderr
    shell([sys.executable, "-c", WITHOUT_GFPRUNE, json.dumps(others)])
    images = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in images] == [
        f"demo-export-{name}" for name in ("fp16", "onnx", "openvino", "program")
    ]
    # the same noise through three runtimes: the same pictures, but for rounding
    grids = [np.asarray(Image.open(path)).astype(int) for path in images[1:]]
    assert all(np.abs(grid - grids[0]).max() <= 2 for grid in grids)
    assert grids[0].std() > 10
