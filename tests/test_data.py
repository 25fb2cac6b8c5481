from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from surgery import arrow
from surgery.data import Prepared, inspect_labels, prepare
from surgery.data_spec import DataSpec
from surgery.errors import DataError, RequestError
from surgery.tokens import IGNORED
from tests.tiny import BOS, EOS, PAD, build_tokenizer

DECODER = build_tokenizer("decoder")
ENCODER = build_tokenizer("encoder")
PAIRED = build_tokenizer("pair")
SEQ2SEQ = build_tokenizer("seq2seq")


def jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSONL file of the rows, and its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def causal(*files: str, tokenizer: Any = DECODER, max_length: int = 32, **settings: Any) -> Prepared:
    """Files prepared for a causal language model."""
    spec = DataSpec(train=files, max_length=max_length, **settings)
    return prepare(spec, task="causal-lm", tokenizer=tokenizer)


def classes(*files: str, max_length: int = 64, **settings: Any) -> Prepared:
    """Files prepared for a classifier."""
    spec = DataSpec(train=files, max_length=max_length, **settings)
    return prepare(spec, task="sequence-classification", tokenizer=ENCODER)


def collate(prepared: Prepared, rows: range) -> Mapping[str, torch.Tensor]:
    """One batch of the given training rows."""
    return prepared.collator([prepared.train[index] for index in rows])


def message_of(spec: DataSpec, task: str = "causal-lm", tokenizer: Any = DECODER) -> str:
    """What `prepare` answers to a request that cannot be done."""
    with pytest.raises(DataError) as caught:
        prepare(spec, task=task, tokenizer=tokenizer)
    return str(caught.value)


PROMPTS = [{"prompt": f"{number} plus 1? ", "completion": str(number + 1)} for number in range(40)]
SENTENCES = [{"text": f"sentence {number}", "label": number % 3} for number in range(30)]


# --- causal language modelling


def test_plain_text_is_one_stream_of_equal_blocks(tmp_path: Path) -> None:
    """Blocks joined are the file's tokens between begin and end, less the incomplete last block; labels are the ids."""
    text = "the quick brown fox\n" * 30
    (tmp_path / "a.txt").write_text(text)
    prepared = causal(str(tmp_path / "a.txt"))
    expected = [BOS, *DECODER(text, add_special_tokens=False)["input_ids"], EOS]
    joined = [token for row in prepared.train for token in row["input_ids"]]
    assert joined == expected[: len(expected) // 32 * 32]
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) == 32 for row in prepared.train)
    counts = prepared.report.train
    assert (counts.rows, counts.tokens, counts.tail_tokens) == (1, len(joined), len(expected) - len(joined))
    assert counts.loss_tokens == counts.examples * 31


def test_documents_are_packed_with_an_end_between_and_left_apart_on_request(tmp_path: Path) -> None:
    """Packed by default; with `packing` off each document is a row of its own."""
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"document {number}"} for number in range(9)])
    packed, apart = causal(file), causal(file, packing=False)
    assert packed.report.packed
    assert {len(row["input_ids"]) for row in packed.train} == {32}
    assert packed.train[0]["input_ids"].count(EOS) >= 1
    assert [DECODER.decode(row["input_ids"]) for row in apart.train][:2] == [
        "<bos>document 0<eos>",
        "<bos>document 1<eos>",
    ]


def test_prompts_are_packed_only_where_asked(tmp_path: Path) -> None:
    """`packing` alone leaves them rows of their own; `pack_examples` joins them with their labels."""
    file = jsonl(tmp_path / "a.jsonl", PROMPTS)
    apart, packed = causal(file), causal(file, pack_examples=True)
    assert len(apart.train) == 40
    ids = [token for row in apart.train for token in row["input_ids"]]
    labels = [label for row in apart.train for label in row["labels"]]
    whole = len(ids) // 32 * 32
    assert [token for row in packed.train for token in row["input_ids"]] == ids[:whole]
    assert [label for row in packed.train for label in row["labels"]] == labels[:whole]


