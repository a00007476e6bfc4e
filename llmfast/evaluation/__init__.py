"""How good a model is: its loss on held-out tokens, and the n-gram model that it has to beat."""

from llmfast.evaluation.loss import Evaluation, evaluate_loss
from llmfast.evaluation.ngram import bigram_loss

__all__ = ["Evaluation", "bigram_loss", "evaluate_loss"]
