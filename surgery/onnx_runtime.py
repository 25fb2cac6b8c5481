"""Answers from an ONNX folder: onnxruntime, numpy and the tokenizer, without torch and without transformers.

Shape letters: t tokens, v vocabulary.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint import DECODER_FILE, ENCODER_FILE, MODEL_FILE, RECORD_FILE, path_inside
from surgery.columns import generator_seed
from surgery.errors import DamagedError, NotAModelError, SurgeryError, UnsupportedError, shorten
from surgery.generate import (
    TEXT_MODELS,
    UNAPPLIED,
    Answer,
    Array,
    GenerateSpec,
    Rules,
    TextStream,
    Write,
    max_positions,
    no_template,
    optional_json,
    read_config_json,
    read_rules,
    refused,
    require_no_settings,
    require_readable,
    require_tokens,
    room,
    scores_of,
    softmax,
)
from surgery.lookup import require_extra
from surgery.tensorfile import header_sha256

PAST, PRESENT = "past_key_values.", "present."
CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ONNX_UNAPPLIED: Mapping[str, tuple[Any, ...]] = {
    **UNAPPLIED,
    "bad_words_ids": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "sequence_bias": (),
    "watermarking_config": (),
}


# --- chat templates

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")


def render_chat(folder: Path, prompt: str) -> str:
    """One message of a user as the tokenizer's template writes it, up to where the answer begins.

    Sandboxed, with the names and settings that transformers gives templates.
    Raises: RequestError: no template, or one that refuses.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = optional_json(folder, "tokenizer_config.json")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}  # noqa: DTZ005  templates mean local time
    message = {"role": "user", "content": prompt}
    names: dict[str, Any] = {"messages": [message], "tools": None, "documents": None, "add_generation_prompt": True}
    names |= _named_tokens(folder)
    source = _GENERATION_TAG.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}", _template(folder, config))
    try:
        return environment.from_string(source).render(**names)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise refused(error) from error


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=settings.pop("ensure_ascii", False), indent=indent, **settings)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path_inside(folder, path.name).read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((entry["template"] for entry in found if entry["name"] == "default"), None)
    if not isinstance(found, str):
        raise no_template(folder)
    return found


def _named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and the like, as tokenizer_config.json or special_tokens_map.json name them."""
    entries = {**optional_json(folder, "special_tokens_map.json"), **optional_json(folder, "tokenizer_config.json")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


# --- the tokenizer


class Text:
    """tokenizer.json, used as transformers' fast tokenizers use it.

    By itself, as `transformers.AutoTokenizer` imports torch, which takes seconds.
    Raises: NotAModelError, DamagedError.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        name = "tokenizer.json"
        if not (folder / name).is_file():
            fix = "Load the model's tokenizer with transformers and save it into the folder: that writes one"
            raise NotAModelError(str(folder), f"no {name}", expected="the model's tokenizer beside its graph", fix=fix)
        try:
            self._tokenizer = Tokenizer.from_file(str(path_inside(folder, name)))
        except Exception as error:
            found = f"it cannot be read ({shorten(str(error), 200)})"
            raise DamagedError(str(folder / name), found, expected="a tokenizer") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder, self._config = folder, optional_json(folder, "tokenizer_config.json")
        named = _named_tokens(folder)
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        plain = {t for t in named.values() if t not in special and self._tokenizer.token_to_id(t) is not None}
        self._tokenizer.add_special_tokens(sorted(plain))

    @property
    def max_tokens(self) -> int | None:
        """What tokenizer_config.json admits; some name a number beyond all texts."""
        found = self._config.get("model_max_length")
        return found if isinstance(found, int) and found < 1 << 31 else None

    def encode(self, prompt: str, *, chat: bool) -> tuple[list[int], list[int]]:
        """Ids and token types (t,) of a prompt. Raises: RequestError: it has no tokens."""
        text = render_chat(self._folder, prompt) if chat else prompt
        encoding = self._tokenizer.encode(text, add_special_tokens=not chat)
        ids = list(encoding.ids)
        require_tokens(ids)
        return ids, list(encoding.type_ids)

    def tokens(self, text: str, pair: str | None = None, *, special: bool = True) -> tuple[list[int], list[int]]:
        """Ids and token types (t,) of a text or a pair, as it stands."""
        encoding = self._tokenizer.encode(text, pair, add_special_tokens=special)
        return list(encoding.ids), list(encoding.type_ids)

    def cut(self, text: str, pair: str | None, length: int) -> tuple[list[int], list[int]]:
        """The same with at most `length` tokens: the longer text loses its end first."""
        self._tokenizer.enable_truncation(length, strategy="longest_first")
        try:
            return self.tokens(text, pair)
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


