"""Fine-tuning: a task's data and loss, handed to the one training loop."""

from llmfast.finetuning.classify import ClassifyResult, classify, finetune_classify

__all__ = ["ClassifyResult", "classify", "finetune_classify"]
