"""An interrupted sweep and an interrupted search are not taken for each other, and neither is deleted unasked. A
resumed search has the inputs it had. What was measured stays, whatever ends the search, at whichever instant."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.families import make_family_pico
from tests.serving.report.test_render import write_plan
from toolchain.errors import SenteiError
from toolchain.metrics.choose import choose_metric
from toolchain.plan.plan import load_plan
from toolchain.prune import apply
from toolchain.prune.budget.limits import LimitSettings, limit_asked
from toolchain.prune.pipeline import prune
from toolchain.prune.search import two_stage
from toolchain.prune.settings import PruneSettings
from toolchain.prune.sweep import sweep
from toolchain.prune.unfinished import begin_search, find_search
from toolchain.text.sources import TextSource

SETTINGS = PruneSettings(
    sparsity=0.3,
    calibration=(),
    num_samples=1,
    seq_len=8,
    align=1,
    attention_removals=None,
    device="cpu",
    dtype=torch.float32,
    seed=0,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    make_family_pico(directory, "llama", "grouped")
    return directory


def unfinished(tmp_path: Path, *plans: str) -> list[Path]:
    found = [tmp_path / "out.search" / plan for plan in plans]
    for path in found:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    return found


def test_a_search_does_not_delete_an_interrupted_sweep(model: Path, tmp_path: Path):
    kept = unfinished(tmp_path, "0.1/plan.json", "0.2/plan.json")
    with pytest.raises(SenteiError, match="--resume"):
        prune(model, tmp_path / "out", SETTINGS, model_name="pico")
    assert all(path.exists() for path in kept)


def test_a_sweep_is_not_resumed_as_a_search(tmp_path: Path):
    unfinished(tmp_path, "0.1/plan.json")
    with pytest.raises(SenteiError, match="interrupted sweep"):
        find_search(tmp_path / "out", force=False, resume=True)


def test_a_search_is_not_resumed_as_a_sweep(model: Path, tmp_path: Path):
    [kept] = unfinished(tmp_path, "plan.json")
    with pytest.raises(SenteiError, match="one sparsity"):
        sweep(model, tmp_path / "out", SETTINGS, [0.1, 0.2], model_name="pico", resume=True)
    assert kept.exists()


def test_questions_that_were_edited_are_not_taken_for_those_of_before(tmp_path: Path):
    words = Tokenizer(WordLevel({"yes": 0, "no": 1}, unk_token="no"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    file, found = tmp_path / "questions.jsonl", []
    for answer in (0, 1):
        file.write_text(json.dumps({"prompt": "yes", "choices": ["yes", "no"], "answer": answer}))
        metric = choose_metric(f"accuracy:{file}", torch.zeros(1, 8), tokenizer)
        limit = limit_asked(LimitSettings(min_metric=0.5), metric)
        assert limit is not None
        assert limit.source_sha256 == metric.source_sha256
        found.append(metric.source_sha256)
    assert found[0] != found[1]

    (directory := tmp_path / "out.search").mkdir()
    write_plan(directory)
    before, now = (load_plan(directory).changed({"metric": "accuracy", "metric_source_sha256": each}) for each in found)
    before.save(directory)
    begin_search(directory, before.document)
    with pytest.raises(SenteiError, match="another metric_source_sha256"):
        begin_search(directory, now.document)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is searched in a moment, with text of its own."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_family_pico(directory, "llama", "grouped")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(directory)
    draw = random.Random(0)
    (directory / "text.txt").write_text(" ".join(f"w{draw.randrange(3, 96)}" for _ in range(200)))
    return directory


def run(model: Path, out: Path, settings: PruneSettings, **how: bool) -> dict[str, object]:
    settings = replace(settings, calibration=[TextSource(model / "text.txt")])
    return prune(model, out, settings, model_name="tiny", **how)


@pytest.mark.parametrize("method", ["2ssp", "shortgpt"])
def test_memory_that_runs_out_after_the_search_loses_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    # No attention is removed: once a reason to delete the search.
    settings = replace(SETTINGS, num_samples=2, method=method, attention_removals=0, compensate=method == "2ssp")
    whole = run(tiny, tmp_path / "whole", settings)

    def without_memory(*_: object, **__: object) -> None:
        raise MemoryError

    late = "compensate" if method == "2ssp" else "write_pruned"
    with monkeypatch.context() as patched, pytest.raises((SenteiError, MemoryError)) as raised:
        patched.setattr(apply, late, without_memory)
        run(tiny, tmp_path / "out", settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.search", "whole"]
    assert "The same command with --resume continues from there." in raised.value.__notes__[-1]
    kept = load_plan(tmp_path / "out.search")
    assert kept.steps[-1].metric == load_plan(tmp_path / "whole").steps[-1].metric

    monkeypatch.setattr(two_stage, "neuron_importance", without_memory)  # it is not measured again
    again = run(tiny, tmp_path / "out", settings, resume=True)
    assert {**again, "duration_s": 0} == {**whole, "duration_s": 0}
    assert not (tmp_path / "out.search").exists()


def test_what_ends_before_anything_is_measured_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(two_stage, "neuron_importance", broken)
    with pytest.raises(MemoryError):
        run(tiny, tmp_path / "out", SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def instants(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The search on disk as a kill would leave it before and after each rename of a file; the last is whole."""
    found: list[Path] = []
    real, search = Path.replace, tmp_path / "killed.search"

    def keep() -> None:
        if search.exists():
            found.append(tmp_path / f"{len(found)}.search")
            shutil.copytree(search, found[-1])

    def replacing(path: Path, to: Path) -> Path:
        keep()
        done = real(path, to)
        keep()
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replacing)
        run(tiny, tmp_path / "killed", KILLED)
    return found


