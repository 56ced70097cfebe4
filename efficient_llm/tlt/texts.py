"""Finished answers that drafts are copied from, shared between threads."""

import threading

import numpy as np


class TextPool:
  """Keeps the newest texts in arrays of one shape, for `ngram.draft`.

  Attributes:
    version: Counts the texts that came in.
  """

  def __init__(self, num_texts: int, num_tokens: int):
    """Starts empty.

    Args:
      num_texts: How many are kept.
      num_tokens: Of the longest text.
    """
    self._texts_RE = np.zeros((num_texts, num_tokens), np.int32)
    self._lengths_R = np.zeros(num_texts, np.int32)
    self._groups_R = np.zeros(num_texts, np.int32)
    self._lock = threading.Lock()
    self.version = 0

  def add(self, group: int, tokens: np.ndarray) -> None:
    """Adds a text, in place of the oldest.

    Args:
      group: Whose rows may copy from it.
      tokens: Prompt and completion.
    """
    with self._lock:
      row = self.version % len(self._lengths_R)
      self._texts_RE[row, : len(tokens)] = tokens
      self._lengths_R[row] = len(tokens)
      self._groups_R[row] = group
      self.version += 1

  def arrays(self) -> dict[str, np.ndarray]:
    """Copies, as keywords of `ngram.draft`."""
    with self._lock:
      return {
        'extra_RE': self._texts_RE.copy(),
        'extra_lengths_R': self._lengths_R.copy(),
        'extra_group_ids_R': self._groups_R.copy(),
      }
