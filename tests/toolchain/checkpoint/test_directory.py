import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from toolchain.checkpoint.directory import companion_files, model_name, open_checkpoint, resolve_model
from toolchain.checkpoint.licences import stated_licences
from toolchain.errors import SenteiError
from toolchain.model.loading import load_model, load_tokenizer


def test_pruned_demo_generates_the_same_with_and_without_cache(pruned_demo: Path):
    model, tokenizer = load_model(pruned_demo, dtype=torch.float32), load_tokenizer(pruned_demo)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    cached, uncached = (
        model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)
    assert open_checkpoint(pruned_demo).is_pruned


def test_weights_in_their_makers_own_form_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = ["config.json", "model-00001-of-00002.safetensors", "consolidated.safetensors", "original/params.json"]
    asked: dict[str, list[str]] = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **options: asked.update(options) or tmp_path)
    resolve_model("org/name")
    fetched = list(filter_repo_objects(files, **asked))
    assert "consolidated.safetensors" not in fetched
    assert set(files[:2]) <= set(fetched)


def test_a_model_of_the_hub_states_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub, snapshot = tmp_path / "hub", tmp_path / "snapshot"
    hub.mkdir()
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")

    def download(_model: str, **options: Any) -> str:
        snapshot.mkdir()
        for name in filter_repo_objects([each.name for each in hub.iterdir()], **options):
            shutil.copyfile(hub / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert [each.name for each in stated_licences(resolve_model("org/name"))] == ["apache-2.0"]
    # What is made of the model has a card of its own.
    assert not companion_files(snapshot)


def test_a_model_of_the_hub_is_called_by_its_id(tmp_path: Path):
    snapshot = tmp_path / "models--org--some--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "org/some--name"
    assert model_name(snapshot / ".." / "..") == "models--org--some--name"
    assert model_name(tmp_path) == tmp_path.name


def _when_torch_opens_a_file(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """The safetensors library reads the header, and has torch open the same file once more."""
    really_open = torch.UntypedStorage.from_file

    def happen_and_open(*arguments: Any, **options: Any) -> torch.UntypedStorage:
        happens()
        return really_open(*arguments, **options)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", happen_and_open)


def test_a_file_that_goes_while_it_is_read(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = Path(shutil.copytree(pico_model, tmp_path / "copy"))
    info = open_checkpoint(copy).tensors["model.norm.weight"]
    _when_torch_opens_a_file(monkeypatch, info.file.unlink)
    with pytest.raises(SenteiError, match=r"tensor model\.norm\.weight cannot be read"):
        info.read("model.norm.weight")


def test_memory_that_runs_out_is_no_damage_of_a_file(pico_model: Path, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("unable to mmap 9 bytes from file: Cannot allocate memory (12)")

    info = open_checkpoint(pico_model).tensors["model.norm.weight"]
    _when_torch_opens_a_file(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="Cannot allocate memory") as told:
        info.read("model.norm.weight")
    assert not isinstance(told.value, SenteiError)
