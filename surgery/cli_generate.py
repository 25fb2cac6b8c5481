"""The command `surgery generate`, which `surgery.cli` registers: parse, answer each prompt, print."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.checkpoint import require_folder
from surgery.cli_options import BASE, JSON
from surgery.errors import RequestError
from surgery.terminal import say

if TYPE_CHECKING:
    from surgery.generate import Answer, TorchModel
    from surgery.onnx_runtime import OnnxModel


@click.command("generate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeatable. Default: standard input.")
@click.option("--max-new-tokens", default=50, show_default=True, help="How many tokens to write at most.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    help="0: the likeliest token each time. Above 0: tokens are drawn, the more freely the higher.",
)
@click.option("--top-k", default=0, show_default=True, help="Draw from so many likeliest tokens only; 0: from all.")
@click.option(
    "--top-p", default=1.0, show_default=True, help="Draw from the likeliest tokens of this probability together."
)
@click.option(
    "--seed", default=0, show_default=True, help="With the prompt it decides what is drawn, by each runtime for itself."
)
@click.option("--chat", is_flag=True, help="The prompt is a user's message: write it as the chat template says.")
@BASE
@JSON
def generate_command(path: Path, *, prompts: tuple[str, ...], base: str | None, as_json: bool, **settings: Any) -> None:
    """Write on from a prompt with the model in PATH, or classify it.

    PATH is an adapter, a merged folder, a checkpoint or an ONNX folder; the last runs in onnxruntime alone.

    \b
    surgery generate model-paca/ --prompt 'Once upon a time'
    surgery generate model-onnx/ --prompt 'Once' --temperature 0.8 --top-p 0.9 --seed 1
    surgery generate classifier/ --prompt 'A fine film.' --json
    """  # noqa: D301  click reads \b as "keep these lines as they are"
    require_folder(path)
    from surgery.generate import POSITIONS, GenerateSpec

    spec = GenerateSpec(**settings)
    texts = [_require_text(prompt) for prompt in prompts or (_read_prompt(),)]
    model = _open(path, base)
    for note in model.notes:
        say(f"Note: {note}")
    answers = []
    for text in texts:
        if len(texts) > 1 and not as_json:
            say(f"Prompt: {text}")
        answer = model.answer(text, spec, (lambda _: None) if as_json else _write)
        answers.append(answer)
        if not as_json:
            click.echo("\n".join(_score_lines(answer)))
        if answer.stopped == POSITIONS:
            say("Note: stopped where the model's positions end.")
    if as_json:
        document = {"path": str(path), "kind": model.kind, "runtime": model.runtime}
        click.echo(json.dumps({**document, "answers": [_plain(answer) for answer in answers]}, indent=2))


def _open(path: Path, base: str | None) -> OnnxModel | TorchModel:
    """The model: in onnxruntime where the folder has graphs, else in torch."""
    from surgery import onnx_runtime

    if not onnx_runtime.is_onnx(path):
        from surgery import generate

        return generate.open_model(path, base=base)
    if base is not None:
        raise RequestError("--base", "given for an ONNX folder", expected="an adapter folder with it")
    return onnx_runtime.open_folder(path)


def _read_prompt() -> str:
    """Standard input, to its end, without the newline there."""
    if sys.stdin.isatty():
        say("Type the prompt; Ctrl-D on a line of its own ends it.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError("standard input", "bytes that are not UTF-8", expected="text") from error


def _require_text(prompt: str) -> str:
    """Raises: RequestError: an empty prompt, or one that is no text."""
    if not prompt:
        raise RequestError("--prompt", "an empty prompt", expected="text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # from bytes that are not UTF-8
        raise RequestError("--prompt", repr(prompt), expected="text in UTF-8")
    return prompt


def _write(text: str) -> None:
    click.echo(text, nl=False)


def _score_lines(answer: Answer) -> list[str]:
    """One line a label; none for text, which stands there already."""
    width = max((len(score.label) for score in answer.scores), default=0)
    return [f"{score.label:{width}}  {score.score:.4f}" for score in answer.scores]


def _plain(answer: Answer) -> dict[str, Any]:
    """An answer as what JSON has, without what does not apply."""
    if answer.scores:
        return {"prompt": answer.prompt, "scores": [asdict(score) for score in answer.scores]}
    entries = {"new_tokens": len(answer.tokens), **asdict(answer)}
    return {name: value for name, value in entries.items() if name not in ("tokens", "scores")}
