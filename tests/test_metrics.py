from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from surgery.errors import CheckError, RequestError
from surgery.formats import TASKS
from surgery.metrics import metrics_for, preprocess_for


def measure(task: str, predictions: object, labels: object) -> dict[str, float]:
    """A task's metrics, as the trainer calls them."""
    return metrics_for(task)(EvalPrediction(np.asarray(predictions), np.asarray(labels)))


def one_hot(classes: list[int], width: int) -> np.ndarray:
    """Logits (rows, width) that guess the given classes."""
    return np.eye(width)[classes]


def test_two_classes_give_the_f1_of_class_one() -> None:
    """Counted by hand: 1 true and 1 false positive, 1 false and 2 true negatives; macro would be 7/12."""
    got = measure("sequence-classification", one_hot([1, 1, 0, 0, 0], 2), [1, 0, 1, 0, 0])
    assert got == pytest.approx({"accuracy": 0.6, "f1": 0.5, "matthews_correlation": 1 / 6})


def test_more_classes_give_the_mean_f1() -> None:
    """Counted by hand: classes 0, 1, 2 have F1 1, 2/3, 0."""
    got = measure("sequence-classification", one_hot([0, 1, 1], 3), [0, 1, 2])
    assert got["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert got["accuracy"] == pytest.approx(2 / 3)


def test_a_perfect_and_an_inverted_classifier_have_matthews_one_and_minus_one() -> None:
    """Matthews correlation tells a wrong classifier from a useless one."""
    labels = [0, 1, 0, 1]
    assert measure("sequence-classification", one_hot(labels, 2), labels)["matthews_correlation"] == 1.0
    assert measure("sequence-classification", one_hot([1, 0, 1, 0], 2), labels)["matthews_correlation"] == -1.0


def test_a_constant_classifier_gives_numbers_without_a_warning() -> None:
    """Undefined ratios are 0, not NaN and not a warning."""
    got = measure("sequence-classification", one_hot([0, 0], 2), [0, 0])
    assert got == {"accuracy": 1.0, "f1": 0.0, "matthews_correlation": 0.0}


def test_regression_ranks_and_fits() -> None:
    """Spearman sees order only, Pearson sees shape; a constant side gives 0."""
    got = measure("regression", [[1.0], [2.0], [9.0]], [1.0, 2.0, 3.0])
    assert got["spearman"] == 1.0
    assert got["pearson"] == pytest.approx(np.corrcoef([1, 2, 9], [1, 2, 3])[0, 1])
    assert measure("regression", [[1.0], [1.0]], [1.0, 2.0]) == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("task", ("regression", "sequence-classification"))
def test_predictions_that_are_no_numbers_are_a_failed_check(task: str) -> None:
    """NaN would count as class 0 and pass unseen."""
    with pytest.raises(CheckError, match="not finite"):
        measure(task, [[math.nan, 0.0], [0.0, 1.0]], [0, 1])


def test_causal_guesses_are_for_the_next_token() -> None:
    """The guess at t is compared with the label at t + 1; padding and prompts (-100) do not count."""
    labels = [[-100, 5, 6, -100]]
    assert measure("causal-lm", [[5, 6, 0, 0]], labels) == {"token_accuracy": 1.0}
    assert measure("causal-lm", [[0, 5, 6, 0]], labels) == {"token_accuracy": 0.0}
    assert measure("causal-lm", [[5, 0, 0, 0]], labels) == {"token_accuracy": 0.5}
    assert measure("causal-lm", [[1, 2]], [[-100, -100]]) == {"token_accuracy": 0.0}


def test_decoder_guesses_are_for_their_own_position() -> None:
    """In an encoder-decoder the input is shifted, not the labels."""
    assert measure("seq2seq", [[5, 6, 0]], [[5, 6, -100]]) == {"token_accuracy": 1.0}


def test_tokens_without_a_label_do_not_count() -> None:
    """Continuation pieces are ignored whatever was predicted for them."""
    assert measure("token-classification", [[0, 1, 2]], [[0, -100, 2]]) == {"accuracy": 1.0, "f1": 1.0}


def test_guesses_are_reduced_to_ids_before_they_are_gathered() -> None:
    """A language model's logits become ids; a classifier's stay; a tuple's first entry is taken."""
    logits, labels = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.zeros(1, 2)
    for task in ("causal-lm", "seq2seq", "token-classification"):
        assert preprocess_for(task)((logits, "cache"), labels).tolist() == [[1, 0]]
    for task in ("sequence-classification", "regression"):
        assert preprocess_for(task)((logits,), labels) is logits


def test_every_task_has_metrics_and_an_unknown_one_is_named() -> None:
    """Both tables cover the tasks."""
    assert all(metrics_for(task) and preprocess_for(task) for task in TASKS)
    with pytest.raises(RequestError, match="The closest is 'regression'"):
        metrics_for("regresion")


def test_importing_the_data_modules_loads_nothing_heavy() -> None:
    """A fresh interpreter that imports them has neither torch, transformers, datasets nor scikit-learn."""
    heavy = "{'torch', 'transformers', 'datasets', 'sklearn', 'scipy', 'pyarrow', 'numpy'}"
    code = f"import sys, surgery.data, surgery.metrics; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