@given(lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=12))
def test_no_row_without_loss_and_none_too_long_is_kept(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]]
) -> None:
    """Rows are cut on the right; a prompt that leaves no room for its answer drops its row; the counts add up."""
    rows = [{"prompt": "q" * prompt, "completion": "z" * completion} for prompt, completion in lengths]
    file = jsonl(tmp_path_factory.mktemp("cut") / "a.jsonl", [*rows, {"prompt": "q", "completion": "z"}])
    prepared = causal(file, max_length=20)
    kept = [index for index, (prompt, _) in enumerate(lengths) if 1 + prompt < 20]
    counts = prepared.report.train
    assert len(prepared.train) == counts.examples == len(kept) + 1
    assert counts.dropped_rows == len(lengths) - len(kept)
    assert counts.truncated_rows == sum(sum(lengths[index]) + 2 > 20 for index in kept)
    for index, row in zip(kept, prepared.train, strict=False):
        assert (
            DECODER.decode(row["input_ids"])
            == ("<bos>" + "q" * lengths[index][0] + "z" * lengths[index][1] + "<eos>")[
                : len(DECODER.decode(row["input_ids"]))
            ]
        )
        assert any(label != IGNORED for label in row["labels"][1:])
        assert len(row["input_ids"]) <= 20


def test_the_tokenizers_own_limit_holds_where_it_is_smaller(tmp_path: Path) -> None:
    """The report says which length held."""
    (tmp_path / "a.txt").write_text("word " * 500)
    prepared = causal(str(tmp_path / "a.txt"), max_length=4096)
    assert prepared.report.max_length == DECODER.model_max_length == 128
    assert len(prepared.train[0]["input_ids"]) == 128


def test_one_row_is_called_a_row(tmp_path: Path) -> None:
    """Plain text is one; the words of the report are those of its numbers."""
    (tmp_path / "a.txt").write_text("word " * 6)
    prepared = causal(str(tmp_path / "a.txt"), max_length=8)
    counts = prepared.report.train
    assert (counts.rows, counts.examples) == (1, len(prepared.train))
    assert prepared.report.lines()[1].startswith(f"train: 1 row, {counts.examples} examples, {counts.tokens} tokens, ")
    one = causal(jsonl(tmp_path / "a.jsonl", [{"prompt": "a b", "completion": ""}]))
    assert (one.report.train.examples, one.report.train.loss_tokens) == (1, 1), "the end of the text"
    assert one.report.lines()[1].startswith("train: 1 row, 1 example, ")
    assert one.report.lines()[1].endswith(" tokens, 1 carries loss")


@pytest.mark.parametrize(
    ("rows", "settings", "wanted"),
    (
        ([{"prompt": "q" * 99, "completion": "a"}], {}, "no token that carries loss in 1 row,"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "assistant turns"),
        ([{"text": "short"}], {}, "fewer than one block, expected 32 or more"),
    ),
)
def test_data_without_loss_are_an_error_with_the_likely_reason(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], wanted: str
) -> None:
    """Prompts that fill the row, no assistant turn, less text than one block: nothing would be learnt."""
    file = jsonl(tmp_path / "a.jsonl", rows)
    assert wanted in message_of(DataSpec(train=(file,), max_length=32, **settings))


def test_an_evaluation_set_without_loss_is_an_error_too(tmp_path: Path) -> None:
    """The message says which of the two it is."""
    train = jsonl(tmp_path / "a.jsonl", PROMPTS)
    held = jsonl(tmp_path / "b.jsonl", [{"prompt": "q" * 99, "completion": "a"}])
    assert message_of(DataSpec(train=(train,), eval=(held,), max_length=32)).startswith("data.eval: ")


# --- batches


@pytest.mark.parametrize("side", ("right", "left"))
def test_batches_are_padded_to_the_longest_row_and_labels_with_them(tmp_path: Path, side: str) -> None:
    """Padding carries no loss and no attention, on either side."""
    tokenizer = build_tokenizer("decoder")
    tokenizer.padding_side = side
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "z" * size} for size in (1, 5)])
    batch = collate(causal(file, tokenizer=tokenizer), range(2))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 8)
    padding = batch["attention_mask"] == 0
    assert padding.sum() == 4
    assert padding[0, 0 if side == "left" else -1]
    assert (batch["input_ids"][padding] == PAD).all()
    assert (batch["labels"][padding] == IGNORED).all()


def test_shapes_are_static_or_rounded_where_asked(tmp_path: Path) -> None:
    """`static_shapes` pads to `max_length`, `pad_to_multiple_of` to the next multiple."""
    file = jsonl(tmp_path / "a.jsonl", PROMPTS)
    assert collate(causal(file, static_shapes=True), range(2))["labels"].shape == (2, 32)
    assert collate(causal(file, pad_to_multiple_of=7), range(2))["labels"].shape[1] % 7 == 0
    spec = DataSpec(train=(file,), max_length=32, static_shapes=True)
    batch = prepare(spec, task="seq2seq", tokenizer=SEQ2SEQ)
    assert collate(batch, range(2))["labels"].shape == (2, 32)


