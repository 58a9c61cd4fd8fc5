"""The Japanese report: every message has its translation, with the same values in it."""

import ast
import re
import tomllib
from pathlib import Path
from typing import get_args

import jinja2
import pytest

from serving.benchmark import goodput, metrics, ratios
from serving.benchmark import gpu_watch as gpu_state
from serving.benchmark import results as bench_results
from serving.decision import verdict
from serving.decision.document import Status
from serving.forecast import explain, gap, model_facts, roofline
from serving.poc.walk import TOO_DAMAGED
from serving.report import decision, decision_charts
from serving.report import translate as messages_module
from serving.report.speed import FORMER_FORMULAS, LABELS
from serving.report.translate import LANGUAGES, Say
from toolchain.significance import Verdict

REPORT = Path(messages_module.__file__).parent
TRANSLATED = [language for language in LANGUAGES if language != "en"]
# What files hold and the report says in its own language.
SAID_OF_DATA = {
    *LABELS.values(),
    *verdict.MESSAGES, *(message for pair in decision.RAILS.values() for message in pair), decision.FASTER,
    *decision.KINDS, *get_args(Status), *decision.GAIN_METRICS.values(), *decision.INPUTS.values(),
    *decision_charts.TITLES.values(), TOO_DAMAGED,
    *explain.MESSAGES,
    *gap.MESSAGES,
    *FORMER_FORMULAS,
    *(metric.formula for metric in (*metrics.METRICS, *goodput.GOODPUT_METRICS)),
    *(formula for _, formula in model_facts.SIZE_FORMULAS.values()),
    *bench_results.FORMULAS,
    gpu_state.RECORDED, gpu_state.NOT_RECORDED, metrics.ENERGY.formula, "J",
    ratios.RATIO_FORMULA, model_facts.PREFILL_FORMULA, model_facts.DECODE_FORMULA, model_facts.END_TO_END_FORMULA,
    *roofline.PHASES, "prefill and decode", "compute", "memory",
    *get_args(Verdict), "document", "window", "exact McNemar test", "paired t-test of the questions' scores",
    "paired t-test of jackknife values of the questions",
    "normal test of the mean of the tasks' paired differences",
    "tokens/s", "requests/s", "ms", "original", "pruned", "after stage 1", "perplexity", "kl", "accuracy", "metric",
}  # fmt: skip


def all_messages():
    """Every message that a report can say."""
    return SAID_OF_DATA | _of_templates() | _of_code()


def _of_templates():
    environment = jinja2.Environment(extensions=["jinja2.ext.i18n"])
    environment.policies["ext.i18n.trimmed"] = True
    found = set()
    for file in REPORT.glob("templates/*.j2"):
        source = file.read_text(encoding="utf-8")
        found |= {message for _, _, message in environment.extract_translations(source) if message}
    return found


def _of_code():
    found = set()
    for file in REPORT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say":
                message = node.args[0]
                if isinstance(message, ast.Constant) and isinstance(message.value, str):
                    found.add(message.value)
    return found


def table(language):
    return tomllib.loads((REPORT / "locale" / f"{language}.toml").read_text(encoding="utf-8"))


def values_of(message):
    return set(re.findall(r"%\((\w+)\)s", message))


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_message_is_translated_and_nothing_else_is(language):
    assert table(language).keys() == all_messages()


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_holds_the_same_values(language):
    for message, said in table(language).items():
        values = values_of(message)
        assert values_of(said) == values, message
        if values:
            assert said % dict.fromkeys(values, "x")


def test_english_is_the_message_itself():
    say = Say("en")
    assert say("95 % interval") == "95 % interval"
    assert say("%(value)sx", value="1.2") == "1.2x"