# --- the next token


def adjust(logits_v: Array, ids: Sequence[int], rules: Rules, *, begin: int, end: int) -> Array:
    """Logits after the folder's rules, in the order in which transformers applies them; the argument is changed.

    ids: all tokens so far, of which the first `begin` were given; end: how many there will be at most.
    """
    if rules.repetition_penalty != 1:
        seen = np.unique(np.asarray(ids))
        x = logits_v[seen]
        logits_v[seen] = np.where(x < 0, x * rules.repetition_penalty, x / rules.repetition_penalty)
    logits_v[_repeating(ids, rules.no_repeat_ngram_size)] = -np.inf
    if len(ids) < max(rules.min_length, begin + rules.min_new_tokens):
        logits_v[list(rules.eos_token_id)] = -np.inf
    if rules.forced_bos_token_id is not None and len(ids) == 1:
        _force(logits_v, [rules.forced_bos_token_id])
    if rules.forced_eos_token_id and len(ids) == end - 1:
        _force(logits_v, rules.forced_eos_token_id)
    logits_v[list(rules.suppress_tokens)] = -np.inf
    if len(ids) == begin + (begin == 1 and rules.forced_bos_token_id is not None):
        logits_v[list(rules.begin_suppress_tokens)] = -np.inf
    return logits_v