def test_without_a_padding_token_the_end_pads_and_still_carries_loss(tmp_path: Path) -> None:
    """Padding is masked by position: the real end of each row keeps its label. The tokenizer is left as it was."""
    tokenizer = build_tokenizer("decoder")
    tokenizer.pad_token = None
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "z" * size} for size in (1, 5)])
    prepared = causal(file, tokenizer=tokenizer)
    assert tokenizer.pad_token is None
    assert prepared.pad_token_id == EOS
    batch = collate(prepared, range(2))
    assert (batch["labels"] == EOS).sum().item() == 2
    assert (batch["input_ids"] == EOS).sum().item() == 6


# --- classes, numbers, tags, targets


def test_labels_become_ids_in_the_order_of_the_names(tmp_path: Path) -> None:
    """Names and ids go through inspect_labels; numbers in any form are the same class."""
    file = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in ("pos", "neg", "pos")])
    prepared = classes(file)
    assert prepared.labels == inspect_labels(DataSpec(train=(file,)), "sequence-classification") == ("neg", "pos")
    assert [row["labels"] for row in prepared.train] == [1, 0, 1]
    assert collate(prepared, range(3))["labels"].dtype == torch.int64
    mixed = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": label} for label in (10, 9.0, "2")])
    assert [row["labels"] for row in classes(mixed).train] == [2, 1, 0]


def test_a_pair_is_given_to_the_tokenizer_as_one(tmp_path: Path) -> None:
    """Segment ids mark the second sentence; too long pairs are cut and counted."""
    rows = [{"sentence1": "a b", "sentence2": "c" * size, "label": size % 2} for size in (3, 80)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    spec = DataSpec(train=(file,), max_length=20)
    prepared = prepare(spec, task="sequence-classification", tokenizer=PAIRED)
    row = prepared.train[0]
    assert PAIRED.decode(row["input_ids"]) == "<bos>a b<eos>ccc<eos>"
    assert row["token_type_ids"].count(1) == 4
    assert [len(item["input_ids"]) for item in prepared.train] == [len(row["input_ids"]), 20]
    assert prepared.report.train.truncated_rows == 1


def test_labels_are_named_as_they_stand_in_the_data(tmp_path: Path) -> None:
    """Named otherwise, the first row says so; rows that are held out are told to be in the training set."""
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in (0, 1)])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": 7}])
    found = r"a.jsonl, line 1: found the class '0', expected one of neg, pos\. Give --labels as they stand in the data"
    with pytest.raises(DataError, match=found):
        prepare(DataSpec(train=(train,)), task="sequence-classification", tokenizer=PAIRED, labels=("neg", "pos"))
    with pytest.raises(DataError, match=r"b.jsonl, line 1: .* Put at least one row of each class into the training"):
        prepare(DataSpec(train=(train,), eval=(other,)), task="sequence-classification", tokenizer=PAIRED)
    tagged = jsonl(tmp_path / "c.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "B"]}])
    with pytest.raises(DataError, match=r"found the class 'B', expected one of O, X\. Give --labels"):
        prepare(DataSpec(train=(tagged,)), task="token-classification", tokenizer=PAIRED, labels=("O", "X"))


@pytest.mark.parametrize("split", ("train", "eval"))
def test_a_class_that_is_not_in_the_training_set_is_an_error(tmp_path: Path, split: str) -> None:
    """With the row's place and the nearest class, in either set."""
    train = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in ("good", "bad")])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": "goood"}])
    spec = DataSpec(train=(train, other)) if split == "train" else DataSpec(train=(train,), eval=(other,))
    with pytest.raises(DataError, match=r"b.jsonl, line 1: found the class 'goood'.*The closest is 'good'"):
        prepare(spec, task="sequence-classification", tokenizer=ENCODER, labels=("bad", "good"))


def test_regression_labels_are_floats(tmp_path: Path) -> None:
    """Also where they are written as integers or as text; NaN is refused with its line."""
    file = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in (1, "2.5")])
    prepared = prepare(DataSpec(train=(file,)), task="regression", tokenizer=ENCODER)
    assert collate(prepared, range(2))["labels"].tolist() == [1.0, 2.5]
    assert prepared.labels == ()
    bad = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": 1.0}, {"text": "a", "label": float("nan")}])
    assert "b.jsonl, line 2: found the label nan" in message_of(DataSpec(train=(bad,)), "regression", ENCODER)


