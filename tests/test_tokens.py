from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.errors import DataError
from surgery.examples import Conversation, Document, PromptCompletion, Tagged
from surgery.tokens import (
    IGNORED,
    CausalEncoder,
    CausalTokens,
    Piece,
    conversation_pieces,
    encode_pieces,
    encode_tagged,
    pack,
    prefix_ids,
)
from tests.tiny import BOS, EOS, build_tokenizer

HERE = "a.jsonl, line 1"
DECODER = build_tokenizer("decoder")
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)

MARKED = (
    "{%- for message in messages -%}\n"
    "<{{ message['role'] }}>\n"
    "{%- if message['role'] == 'assistant' %}\n"
    "{%- generation %}{{ message['content'] }}<eos>{% endgeneration %}\n"
    "{%- else %}{{ message['content'] }}{% endif %}\n"
    "{%- endfor %}"
)
FORGETFUL = (  # like templates that keep a reasoning block in the last turn only
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}x"


def with_template(template: str | None) -> PreTrainedTokenizerFast:
    """The tiny decoder tokenizer with another chat template."""
    tokenizer = build_tokenizer("decoder")
    tokenizer.chat_template = template
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words only: whitespace has no token, and no text needs a special one."""
    words = {word: index for index, word in enumerate(["<eos>", "<unk>", "user", "assistant", "hi", "you", "ok"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def chat(*turns: str) -> Conversation:
    """Turns alternate, the user first."""
    roles = ("user", "assistant")
    messages = tuple({"role": roles[index % 2], "content": text} for index, text in enumerate(turns))
    return Conversation(HERE, messages)


def learned(tokens: CausalTokens, tokenizer: PreTrainedTokenizerFast = DECODER) -> str:
    """The text that carries loss."""
    return str(tokenizer.decode([label for label in tokens.labels if label != IGNORED]))


def encode(tokenizer: PreTrainedTokenizerFast, example: Any) -> CausalTokens:
    """The tokens of one example."""
    return CausalEncoder(tokenizer).encode([example])[0]


@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=20), st.integers(1, 12))
def test_packing_loses_and_repeats_nothing_but_the_tail(documents: list[list[int]], block: int) -> None:
    """Blocks joined are the documents joined, less fewer tokens than one block; labels stay beside their ids."""
    examples = [CausalTokens(ids, [token if token % 2 else IGNORED for token in ids]) for ids in documents]
    blocks = list(pack(examples, block=block))
    joined = [token for ids in documents for token in ids]
    kept = [token for item in blocks for token in item.ids]
    assert all(len(item.ids) == len(item.labels) == block for item in blocks)
    assert kept == joined[: len(joined) // block * block]
    assert [label for item in blocks for label in item.labels] == [t if t % 2 else IGNORED for t in kept]


@given(PRINTABLE, PRINTABLE)
def test_the_completion_and_the_end_carry_loss_and_nothing_else(prompt: str, completion: str) -> None:
    """For any texts the tokens decode to prompt and completion, and the labels to the completion with its end."""
    tokens = encode(DECODER, PromptCompletion(HERE, prompt, completion))
    assert DECODER.decode(tokens.ids) == f"<bos>{prompt}{completion}<eos>"
    assert learned(tokens) == f"{completion}<eos>"
    assert tokens.ids[0] == BOS
    assert tokens.ids[-1] == EOS


@given(st.lists(PRINTABLE, min_size=1, max_size=6))
def test_exactly_the_assistants_turns_carry_loss(turns: list[str]) -> None:
    """By prefixes: what the template writes after each generation prompt carries loss, whatever the texts hold."""
    tokens = encode(DECODER, chat(*turns))
    assert learned(tokens) == "".join(f"{text}<eos>" for text in turns[1::2])
    rendered = DECODER.apply_chat_template(list(chat(*turns).messages), tokenize=False)
    assert DECODER.decode(tokens.ids) == rendered


@given(st.lists(PRINTABLE, min_size=1, max_size=6))
def test_the_templates_own_marks_decide_where_it_has_them(turns: list[str]) -> None:
    """By marks: exactly what stands between them carries loss, and the text is that of the unmarked template."""
    tokenizer = with_template(MARKED)
    tokens = encode(tokenizer, chat(*turns))
    assert learned(tokens) == "".join(f"{text}<eos>" for text in turns[1::2])
    assert tokenizer.decode(tokens.ids) == tokenizer.apply_chat_template(list(chat(*turns).messages), tokenize=False)


def test_the_marks_agree_with_transformers_own_mask_where_that_is_right() -> None:
    """On texts whose every character has a token both ways of masking are the same."""
    tokenizer, conversation = with_template(MARKED), chat("ask", "answer", "more", "again")
    theirs = tokenizer.apply_chat_template(
        list(conversation.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer, conversation)
    assert ours.ids == list(theirs["input_ids"])
    assert [label != IGNORED for label in ours.labels] == [bool(flag) for flag in theirs["assistant_masks"]]


def test_a_turn_that_ends_in_a_character_without_a_token_does_not_run_on() -> None:
    """A word tokenizer has no token for whitespace: the user's next turn still carries no loss."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }} {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    tokens = encode(tokenizer, chat("hi", "ok ", "you", "hi"))
    assert learned(tokens, tokenizer) == "ok hi"