def _repeating(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would end a run of `size` tokens that was there before."""
    if size < 1 or len(ids) < size:
        return []
    last = list(ids[len(ids) - size + 1 :])
    return [ids[n + size - 1] for n in range(len(ids) - size + 1) if list(ids[n : n + size - 1]) == last]


def _force(logits_v: Array, tokens: Sequence[int]) -> None:
    logits_v[:] = -np.inf
    logits_v[list(tokens)] = 0


def choose(logits_v: Array, spec: GenerateSpec, generator: np.random.Generator) -> int:
    """The next token: the likeliest, or one drawn."""
    if np.isnan(logits_v).any():
        fix = "A graph in fp16 may have overflowed: export it in fp32"
        raise SurgeryError("logits", "they are not numbers", expected="finite ones", fix=fix)
    if not spec.temperature:
        return int(logits_v.argmax())
    return int(generator.choice(len(logits_v), p=softmax(narrow(logits_v, spec))))


def narrow(logits_v: Array, spec: GenerateSpec) -> Array:
    """Logits at a temperature, minus infinity outside top_k and top_p: the sets of tokens that transformers keeps."""
    x_v = logits_v.astype(np.float64) / spec.temperature
    if 0 < spec.top_k < len(x_v):
        x_v[x_v < np.partition(x_v, -spec.top_k)[-spec.top_k]] = -np.inf
    if spec.top_p < 1:
        order = np.argsort(x_v, kind="stable")
        dropped = softmax(x_v)[order].cumsum() <= 1 - spec.top_p
        dropped[-1] = False
        x_v[order[dropped]] = -np.inf
    return x_v


# --- the graphs


def is_onnx(folder: Path) -> bool:
    """Whether a folder holds graphs to be run."""
    return any((folder / name).is_file() for name in (MODEL_FILE, ENCODER_FILE, DECODER_FILE))


def _open_session(folder: Path, name: str) -> Any:
    """A graph, ready to run. OMP_NUM_THREADS counts, as it does for torch. Raises: UnsupportedError, DamagedError."""
    require_extra(str(folder), "onnxruntime")
    import onnxruntime

    if not (folder / name).is_file():
        raise DamagedError(str(folder), f"no {name}", expected=f"both {ENCODER_FILE} and {DECODER_FILE}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    threads = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(threads) if threads.isdigit() else 0
    path = str(path_inside(folder, name))
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        why = shorten(str(error), 300)
        if type(error).__name__ == "NotImplemented":  # onnxruntime's, of which the public module has no name
            fix = "Export it again with --dtype fp32"
            raise UnsupportedError(
                path, f"onnxruntime's CPU cannot run it ({why})", expected="a graph in fp32 or fp16", fix=fix
            ) from error
        found = f"onnxruntime cannot load it ({why})"
        raise DamagedError(path, found, expected="a whole ONNX model", fix="Export it again") from error


def as_value(values: Array) -> Any:
    """An array as a graph takes it."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def _row(values: Sequence[int]) -> Any:
    """Shapes: (t,) -> (1, t) int64."""
    return as_value(np.asarray([list(values)], np.int64))


def empty_cache(entry: Any, where: str, *, rows: int = 1) -> Any:
    """A past of no tokens, (rows, heads, 0, head size), from a graph's description of its input."""
    shape, dtype = entry.shape, CACHE_DTYPES.get(entry.type)
    if len(shape) != 4 or dtype is None or not all(isinstance(shape[axis], int) for axis in (1, 3)):
        found = f"{entry.name} is {entry.type} {shape}"
        raise UnsupportedError(where, found, expected="(batch, heads, past, head size) in fp32 or fp16")
    return as_value(np.zeros((rows, shape[1], 0, shape[3]), dtype))


def run_graph(session: Any, names: Sequence[str], feeds: Mapping[str, Any], where: str) -> list[Any]:
    """A graph's outputs. Raises: UnsupportedError: it wants what we do not know."""
    wanted = [entry.name for entry in session.get_inputs()]
    unknown = [name for name in wanted if name not in feeds]
    if unknown:
        raise UnsupportedError(where, f"an input {unknown[0]!r}", expected=f"no more than {', '.join(feeds)}")
    values: list[Any] = session.run_with_ort_values(list(names), {name: feeds[name] for name in wanted})
    return values


class Decoder:
    """A decoder's graph with the cache of one answer. fixed: inputs that stay, such as what an encoder gave."""

    def __init__(self, session: Any, fixed: Mapping[str, Any], where: str) -> None:
        self._session, self._fixed, self._where, self._length = session, fixed, where, 0
        own = [entry for entry in session.get_inputs() if entry.name.startswith(PAST) and entry.name not in fixed]
        self._past = {entry.name: empty_cache(entry, where) for entry in own}

    def next_logits(self, new: Sequence[int]) -> Array:
        """Logits (v,) float32 after `new` tokens (t,), which the cache then holds as well."""
        begin, self._length = self._length, self._length + len(new)
        feeds = {
            "input_ids": _row(new),
            "attention_mask": _row([1] * self._length),
            "position_ids": _row(range(begin, self._length)),
        }
        names = ["logits", *(PRESENT + name.removeprefix(PAST) for name in self._past)]
        logits, *presents = run_graph(self._session, names, {**feeds, **self._fixed, **self._past}, self._where)
        self._past = dict(zip(self._past, presents, strict=True))
        return np.array(logits.numpy()[0, -1], np.float32)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX folder: `kind` (decoder, encoder-decoder or classifier), its graphs by file name, its tokenizer."""

    folder: Path
    kind: str
    sessions: Mapping[str, Any]
    text: Text
    config: Mapping[str, Any]
    rules: Rules
    notes: tuple[str, ...] = ()
    runtime: str = "onnxruntime"

    def answer(self, prompt: str, spec: GenerateSpec, write: Write) -> Answer:
        """Text, given to `write` as it comes, or scores. Raises: RequestError, UnsupportedError."""
        if self.kind == "classifier":
            require_no_settings(spec)
            return self._classify(prompt)
        ids, _ = self.text.encode(prompt, chat=spec.chat)
        if self.kind == "decoder":
            decoder = Decoder(self.sessions[MODEL_FILE], {}, str(self.folder / MODEL_FILE))
            return self._write_on(decoder, ids, prompt, spec, write)
        start = self.rules.decoder_start_token_id
        if start is None:
            raise DamagedError(str(self.folder), "no decoder_start_token_id", expected="one in generation_config.json")
        require_readable(len(ids), max_positions(self.config))
        fixed = self.encode(np.asarray([ids], np.int64), np.ones((1, len(ids)), np.int64))
        decoder = Decoder(self.sessions[DECODER_FILE], fixed, str(self.folder / DECODER_FILE))
        return self._write_on(decoder, [start], prompt, spec, write)

    def _write_on(
        self, decoder: Decoder, given: Sequence[int], prompt: str, spec: GenerateSpec, write: Write
    ) -> Answer:
        """Token after token until the end, the number asked for, or the last position."""
        generator = np.random.default_rng(generator_seed(spec.seed, prompt))
        stream = TextStream(self.text.decode, given, write)
        ids, new = list(given), list(given)
        end = len(given) + room(len(given), spec, max_positions(self.config))
        while len(ids) < end and (len(ids) == len(given) or ids[-1] not in self.rules.eos_token_id):
            logits_v = adjust(decoder.next_logits(new), ids, self.rules, begin=len(given), end=end)
            new = [choose(logits_v, spec, generator)]
            ids += new
            stream.put(new[0])
        return stream.finish(prompt, spec, self.rules.eos_token_id)

    def encode(self, ids_bt: Array, mask_bt: Array) -> dict[str, Any]:
        """What the decoder's graph takes from the encoder's, under the decoder's names, for rows of int64."""
        session, mask = self.sessions[ENCODER_FILE], as_value(mask_bt)
        names = [entry.name for entry in session.get_outputs()]
        feeds = {"input_ids": as_value(ids_bt), "attention_mask": mask}
        values = run_graph(session, names, feeds, str(self.folder / ENCODER_FILE))
        renamed = {"side_states": "encoder_side_states", "last_hidden_state": "encoder_hidden_states"}
        found = {
            renamed.get(name, name.replace(PRESENT, PAST, 1)): value for name, value in zip(names, values, strict=True)
        }
        wanted = {entry.name for entry in self.sessions[DECODER_FILE].get_inputs()}
        return {name: value for name, value in {**found, "encoder_attention_mask": mask}.items() if name in wanted}

    def _classify(self, prompt: str) -> Answer:
        started = time.monotonic()
        ids, types = self.text.encode(prompt, chat=False)
        limits = [n for n in (max_positions(self.config), self.text.max_tokens) if n is not None]
        require_readable(len(ids), min(limits, default=None))
        feeds = {"input_ids": _row(ids), "attention_mask": _row([1] * len(ids)), "token_type_ids": _row(types)}
        (logits,) = run_graph(self.sessions[MODEL_FILE], ["logits"], feeds, str(self.folder / MODEL_FILE))
        scores = scores_of(self.config, logits.numpy()[0])
        return Answer(prompt, seconds=time.monotonic() - started, scores=scores)


def open_folder(folder: Path) -> OnnxModel:
    """An ONNX folder, ready to answer.

    Raises: UnsupportedError: onnxruntime is missing, or the graph neither writes text nor classifies it;
    NotAModelError, DamagedError.
    """
    _require_headers(folder)
    config, (rules, notes) = read_config_json(folder), read_rules(folder, ONNX_UNAPPLIED)
    is_single = (folder / MODEL_FILE).is_file()
    names = (MODEL_FILE,) if is_single else (ENCODER_FILE, DECODER_FILE)
    sessions = {name: _open_session(folder, name) for name in names}
    kind = _kind(sessions[MODEL_FILE], folder / MODEL_FILE) if is_single else "encoder-decoder"
    text = Text(folder)
    return OnnxModel(folder, kind, sessions, text, config, rules, () if kind == "classifier" else tuple(notes))


def _require_headers(folder: Path) -> None:
    """The files in which our graphs look for weights have them where they were. Raises: DamagedError."""
    described = optional_json(folder, RECORD_FILE).get("manifest", {}).get("export", {}).get("onnx", {})
    for name, digest in described.get("headers", {}).items() if described.get("data") == "safetensors" else ():
        path = path_inside(folder, name)
        if not path.is_file() or header_sha256(path) != digest:
            found = "it is absent, or its header has changed, and with it where weights lie"
            raise DamagedError(str(path), found, expected="the file that was exported", fix="Export again")


def _kind(session: Any, path: Path) -> str:
    """decoder or classifier. Raises: UnsupportedError, with what the graph is instead."""
    inputs = {entry.name for entry in session.get_inputs()}
    outputs = {entry.name: entry.shape for entry in session.get_outputs()}
    if any(name.startswith(PAST) for name in inputs):
        return "decoder"
    if "pixel_values" in inputs:
        found = "a model that reads images"
    elif "logits" not in outputs:
        found = f"an encoder without a head: it gives {', '.join(outputs)}"
    elif len(outputs["logits"]) == 2:
        return "classifier"
    else:
        found = "a model that scores every token, without a cache to write on with"
    raise UnsupportedError(str(path), found, expected=TEXT_MODELS)