def test_tags_are_aligned_padded_and_named(tmp_path: Path) -> None:
    """Token classification: names in order, labels padded with -100, rows of several lengths in one batch."""
    rows = [{"tokens": ["the", "fox"], "tags": ["O", "B"]}, {"tokens": ["a"], "tags": ["O"]}]
    tokenizer = build_tokenizer("encoder")
    tokenizer.add_prefix_space = True
    spec = DataSpec(train=(jsonl(tmp_path / "a.jsonl", rows),), max_length=32)
    prepared = prepare(spec, task="token-classification", tokenizer=tokenizer)
    assert prepared.labels == inspect_labels(spec, "token-classification") == ("B", "O")
    batch = collate(prepared, range(2))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert [label for label in batch["labels"].flatten().tolist() if label != IGNORED] == [1, 0, 1]
    assert prepared.report.train.loss_tokens == 3


def test_sequence_to_sequence_targets_are_padded_apart(tmp_path: Path) -> None:
    """Labels have the target's length and special tokens, and -100 as padding."""
    rows = [{"source": "a long source", "target": "t"}, {"source": "s", "target": "ttt"}]
    spec = DataSpec(train=(jsonl(tmp_path / "a.jsonl", rows),), max_length=64)
    batch = collate(prepare(spec, task="seq2seq", tokenizer=SEQ2SEQ), range(2))
    assert batch["labels"].shape == (2, 4)
    assert batch["labels"][0, 2:].tolist() == [IGNORED, IGNORED]
    assert (batch["labels"] == EOS).sum().item() == 2
    assert batch["input_ids"].shape[1] > 4


# --- which rows


def test_held_out_rows_are_disjoint_complete_and_drawn_by_the_seed(tmp_path: Path) -> None:
    """The two sets partition the rows, exactly as many as asked; the same seed gives the same split."""
    file = jsonl(tmp_path / "a.jsonl", SENTENCES)
    every = [row["input_ids"] for row in classes(file).train]

    def halves(seed: int) -> tuple[list[list[int]], list[list[int]]]:
        prepared = classes(file, eval_fraction=0.2, seed=seed)
        assert prepared.eval is not None
        return [row["input_ids"] for row in prepared.train], [row["input_ids"] for row in prepared.eval]

    train, held = halves(0)
    assert len(held) == 6
    assert sorted(train + held) == sorted(every)
    assert halves(0) == (train, held)
    assert halves(1) != (train, held)


def test_the_held_out_part_of_a_stream_is_its_end(tmp_path: Path) -> None:
    """Blocks of a plain text are split where it is cut once; the counts of both parts add up."""
    (tmp_path / "a.txt").write_text("".join(f"{number} " for number in range(400)))
    whole = causal(str(tmp_path / "a.txt"))
    parts = causal(str(tmp_path / "a.txt"), eval_fraction=0.25)
    assert parts.eval is not None
    assert parts.report.eval is not None
    assert [*parts.train, *parts.eval] == list(whole.train)
    assert len(parts.eval) == round(len(whole.train) * 0.25)
    assert parts.report.train.tokens + parts.report.eval.tokens == whole.report.train.tokens
    assert parts.report.train.examples == len(parts.train)


def test_the_first_rows_are_taken_where_a_limit_is_set(tmp_path: Path) -> None:
    """`max_rows` holds for each set; the classes are still those of the whole training set."""
    file = jsonl(tmp_path / "a.jsonl", SENTENCES)
    prepared = classes(file, eval=(file,), max_rows=2)
    assert prepared.eval is not None
    assert len(prepared.train) == len(prepared.eval) == 2
    assert prepared.labels == ("0", "1", "2")


