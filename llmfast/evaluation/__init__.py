"""How good a model is: its loss on held-out tokens, the n-gram model that it has to beat, its responses' scores."""

from llmfast.evaluation.judge import ModelJudge, OfflineJudge, judge_responses, parse_score, read_entries, summarise
from llmfast.evaluation.judge_client import ChatClient
from llmfast.evaluation.likelihood import log_likelihoods
from llmfast.evaluation.loss import Evaluation, evaluate_loss
from llmfast.evaluation.multiple_choice import MultipleChoice, evaluate_multiple_choice, read_questions
from llmfast.evaluation.ngram import bigram_loss
from llmfast.evaluation.similarity import Similarity, similarity

__all__ = [
    "ChatClient",
    "Evaluation",
    "ModelJudge",
    "MultipleChoice",
    "OfflineJudge",
    "Similarity",
    "bigram_loss",
    "evaluate_loss",
    "evaluate_multiple_choice",
    "judge_responses",
    "log_likelihoods",
    "parse_score",
    "read_entries",
    "read_questions",
    "similarity",
    "summarise",
]
