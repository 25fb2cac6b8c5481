"""What is reported after an evaluation, by task. The loss is the trainer's.

| task | metrics |
|---|---|
| sequence-classification | accuracy, f1 (of class 1 when there are two classes, else macro), matthews_correlation |
| image-classification | the same |
| regression | spearman, pearson (0 where one side is constant: nothing can be said) |
| token-classification | accuracy, f1 (macro), over labelled tokens, not over entities |
| causal-lm, seq2seq | token_accuracy: the next token guessed right, among those that carry loss |

scikit-learn, scipy and numpy are imported when a metric is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckError, RequestError, closest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import EvalPrediction

IGNORED = -100

Metrics = dict[str, float]


def metrics_for(task: str) -> Callable[[EvalPrediction], Metrics]:
    """The trainer's `compute_metrics`. Predictions are those that `preprocess_for(task)` leaves."""
    return _METRICS[_known(task)]


def metric_names(task: str) -> tuple[str, ...]:
    """The names that `metrics_for(task)` gives."""
    return _NAMES[_known(task)]


def preprocess_for(task: str) -> Callable[[Any, Tensor], Tensor]:
    """The trainer's `preprocess_logits_for_metrics`: keep token ids where there is one guess a token.

    Without it an evaluation of a language model would gather rows x tokens x vocabulary floats.
    """
    return _PREPROCESS[_known(task)]


def _known(task: str) -> str:
    if task not in _METRICS:
        known = ", ".join(_METRICS)
        raise RequestError("task", f"found {task!r}", expected=f"one of {known}", fix=closest(task, _METRICS))
    return task


def keep_logits(logits: Any, labels: Tensor) -> Tensor:  # noqa: ARG001 - the trainer's signature
    """Shapes: (batch, ...) to the same. A tuple holds caches or hidden states behind the logits."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first


def best_token(logits: Any, labels: Tensor) -> Tensor:
    """Shapes: logits (batch, tokens, classes) to ids (batch, tokens)."""
    return keep_logits(logits, labels).argmax(dim=-1)


def classification_metrics(prediction: EvalPrediction) -> Metrics:
    """Shapes: predictions (rows, classes); label_ids (rows,)."""
    from sklearn.metrics import matthews_corrcoef

    logits, labels = _finite(prediction.predictions), _array(prediction.label_ids)
    guesses = logits.argmax(axis=-1)
    several = len({*labels.tolist(), *guesses.tolist()}) > 1  # scikit-learn warns of a single class
    matthews = float(matthews_corrcoef(labels, guesses)) if several else 0.0
    return {**_accuracy_f1(labels, guesses, binary=logits.shape[-1] == 2), "matthews_correlation": matthews}


def token_classification_metrics(prediction: EvalPrediction) -> Metrics:
    """Shapes: predictions and label_ids (rows, tokens); a label of -100 is no label."""
    labels, guesses = _array(prediction.label_ids), _array(prediction.predictions)
    labelled = labels != IGNORED
    return _accuracy_f1(labels[labelled], guesses[labelled], binary=False)


def regression_metrics(prediction: EvalPrediction) -> Metrics:
    """Shapes: predictions (rows, 1) or (rows,); label_ids (rows,)."""
    from scipy.stats import pearsonr, spearmanr

    guesses, labels = _finite(prediction.predictions).reshape(-1), _array(prediction.label_ids).reshape(-1)
    if labels.max() == labels.min() or guesses.max() == guesses.min():
        return {"spearman": 0.0, "pearson": 0.0}
    return {"spearman": float(spearmanr(guesses, labels)[0]), "pearson": float(pearsonr(guesses, labels)[0])}


def next_token_metrics(prediction: EvalPrediction) -> Metrics:
    """Shapes: predictions and label_ids (rows, tokens); the guess at t is for the label at t + 1."""
    return _token_accuracy(_array(prediction.predictions)[:, :-1], _array(prediction.label_ids)[:, 1:])


def decoder_token_metrics(prediction: EvalPrediction) -> Metrics:
    """Shapes: predictions and label_ids (rows, tokens); the decoder's input is already shifted."""
    return _token_accuracy(_array(prediction.predictions), _array(prediction.label_ids))


def _token_accuracy(guesses: np.ndarray, labels: np.ndarray) -> Metrics:
    counted = labels != IGNORED
    return {"token_accuracy": float((guesses == labels)[counted].mean()) if counted.any() else 0.0}


def _accuracy_f1(labels: np.ndarray, guesses: np.ndarray, *, binary: bool) -> Metrics:
    from sklearn.metrics import accuracy_score, f1_score

    f1 = f1_score(labels, guesses, average="binary" if binary else "macro", zero_division=0.0)
    return {"accuracy": float(accuracy_score(labels, guesses)), "f1": float(f1)}


def _array(values: Any) -> np.ndarray:
    import numpy as np

    return np.asarray(values)


def _finite(values: Any) -> np.ndarray:
    """NaN would quietly count as class 0."""
    import numpy as np

    array = np.asarray(values)
    if not np.isfinite(array).all():
        fix = "Lower the learning rate, or train in float32"
        raise CheckError("evaluation", "found predictions that are not finite", expected="numbers", fix=fix)
    return array


_METRICS: Mapping[str, Callable[[EvalPrediction], Metrics]] = {
    "causal-lm": next_token_metrics,
    "sequence-classification": classification_metrics,
    "image-classification": classification_metrics,
    "regression": regression_metrics,
    "token-classification": token_classification_metrics,
    "seq2seq": decoder_token_metrics,
}
_PREPROCESS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "causal-lm": best_token,
    "sequence-classification": keep_logits,
    "image-classification": keep_logits,
    "regression": keep_logits,
    "token-classification": best_token,
    "seq2seq": best_token,
}
_NAMES: Mapping[str, tuple[str, ...]] = {
    "causal-lm": ("token_accuracy",),
    "sequence-classification": ("accuracy", "f1", "matthews_correlation"),
    "image-classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("spearman", "pearson"),
    "token-classification": ("accuracy", "f1"),
    "seq2seq": ("token_accuracy",),
}
