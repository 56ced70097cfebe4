"""Tokens that are seen again, and parameters beyond what they can fill.

Muennighoff et al. 2023, "Scaling Data-Constrained Language Models",
arXiv:2305.16264: a repeated token is worth less with every repetition, and so
is a parameter above the number that is best for the unique tokens.
"""

import dataclasses

import numpy as np

from efficient_llm.scaling import data

# Their fit to C4 (section 5): repetitions after which 1 - 1/e of all is gained.
TOKEN_DECAY = 15.387756
PARAMETER_DECAY = 5.309743
# Best tokens a parameter under their law, whose exponents are equal:
# (beta B / alpha A)^(2 / (alpha + beta)) with the constants of their C4 fit.
TOKENS_PER_PARAMETER = 19.6
# Up to here repeated tokens are nearly as good as new (their abstract).
_NEGLIGIBLE_EPOCHS = 4.0


def tokens(
  num_tokens: np.ndarray, unique: np.ndarray, decay: float = TOKEN_DECAY
) -> np.ndarray:
  """Tokens that would be as good if all were new (their eq. 5).

  D' = U + U R* (1 - exp(-R / R*)), with R = D / U - 1 repetitions.

  Args:
    num_tokens: Seen in all.
    unique: Different ones; not above `num_tokens`.
    decay: R*.
  """
  repeats = num_tokens / unique - 1
  return unique + unique * decay * -np.expm1(-repeats / decay)


def params(
  num_params: np.ndarray, unique: np.ndarray, decay: float = PARAMETER_DECAY
) -> np.ndarray:
  """Parameters that would be as good if none were in excess (their eq. 6).

  Args:
    num_params: Of the model.
    unique: Different tokens.
    decay: R_N*.
  """
  enough = unique / TOKENS_PER_PARAMETER
  excess = np.maximum(num_params / enough - 1, 0)
  filled = enough + enough * decay * -np.expm1(-excess / decay)
  return np.where(excess > 0, filled, num_params)


def is_repeated(runs: data.Runs) -> bool:
  """Whether some run saw its tokens more often than is negligible.

  Args:
    runs: Rows; without `unique_tokens` nothing is known to repeat.
  """
  epochs = runs.num_tokens / runs.unique_tokens
  return bool((np.nan_to_num(epochs) > _NEGLIGIBLE_EPOCHS).any())


def effective(runs: data.Runs) -> data.Runs:
  """The same rows with what their sizes and tokens are worth.

  Args:
    runs: Rows; those that do not repeat stay.
  """
  again = np.nan_to_num(runs.unique_tokens, nan=np.inf) < runs.num_tokens
  unique = np.where(again, runs.unique_tokens, runs.num_tokens)
  return dataclasses.replace(
    runs,
    num_tokens=tokens(runs.num_tokens, unique),
    num_params=np.where(
      again, params(runs.num_params, unique), runs.num_params
    ),
  )
