"""What stops a run."""

import torch

from llmfast.errors import UserError


class TrainingError(UserError):
    """Training cannot go on: a value that is not finite, or no memory left. The weights are those before the step."""


class NotFiniteError(Exception):
    """The loss or the gradients of step ``step`` are not finite."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
