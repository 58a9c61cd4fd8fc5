"""Writes a kit: templates filled with facts. Values get into YAML and JSON through ``tojson``, whose output is both."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from serving.deploy_kit.facts import Kit, Side
from toolchain.errors import MissingDependencyError, SenteiError
from toolchain.outputs import new_directory

# The version that sentei's tests run with; a test holds it against pyproject.toml.
VLLM_VERSION = "0.32.0"
ENVOY_VERSION = "1.40.0"
PROMETHEUS_VERSION = "3.5.0"
GRAFANA_VERSION = "12.0.0"
# The packages that sentei needs and vLLM does not bring, and those of its extra "sign". Tests compare both with
# pyproject.toml.
_NOT_IN_VLLM = ("rich>=13", "scipy>=1.11", "typer>=0.15")
_SIGN = ("cyclonedx-python-lib>=11", "model-signing>=1.1", "packaging", "pyopenssl")
# Shares of the traffic that the candidate gets, in %.
STEPS = (0, 10, 50, 100)
_TEMPLATES = Path(__file__).parent / "templates"
_ALWAYS = (
    "images/server.Containerfile", "images/model.Containerfile", "compose/compose.yaml", "compose/prometheus.yml",
    "compose/grafana/datasources.yaml", "compose/grafana/dashboards.yaml", "compose/grafana/sentei.json",
    "envoy/envoy.yaml", "kubernetes/servers.yaml", "runbook.en.md", "runbook.ja.md",
)  # fmt: skip


def write_kit(kit: Kit, out: Path, *, force: bool = False) -> list[str]:
    """Writes all files of a kit.

    Args:
        kit: What they are filled with.
        out: The directory to create.
        force: Replace an existing one.

    Returns:
        The files, relative to ``out``.

    Raises:
        SenteiError: ``out`` exists, or cannot be written.
        MissingDependencyError: jinja2 is not installed.
    """
    files = dict(_rendered(kit))
    with new_directory(out, force=force) as partial:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        # The wheel goes there; an image build cannot copy from a directory that is missing.
        (partial / "images/wheels").mkdir()
    return sorted(files)


def _rendered(kit: Kit) -> Iterator[tuple[str, str]]:
    environment = _environment()
    common = {
        "kit": kit, "sides": kit.sides, "steps": STEPS, "engine": kit.sides[0].engine,
        "on_gpu": kit.sides[0].on_gpu, "args": lambda side, place="/model": serve_args(kit, side, place),
        "base_image": _base_image(kit), "requirement": f"sentei{_extras(kit)}=={kit.sentei_version}",
        "collected": _collected(kit), "envoy_version": ENVOY_VERSION, "prometheus_version": PROMETHEUS_VERSION,
        "grafana_version": GRAFANA_VERSION, "signed": _is_signed(kit),
        "jobs": f'job=~"{"|".join(kit.object_name(side) for side in kit.sides)}"', "has_kserve": has_kserve(kit),
    }  # fmt: skip

    def render(template: str, **more: Any) -> str:
        text: str = environment.get_template(f"{template}.j2").render(**common, **more)
        return text

    for name in _ALWAYS:
        yield name, render(name)
    if len(kit.sides) == 1:
        yield "envoy/routes/current.yaml", render("envoy/routes.yaml", weights=[100])
        yield "kubernetes/route.yaml", render("kubernetes/route.yaml", weights=[100])
    else:
        yield "gate.yaml", render("gate.yaml")
        yield "envoy/routes/current.yaml", render("envoy/routes.yaml", weights=[100, 0])
        for step in STEPS:
            yield f"envoy/routes/{step}.yaml", render("envoy/routes.yaml", weights=[100 - step, step])
            yield f"kubernetes/route-{step}.yaml", render("kubernetes/route.yaml", weights=[100 - step, step])
    if has_kserve(kit):
        yield "kubernetes/kserve.yaml", render("kubernetes/kserve.yaml", weights=[100, 0][: len(kit.sides)])


def _base_image(kit: Kit) -> str:
    if kit.sides[0].engine == "vllm":
        return f"vllm/vllm-openai:v{VLLM_VERSION}"
    return "python:3.12-slim"


def _extras(kit: Kit) -> str:
    side = kit.sides[0]
    engine = [] if side.engine == "vllm" else ["onnx-gpu" if side.on_gpu else "onnx"]
    names = [*engine, *(["sign"] if _is_signed(kit) else [])]
    return f"[{','.join(names)}]" if names else ""


def _collected(kit: Kit) -> list[str]:
    """What pip is to collect for the image of the server beside sentei's own wheel, without a second torch for vLLM's.

    The wheel is named by its file: the index may have another package of that name.
    """
    if kit.sides[0].engine == "vllm":
        return [*_NOT_IN_VLLM, *(_SIGN if _is_signed(kit) else ())]
    return [f"/wheels/sentei-{kit.sentei_version}-py3-none-any.whl{_extras(kit)}"]


def _is_signed(kit: Kit) -> bool:
    return any(side.is_signed for side in kit.sides)


def has_kserve(kit: Kit) -> bool:
    """Whether KServe can serve it: it starts vLLM by itself, with the model's name in a shell's command line."""
    return kit.sides[0].engine == "vllm" and kit.has_shell_name


def serve_args(kit: Kit, side: Side, place: str) -> list[str]:
    """The command of a server, whose model is at ``place``."""
    signature = ["--require-signature", "/keys/key.pub"] if side.is_signed else []
    # With "=", since a name may begin with a dash.
    options = ["--host", "0.0.0.0", "--port", "8000", f"--served-model-name={kit.model_name}"]
    return ["sentei", "serve", place, *signature, "--", *options, "--max-model-len", str(kit.max_model_len)]


@cache
def _environment() -> Any:
    try:
        jinja2: Any = importlib.import_module("jinja2")
    except ImportError as error:
        raise MissingDependencyError("jinja2", "demo") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=_only_plain,
    )
    environment.filters |= {
        "tojson": _json,
        "compose": lambda value: _json(_each(value, lambda text: text.replace("$", "$$"))),
        "kubernetes": lambda value: _json(_each(value, lambda text: text.replace("$(", "$$("))),
        "shell": lambda value: _Safe(shlex.quote(str(value))),
        "words": lambda values: _Safe(shlex.join(values)),
        "code": _markdown_code,
        "cell": lambda value: _Safe(_markdown_code(value).replace("|", "\\|")),
        "gib": lambda value: _Safe(f"{value / 2**30:.2f}"),
    }
    return environment


class _Safe(str):
    """Text that a filter has made fit for its place."""


_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")


def _only_plain(value: object) -> object:
    """Stops a template that writes text of strangers as it is."""
    if isinstance(value, _Safe | int) or _PLAIN.fullmatch(str(value)) or value == "":
        return value
    raise SenteiError(f"A template writes {value!r} without a filter.", "This is a mistake of sentei's.")


def _json(value: object) -> _Safe:
    """JSON, which is YAML too, but for JSON's escapes of what lies above U+FFFF: such characters stay as they are."""
    return _Safe(json.dumps(value, ensure_ascii=False))


def _each(value: Any, change: Any) -> Any:
    return [change(each) for each in value] if isinstance(value, list) else change(value)


def _markdown_code(value: object) -> _Safe:
    """A name in a paragraph, as code: the fence is longer than any run of backticks in it."""
    text = str(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return _Safe(f"{fence}{pad}{text}{pad}{fence}")
