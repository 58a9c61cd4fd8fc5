"""Chats as a model is served them: each through the model's chat template.

A server renders a chat with the template and adds no special tokens: the template writes them. So do we. Where the
template begins a chat with the token that the tokenizer puts before every text, that token is taken off: it stands once
before each window, as it stands once before each prompt, and not again within one.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from toolchain.errors import SenteiError
from toolchain.text.chat_template import ANSWER_BEGINS, WHOLE, ChatTemplate, Ending
from toolchain.text.sources import Chat, Text, read_documents, text_name

# On which every text is read: a template that writes the date would make another text of the same chats tomorrow. It is
# the date that Llama 3.2's template falls back to.
READ_ON = datetime(2024, 7, 26)


def check_template(tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Checks that a model is served chats at all.

    Args:
        tokenizer: The model's own.
        what: Needs a template; begins the sentence.

    Raises:
        SenteiError: It has no chat template.
    """
    if not tokenizer.chat_template:
        raise SenteiError(
            f"{what} the model's chat template, and its tokenizer has none.",
            "Give a model that was trained on chats, with its chat_template.jinja or tokenizer_config.json.",
        )


def tokenize_chats(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, name: str, *, ending: Ending = WHOLE
) -> Iterator[list[int]]:
    """Yields each chat's tokens, exactly as a server makes them, on one fixed date.

    Raises:
        SenteiError: There is no chat template, or it refuses a chat; the chats are called ``name``.
    """
    check_template(tokenizer, f"{name} holds chats, which need")
    with ChatTemplate(tokenizer, now=READ_ON) as template:
        for number, chat in enumerate(chats, 1):
            try:
                text = template.render(chat.messages, tools=chat.tools, ending=ending)
            except SenteiError as error:
                raise SenteiError(f"{name}, chat {number}: {error.message}", error.hint) from error
            yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def as_chats(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> list[str]:
    """What a server makes of each prompt as a user's turn, up to where the answer begins, on one fixed date.

    Raises:
        SenteiError: There is no chat template, or it refuses a prompt.
    """
    check_template(tokenizer, "--chat-template takes")
    with ChatTemplate(tokenizer, now=READ_ON) as template:
        return [template.render([{"role": "user", "content": each.rstrip()}]) for each in prompts]


def chat_prompts(text: Text, tokenizer: PreTrainedTokenizerBase, *, count: int, longest: int) -> list[list[int]]:
    """Prompts for generation from a text of chats: each up to where its first answer begins.

    Args:
        text: Its documents are chats.
        tokenizer: The model's own.
        count: How many at most: those of the first chats in which somebody asks something.
        longest: Longer prompts, in tokens, are left out.
    """
    chats = (each for each in read_documents(text) if isinstance(each, Chat))
    asked = (
        Chat(list(takewhile(lambda message: message["role"] != "assistant", chat.messages)), chat.tools)
        for chat in chats
    )
    prompts: list[list[int]] = []
    if count:
        some = (chat for chat in asked if any(message["role"] == "user" for message in chat.messages))
        for ids in tokenize_chats(some, tokenizer, text_name(text), ending=ANSWER_BEGINS):
            prompts += [ids] if len(ids) <= longest else []
            if len(prompts) == count:
                break
    return prompts
