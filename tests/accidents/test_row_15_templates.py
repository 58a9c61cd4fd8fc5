"""Row 15: a chat template that loops for ever or fills the memory costs its own request alone."""

import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.accidents.onnx_service import FILL, LOOP, TEMPLATE, Service
from tests.command_line import refused, sentei
from toolchain.errors import SenteiError
from toolchain.model.loading import load_tokenizer
from toolchain.text import chat_template
from toolchain.text.chat_template import ChatTemplate

CHAT = "/v1/chat/completions"


def template(text: object, **options: Any) -> ChatTemplate:
    tokenizer: Any = SimpleNamespace(get_chat_template=lambda: text, special_tokens_map={"bos_token": "<s>"})
    return ChatTemplate(tokenizer, **options)


def messages(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_the_server_stops_a_template_and_answers_others_meanwhile(service: Service):
    found: list[tuple[int, str]] = []
    asking = threading.Thread(target=lambda: found.append(service.refusal(CHAT, {"messages": messages(LOOP)})))
    started = time.monotonic()
    asking.start()
    while asking.is_alive():
        assert service.answers()
    assert time.monotonic() - started < 20
    assert found[0][0] == 400 and "chat template took more than 5 s" in found[0][1]
    status, message = service.refusal(CHAT, {"messages": messages(FILL)})
    assert status == 400 and "takes more than 512 MB" in message
    assert service.ask(CHAT, {"messages": messages("The"), "max_tokens": 2})[0] == 200


def test_generate_stops_it_too(pico_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 1)
    directory = tmp_path / "model"
    shutil.copytree(pico_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    refused(sentei("generate", directory, "--chat", "--prompt", LOOP), "chat template took more than 1 s")


def test_it_says_what_transformers_says(demo_model: Path):
    tokenizer = load_tokenizer(demo_model)
    asked = [{"role": "system", "content": "Be brief."}, *messages("2 + 2 = ? \N{DECIDUOUS TREE}")]
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    with ChatTemplate(tokenizer) as rendered:
        assert rendered.render(asked) == expected


def test_bounds_and_refusals():
    with template(
        "{{ bos_token }}{% if messages[0].content == 'no' %}{{ raise_exception('no ' * 999) }}{% endif %}"
    ) as small:
        assert small.render(messages("yes")) == "<s>"
        with pytest.raises(SenteiError, match="refuses them") as error:
            small.render(messages("no"))
        assert len(str(error.value)) < 500
    with template("{{ 'long ' * 99 }}", max_chars=100) as long, pytest.raises(SenteiError, match="more than 100"):
        long.render(messages("a"))
    with template("{{ '\\ud800' }}") as half, pytest.raises(SenteiError, match="surrogates not allowed"):
        half.render(messages("a"))
    for bad in ("a" * 2**21, {"default": 5}, None):
        with pytest.raises(SenteiError, match="chat template is not a text"):
            template(bad)


def test_the_process_ends_with_its_parent_and_is_started_again():
    with template("{{ messages[0].content }}") as rendered:
        assert rendered.render(messages("a")) == "a"
        process = rendered._process
        assert process
        process.kill()
        process.wait()
        with pytest.raises(SenteiError, match="ended its process"):
            rendered.render(messages("b"))
        assert rendered.render(messages("c")) == "c"
        process = rendered._process
        assert process and process.stdin
        process.stdin.close()  # as when the parent is killed
        assert process.wait(timeout=10) in (0, -signal.SIGKILL)  # it sees the end of its input, or its pipe's