def test_several_files_are_joined_in_order_and_must_agree_on_the_format(tmp_path: Path) -> None:
    """Files may differ in their columns' names, not in what a row is."""
    first = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}])
    second = jsonl(tmp_path / "b.jsonl", [{"sentence": "b", "label": 1}])
    assert [ENCODER.decode(row["input_ids"]) for row in classes(first, second).train] == ["<bos>a<eos>", "<bos>b<eos>"]
    pairs = jsonl(tmp_path / "c.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 1}])
    wanted = "c.jsonl, line 1: found the format pair, expected classification"
    assert wanted in message_of(DataSpec(train=(first, pairs)), "sequence-classification", ENCODER)


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    """Nothing is cached: same name, same size, same time stamp, other content, other result."""
    path = tmp_path / "a.jsonl"
    before = causal(jsonl(path, [{"prompt": "q", "completion": "aa"}]))
    stamp = path.stat()
    after = causal(jsonl(path, [{"prompt": "q", "completion": "zz"}]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = causal(str(path))
    assert DECODER.decode(before.train[0]["input_ids"]) == "<bos>qaa<eos>"
    assert [DECODER.decode(item.train[0]["input_ids"]) for item in (after, again)] == ["<bos>qzz<eos>"] * 2


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files lie in TMPDIR alone, go with the sets, and do not outlive an error."""
    scratch, work = tmp_path / "scratch", tmp_path / "work"
    scratch.mkdir()
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.chdir(work)
    good, bad = jsonl(tmp_path / "a.jsonl", PROMPTS), tmp_path / "b.jsonl"
    prepared = causal(good, eval_fraction=0.5)
    assert len(list(scratch.iterdir())) == 2
    del prepared
    gc.collect()
    bad.write_text(Path(good).read_text() + "{broken\n")
    (tmp_path / "c.txt").write_text("few blocks " * 4)
    refused = [
        DataSpec(train=(str(bad),)),
        DataSpec(train=(good,), max_length=2),
        DataSpec(train=(good,), eval=(str(bad),)),
        DataSpec(train=(str(tmp_path / "c.txt"),), max_length=16, eval_fraction=0.9),
    ]
    for spec in refused:
        message_of(spec)
    causal(str(tmp_path / "c.txt"), max_length=4, eval_fraction=0.5)
    gc.collect()
    assert list(scratch.iterdir()) == []
    assert list(work.iterdir()) == []


def test_a_forked_process_does_not_remove_its_parents_rows(tmp_path: Path) -> None:
    """Only the process that wrote a set removes it."""
    file = arrow.write(iter([{"input_ids": [1, 2]}]))
    arrow._remove_own(file, os.getpid() + 1)
    assert file.exists()
    arrow._remove_own(file, os.getpid())
    assert not file.parent.exists()


def test_the_same_request_gives_the_same_rows(tmp_path: Path) -> None:
    """Preparing twice is preparing once."""
    file = jsonl(tmp_path / "a.jsonl", PROMPTS)
    one, two = (causal(file, eval_fraction=0.25) for _ in range(2))
    assert list(one.train) == list(two.train)
    assert one.report == two.report


@pytest.mark.parametrize(
    ("settings", "wanted"),
    (
        ({"train": ()}, "data.train"),
        ({"eval_fraction": 1.0}, "data.eval_fraction"),
        ({"eval_fraction": 0.1, "eval": ("b",)}, "data.eval_fraction"),
        ({"max_length": 1}, "data.max_length"),
        ({"max_rows": 0}, "data.max_rows"),
        ({"pad_to_multiple_of": 0}, "data.pad_to_multiple_of"),
        ({"pad_to_multiple_of": 8, "static_shapes": True}, "data.pad_to_multiple_of"),
    ),
)
def test_impossible_settings_are_named(settings: dict[str, Any], wanted: str) -> None:
    """A value out of range, or two settings of which one would be ignored."""
    with pytest.raises(DataError) as caught:
        DataSpec(**{"train": ("a",), **settings})
    assert caught.value.where == wanted


def test_settings_that_the_data_would_ignore_are_errors(tmp_path: Path) -> None:
    """Plain text has no rows to limit or keep apart; only causal models read packed rows; too few rows to split."""
    (tmp_path / "a.txt").write_text("text " * 100)
    text, rows = str(tmp_path / "a.txt"), jsonl(tmp_path / "a.jsonl", SENTENCES)
    assert "without packing" in message_of(DataSpec(train=(text,), packing=False))
    assert "which has no rows" in message_of(DataSpec(train=(text,), max_rows=3))
    assert "for the task regression" in message_of(DataSpec(train=(text,)), "regression", ENCODER)
    packed = DataSpec(train=(rows,), pack_examples=True)
    assert message_of(packed, "sequence-classification", ENCODER).startswith("data.pack_examples")
    few = jsonl(tmp_path / "b.jsonl", PROMPTS[:1])
    assert "to take 0.5 of" in message_of(DataSpec(train=(few,), eval_fraction=0.5))


def test_an_unknown_task_is_a_request_error(tmp_path: Path) -> None:
    """Before any file is read."""
    with pytest.raises(RequestError, match="expected one of causal-lm"):
        inspect_labels(DataSpec(train=("nowhere.jsonl",)), "translation")


def test_tasks_without_classes_have_no_labels(tmp_path: Path) -> None:
    """Causal models and regression have none; a single class is an error."""
    file = jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    assert inspect_labels(DataSpec(train=(file,)), "regression") == ()
    with pytest.raises(DataError, match="one class only"):
        inspect_labels(DataSpec(train=(file,)), "sequence-classification")


def test_the_report_can_be_printed(tmp_path: Path) -> None:
    """It names the format and counts what was cut and dropped."""
    rows = [{"prompt": "q", "completion": "z" * 50}, {"prompt": "q" * 50, "completion": "z"}]
    lines = causal(jsonl(tmp_path / "a.jsonl", rows)).report.lines()
    assert lines == [
        "format prompt-completion, up to 32 tokens",
        "train: 2 rows, 1 example, 32 tokens, 30 carry loss, 1 cut, 1 dropped without loss",
    ]


# --- real data


def test_sst2_is_read_without_a_header(shared_data: Path) -> None:
    """Two columns by number, nothing quoted, every sentence there."""
    folder = shared_data / "classification" / "sst2"
    spec = DataSpec(
        train=(str(folder / "train.tsv"),), eval=(str(folder / "dev.tsv"),), columns={"text": "0", "label": "1"}
    )
    prepared = prepare(spec, task="sequence-classification", tokenizer=ENCODER)
    assert prepared.eval is not None
    assert (len(prepared.train), len(prepared.eval), prepared.labels) == (6920, 872, ("0", "1"))
    assert "expected columns for sequence-classification" in message_of(
        DataSpec(train=spec.train), "sequence-classification", ENCODER
    )


def test_cola_and_rte_are_read_with_their_quotes(shared_data: Path) -> None:
    """CoLA: columns 3 and 1 of four; RTE: a header, and quotes that mean nothing."""
    folder = shared_data / "classification"
    cola = DataSpec(train=(str(folder / "cola" / "in_domain_train.tsv"),), columns={"text": "3", "label": "1"})
    assert len(prepare(cola, task="sequence-classification", tokenizer=ENCODER).train) == 8551
    rte = DataSpec(train=(str(folder / "rte" / "dev.tsv"),))
    prepared = prepare(rte, task="sequence-classification", tokenizer=PAIRED)
    assert (len(prepared.train), prepared.labels) == (277, ("entailment", "not_entailment"))
    numbered = DataSpec(train=rte.train, columns={"sentence1": "1", "sentence2": "2", "label": "3"})
    assert "reads like a header" in message_of(numbered, "sequence-classification", PAIRED)


def test_banking77_has_77_classes(shared_data: Path) -> None:
    """CSV with quotes, the label under another name."""
    folder = shared_data / "classification" / "banking77"
    spec = DataSpec(train=(str(folder / "train.csv"),), eval=(str(folder / "test.csv"),), columns={"label": "category"})
    prepared = prepare(spec, task="sequence-classification", tokenizer=ENCODER)
    assert prepared.eval is not None
    assert (len(prepared.train), len(prepared.eval), len(prepared.labels)) == (10003, 3080, 77)


def test_gsm8k_is_prompt_and_completion_by_columns(shared_data: Path) -> None:
    """Question and answer; the loss is on the answer, which ends in its number."""
    file = str(shared_data / "instruct" / "gsm8k" / "test.jsonl")
    spec = DataSpec(train=(file,), columns={"prompt": "question", "completion": "answer"}, max_length=2048)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "models" / "stories260K", model_max_length=2048)
    prepared = prepare(spec, task="causal-lm", tokenizer=tokenizer)
    assert prepared.report.train.rows == len(prepared.train) == 1319
    row = prepared.train[0]
    learned = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert learned.startswith("Janet sells 16")
    assert learned.endswith("#### 18</s>")


def test_tinyshakespeare_is_packed_for_a_real_tokenizer(shared_data: Path) -> None:
    """Every token but those of the last block, once."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared_data / "models" / "stories260K")
    file = str(shared_data / "text" / "tinyshakespeare.txt")
    counts = causal(file, tokenizer=tokenizer, max_length=256).report.train
    assert counts.tail_tokens < 256
    assert counts.tokens % 256 == 0
    text = Path(file).read_text()
    assert counts.tokens + counts.tail_tokens == len(tokenizer(text, verbose=False)["input_ids"]) + 1
