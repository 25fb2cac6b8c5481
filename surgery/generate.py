"""Answers to prompts: what is asked for, what comes back, and how torch gives it. `surgery.onnx_runtime` gives it too.

At module level nothing here imports torch or transformers: an ONNX folder needs neither.

Shape letters: v vocabulary, l labels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.checkpoint import CONFIG_FILE, RECORD_FILE, path_inside, read_json
from surgery.columns import generator_seed
from surgery.errors import DamagedError, NotAModelError, RequestError, UnsupportedError, option_of, shorten

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.manifest import Record

END, TOKENS, POSITIONS = "end", "max-new-tokens", "positions"  # why an answer stopped
HALF_CHARACTER = "\ufffd"
LOWEST_TEMPERATURE = 0.01  # below it the exponents of the softmax overflow
TEXT_MODELS = "a decoder, an encoder-decoder or a text classifier"
KINDS = {
    "causal-lm": "decoder",
    "seq2seq": "encoder-decoder",
    "sequence-classification": "classifier",
    "regression": "classifier",
}
# Entries of generation_config.json that change what is written, with the values at which they do not.
UNAPPLIED: Mapping[str, tuple[Any, ...]] = {"num_beams": (1,), "penalty_alpha": (0,), "stop_strings": ([],)}
# What of a folder's own settings would change what --temperature, --top-k and --top-p say.
NO_OTHER_SAMPLING = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_p": None}

Array = npt.NDArray[Any]
Write = Callable[[str], object]


# --- what is asked for, and what comes back


@dataclass(frozen=True)
class GenerateSpec:
    """How text is made.

    temperature 0: the likeliest token each time. Above it tokens are drawn, out of the `top_k` likeliest (0: all) and
    of those, the likeliest that make up `top_p` of the probability; what is drawn is, in each runtime, a function of
    (seed, prompt).
    chat: the prompt is one message of a user, written as the tokenizer's chat template says.
    """

    max_new_tokens: int = 50
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        is_warm = LOWEST_TEMPERATURE <= self.temperature < math.inf
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (is_warm or self.temperature == 0, f"0, or {LOWEST_TEMPERATURE} and more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise RequestError(option_of(name), str(getattr(self, name)), expected=expected)
        idle = [name for name in ("top_k", "top_p", "seed") if name in self.given()]
        if not self.temperature and idle:
            found = f"{getattr(self, idle[0])} with temperature 0, which draws nothing"
            raise RequestError(option_of(idle[0]), found, expected="a --temperature above 0")

    def given(self) -> list[str]:
        """The names of what differs from its default."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Score:
    """A label with its probability, or with its value for regression."""

    label: str
    score: float


@dataclass(frozen=True)
class Answer:
    """New text, its tokens and why it stopped (`end`, `max-new-tokens`, `positions`), or a classifier's scores."""

    prompt: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    stopped: str = ""
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    scores: tuple[Score, ...] = ()


class TextStream:
    """Tokens to text as they come: whole characters only, with the spaces that decoding all at once would give.

    A token's text is what it adds to the text of the tokens before it, `context` (the prompt's) among them: decoders
    drop the space that a first word begins with.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int], write: Write) -> None:
        self._decode, self._write = decode, write
        self._ids, self._begin, self._end = list(context), 0, len(context)
        self._context = len(context)
        self._parts: list[str] = []
        self._started = time.monotonic()
        self._first_seconds = 0.0

    def put(self, token: int) -> None:
        """Take one more token; write what is certain now."""
        if len(self._ids) == self._context:
            self._first_seconds = time.monotonic() - self._started
        self._ids.append(token)
        new = self._pending()
        if new and not new.endswith(HALF_CHARACTER):
            self._emit(new)
            self._begin, self._end = self._end, len(self._ids)

    def _pending(self) -> str:
        known = self._decode(self._ids[self._begin : self._end])
        return self._decode(self._ids[self._begin :])[len(known) :]

    def _emit(self, text: str) -> None:
        self._parts.append(text)
        self._write(text)

    def finish(self, prompt: str, spec: GenerateSpec, eos: Sequence[int]) -> Answer:
        """Write what is left, but for a character that was cut off, and sum up."""
        rest = self._pending().rstrip(HALF_CHARACTER)
        if rest:
            self._emit(rest)
        tokens = tuple(self._ids[self._context :])
        stopped = END if tokens[-1] in eos else TOKENS if len(tokens) == spec.max_new_tokens else POSITIONS
        return Answer(
            prompt, "".join(self._parts), tokens, stopped, self._first_seconds, time.monotonic() - self._started
        )


# --- what a folder's JSON files say


@dataclass(frozen=True)
class Rules:
    """What generation_config.json (or, without one, config.json) asks of every answer, under transformers' names."""

    eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()


