"""Row 1: a stranger's ONNX export never runs code, and nothing outside of its directory is read."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.onnx_graph import export_onnx
from serving.benchmark.sessions.worker import load_onnx
from serving.engines.genai import GenaiModel
from serving.engines.generate import stream_text
from serving.engines.onnxruntime import OnnxEngine
from serving.forecast.model_facts import onnx_facts
from serving.onnx_export.files import check_files, read_settings
from serving.readiness import examine_directory
from serving.server.onnx.api import ServerLimits
from serving.server.onnx.server import OnnxApi
from serving.verify.verify import verify
from tests.command_line import sentei
from tests.conftest import make_pico
from toolchain.checkpoint.directory import copy_companions
from toolchain.errors import SenteiError

LIBRARY = """
#include <stdlib.h>
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("SENTEI_TEST_MARKER"), "w")); }
"""


@pytest.fixture(scope="module")
def source(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    make_pico(directory, head_dim=16, num_hidden_layers=1)
    copy_companions(demo_model, directory)
    return directory


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "pico"
    export_onnx(source, out)
    return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library that leaves a trace as soon as it is loaded; without a compiler, a file that only looks like one."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "evil.c").write_text(LIBRARY)
    if not shutil.which("gcc"):
        return b"\x7fELF"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "evil.so", folder / "evil.c"], check=True)
    return (folder / "evil.so").read_bytes()


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "code-has-run"
    monkeypatch.setenv("SENTEI_TEST_MARKER", str(path))
    return path


@pytest.fixture
def strangers(exported: Path, library: bytes, tmp_path: Path) -> Path:
    """A copy with a library beside it; no hashes, or they would be what the stranger wants."""
    copy = Path(shutil.copytree(exported, tmp_path / "export"))
    (copy / "sentei_export.json").unlink()
    (copy / "evil.so").write_bytes(library)
    return copy


def change_settings(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "genai_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def decoder(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["model"]["decoder"].update(keys)


def session(**keys: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["model"]["decoder"]["session_options"].update(keys)


def refuses(use: Callable[[], Any], match: str) -> None:
    with pytest.raises(SenteiError, match=match) as caught:
        use()
    assert "\n" not in str(caught.value)


def everything_that_opens(directory: Path, source: Path) -> list[Callable[[], Any]]:
    return [
        lambda: GenaiModel(directory),
        lambda: OnnxEngine(directory),
        lambda: OnnxApi(directory, ServerLimits(max_num_seqs=1)),
        lambda: load_onnx(directory, "cpu", None),
        lambda: onnx_facts(directory),
        lambda: list(stream_text(directory, "hi", max_new_tokens=2)),
        lambda: verify(directory, source),
    ]


def test_a_library_in_the_settings_is_never_loaded(strangers: Path, source: Path, exported: Path, marker: Path) -> None:
    change_settings(strangers, session(custom_ops_library="evil.so"))
    shutil.copy(exported / "sentei_export.json", strangers)  # verify needs it
    summary = json.loads((strangers / "sentei_export.json").read_text())
    del summary["files"]["genai_config.json"]
    (strangers / "sentei_export.json").write_text(json.dumps(summary))
    for use in everything_that_opens(strangers, source):
        refuses(use, r"session_options\.custom_ops_library is not known to sentei and could run code")
    assert "custom_ops_library" in examine_directory(strangers)["problems"][0]
    assert not marker.exists()


def test_the_command_refuses_in_one_sentence(strangers: Path, marker: Path) -> None:
    change_settings(strangers, session(custom_ops_library="evil.so"))
    done = sentei("generate", strangers, "--prompt", "hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert "custom_ops_library is not known to sentei" in done.stderr and "Traceback" not in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        session(custom_ops_library=str(Path("/tmp/evil.so"))),
        session(**{"session.model_external_initializers_file_folder_path": "/etc"}),
        session(enable_profiling="profile"),
        session(log_id='x", "custom_ops_library": "evil.so'),
        session(log_id="x\\"),
        session(provider_options=[{"cuda": {"user_compute_stream": "94000000000000"}}]),
        session(provider_options=[{"cuda": {"gpu_external_alloc": "94000000000000"}}]),
        session(provider_options=[{"evil": {}}]),
        session(provider_options=[{"OpenVINO": {"cache_dir": "x"}}]),
        decoder(filename="../pico/model.onnx"),
        decoder(filename="/etc/passwd"),
        decoder(filename="model.ort"),
        decoder(pipeline=[{"embed": {"filename": "model.onnx"}}]),
        decoder(run_options={"a": "b"}),
        lambda content: content["model"].update(vision={"filename": "model.onnx"}),
        lambda content: content["model"].update(type="../x"),
        lambda content: content.update(engine={}),
        lambda content: content["search"].update({"\x1b[2J": 1}),
        lambda content: content["model"].update(context_length=2**40),
        lambda content: content["model"].update(context_length=True),
        lambda content: content["search"].update(temperature="hot"),
    ],
)
def test_what_is_not_on_the_list_is_refused(
    strangers: Path, marker: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    change_settings(strangers, change)
    with pytest.raises(SenteiError, match=r"genai_config\.json") as caught:
        GenaiModel(strangers)
    assert str(caught.value).isprintable()
    assert not marker.exists()


@pytest.mark.parametrize("runtime", [OnnxEngine, GenaiModel])
def test_a_key_that_is_given_twice(strangers: Path, marker: Path, runtime: type) -> None:
    path = strangers / "genai_config.json"
    path.write_text(path.read_text().replace('"log_id"', '"provider_options": [], "log_id"'))
    refuses(lambda: runtime(strangers), "provider_options' is there twice")


def test_a_package_manifest_beside_the_settings(strangers: Path) -> None:
    """onnxruntime-genai would read its settings elsewhere."""
    (strangers / "manifest.json").write_text("{}")
    refuses(lambda: GenaiModel(strangers), r"manifest\.json is not known to sentei")


def with_location(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location

    return change


def with_hidden_location(model: onnx.ModelProto) -> None:
    """In a graph inside of a node inside of a node."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
    middle = onnx.helper.make_graph([onnx.helper.make_node("If", ["a"], ["b"], then_branch=inner)], "middle", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["a"], ["b"], then_branch=middle))


