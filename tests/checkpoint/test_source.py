"""Where checkpoints come from: folders, and a Hub that really answers HTTP."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, hub_server

from gfprune_cli.checkpoint import source as source_module
from gfprune_cli.checkpoint.source import looks_like_hub_id, resolve
from gfprune_cli.errors import GfpruneError, UsageError

REPO = "someone/tiny-ddpm"

# huggingface_hub reads its environment once, at import: each Hub test is a process of its own, as for users.
RESOLVE = """
import json, sys
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import GfpruneError
events = []
try:
    source = resolve(progress=events.append, **json.loads(sys.argv[1]))
except GfpruneError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
else:
    files = sorted(p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*") if p.is_file())
    print(json.dumps({
        "folder": str(source.folder), "commit": source.commit, "kind": source.kind, "files": files,
        "bytes": max((event.step for event in events), default=0),
    }))
"""


def fake_pipeline(folder: Path, weights: list[str], *, unet: str = "UNet2DModel") -> Path:
    """The files of a pipeline as the Hub lists them; what the weights hold does not matter to a download."""
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", unet],
    }
    files = {
        "model_index.json": json.dumps(index),
        "README.md": "---\nlicense: apache-2.0\n---\n",
        "unet/config.json": json.dumps({"_class_name": unet}),
        "scheduler/scheduler_config.json": json.dumps({"_class_name": "DDPMScheduler"}),
        "samples/cat.png": "no model file",
        **{name: f"weights {name}" for name in weights},
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


PLAIN = "unet/diffusion_pytorch_model.safetensors"
FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"
JSON = ["README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    repo = fake_pipeline(
        tmp_path / "repo", [PLAIN, FP16, "unet/diffusion_pytorch_model.bin", "v1-pruned.safetensors"]
    )
    with hub_server({REPO: repo}) as served:
        yield served


def run_resolve(
    home: Path, hub: Hub | None, environment: dict[str, str] | None = None, **arguments: object
) -> dict:
    """`resolve` in a fresh process; returns what it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    endpoint = {"HF_ENDPOINT": hub.url} if hub else {}
    env = clean | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"} | endpoint | (environment or {})
    call = [sys.executable, "-c", RESOLVE, json.dumps({"model": REPO} | arguments)]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "hf_right" not in done.stderr + done.stdout
    return dict(json.loads(done.stdout), stderr=done.stderr)


class TestFolders:
    def test_a_folder_is_taken_as_it_is(self, tmp_path: Path) -> None:
        source = resolve(str(tmp_path))
        assert (source.folder, source.kind, source.commit) == (tmp_path, "local", None)

    def test_demo_is_the_package_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source_module, "DEMO", tmp_path)
        source = resolve("demo")
        assert (source.label, source.folder, source.kind) == ("demo", tmp_path, "demo")

    def test_a_missing_demo_says_reinstall(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(source_module, "DEMO", tmp_path / "absent")
        with pytest.raises(GfpruneError, match="reinstall gfprune"):
            resolve("demo")

    @pytest.mark.parametrize(
        "model", ["./absent", "/absent/model", "a/b/c", "absent", "", "~nobody/x", "a\0b", "../a/b"]
    )
    def test_neither_a_folder_nor_a_hub_id(self, model: str) -> None:
        with pytest.raises(UsageError, match="owner/name"):
            resolve(model)

    def test_a_folder_wins_over_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve("owner/name").kind == "local"

    def test_revision_needs_a_hub_model(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--revision"):
            resolve(str(tmp_path), revision="main")

    def test_a_variant_is_a_name(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="--variant"):
            resolve(str(tmp_path), variant="../fp16")

    @pytest.mark.parametrize("model", ["google/ddpm-cifar10-32", "a/b", "A.b_c/d-e.f"])
    def test_hub_ids(self, model: str) -> None:
        assert looks_like_hub_id(model)

    @pytest.mark.parametrize(
        "model",
        ["a", "a/b/c", "/a/b", "-a/b", "a/..", "a/b--c", "a b/c", "a/b.git", "a/b\n", "a/b.safetensors"],
    )
    def test_what_is_no_hub_id(self, model: str) -> None:
        assert not looks_like_hub_id(model)


class TestHub:
    def test_downloads_the_plain_weights_at_one_commit(self, hub: Hub, tmp_path: Path) -> None:
        result = run_resolve(tmp_path / "home", hub)
        assert (result["commit"], result["kind"]) == (COMMIT, "hub")
        assert result["files"] == [*JSON, PLAIN]
        assert set(hub.downloads()) == set(result["files"])
        assert result["bytes"] > 0
        assert result["stderr"].count("\r") == 0  # no progress bar: the core reports, it does not print

    def test_a_variant_replaces_the_plain_weights(self, hub: Hub, tmp_path: Path) -> None:
        assert run_resolve(tmp_path / "home", hub, variant="fp16")["files"] == [*JSON, FP16]

    def test_config_only_downloads_no_weights(self, hub: Hub, tmp_path: Path) -> None:
        assert run_resolve(tmp_path / "home", hub, config_only=True)["files"] == JSON

    @pytest.mark.parametrize("how", ["flag", "environment"])
    def test_offline_reads_the_cache(self, hub: Hub, tmp_path: Path, how: str) -> None:
        first = run_resolve(tmp_path / "home", hub)
        asked = len(hub.requests)
        if how == "flag":
            second = run_resolve(tmp_path / "home", hub, offline=True)
        else:
            second = run_resolve(tmp_path / "home", hub, {"HF_HUB_OFFLINE": "1"}, revision="main")
        assert (second["folder"], second["commit"]) == (first["folder"], COMMIT)
        assert len(hub.requests) == asked

    def test_offline_without_a_cache(self, hub: Hub, tmp_path: Path) -> None:
        result = run_resolve(tmp_path / "home", hub, offline=True)
        assert result["code"] == 1
        assert "is not in the Hub cache: run once with network access" in result["error"]
        assert hub.requests == []

    def test_offline_with_the_weights_missing(self, hub: Hub, tmp_path: Path) -> None:
        run_resolve(tmp_path / "home", hub, config_only=True)
        result = run_resolve(tmp_path / "home", hub, offline=True)
        assert "only a part of someone/tiny-ddpm is in the Hub cache" in result["error"]

    def test_no_such_repository(self, hub: Hub, tmp_path: Path) -> None:
        result = run_resolve(tmp_path / "home", hub, model="someone/absent")
        assert "not on the Hub, or is private" in result["error"]
        assert "HF_TOKEN" in result["error"]

    def test_no_such_revision(self, hub: Hub, tmp_path: Path) -> None:
        assert "no revision 'v9'" in run_resolve(tmp_path / "home", hub, revision="v9")["error"]

    def test_no_such_variant_downloads_no_weights(self, hub: Hub, tmp_path: Path) -> None:
        result = run_resolve(tmp_path / "home", hub, variant="bf16")
        assert result["code"] == 2
        assert "drop variant, or pass variant fp16" in result["error"]
        assert not any(name.endswith(".safetensors") for name in hub.downloads())

    def test_a_gated_repository_needs_the_token(self, hub: Hub, tmp_path: Path) -> None:
        hub.gated.add(REPO)
        assert "is gated" in run_resolve(tmp_path / "home", hub)["error"]
        assert run_resolve(tmp_path / "home", hub, {"HF_TOKEN": "hf_right"})["commit"] == COMMIT

    @pytest.mark.parametrize("token", ["hf_secret", "hf_sécret", "hf_secret\x7f"])
    def test_a_bad_token_is_never_shown(self, hub: Hub, tmp_path: Path, token: str) -> None:
        result = run_resolve(tmp_path / "home", hub, {"HF_TOKEN": token})
        assert "HF_TOKEN" in result["error"]
        assert "cret" not in result["error"] + result["stderr"]

    def test_no_network(self, hub: Hub, tmp_path: Path) -> None:
        # Port 1 of loopback refuses: as near to a missing network as a test can be without one.
        gone = {"HF_ENDPOINT": "http://user:hf_right@127.0.0.1:1"}
        result = run_resolve(tmp_path / "home", None, gone)
        assert "cannot reach the Hub (127.0.0.1:1)" in result["error"]

    def test_a_refusal_names_its_status(self, hub: Hub, tmp_path: Path) -> None:
        run_resolve(tmp_path / "home", hub)
        hub.answer = 403
        result = run_resolve(tmp_path / "home", hub)
        assert "answered HTTP 403 for someone/tiny-ddpm: check HF_TOKEN" in result["error"]

    def test_an_outage_names_the_cache(self, hub: Hub, tmp_path: Path) -> None:
        hub.answer = 500
        result = run_resolve(tmp_path / "home", hub)
        assert "HF_HUB_OFFLINE=1 for a cached copy" in result["error"]

    def test_an_endpoint_that_is_no_hub(self, hub: Hub, tmp_path: Path) -> None:
        hub.answer = 204
        assert "check HF_ENDPOINT" in run_resolve(tmp_path / "home", hub)["error"]

    def test_pickles_are_refused_before_the_download(self, hub: Hub, tmp_path: Path) -> None:
        hub.repos["old/pickled"] = fake_pipeline(tmp_path / "old", ["unet/diffusion_pytorch_model.bin"])
        result = run_resolve(tmp_path / "home", hub, model="old/pickled")
        assert "safe_serialization=True" in result["error"]
        assert not any(name.endswith(".bin") for name in hub.downloads())

    def test_an_unsupported_pipeline_is_refused_before_the_download(self, hub: Hub, tmp_path: Path) -> None:
        hub.repos["a/dit"] = fake_pipeline(tmp_path / "dit", [PLAIN], unet="FlaxThing")
        result = run_resolve(tmp_path / "home", hub, model="a/dit")
        assert "names no denoiser that gfprune supports (U-Nets and" in result["error"]
        assert PLAIN not in hub.downloads()

    def test_shards_and_a_flat_repository(self, hub: Hub, tmp_path: Path) -> None:
        flat = fake_pipeline(tmp_path / "flat", [])
        shutil.move(flat / "unet" / "config.json", flat / "config.json")
        shutil.rmtree(flat / "unet")
        names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        for name in [*names, "diffusion_pytorch_model.safetensors.index.json", "other.safetensors"]:
            (flat / name).write_text("{}")
        hub.repos["a/flat"] = flat
        files = run_resolve(tmp_path / "home", hub, model="a/flat")["files"]
        assert set(names) < set(files)
        assert "other.safetensors" not in files