def optional_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder, or nothing where it has none."""
    return read_json(path_inside(folder, name)) if (folder / name).is_file() else {}


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises: NotAModelError."""
    if not (folder / CONFIG_FILE).is_file():
        raise NotAModelError(str(folder), f"no {CONFIG_FILE}", expected="a Hugging Face model folder")
    return read_json(path_inside(folder, CONFIG_FILE))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def read_rules(folder: Path, unapplied: Mapping[str, tuple[Any, ...]]) -> tuple[Rules, list[str]]:
    """The rules, and a remark where the folder asks for more. Raises: DamagedError, NotAModelError."""
    config = read_config_json(folder)
    flat = {**_text_config(config), **config}
    asked = optional_json(folder, "generation_config.json") or flat
    for name in ("eos_token_id", "decoder_start_token_id", "bos_token_id"):
        if asked.get(name) is None:
            asked = {**asked, name: flat.get(name)}
    if asked["decoder_start_token_id"] is None:
        asked = {**asked, "decoder_start_token_id": asked["bos_token_id"]}
    known = {f.name: asked[f.name] for f in fields(Rules) if asked.get(f.name) is not None}
    for field in fields(Rules):
        if isinstance(field.default, tuple) and field.name in known:
            values = known[field.name]
            known[field.name] = tuple(values) if isinstance(values, list) else (values,)
    left = [name for name, idle in unapplied.items() if asked.get(name) is not None and asked[name] not in idle]
    return Rules(**known), [f"not applied of what {folder} asks for: {', '.join(left)}"] if left else []


def max_positions(config: Mapping[str, Any]) -> int | None:
    """How many positions a model has; None where they are relative, or config.json does not say."""
    text = _text_config(config)
    own = None if "relative_attention_num_buckets" in text else text.get("n_positions")
    found = text.get("max_position_embeddings", own)
    return found if isinstance(found, int) and found > 0 else None


def room(tokens: int, spec: GenerateSpec, limit: int | None) -> int:
    """How many tokens may follow `tokens`. Raises: RequestError: none, as the model's positions are used up."""
    if limit is not None and tokens >= limit:
        raise RequestError("--prompt", f"{tokens} tokens", expected=f"fewer than the model's {limit} positions")
    return spec.max_new_tokens if limit is None else min(spec.max_new_tokens, limit - tokens)


def require_readable(tokens: int, limit: int | None) -> None:
    """An encoder has a position for each token. Raises: RequestError."""
    if limit is not None and tokens > limit:
        raise RequestError("--prompt", f"{tokens} tokens", expected=f"at most the model's {limit} positions")


def require_tokens(ids: Sequence[int]) -> None:
    """Raises: RequestError: a prompt without a token."""
    if not ids:
        raise RequestError("--prompt", "a text that has no tokens", expected="text")


def require_no_settings(spec: GenerateSpec) -> None:
    """A classifier makes no text. Raises: RequestError: a setting that would be ignored."""
    for name in spec.given():
        raise RequestError(option_of(name), "given to a classifier, which makes no text", expected="--prompt alone")


