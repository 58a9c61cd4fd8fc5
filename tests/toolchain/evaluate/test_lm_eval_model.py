"""lm-eval's wrapper: what it keeps of a model's logits, and that no answer depends on that."""

import random
from pathlib import Path

import pytest
import torch

from tests.families import VARIANTS, make_family_pico
from toolchain.evaluate.lm_eval_model import ServedHFLM
from toolchain.evaluate.task_requests import BatchSize
from toolchain.model.loading import load_model, load_tokenizer

SHAPES = [(kind, next(iter(variants))) for kind, variants in VARIANTS.items()]


def requests(num: int) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Prompts of 1 to 40 tokens with choices of 1 to 30, some of them, and some of their ends, the token 0."""
    draw = random.Random(0)
    rows = []
    for place in range(num):
        prompt = [draw.randrange(96) for _ in range(draw.randint(1, 40))]
        # Several choices of one prompt, of which all but the last token are the same, are read once.
        choices = (
            [[token] for token in (0, 5, 7)] if place % 4 == 0 else [draw.choices(range(96), k=draw.randint(1, 30))]
        )
        if place % 3 == 0:
            prompt[-1] = choices[0][max(0, len(choices[0]) - 2)] = 0
        rows += [((str(prompt), str(choice)), prompt, choice) for choice in choices]
    return rows


@pytest.mark.parametrize(("kind", "variant"), SHAPES, ids=[kind for kind, _ in SHAPES])
@torch.inference_mode()
def test_every_choice_has_the_log_likelihood_of_its_own_tokens(
    kind: str, variant: str, tmp_path: Path, pico_model: Path
):
    make_family_pico(tmp_path, kind, variant)
    model = load_model(tmp_path)
    lm = ServedHFLM(model, load_tokenizer(pico_model), None, None, lambda: None, 8)
    asked = requests(40)
    for (_, prompt, choice), (log_likelihood, is_greedy) in zip(asked, lm._loglikelihood_tokens(asked), strict=True):
        logs = model(torch.tensor([prompt + choice])).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logs.gather(1, torch.tensor(choice)[:, None]).sum()
        assert log_likelihood == pytest.approx(float(expected), abs=2e-3)
        assert is_greedy == (logs.argmax(-1).tolist() == choice)


@pytest.mark.parametrize(("batch_size", "kept"), [(4, 1), ("auto", 200)])
def test_the_logits_of_a_long_prompt_are_not_kept(
    batch_size: BatchSize, kept: int, pico_model: Path, monkeypatch: pytest.MonkeyPatch
):
    model = load_model(pico_model)
    lm = ServedHFLM(model, load_tokenizer(pico_model), None, None, lambda: None, batch_size)
    monkeypatch.setattr(lm, "_detect_batch_size", lambda *_: 4)
    seen: list[int] = []
    forward = model.forward

    def spied(*args: object, **kwargs: object) -> object:
        found = forward(*args, **kwargs)
        seen.append(found.logits.shape[1])
        return found

    monkeypatch.setattr(model, "forward", spied)
    lm._loglikelihood_tokens([(("", str(choice)), [9] * 200, [choice]) for choice in range(8)])
    assert max(seen) == kept
