"""Training: one loop, its optimizer and schedule, and the arithmetic of a run before it starts."""

from llmfast.training.errors import TrainingError
from llmfast.training.plan import Plan, plan
from llmfast.training.trainer import Trainer, TrainResult, language_model_loss

__all__ = ["Plan", "TrainResult", "Trainer", "TrainingError", "language_model_loss", "plan"]