def scores_of(config: Mapping[str, Any], logits_l: Array) -> tuple[Score, ...]:
    """A classifier's labels, most probable first; the values of a regression in their own order."""
    labels = config.get("id2label") or {}
    usual = "regression" if len(logits_l) == 1 else "single_label_classification"
    kind = config.get("problem_type") or usual
    logits_l = logits_l.astype(np.float64)
    if kind == "regression":
        values_l = logits_l
    elif kind == "multi_label_classification":
        values_l = np.exp(-np.logaddexp(0, -logits_l))
    else:
        values_l = softmax(logits_l)
    order = range(len(values_l)) if kind == "regression" else np.argsort(-values_l, kind="stable")
    return tuple(Score(str(labels.get(str(n), f"LABEL_{n}")), float(values_l[n])) for n in order)


def no_template(folder: Path) -> RequestError:
    """What to say of --chat without a template."""
    fix = "Leave --chat out: the prompt is then given to the model as it stands"
    return RequestError("--chat", f"no chat template in {folder}", expected="an instruct model's tokenizer", fix=fix)


def refused(error: Exception) -> RequestError:
    """What to say of a chat template that does not take a user's message."""
    return RequestError("--chat", f"the chat template refuses the prompt ({shorten(str(error), 200)})")


def softmax(x_v: Array) -> Array:
    """Shapes: (v,) -> (v,), summing to 1."""
    powers_v = np.exp(x_v - x_v.max())
    return np.asarray(powers_v / powers_v.sum())


# --- in torch


class _Streamer:
    """Hands each new token to our own stream; transformers' generate calls nothing but these two.

    transformers' TextStreamer starts anew after every newline and at the answer's first token, and a sentencepiece
    decoder drops the space that a text begins with: words would stick to what stands before them.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream, self._is_prompt = stream, True

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            for token in value.reshape(-1).tolist():
                self._stream.put(token)
        self._is_prompt = False

    def end(self) -> None:
        """The stream is finished by whoever made it."""


@dataclass(frozen=True)
class TorchModel:
    """A model in memory, `kind` (decoder, encoder-decoder or classifier), and its tokenizer."""

    folder: Path
    kind: str
    model: Any
    tokenizer: Any
    config: Mapping[str, Any]
    rules: Rules
    notes: tuple[str, ...] = ()
    runtime: str = "torch"

    def answer(self, prompt: str, spec: GenerateSpec, write: Write) -> Answer:
        """Text, given to `write` as it comes, or scores. Raises: RequestError."""
        if self.kind == "classifier":
            require_no_settings(spec)
            return self._classify(prompt)
        return self._write_on(prompt, spec, write)

    def _encode(self, prompt: str, *, chat: bool) -> Any:
        """The tokenizer's batch of one. Raises: RequestError: no tokens, or no template that takes the prompt."""
        text = self._render(prompt) if chat else prompt
        batch = self.tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)
        require_tokens(batch["input_ids"][0].tolist())
        return batch.to(self.model.device)

    def _render(self, prompt: str) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise no_template(self.folder)
        message = {"role": "user", "content": prompt}
        try:
            return str(self.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise refused(error) from error

    def _write_on(self, prompt: str, spec: GenerateSpec, write: Write) -> Answer:
        import torch

        from surgery.compat import quiet_loading

        batch, limit = self._encode(prompt, chat=spec.chat), max_positions(self.config)
        given = batch["input_ids"][0].tolist()
        if self.kind == "encoder-decoder":
            require_readable(len(given), limit)
            given = [self.rules.decoder_start_token_id]
        stream = TextStream(self._decode, given, write)
        drawing = {"temperature": spec.temperature, "top_k": spec.top_k, "top_p": spec.top_p, **NO_OTHER_SAMPLING}
        with quiet_loading(), torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(generator_seed(spec.seed, prompt))
            self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=room(len(given), spec, limit),
                num_beams=1,
                stop_strings=None,
                eos_token_id=list(self.rules.eos_token_id) or None,
                do_sample=spec.temperature > 0,
                streamer=_Streamer(stream),
                **(drawing if spec.temperature else {}),
            )
        return stream.finish(prompt, spec, self.rules.eos_token_id)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _classify(self, prompt: str) -> Answer:
        import torch

        started = time.monotonic()
        batch = self._encode(prompt, chat=False)
        limits = [n for n in (max_positions(self.config), self.tokenizer.model_max_length) if n is not None]
        require_readable(batch["input_ids"].shape[1], min(limits))
        with torch.inference_mode():
            logits_l = self.model(**batch).logits[0].float().cpu().numpy()
        return Answer(prompt, seconds=time.monotonic() - started, scores=scores_of(self.config, logits_l))


