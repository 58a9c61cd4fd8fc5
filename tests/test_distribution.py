"""The wheel: whoever installs it has all that the code reads, and vLLM finds the plugin in it."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest

from serving.server.process import free_port, is_healthy
from tests.accidents.processes import wait_for

ROOT = Path(__file__).parents[1]
PACKAGES = ("toolchain", "export", "serving")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SENTEI = ("-c", "from toolchain.cli.entry import main; main()")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as pip would lay them out."""
    directory = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def python(installed: Path, cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Python with the wheel in front of everything else, and nothing of the repository."""
    command = [sys.executable, "-P", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel: Path) -> None:
    """Templates, locales, task files and markers of types too: no file of a package is known to be unread."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == there
    assert {f"{package}/py.typed" for package in PACKAGES} <= inside
    # What the code opens beside itself.
    opened = re.findall(r'Path\(__file__\)(?:\.with_name\(|\.parent / )"([^"]+)"', sources())
    assert {"locale", "task_files", "templates"} <= set(opened)
    assert [name for name in opened if not any(f"/{name}" in path for path in inside)] == []


def sources() -> str:
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_vllm_finds_the_plugin(installed: Path, tmp_path: Path) -> None:
    code = """
from importlib.metadata import entry_points
(plugin,) = entry_points(group="vllm.general_plugins", name="sentei")
print(plugin.load().__code__.co_filename)
"""
    done = python(installed, tmp_path, "-c", code)
    assert done.stdout.strip() == str(installed / "serving" / "vllm_plugin" / "registration.py"), done.stderr


def test_its_metadata_is_what_pip_reads(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("sentei", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (info / "licenses" / "LICENSE").is_file()
    points = (info / "entry_points.txt").read_text(encoding="utf-8")
    assert "[vllm.general_plugins]\nsentei = serving.vllm_plugin.registration:register" in points
    assert "[console_scripts]\nsentei = toolchain.cli.entry:main" in points


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_templates_are_found_in_the_wheel(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, *SENTEI, "poc", "init", "-o", "poc.yaml", "--lang", "ja")
    assert done.returncode == 0, done.stderr
    assert "CHANGE_ME" in (tmp_path / "poc.yaml").read_text(encoding="utf-8")


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_doctor_and_vllm_find_the_wheel(installed: Path, pruned_wide: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, *SENTEI, "doctor", pruned_wide, "--json")
    assert done.returncode == 0, done.stderr
    port = free_port()
    options = ("--port", str(port), "--max-model-len", "64", "--enforce-eager", "--kv-cache-memory-bytes", "1G")
    command = [sys.executable, "-P", *SENTEI, "serve", str(pruned_wide), "--", *options]
    with (tmp_path / "server.log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: server.poll() is not None or is_healthy(f"http://127.0.0.1:{port}"), timeout_s=300)
        assert server.poll() is None, "the server ended"
        body = {"model": str(pruned_wide), "prompt": "The gardener", "max_tokens": 3}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        server.wait(timeout=120)
