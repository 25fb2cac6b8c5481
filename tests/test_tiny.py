"""The tiny models themselves: they load as a downloaded checkpoint would, and nothing in them is dead."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from safetensors import safe_open

from tests.conftest import TinyModel
from tests.tiny import FAMILIES, SPECIAL, VOCABULARY, build_model, build_tokenizer, sample_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_and_loads_without_a_word(
    family: str, tiny_model: TinyModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny checkpoint loads without warnings and computes what the model computed before it was saved."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = tiny_model(family)
    model_class = getattr(transformers, FAMILIES[family].model)
    with caplog.at_level(logging.WARNING):
        loaded = model_class.from_pretrained(folder).eval()
    assert [record.getMessage() for record in caplog.records] == []
    inputs = sample_inputs(family)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, build_model(family)(**inputs).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_drawn(family: str) -> None:
    """No parameter is constant, so a fault in a bias or a norm cannot hide."""
    constant = [name for name, p in build_model(family).named_parameters() if p.numel() > 1 and p.std() == 0]
    assert constant == []


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.tokenizer])
def test_the_tokenizer_loads_as_the_family_s_own(family: str, tiny_model: TinyModel) -> None:
    """AutoTokenizer gives the ids that were built, with pad and eos set, and text survives a round trip."""
    text = "What is 2 + 3?\n{five} ~ the Quick fox."
    kind = FAMILIES[family].tokenizer
    loaded = transformers.AutoTokenizer.from_pretrained(tiny_model(family))
    built = build_tokenizer(kind)
    assert dict(loaded(text)) == dict(built(text))
    assert dict(loaded(text, "a pair")) == dict(built(text, "a pair"))
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.pad_token, loaded.eos_token, len(loaded)) == (SPECIAL[0], SPECIAL[1], VOCABULARY)


def test_dtype_and_shards_are_as_asked(tiny_model: TinyModel) -> None:
    """`dtype` and `max_shard_size` reach the files."""
    folder = tiny_model("llama", dtype=torch.bfloat16, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    for path in files:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118 not a dict


def test_the_same_request_gives_the_same_folder(tiny_model: TinyModel) -> None:
    """One request is built once; another seed or another setting is another folder."""
    assert tiny_model("gpt2") == tiny_model("gpt2")
    assert tiny_model("gpt2") != tiny_model("gpt2", seed=1)
    assert tiny_model("gpt2") != tiny_model("gpt2", overrides={"tie_word_embeddings": False})
