"""Losses of preference tuning, from log-probabilities of whole responses.

All arguments are float tensors (B,), one value a pair or example; every loss comes back (B,), unreduced.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_LOG_PROB = -1e-6  # of a mean: the odds of a certain response would be infinite


class PairLosses(NamedTuple):
    """Losses and rewards of pairs, (B,) each; the rewards carry no gradient."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def response_log_probs(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, number of tokens) of each row's response: (B,), float32 or better.

    inputs, targets (B, T) int64; targets of -100 do not count. The (B T, V) logits never exist as a whole, neither
    forward nor backward (``ops.linear_cross_entropy``).
    """
    losses = model(inputs, targets, reduction="none")[1]
    return -losses.sum(1), (targets != -100).sum(1)


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float) -> PairLosses:
    """-log sigmoid(r_c - r_r), r = beta (log pi - log pi_ref) (Rafailov et al. 2023, equation 7).

    Log-probabilities of the chosen and rejected responses under the model and under the reference.
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())


def orpo(chosen: Tensor, rejected: Tensor, *, weight: float) -> PairLosses:
    """-chosen - weight log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) (Hong et al. 2024).

    Arguments are mean log-probabilities a token: the first term is the usual loss of the chosen response, and p is
    the geometric mean of its tokens' probabilities. Rewards are weight times these means.
    """
    odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    losses = -chosen - weight * F.logsigmoid(odds_ratio)
    return PairLosses(losses, (weight * chosen).detach(), (weight * rejected).detach())


def _log_odds(log_p: Tensor) -> Tensor:
    log_p = log_p.clamp(max=LARGEST_LOG_PROB)
    return log_p - torch.log(-torch.expm1(log_p))


def kto(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(losses, rewards) of single responses (Ethayarajh et al. 2024, equation 8), up to the constant of its first term.

    w (1 - sigmoid(r - z)) where ``desirable`` (bool), else w (1 - sigmoid(z - r)), with r = beta (log pi - log pi_ref)
    and z = beta ``kl``: an estimate (a scalar, 0 or more, without gradient) of how far the model is from the reference.
    """
    rewards = beta * (log_probs - ref_log_probs)
    sign = torch.where(desirable, 1.0, -1.0).to(rewards.dtype)
    weights = torch.where(desirable, desirable_weight, undesirable_weight).to(rewards.dtype)
    return weights * (1 - torch.sigmoid(sign * (rewards - beta * kl.detach()))), rewards.detach()
