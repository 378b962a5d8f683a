"""Accuracies counted by hand."""

import pytest
import torch

from d2_deform.evaluation import ClassificationEvaluator


def evaluate(scores, labels):
    evaluator = ClassificationEvaluator()
    evaluator.reset()
    for row, label in zip(scores, labels, strict=True):
        evaluator.process([{"label": label}], [{"scores": torch.tensor(row)}])
    return evaluator.evaluate()["classification"]


def test_top1_and_top5():
    row = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert evaluate([row] * 4, [0, 0, 4, 5]) == {"top1": 50.0, "top5": 75.0}


def test_five_classes_have_no_top5():
    assert evaluate([[0.5, 0.2, 0.1, 0.1, 0.1]], [0]) == {"top1": 100.0}


@pytest.mark.parametrize("row", [[0.5, 0.5], [float("nan"), float("nan")]])
def test_who_cannot_tell_is_wrong(row):
    assert evaluate([row], [0]) == {"top1": 0.0}


def test_reset_forgets():
    evaluator = ClassificationEvaluator()
    evaluator.process([{"label": 0}], [{"scores": torch.tensor([0.0, 1.0])}])
    evaluator.reset()
    evaluator.process([{"label": 1}], [{"scores": torch.tensor([0.0, 1.0])}])
    assert evaluator.evaluate() == {"classification": {"top1": 100.0}}
