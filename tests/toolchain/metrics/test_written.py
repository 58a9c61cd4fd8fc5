"""Answers that a model writes: the same as token by token without any cache, padding or batch, pruned or not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from toolchain.architecture.families import FAMILIES
from toolchain.errors import SenteiError
from toolchain.metrics import written
from toolchain.metrics.choose import choose_metric
from toolchain.metrics.question_metrics import ANSWERS_AT_A_TIME
from toolchain.metrics.token_metrics import measure
from toolchain.metrics.written import WrittenMetric, write_greedily
from toolchain.model.layer_walk import LayerWalk
from toolchain.model.loading import load_model, load_tokenizer

LLAMA = FAMILIES["llama"]
NUM_TOKENS = 6


@torch.inference_mode()
def plainly(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The whole text is read again for every token."""
    text = list(prompt)
    for _ in range(NUM_TOKENS):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of many lengths, more than are written at a time."""
    draw = torch.Generator().manual_seed(0)
    lengths = [1 + number * 5 % 23 for number in range(ANSWERS_AT_A_TIME + 4)]
    return [torch.randint(3, 49000, (length,), generator=draw).tolist() for length in lengths]


@pytest.mark.parametrize("removed", [(), (0,), (0, 2)])
def test_together_they_are_what_each_is_alone(demo_pico: Path, prompts: list[list[int]], removed: tuple[int, ...]):
    walk = LayerWalk(load_model(demo_pico, dtype=torch.float32), LLAMA)
    for layer in removed:
        walk.layers.remove_attention(layer)
    found = dict(write_greedily(walk.model, prompts, NUM_TOKENS))
    assert [found[number] for number in range(len(prompts))] == [plainly(walk.model, each) for each in prompts]


def test_long_prompts_are_written_few_at_a_time(
    demo_pico: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """A batch of long prompts would take more memory than a model of any size has to spare."""
    model, sizes = load_model(demo_pico, dtype=torch.float32), list[int]()
    together = dict(write_greedily(model, prompts, NUM_TOKENS))
    monkeypatch.setattr(written, "_MOST_TOKENS", 60)
    model.register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].numel()) if args[0].shape[1] > 1 else None
    )  # fmt: skip
    assert dict(write_greedily(model, prompts, NUM_TOKENS)) == together
    assert max(sizes) <= 60 and len(sizes) >= 7


def test_an_answer_ends_where_the_model_ends_it(demo_pico: Path, prompts: list[list[int]]):
    model = load_model(demo_pico, dtype=torch.float32)
    whole = [plainly(model, each) for each in prompts]
    end = whole[0][2]
    model.generation_config.eos_token_id = [end]
    found = dict(write_greedily(model, prompts, NUM_TOKENS))
    assert found[0] == whole[0][: whole[0].index(end)]
    assert [found[n] for n in range(len(prompts))] == [
        each[: each.index(end)] if end in each else each for each in whole
    ]


def test_a_model_that_is_broken_is_not_called_one_that_refuses_nothing(demo_pico: Path):
    model = load_model(demo_pico, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(SenteiError, match="NaN or Inf"):
        list(write_greedily(model, [[5, 6]], 2))


def test_in_a_search_a_candidate_writes_as_if_its_attention_were_gone(demo_pico: Path, tmp_path: Path):
    """Phrases are what the model without attention 1 writes: it alone refuses everything."""
    model, tokenizer = load_model(demo_pico, dtype=torch.float32), load_tokenizer(demo_pico)
    walk, asked = LayerWalk(model, LLAMA), ["Trees", "A gardener in winter prunes", "Fruit"]
    walk.layers.remove_attention(1)
    ids = [tokenizer(each)["input_ids"] for each in asked]
    phrases = [tokenizer.decode(plainly(model, each), skip_special_tokens=True) for each in ids]
    walk.layers.restore()
    path = tmp_path / "q.jsonl"
    rows = [{"prompt": each, "refusal_phrases": [phrase]} for each, phrase in zip(asked, phrases, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    metric = choose_metric(f"refusal_rate:{path}#wanted=refusals,tokens={NUM_TOKENS}", torch.zeros(1, 64), tokenizer)
    assert measure(walk, metric, without_attention=[1]) == 1
    assert measure(walk, metric) < 1
    assert measure(walk, metric, without_attention=[0]) < 1


def test_a_prompt_that_leaves_no_room_is_refused_with_its_number(demo_pico: Path, tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "short"}\n{"prompt": "%s"}\n' % ("word " * 40))
    with pytest.raises(SenteiError, match=r"q.jsonl question 2: its prompt has 4\d tokens"):
        choose_metric(f"valid_json:{path}", torch.zeros(1, 8), load_tokenizer(demo_pico), longest=140)


def test_a_chat_model_is_asked_in_its_template(demo_pico: Path, tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "Name a tree."}')
    tokenizer = load_tokenizer(demo_pico)
    metric = choose_metric(f"valid_json:{path}", torch.zeros(1, 8), tokenizer, longest=256, chat_template=True)
    assert isinstance(metric, WrittenMetric)
    served = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a tree."}], add_generation_prompt=True, return_dict=False
    )
    assert metric.prompts == [served]
    assert metric.source is not None and metric.source.endswith("in the chat template")