@pytest.mark.parametrize(
    "change, message",
    [
        (with_location("../secret"), "not beside the graph"),
        (with_location("/etc/hostname"), "not beside the graph"),
        (with_location("*/_ORT_MEM_ADDR_/*"), "not beside the graph"),
        (with_location(".."), "not beside the graph"),
        (with_location("model.onnx.data\n"), "not beside the graph"),
        (with_location("nowhere"), "does not exist"),
        (with_hidden_location, "not beside the graph"),
        (lambda model: setattr(model.graph.node[0], "domain", "evil"), "'evil.* is not ONNX Runtime's own"),
        (lambda model: model.functions.add(name="f", domain="evil"), "functions of its own"),
        (lambda model: model.metadata_props.add(key="ort_config", value="{}"), "brings session options"),
    ],
)
@pytest.mark.parametrize("runtime", [OnnxEngine, GenaiModel])
def test_a_graph_names_nothing_outside(
    strangers: Path, runtime: type, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    (strangers.parent / "secret").write_bytes(bytes(10**6))
    path = strangers / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    refuses(lambda: runtime(strangers), message)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_a_link_out_of_the_directory(strangers: Path, name: str) -> None:
    outside = strangers.parent / "outside"
    (strangers / name).rename(outside)
    (strangers / name).symlink_to(outside)
    for runtime in (OnnxEngine, GenaiModel):
        refuses(lambda runtime=runtime: runtime(strangers), "is not inside the directory")  # type: ignore[misc]


def test_links_of_the_hubs_cache_are_followed(exported: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in exported.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    check_files(snapshot)
    assert read_settings(snapshot) == read_settings(exported)


def test_every_file_is_hashed(exported: Path, tmp_path: Path) -> None:
    written = {path.name for path in exported.iterdir()} - {"sentei_export.json", "README.md", "verification.json"}
    assert {"genai_config.json", "tokenizer.json", "tokenizer_config.json", "model.onnx.data"} <= written
    for name in sorted(written):
        copy = Path(shutil.copytree(exported, tmp_path / name))
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content.replace(b"2", b"3") if name == "genai_config.json" else content + b" ")
        for runtime in (OnnxEngine, GenaiModel):
            refuses(lambda runtime=runtime, copy=copy: runtime(copy), f"{name} is damaged")  # type: ignore[misc]


def test_an_export_of_an_earlier_version_is_still_read(exported: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "old"))
    summary = json.loads((copy / "sentei_export.json").read_text())
    summary["files"] = {name: facts for name, facts in summary["files"].items() if name.startswith("model.onnx")}
    (copy / "sentei_export.json").write_text(json.dumps(summary))
    GenaiModel(copy)
    assert examine_directory(copy)["problems"] == []


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "", ".", "x\0y", "x" * 5000])
def test_the_list_of_hashes_names_nothing_outside(strangers: Path, exported: Path, name: str) -> None:
    (strangers.parent / "secret").write_text("secret")
    summary = json.loads((exported / "sentei_export.json").read_text())
    summary["files"] |= {name: {"bytes": 6, "sha256": "0" * 64}}
    (strangers / "sentei_export.json").write_text(json.dumps(summary))
    with pytest.raises(SenteiError, match=r"not inside the directory|cannot be read|does not exist"):
        check_files(strangers)


