"""Tokens of bytes become text: what a model says is said once, and bytes that are no character never end an answer."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serving.server.onnx.answer_text import AnswerText, Piece

BOS, EOS, FIRST_BYTE = 1, 2, 3
ORDINARY = {text: FIRST_BYTE + 256 + index for index, text in enumerate((" ", "a", " b", "木"))}
LONE = FIRST_BYTE + 0xE6  # the first byte of three


def make(*more: decoders.Decoder) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [text.replace(" ", "▁") for text in ORDINARY]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    known = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*known, *more])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


# As Gemma's; and as Llama 2's and Mistral's, which leave out a space where a text begins.
TOKENIZERS = [make(), make(decoders.Strip(" ", 1, 0))]
tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["kept", "stripped"])


def in_bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], *, stop_strings: Sequence[str] = ()
) -> list[Piece]:
    found: list[Piece] = []
    taker = AnswerText(
        tokenizer, prompt, max_tokens=10_000, stop_ids={EOS}, stop_strings=stop_strings, emit=found.append
    )
    for number, token in enumerate(answer, start=1):
        goes_on = taker.take(token)
        assert len(found) == number  # one piece for each token
        assert goes_on == (found[-1].finish_reason is None)
        if not goes_on:
            break
    return found


def said(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> str:
    return "".join(piece.text for piece in pieces(tokenizer, prompt, answer))


@tokenizers
def test_a_byte_that_is_no_character_ends_no_answer(tokenizer: Tokenizer):
    found = pieces(tokenizer, [BOS, ORDINARY["a"]], [*in_bytes("剪"), LONE, ORDINARY["a"], ORDINARY[" b"], EOS])
    assert [piece.text for piece in found] == ["", "", "剪", "", "\N{REPLACEMENT CHARACTER}a", " b", ""]
    assert found[-1].finish_reason == "stop"
    # What the prompt ends with may be the character beside it.
    assert said(tokenizer, in_bytes("剪"), [LONE, ORDINARY["a"]]) == "\N{REPLACEMENT CHARACTER}a"


@tokenizers
@pytest.mark.parametrize(
    "end", ["剪定木", "a剪定木", "🌳🌳🌳", "é剪定木", "剪定木剪定木", "剪\N{REPLACEMENT CHARACTER}", "\n"]
)
def test_an_answer_does_not_begin_with_the_prompt(tokenizer: Tokenizer, end: str):
    assert said(tokenizer, [BOS, *in_bytes(end)], [ORDINARY["a"], ORDINARY[" b"]]) == "a b"
    assert said(tokenizer, in_bytes(end), [*in_bytes("木"), ORDINARY["a"]]) == "木a"


@tokenizers
def test_an_answer_may_complete_the_prompts_last_character(tokenizer: Tokenizer):
    for prompt in ([], [ORDINARY["a"]], in_bytes("剪定木")):
        for held in (1, 2, 3):
            tree = in_bytes("🌳")
            assert said(tokenizer, [*prompt, *tree[:held]], [*tree[held:], ORDINARY["a"]]) == "🌳a"
            assert said(tokenizer, [*prompt, *tree[:held]], [ORDINARY["a"]]) == "a"


@tokenizers
def test_a_model_that_writes_half_characters_for_ever_is_heard(tokenizer: Tokenizer):
    found = pieces(tokenizer, [BOS], [LONE] * 320 + [ORDINARY["a"]])
    assert "".join(piece.text for piece in found) == "\N{REPLACEMENT CHARACTER}" * 320 + "a"
    assert any(piece.text for piece in found[:40])


characters = st.text("a b\née木剪🌳", max_size=12)
choices = st.lists(st.booleans(), min_size=1, max_size=8)


def tokens_of(text: str, choices: list[bool]) -> list[int]:
    """One token for a character where there is one and it is chosen, else its bytes."""
    return [
        token
        for index, character in enumerate(text)
        for token in (
            [ORDINARY[character]] if character in ORDINARY and choices[index % len(choices)] else in_bytes(character)
        )
    ]


@settings(deadline=None)
@given(st.sampled_from(TOKENIZERS), characters, characters, choices)
def test_whole_characters_come_as_they_are_decoded(tokenizer: Tokenizer, prompt: str, answer: str, choices: list[bool]):
    before, after = [BOS, *tokens_of(prompt, choices)], tokens_of(answer, choices)
    whole = tokenizer.decode([*before, *after]).removeprefix(tokenizer.decode(before))
    assert said(tokenizer, before, after) == whole


# Without the last bytes of the replacement character itself, which could not be told from the others.
bytes_alone = st.sampled_from([FIRST_BYTE + byte for byte in range(0x80, 0x100) if byte != 0xBF])
any_tokens = st.lists(
    bytes_alone | st.sampled_from([BOS, *ORDINARY.values(), *in_bytes("木🌳é")]),
    max_size=40,
)


@settings(deadline=None)
@given(st.sampled_from(TOKENIZERS), any_tokens, any_tokens)
def test_whatever_the_bytes_are_all_else_is_said_once(tokenizer: Tokenizer, prompt: list[int], answer: list[int]):
    text = said(tokenizer, [BOS, ORDINARY["a"], *prompt], answer)
    plain = {token: text for text, token in ORDINARY.items() if text.isascii()}
    assert [each for each in text if each in "a b"] == list("".join(plain.get(token, "") for token in answer))
    # A byte is a replacement character, or part of some other: no token of bytes adds more than one.
    assert len(text) <= sum(len(plain.get(token, "x")) for token in answer)


@settings(deadline=None)
@given(
    st.sampled_from(TOKENIZERS),
    characters,
    st.lists(st.text("a .。木終わり🌳", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text("a .。木終わり🌳", max_size=20),
)
def test_stop_strings_in_bytes_end_an_answer(tokenizer: Tokenizer, prompt: str, stop: list[str], answer: str):
    found = pieces(tokenizer, [BOS, *in_bytes(f"{prompt}a")], [*in_bytes(answer), EOS], stop_strings=stop)
    text = "".join(piece.text for piece in found)
    assert answer.startswith(text)
    assert not [each for each in stop if each in text]
    assert text == answer or any(answer.startswith(each, len(text)) for each in stop)
    assert [piece.finish_reason for piece in found] == [None] * (len(found) - 1) + ["stop"]


@tokenizers
def test_a_stop_string_ends_an_answer_with_its_last_byte(tokenizer: Tokenizer):
    found = pieces(tokenizer, [BOS], in_bytes("木。終わり。木"), stop_strings=["終わり", "り。"])
    assert "".join(piece.text for piece in found) == "木。"
    assert len(found) == len(in_bytes("木。終わり"))
