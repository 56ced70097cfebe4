"""Completions that an earlier call left unfinished."""

import dataclasses

import numpy as np

# Widths are powers of two from here on: few programs.
_SMALLEST_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Begun:
  """What there is of completions; their next tokens have the same coins.

  Attributes:
    tokens_NT: 0 behind the end.
    lengths_N: Tokens of each, 0 where nothing was begun.
  """

  tokens_NT: np.ndarray
  lengths_N: np.ndarray

  @classmethod
  def nothing(cls, num_rows: int, num_tokens: int) -> 'Begun':
    """Completions without a token."""
    return cls(
      np.zeros((num_rows, num_tokens), np.int32), np.zeros(num_rows, np.int32)
    )

  def texts(
    self,
    prompts_NP: np.ndarray,
    prompt_lengths_N: np.ndarray,
    rows: np.ndarray,
    *,
    most: int,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with what there is behind them.

    Args:
      prompts_NP: Padded on the right.
      prompt_lengths_N: Real tokens.
      rows: Whose texts.
      most: Tokens that the widest may have.
    Returns:
      The texts, padded on the right, and their lengths.
    """
    lengths_B = prompt_lengths_N[rows] + self.lengths_N[rows]
    width = max(_SMALLEST_WIDTH, 1 << int(lengths_B.max() - 1).bit_length())
    texts_BP = np.zeros((len(rows), min(width, most)), np.int32)
    for text, row in zip(texts_BP, rows, strict=True):
      num_prompt, num_new = prompt_lengths_N[row], self.lengths_N[row]
      text[:num_prompt] = prompts_NP[row, :num_prompt]
      text[num_prompt : num_prompt + num_new] = self.tokens_NT[row, :num_new]
    return texts_BP, lengths_B
