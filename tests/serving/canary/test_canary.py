"""A canary by the kit's own files, with real servers, a real Envoy and a real Prometheus: no request is lost.

``SENTEI_CANARY_RECORD=FILE pytest -m acceptance tests/serving/canary`` writes what happened, which
``benchmarks/canary.py`` draws.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.command_line import sentei
from tests.conftest import make_pico, prune_by_hand
from tests.serving.canary.load import Load, Prompt
from tests.serving.canary.machine import KEY, SIDES, Machine, machine
from tests.serving.canary.rollout import Record, roll_out
from tests.serving.deploy_kit.kits import program
from toolchain.checkpoint.directory import copy_companions

PER_S, MOST = 15.0, 15_000
MAX_TOKENS = 5


@pytest.fixture(scope="module")
def exports(demo_pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model, and the same with narrower FFNs and two attentions less, both for ONNX Runtime."""
    place = tmp_path_factory.mktemp("exports")
    make_pico(place / "whole", head_dim=16, max_position_embeddings=128)
    copy_companions(demo_pico, place / "whole")
    (place / "pruned").mkdir()
    prune_by_hand(place / "whole", place / "pruned", removed_attention={1, 2}, width=lambda layer: 32)
    for side, source in zip(SIDES, ("whole", "pruned"), strict=True):
        done = sentei("export", "onnx", place / source, "-o", place / side)
        assert done.returncode == 0, done.stderr
    return {side: place / side for side in SIDES}


def prompts(running: Machine) -> list[Prompt]:
    """Prompts of several lengths to which the sides write different answers."""
    made = []
    for length in range(3, 60, 5):
        body = {
            "model": "small", "prompt": [100 + 7 * length + place for place in range(length)],
            "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        answers = {side: running.ask(side, body) for side in SIDES}
        one, other = answers.values()
        if not (one.startswith(other) or other.startswith(one)):
            made.append(Prompt(body, answers))
    assert len(made) >= 6
    return made


@pytest.fixture(scope="module")
def record(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Record:
    for name in ("envoy", "prometheus"):
        program(name)  # before anything is started
    place = tmp_path_factory.mktemp("machine")
    done = sentei("deploy-kit", *exports.values(), "-o", place / "kit", "--served-model-name", "small")
    assert done.returncode == 0, done.stderr
    with machine(place / "kit", exports, place) as running:
        with Load(running.url, KEY, prompts(running), per_s=PER_S, most=MOST) as load:
            rollout = roll_out(running, load)
        found = rollout.finish()
    if keep := os.environ.get("SENTEI_CANARY_RECORD"):
        Path(keep).write_text(json.dumps(asdict(found) | {"not_sent": load.not_sent}))
    assert load.not_sent == 0
    return found


pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]


def test_no_request_is_lost_but_streams_that_the_candidate_had_begun(record: Record):
    """What Envoy can try again, the original answers; each text is one that the model writes alone."""
    lost = [each for each in record.requests if each.problem]
    assert all(each.is_stream and each.has_begun and each.side != "original" for each in lost), lost[:5]
    assert all(any(each in record.during(fault) for fault in record.faults) for each in lost), lost[:5]
    assert len(lost) <= 0.01 * len(record.requests)


def test_the_candidate_s_share_is_what_the_step_says(record: Record):
    for (begun_s, share), (ended_s, _) in zip(record.steps, record.steps[1:], strict=False):
        if any(begun_s <= fault.begun_s <= ended_s for fault in record.faults):
            continue
        sides = [each.side for each in record.requests if begun_s + 3 <= each.sent_s <= ended_s - 1]
        found = sides.count("candidate") / max(1, len(sides))
        assert abs(found - share / 100) < (0.15 if 0 < share < 100 else 1e-9), (share, found, len(sides))


def test_each_fault_is_told_and_rolled_back_within_a_minute(record: Record):
    assert [fault.name for fault in record.faults] == ["slow", "errors", "stuck", "killed"]
    for fault in record.faults:
        assert fault.last_sent_s - fault.told_s < 60, fault
        assert "Roll back" in fault.reason
    told = {fault.name: fault.told_s - fault.begun_s for fault in record.faults}
    assert max(told.values()) < 150 and max(told[name] for name in ("errors", "stuck", "killed")) < 60, told
