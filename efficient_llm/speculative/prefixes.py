"""Prompts that have been read, kept on the device for rows that begin later."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.speculative import prefill, programs
from efficient_llm.speculative import state as state_lib
from efficient_llm.typing import Array, Params


class Prefixes:
  """A table with a place for each of so many prompts, at the prompts' width.

  Rows with equal prompts share a place. What is not held is read; it takes the
  place of the prompt that waiting rows ask for last, or not at all.

  Attributes:
    num_read: Prompts read so far.
  """

  def __init__(
    self,
    pool: programs.Programs,
    plan: state_lib.Plan,
    prompts_NP: np.ndarray,
    lengths_N: np.ndarray,
    *,
    max_kept: int,
  ):
    """Starts empty.

    Args:
      pool: Of compiled programs.
      plan: What is decoded and how.
      prompts_NP: Padded on the right.
      lengths_N: Real tokens.
      max_kept: Places, at least as many as rows begin at once; fewer are made
        where there are fewer prompts.
    """
    self._programs, self._plan = pool, plan
    self._prompts_NP, self._lengths_N = prompts_NP, lengths_N
    real_NP = np.arange(prompts_NP.shape[1]) < lengths_N[:, None]
    # Padding is -1, which no token is.
    padded_NP = np.where(real_NP, prompts_NP, -1)
    unique, ids_N = np.unique(padded_NP, axis=0, return_inverse=True)
    self._prompt_N = ids_N.reshape(-1)
    # Powers of two: now and then two problems are the same.
    num_places = min(max_kept, 1 << (len(unique) - 1).bit_length())
    self._held_R = np.full(num_places, -1)
    self._table: prefill.Prefix | None = None
    self.num_read = 0

  def forget(self) -> None:
    """Holds nothing any more, as another drafter reads differently."""
    self._held_R[:] = -1

  def hold(
    self,
    params: Params,
    draft_params: Any,
    rows: np.ndarray,
    waiting: Sequence[int],
  ) -> tuple[prefill.Prefix, np.ndarray]:
    """Reads the prompts of rows that are not held.

    Args:
      params: The target's, prepared.
      draft_params: The drafter's, prepared.
      rows: That begin now, at most as many as there are places or prompts.
      waiting: That may begin later, in order.
    Returns:
      The table, and the place of each row's prompt in it.
    """
    wanted = self._prompt_N[rows]
    prompts, first = np.unique(wanted, return_index=True)
    first = first[~np.isin(prompts, self._held_R)]
    if len(first):
      places = self._free(len(first), wanted, self._prompt_N[list(waiting)])
      self._held_R[places] = wanted[first]
      self._read(params, draft_params, rows[first], places)
    assert self._table is not None
    order = np.argsort(self._held_R, kind='stable')
    found = np.searchsorted(self._held_R, wanted, sorter=order)
    return self._table, order[found]

  def _free(
    self, count: int, wanted: np.ndarray, upcoming: np.ndarray
  ) -> np.ndarray:
    """Places whose prompts are asked for last, those asked for now apart."""
    prompts, first = np.unique(upcoming, return_index=True)
    next_use = {-1: len(upcoming) + 1} | dict(zip(prompts, first, strict=True))
    uses_R = [next_use.get(held, len(upcoming)) for held in self._held_R]
    uses_R = np.where(np.isin(self._held_R, wanted), -1, uses_R)
    return np.argsort(-uses_R, kind='stable')[:count]

  def _read(
    self,
    params: Params,
    draft_params: Any,
    rows: np.ndarray,
    places: np.ndarray,
  ) -> None:
    self.num_read += len(rows)
    # Rows that fill up to a power of two go nowhere.
    size = 1 << (len(rows) - 1).bit_length()
    num_over, num_places = size - len(rows), len(self._held_R)
    rows = np.concatenate([rows, np.repeat(rows[:1], num_over)])
    places = np.concatenate([places, np.full(num_over, num_places)])
    prefix = self._programs.call(
      prefill.read,
      (self._plan,),
      params,
      draft_params,
      self._prompts_NP[rows],
      self._lengths_N[rows],
    )
    if self._table is None:
      self._table = self._programs.call(_empty, (num_places,), prefix)
    self._table = self._programs.call(
      state_lib.put, (), self._table, places, prefix, donated=(0,)
    )


def _empty(num_places: int, prefix: prefill.Prefix) -> prefill.Prefix:
  def zeros(x: Array) -> Array:
    return jnp.zeros((num_places, *x.shape[1:]), x.dtype)

  return jax.tree.map(zeros, prefix)
