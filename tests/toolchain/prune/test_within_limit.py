"""A limit is about the model that is written: compensated, and on text that decided nothing else."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from tests.command_line import PROGRAM, sentei
from tests.toolchain.prune.conftest import NUM_SAMPLES, SEQ_LEN
from tests.toolchain.prune.test_unfinished import SETTINGS
from toolchain.errors import CheckFailedError, SenteiError
from toolchain.metrics.token_metrics import measure
from toolchain.model.loading import load_model, load_tokenizer
from toolchain.plan.plan import PruningPlan, load_plan
from toolchain.prune import within_limit
from toolchain.prune.apply import apply_plan
from toolchain.prune.budget.limits import LimitSettings
from toolchain.prune.pipeline import prune
from toolchain.prune.settings import PruneSettings
from toolchain.prune.sweep import sweep
from toolchain.text.sources import TextSource
from toolchain.text.windows import load_windows

LIMIT = 0.28


def settings(worded_model: Path, limit: float | None = LIMIT, **others: Any) -> PruneSettings:
    asked = replace(
        SETTINGS, sparsity=0.5, num_samples=NUM_SAMPLES, seq_len=SEQ_LEN, align=4, compensate=True, widths="ranked",
        attention_removals=2, calibration=[TextSource(worded_model / "text.txt")],
    )  # fmt: skip
    if limit is not None:
        asked = replace(asked, limit_metric="kl", limit=LimitSettings(max_metric=limit))
    return replace(asked, **others)


@torch.inference_mode()
def divergence(worded_model: Path, pruned: Path) -> float:
    """From the original, on the tokens behind those of the calibration; by the models as they load, in nats."""
    ids = torch.tensor([[int(word[1:]) for word in (worded_model / "text.txt").read_text().split()]])[
        :, NUM_SAMPLES * SEQ_LEN :
    ]
    p, q = (
        load_model(each, dtype=torch.float32)(ids.view(2, SEQ_LEN)).logits.log_softmax(-1)
        for each in (worded_model, pruned)
    )
    return float(kl_div(q, p, log_target=True, reduction="sum")) / p[..., 0].numel()


@dataclass(frozen=True)
class Run:
    """A search that a limit ended.

    Attributes:
        out: The pruned model.
        summary: As it was returned.
        killed: ``out.search`` as a kill would leave it while the third model is measured.
        measured: How many models were.
        descriptions: What progress told.
    """

    out: Path
    summary: dict[str, Any]
    killed: Path
    measured: int
    descriptions: list[str]


@pytest.fixture(scope="module")
def limited(worded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("limited")
    out, killed, descriptions, count = directory / "out", directory / "killed.search", [], 0

    def measuring(*arguments: Any) -> float:
        nonlocal count
        count += 1
        if count == 3:
            shutil.copytree(directory / "out.search", killed)
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(within_limit, "measure", measuring)
        summary = prune(worded_model, out, settings(worded_model), model_name="tiny", progress=Told(descriptions))
    return Run(out, summary, killed, count, descriptions)


class Told:
    """A progress that keeps the stages' descriptions."""

    def __init__(self, descriptions: list[str]) -> None:
        self.descriptions = descriptions

    def __call__(self, description: str, total: int) -> "Told":
        self.descriptions.append(description)
        return self

    def __enter__(self) -> Any:
        return lambda: None

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(scope="module")
def unlimited(worded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PruningPlan:
    """The same search without a limit."""
    out = tmp_path_factory.mktemp("unlimited") / "out"
    prune(worded_model, out, settings(worded_model, limit=None), model_name="tiny")
    return load_plan(out)


def test_the_written_model_holds_the_limit_and_the_next_step_does_not(
    worded_model: Path, limited: Run, unlimited: PruningPlan, tmp_path: Path
):
    plan = load_plan(limited.out)
    limit = plan.document.limit
    assert limit is not None
    assert limit.measured == pytest.approx(divergence(worded_model, limited.out), rel=1e-4)
    assert limit.measured <= LIMIT
    num_steps = len(plan.steps) - 1
    assert len(plan.document.stage_1) < num_steps + 1 < len(unlimited.steps), "the limit is beyond stage 1"
    # The search itself is that without a limit.
    assert plan.document.trace == unlimited.document.trace[: len(plan.document.trace)]
    text = [TextSource(worded_model / "text.txt")]
    apply_plan(unlimited.cut(num_steps + 1), worded_model, tmp_path / "next", calibration=text)
    further = divergence(worded_model, tmp_path / "next")
    assert further > LIMIT
    reason = plan.document.stopped_because
    assert reason is not None
    assert f"kl would be {further:.3f}"[:-1] in reason
    assert "compensated, on 2 windows kept apart; the limit is 0.28" in reason


def test_what_was_measured_is_said(worded_model: Path, limited: Run):
    assert limited.summary["limit"] == {
        "metric": "kl", "source": None, "higher_is_better": False, "value": LIMIT, "original": 0,
        "measured": pytest.approx(divergence(worded_model, limited.out), rel=1e-4), "compensated": True,
        "num_windows": 2, "text": "text.txt",
    }  # fmt: skip
    card = (limited.out / "README.md").read_text()
    assert "the written, compensated model, on 2 windows of text.txt that decided nothing else" in card
    told = [each for each in limited.descriptions if each.startswith("Limit")]
    assert told[0] == "Limit: model 1 of about 1"
    assert len(told) == limited.measured
    assert told[2].startswith("Limit: model 3 of about ")
    assert not limited.out.with_name("out.search").exists()


def test_compensation_lets_more_go(worded_model: Path, limited: Run, tmp_path: Path):
    done = prune(worded_model, tmp_path / "out", settings(worded_model, compensate=False), model_name="tiny")
    assert 0 < done["sparsity"] < limited.summary["sparsity"]
    assert divergence(worded_model, tmp_path / "out") <= LIMIT
    assert done["limit"]["measured"] == pytest.approx(divergence(worded_model, tmp_path / "out"), rel=1e-4)
    assert not done["limit"]["compensated"]


def test_killed_between_models_it_goes_on_to_the_same_weights(
    worded_model: Path, limited: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(limited.killed, tmp_path / "out.search")
    assert (tmp_path / "out.search" / "limit" / "model").is_dir()
    assert len(json.loads((tmp_path / "out.search" / "limit" / "trials.json").read_text())["trials"]) == 2
    again = 0

    def measuring(*arguments: Any) -> float:
        nonlocal again
        again += 1
        return measure(*arguments)

    monkeypatch.setattr(within_limit, "measure", measuring)
    summary = prune(worded_model, tmp_path / "out", settings(worded_model), model_name="tiny", resume=True)
    assert {**summary, "duration_s": 0} == {**limited.summary, "duration_s": 0}
    assert again == limited.measured - 2
    for file in ("model.safetensors", "plan.json", "plan.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (limited.out / file).read_bytes(), file


def test_a_limit_inside_stage_1_is_met_between_two_of_its_steps(
    worded_model: Path, unlimited: PruningPlan, tmp_path: Path
):
    done = prune(worded_model, tmp_path / "out", settings(worded_model, limit=0.08), model_name="tiny")
    plan = load_plan(tmp_path / "out")
    assert not plan.document.trace
    assert plan.document.stage_1[-1] not in unlimited.document.stage_1
    assert divergence(worded_model, tmp_path / "out") <= 0.08
    assert done["stopped_because"].startswith("kl would be 0.0")
    assert "with narrower FFNs, compensated" in done["stopped_because"]


def test_where_nothing_may_go_the_plan_says_so(worded_model: Path, tmp_path: Path):
    with pytest.raises(CheckFailedError, match=r"Nothing was removed: kl would be .* with narrower FFNs, compensated"):
        prune(worded_model, tmp_path / "out", settings(worded_model, limit=1e-5, num_samples=2), model_name="tiny")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "plan.safetensors"}


def test_a_sweep_holds_the_limit_too(worded_model: Path, limited: Run, tmp_path: Path):
    shutil.copytree(limited.killed, tmp_path / "out.search" / "0.5")
    found = sweep(worded_model, tmp_path / "out", settings(worded_model), [0.5], model_name="tiny", resume=True)
    assert found["plans"][0]["sparsity"] == limited.summary["sparsity"]
    plan, alone = load_plan(tmp_path / "out" / "0.5").document, load_plan(limited.out).document
    assert alone.limit is not None
    assert (plan.limit, plan.stopped_because, plan.trace) == (alone.limit, alone.stopped_because, alone.trace)


def test_text_for_the_limit_is_missed_before_anything_is_computed(worded_model: Path, tmp_path: Path):
    few = (worded_model / "text.txt").read_text().split()[:-1]
    (tmp_path / "short.txt").write_text(" ".join(few))
    with pytest.raises(SenteiError, match="A limit is checked on text of its own, 2 windows after the 16"):
        prune(
            worded_model, tmp_path / "out", settings(worded_model, calibration=[TextSource(tmp_path / "short.txt")]),
            model_name="tiny",
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


@pytest.mark.acceptance
def test_the_demo_model_as_written_is_at_most_a_fifth_worse(demo_model: Path, tmp_path: Path):
    settings = ("--sparsity", 0.4, "--samples", 8, "--seq-len", 128, "--max-degradation", 1.2)
    plain, out = tmp_path / "plain", tmp_path / "out"
    command = ["prune", demo_model, "-o", out, *settings]
    process = subprocess.Popen([PROGRAM, *map(str, command)], stderr=subprocess.DEVNULL)
    trials = tmp_path / "out.search" / "limit" / "trials.json"
    try:
        deadline = time.monotonic() + 900
        while not (trials.exists() and len(json.loads(trials.read_text())["trials"]) == 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = json.loads(trials.read_text())["trials"]
    done = sentei(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Limit: model 3 " in done.stderr
    assert not any(f"Limit: model {number} " in done.stderr for number in (1, 2)), "those were measured"

    # Independently: the ninth window of the text, by the models as they load.
    words = load_windows(None, load_tokenizer(demo_model), num_samples=9, seq_len=128).ids[8:]

    @torch.inference_mode()
    def perplexity(directory: Path) -> float:
        logits = load_model(directory, dtype=torch.float32)(words).logits
        return float(cross_entropy(logits[0, :-1], words[0, 1:]).exp())

    original, found = perplexity(demo_model), perplexity(out)
    limit = load_plan(out).document.limit
    assert limit is not None
    assert limit.measured == pytest.approx(found, rel=1e-3)
    assert original < found <= 1.2 * original * (1 + 1e-4)
    assert all(each["measured"] > limit.value for each in before[:1]), "the target breaks the limit"
    uncompensated = sentei("prune", demo_model, "-o", plain, *settings, "--no-compensate")
    assert uncompensated.returncode == 0, uncompensated.stderr
    removed = [json.loads((each / "pruning_summary.json").read_text())["sparsity"] for each in (plain, out)]
    assert 0 < removed[0] < removed[1] < 0.4
    assert perplexity(plain) <= 1.2 * original * (1 + 1e-3)
