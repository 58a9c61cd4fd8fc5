"""The OpenAI server over a real export, with OpenAI's own client and vLLM's load generator."""

import json
import shutil
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from serving.engines.onnxruntime import OnnxEngine
from serving.server.onnx.server import running_server
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer

PROMPT = "The history of bread is long. People first"
MESSAGES: list[Any] = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def base_url(demo_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ["--max-num-seqs", "2", "--max-model-len", "512"]
    with running_server(demo_onnx, options=options, log=tmp_path_factory.mktemp("log") / "server.log") as url:
        yield url


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def complete(client: openai.OpenAI, demo_onnx: Path) -> Callable[..., Completion]:
    def ask(**fields: Any) -> Completion:
        extra = {name: fields.pop(name) for name in ("top_k", "ignore_eos") if name in fields}
        fields = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
        return client.completions.create(model=demo_onnx.name, extra_body=extra, **fields)

    return ask


@pytest.fixture(scope="module")
def greedy(demo_onnx: Path) -> Callable[[str, int], str]:
    """What plain ONNX Runtime answers to one prompt alone."""
    engine, tokenizer = OnnxEngine(demo_onnx), load_tokenizer(demo_onnx)
    return lambda prompt, count: tokenizer.decode(engine.generate(tokenizer(prompt)["input_ids"], count))


def generated(base_url: str) -> int:
    with urllib.request.urlopen(f"{base_url}/metrics") as response:
        families = {each.name: each for each in text_string_to_metric_families(response.read().decode())}
    return int(families["vllm:generation_tokens"].samples[0].value)


def test_completions(complete: Callable[..., Completion], greedy: Callable[[str, int], str], demo_onnx: Path) -> None:
    answer = complete()
    Completion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].text == greedy(PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    ids = load_tokenizer(demo_onnx)(PROMPT)["input_ids"]
    assert answer.usage and answer.usage.to_dict() == {
        "prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12
    }  # fmt: skip
    assert complete(prompt=ids).choices[0].text == complete(prompt=[PROMPT]).choices[0].text == answer.choices[0].text


def test_streamed_text_is_the_same(complete: Callable[..., Any]) -> None:
    whole = complete(max_tokens=20)
    *chunks, last = complete(max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 19 + ["length"]
    assert (last.choices, last.usage) == ([], whole.usage)


def test_stop_strings_end_and_are_not_in_the_text(complete: Callable[..., Any]) -> None:
    text = complete(max_tokens=20).choices[0].text
    stop = text[10:16]  # from within a word to within another
    answer = complete(max_tokens=20, stop=["never said", stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(complete(max_tokens=20, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat(client: openai.OpenAI, greedy: Callable[[str, int], str], demo_onnx: Path) -> None:
    asked: dict[str, Any] = {"model": demo_onnx.name, "temperature": 0}
    answer = client.chat.completions.create(messages=MESSAGES, **asked)  # up to its end: no max_tokens
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    choice, usage = answer.choices[0], answer.usage
    assert usage and choice.finish_reason == "stop" and choice.message.role == "assistant"
    template = load_tokenizer(demo_onnx).apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    expected = greedy(str(template), usage.completion_tokens)
    assert expected == f"{choice.message.content}<|im_end|>"
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **asked))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    longer = client.chat.completions.create(
        messages=parts, max_completion_tokens=usage.completion_tokens + 9, extra_body={"ignore_eos": True}, **asked
    )
    assert longer.usage and longer.usage.completion_tokens == usage.completion_tokens + 9
    assert longer.choices[0].finish_reason == "length"


def test_sampling(complete: Callable[..., Completion]) -> None:
    def drawn(**settings: Any) -> str:
        return complete(temperature=1.2, **settings).choices[0].text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    greedy = complete().choices[0].text
    assert drawn(seed=1, top_k=1) == drawn(seed=1, top_p=1e-6) == greedy != drawn(seed=1)


def test_more_requests_than_rows(complete: Callable[..., Completion], greedy: Callable[[str, int], str]) -> None:
    prompts = [f"{PROMPT}{' and then' * index}" for index in range(5)]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda prompt: complete(prompt=prompt, max_tokens=10), prompts))
    assert [answer.choices[0].text for answer in answers] == [greedy(prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_nobody_waits_for_is_given_up(client: openai.OpenAI, base_url: str, stream: bool) -> None:
    before = generated(base_url)
    asked: dict[str, Any] = {"model": client.models.list().data[0].id, "prompt": PROMPT, "max_tokens": 490}
    if stream:
        with client.completions.create(stream=True, extra_body={"ignore_eos": True}, **asked) as chunks:
            next(iter(chunks))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(timeout=2, extra_body={"ignore_eos": True}, **asked)
    now, then = generated(base_url), -1
    while now != then:
        time.sleep(1)
        now, then = generated(base_url), now
    assert now - before < 490


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "word " * 600}, r"The prompt has 6\d\d tokens and 12 more.*holds 512"),
        ({"max_tokens": 600}, "and 600 more are asked for"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": [1, 60000]}, "token ids outside of 0 to 49151"),
        ({"prompt": ["one", "two"]}, "2 prompts are in one request"),
        ({"temperature": -1}, "temperature -1.0 is not between"),
        ({"n": 2}, "n: Input should be 1"),
        ({"presence_penalty": 0.5}, "presence_penalty: Input should be less than or equal to 0"),
        ({"suffix": "end"}, "suffix: Extra inputs are not permitted"),
    ],
)
def test_bad_requests(complete: Callable[..., Completion], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(**fields)


def test_bad_chats(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    with pytest.raises(openai.BadRequestError, match="list of parts of type text"):
        client.chat.completions.create(model=model, messages=image)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model=model, messages=[])
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist; this server has"):
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)


@pytest.mark.acceptance
@pytest.mark.usefixtures("vllm")
def test_the_benchmark_starts_it_and_vllms_load_generator_drives_it(demo_onnx: Path, tmp_path: Path) -> None:
    from serving.benchmark.sessions.server import ServerSession
    from serving.benchmark.settings import BenchmarkSettings
    from serving.benchmark.side import open_sides
    from serving.benchmark.workload import make_workloads

    workloads = make_workloads(engine="onnx-server", input_len=16, output_len=4, concurrency=[2], num_prompts=4)
    settings = BenchmarkSettings(engine="onnx-server", workloads=workloads)
    sides = open_sides(demo_onnx, None, settings)
    session = ServerSession(sides, settings, tmp_path)
    try:
        measured = session.measure(sides["original"], 0, workloads[0], name="original-0")
    finally:
        session.close()
    assert (measured["completed"], measured["failed"], measured["first_error"]) == (4, 0, None)
    assert all(measured[f"mean_{name}_ms"] > 0 for name in ("ttft", "tpot", "itl", "e2el"))
    kept = json.loads((tmp_path / "vllm" / "original-0.json").read_text())
    assert (kept["total_output_tokens"], kept["output_throughput"]) == (16, measured["output_throughput"])
    assert sides["original"].engine_report["server_options"] == ["--max-num-seqs", "2", "--max-model-len", "36"]
    # The weights are in memory, and more.
    used = sides["original"].engine_report["peak_memory_bytes"]
    assert sides["original"].facts.weight_bytes < used < 4e9


def test_what_cannot_be_served_is_told_before_it_starts(demo_onnx: Path, pico_model: Path, tmp_path: Path) -> None:
    refused(sentei("serve", demo_onnx, "--engine", "vllm"), "is an ONNX export; engine 'vllm' cannot serve it")
    refused(sentei("serve", pico_model, "--engine", "onnx"), "is no ONNX export; engine 'onnx' cannot serve it")
    refused(sentei("serve", pico_model, "--engine", "llama"), "'llama' is not known")
    refused(sentei("serve", demo_onnx, "--", "--port", "99999"), "99999 cannot be listened on")
    refused(sentei("serve", demo_onnx, "--", "--max-model-len", "9000"), "9000 tokens are asked for", "holds 8192")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(sentei("serve", demo_onnx, "--", "--port", port), f"127.0.0.1:{port} cannot be listened on")
    done = sentei("serve", demo_onnx, "--", "--max-num-seqs", "0")
    assert done.returncode == 2 and "'0' is not a whole number above 0" in done.stderr
    shutil.copytree(demo_onnx, tmp_path / "copy")
    with (tmp_path / "copy" / "model.onnx.data").open("r+b") as weights:
        weights.seek(1_000_000)
        byte = weights.read(1)[0]
        weights.seek(1_000_000)
        weights.write(bytes([byte ^ 1]))
    with (
        pytest.raises(SenteiError, match=r"ended with exit code 1 before it was ready: .*model\.onnx\.data is damaged"),
        running_server(tmp_path / "copy", log=tmp_path / "log"),
    ):
        pass


def test_no_page_loads_anything_from_elsewhere(base_url: str) -> None:
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{base_url}/docs")
    with urllib.request.urlopen(f"{base_url}/v1/models") as response:
        assert json.load(response)["data"][0]["max_model_len"] == 512