def test_a_token_never_lies_across_prompt_and_completion() -> None:
    """GPT-2's kind of tokenizer would join the space and "the": the pieces are then tokenized one by one."""
    joined = DECODER("we the", add_special_tokens=False)["input_ids"]
    assert "\u0120the" in DECODER.convert_ids_to_tokens(joined)
    tokens = encode(DECODER, PromptCompletion(HERE, "we ", "the"))
    assert learned(tokens) == "the<eos>"
    assert DECODER.decode(tokens.ids) == "<bos>we the<eos>"


def test_pieces_of_one_text_are_tokenized_as_one() -> None:
    """A tokenizer of the Llama kind marks the start of a text: only the first piece may get that mark."""
    pieces = {"\u2581": 0, "a": 1, "b": 2, "\u2581b": 3, "<unk>": 4, "\u2581a": 5}
    tokenizer = Tokenizer(models.BPE(pieces, [("\u2581", "b"), ("\u2581", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    (tokens,) = encode_pieces(fast, [[Piece("a", loss=False), Piece("b b", loss=True)]])
    assert fast.convert_ids_to_tokens(tokens.ids) == ["\u2581a", "b", "\u2581b"]
    assert tokens.labels == [IGNORED, 2, 3]


def test_the_prefix_is_what_the_tokenizer_puts_in_front() -> None:
    """A Llama's begin token, a BERT's classifier token, nothing for a T5."""
    assert prefix_ids(DECODER) == [BOS]
    assert prefix_ids(build_tokenizer("encoder")) == [BOS]
    assert prefix_ids(build_tokenizer("seq2seq")) == []


def test_an_end_that_is_already_there_is_not_written_twice() -> None:
    """Neither for a document nor for a completion; a part of a document has neither begin nor end."""
    assert encode(DECODER, Document(HERE, "a<eos>")).ids == encode(DECODER, Document(HERE, "a")).ids
    assert encode(DECODER, PromptCompletion(HERE, "p", "a<eos>")).ids.count(EOS) == 1
    middle = encode(DECODER, Document(HERE, "a", begins=False, ends=False))
    assert middle.ids == middle.labels == DECODER("a", add_special_tokens=False)["input_ids"]


def test_all_of_a_document_carries_loss() -> None:
    """A document's labels are its ids."""
    tokens = encode(DECODER, Document(HERE, "some text"))
    assert tokens.labels == tokens.ids
    assert tokens.carries_loss() == len(tokens) - 1


@pytest.mark.parametrize(
    ("template", "turns", "wanted"),
    (
        (None, ("a", "b"), "tokenizer: found no chat template"),
        (FORGETFUL, ("a", "b", "c", "d"), "writes turn 2 differently"),
        (MARKED.replace("{% endgeneration %}", ""), ("a", "b"), "line 1: found"),
        ("{{ messages[0]['content'] }}{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", ("a",), "refuses"),
    ),
)
def test_a_template_that_cannot_be_masked_is_refused(template: str | None, turns: tuple[str, ...], wanted: str) -> None:
    """No template, one whose turns change with those around them, unpaired marks, one that fails: all are named."""
    with pytest.raises(DataError, match=wanted):
        conversation_pieces(with_template(template), chat(*turns))


def test_a_template_whose_last_turn_differs_serves_single_answers() -> None:
    """One answer a row is masked even by a template that writes the last turn apart."""
    pieces = conversation_pieces(with_template(FORGETFUL), chat("a", "b"))
    assert [piece.text for piece in pieces if piece.loss] == ["<think>b"]


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    """The template's own words and the row are in the message."""
    wrong = Conversation(HERE, ({"role": "assistant", "content": "x"},))
    with pytest.raises(DataError, match=r"line 1: found a conversation that the chat template refuses \(user first\)"):
        conversation_pieces(with_template(STRICT), wrong)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    """Completions need an end to learn."""
    tokenizer = build_tokenizer("decoder")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        CausalEncoder(tokenizer)


def test_tags_go_to_the_first_piece_of_each_word() -> None:
    """Continuation pieces and special tokens carry -100; cutting keeps pieces and labels aligned."""
    tokenizer = build_tokenizer("encoder")
    tokenizer.add_prefix_space = True
    ids = {"O": 0, "B": 1}
    example = Tagged(HERE, ("the", "qqq"), ("O", "B"))
    row, cut = encode_tagged(tokenizer, example, ids=ids, max_length=64)
    first = [index for index, label in enumerate(row["labels"]) if label != IGNORED]
    assert [row["labels"][index] for index in first] == [0, 1]
    assert len(row["labels"]) == len(row["input_ids"])
    assert not cut
    assert tokenizer.decode(row["input_ids"][first[1] : -1]).strip() == "qqq"
    short, cut = encode_tagged(tokenizer, example, ids=ids, max_length=4)
    assert cut
    assert len(short["input_ids"]) == len(short["labels"]) == 4