def open_model(folder: Path, *, base: str | None = None) -> TorchModel:
    """A folder's model in memory, ready to answer. base: where an adapter's base is.

    No code of the folder runs: a side network is the project's own.
    Raises: NotAModelError, DamagedError, BaseMismatchError, ResourceError, RequestError; UnsupportedError where the
    model neither writes text nor classifies it.
    """
    from surgery.exported import load_merged, own_class
    from surgery.manifest import ADAPTER, MERGED, REMOTE_CODE, read_record
    from surgery.operate import load, require_memory

    is_ours = (folder / RECORD_FILE).is_file()
    record = read_record(folder, ADAPTER, MERGED, REMOTE_CODE) if is_ours else None
    is_adapter = record is not None and record.kind == ADAPTER
    if base is not None and not is_adapter:
        raise RequestError("--base", "given for a folder that is no adapter", expected="an adapter folder with it")
    if not is_adapter:
        require_memory(folder, None)
    kind = _kind(folder, record)
    rules, notes = read_rules(folder, UNAPPLIED)
    tokenizer = _open_tokenizer(folder)
    if is_adapter:
        model = load(folder, base=base)
    else:
        model = load_merged(folder, own_class(folder, record) if record else None).eval()
    remarks = () if kind == "classifier" else tuple(notes)
    return TorchModel(folder, kind, model, tokenizer, read_config_json(folder), rules, remarks)


def _kind(folder: Path, record: Record | None) -> str:
    """decoder, encoder-decoder or classifier. Raises: UnsupportedError, with what the model is instead."""
    import transformers

    from surgery.survey import own_architecture, own_task, read_config

    if record:
        task, name = record.plan.task, record.plan.architecture
    else:
        config = read_config(folder)
        task, name = own_task(config), own_architecture(config)
    if name and not hasattr(transformers, name):
        if record:  # the name becomes part of a side network's source: it must be one that we could have written
            raise DamagedError(
                str(folder / RECORD_FILE), f"architecture {name[:80]!r}", expected="one of transformers'"
            )
        fix = "surgery runs no code from a model's folder"
        found = f"{name}, which transformers does not have"
        raise UnsupportedError(str(folder), found, expected="a model that it has", fix=fix)
    if task in KINDS:
        return KINDS[task]
    others = {"image-classification": "reads images", "token-classification": "gives every token a label"}
    does = "fills masks" if name.endswith("ForMaskedLM") else others.get(task, "has no head: it gives hidden states")
    raise UnsupportedError(str(folder), f"{name or 'a model of no named class'}, which {does}", expected=TEXT_MODELS)


def _open_tokenizer(folder: Path) -> Any:
    """Raises: NotAModelError: none, or one that transformers cannot read."""
    from transformers import AutoTokenizer

    from surgery.compat import quiet_loading

    why = "it has no tokens"
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) > len(tokenizer.all_special_ids):  # without files, some classes come out all but empty
            return tokenizer
    except (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        why = shorten(str(error), 160)
    raise NotAModelError(str(folder), f"no tokenizer that transformers can read ({why})", expected="the model's own")