@pytest.mark.parametrize(
    "files", [None, [], {"model.onnx": 3}, {"model.onnx": {"bytes": True, "sha256": "0" * 64}},
              {"model.onnx": {"bytes": 3, "sha256": "x"}}, {"model.onnx": {"bytes": "3"}}]
)  # fmt: skip
def test_a_damaged_list(strangers: Path, exported: Path, files: Any) -> None:
    summary = json.loads((exported / "sentei_export.json").read_text())
    (strangers / "sentei_export.json").write_text(json.dumps(summary | {"files": files}))
    refuses(lambda: check_files(strangers), r"sentei_export\.json does not have the fields it should \(files")


def test_a_fifo_is_no_file(strangers: Path) -> None:
    (strangers / "model.onnx").unlink()
    os.mkfifo(strangers / "model.onnx")
    refuses(lambda: OnnxEngine(strangers), "does not exist")


def test_a_graph_that_is_no_decoder(strangers: Path) -> None:
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    stream = io.BytesIO()
    onnx.save(empty, stream)
    (strangers / "model.onnx").write_bytes(stream.getvalue())
    for use in (onnx_facts, lambda directory: OnnxEngine(directory).generate([5, 6], 2), GenaiModel):
        with pytest.raises(SenteiError, match=str(strangers)):
            use(strangers)


def test_a_location_that_is_no_text(strangers: Path) -> None:
    path = strangers / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"model.onnx.data", b"model.onnx.dat\xff"))
    refuses(lambda: OnnxEngine(strangers), "not beside the graph")


def test_a_context_that_is_no_number(strangers: Path) -> None:
    model = onnx.load(strangers / "model.onnx", load_external_data=False)
    model.metadata_props.add(key="sentei.original_context_length", value="ten")
    (strangers / "model.onnx").write_bytes(model.SerializeToString())
    refuses(lambda: OnnxEngine(strangers).batch_context_length, "original context is 'ten'")


def test_an_error_while_tokens_are_made_is_one_sentence(strangers: Path) -> None:
    """The cache of another width than the graph's."""
    change_settings(strangers, decoder(head_size=32))
    refuses(lambda: list(GenaiModel(strangers).stream([5, 6, 7], 3)), "failed in onnxruntime-genai")