KILLED = replace(SETTINGS, attention_removals=1)


def test_a_kill_at_any_instant_leaves_a_search_to_go_on_with(tiny: Path, tmp_path: Path, instants: list[Path]):
    whole = (tmp_path / "killed" / "plan.json").read_bytes()
    states = {  # each with the file that was being written, where there was one
        tuple(sorted((file.name, file.read_bytes()) for file in place.rglob("*.*") if file.suffix != ".partial")): place
        for place in instants
    }
    assert len(states) > 8
    for place in states.values():
        out = place.with_suffix("")
        run(tiny, out, KILLED, resume=True)
        assert (out / "plan.json").read_bytes() == whole, sorted(path.name for path in place.iterdir())
        assert not place.exists()


def test_a_search_of_the_version_that_kept_the_plan_alone_goes_on(tiny: Path, tmp_path: Path, instants: list[Path]):
    for place in instants:
        (place / "inputs.json").unlink(missing_ok=True)
        shutil.rmtree(place / "sums", ignore_errors=True)
    *_, last = instants
    scores_alone = next(each for each in instants if [path.name for path in each.iterdir()] == ["plan.safetensors"])
    for place in (last, scores_alone):
        other = replace(KILLED, seed=1)
        if place is last:
            with pytest.raises(SenteiError, match="begun with another seed: 0 then, 1 now"):
                run(tiny, place.with_suffix(""), other, resume=True)
        run(tiny, place.with_suffix(""), KILLED, resume=True)
        assert (place.with_suffix("") / "plan.json").read_bytes() == (tmp_path / "killed" / "plan.json").read_bytes()


def test_a_resumed_sweep_takes_no_sums_of_another_text(tiny: Path, tmp_path: Path):
    """A sweep of other sparsities has no plan of its own yet that would say what it was begun with."""
    words = (tiny / "text.txt").read_text().split()
    (other := tmp_path / "other.txt").write_text(" ".join(reversed(words)))
    one, another = (
        replace(SETTINGS, num_samples=4, calibration=[TextSource(text)]) for text in (tiny / "text.txt", other)
    )

    @contextmanager
    def until_importance_is_known(title: str, total: int) -> Iterator[Callable[[], None]]:
        if title == "Widths of FFNs":
            raise KeyboardInterrupt
        yield lambda: None

    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, tmp_path / "out", one, [0.2], model_name="tiny", progress=until_importance_is_known)
    assert list((tmp_path / "out.search" / "sums").iterdir())
    sweep(tiny, tmp_path / "out", another, [0.3], model_name="tiny", resume=True)
    sweep(tiny, tmp_path / "whole", another, [0.3], model_name="tiny")
    found, whole = ((tmp_path / name / "0.3" / "plan.safetensors").read_bytes() for name in ("out", "whole"))
    assert found == whole
