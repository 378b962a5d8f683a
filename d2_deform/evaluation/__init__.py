"""Evaluators beside Detectron2's own."""

from d2_deform.evaluation.classification_evaluation import ClassificationEvaluator
from d2_deform.evaluation.proposal_evaluation import ProposalEvaluator
from d2_deform.evaluation.voc_folder_evaluation import VOCFolderEvaluator

__all__ = ["ClassificationEvaluator", "ProposalEvaluator", "VOCFolderEvaluator"]
