"""The host's side of a generation: who is in the batch, and who has ended.

Over 300 lines: one class, whose methods share the batch.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.models import decoding
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import (
  continuation,
  generation,
  prefill,
  prefixes,
  programs,
  rounds,
  row_queue,
  strategy,
)
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Params


@dataclasses.dataclass
class Job:
  """One call of `generate`: the host's side of it.

  Attributes:
    state: The batch.
    ids_B: Which prompt each row of the batch completes; -1 for none.
    begun: What there is of the completions.
    waiting: Prompts that have not begun, in order; those that another job
      takes from it are zeros in the result. Closed, it ends the job, and rows
      under way are zeros as well.
    is_behind: Whether the drafter's memory has been left behind.
  """

  programs: programs.Programs
  plan: state_lib.Plan
  chooser: strategy.Strategy | None
  max_batch: int
  max_kept_prompts: int
  rounds_at_once: int
  params: Params
  draft_params: Any
  prompts_NP: np.ndarray
  lengths_N: np.ndarray
  keys_N: Array
  groups_N: np.ndarray | None
  refresh: generation.Refresh | None
  finished: generation.Finished | None
  stop: generation.Stop | None
  begun: continuation.Begun
  waiting: row_queue.RowQueue
  state: state_lib.State = dataclasses.field(init=False)

  def run(self) -> generation.Generation:
    num_rows, num_new = len(self.lengths_N), self.plan.sampling.max_new_tokens
    self.stats = generation.Stats()
    self.tokens_NT = np.zeros((num_rows, num_new), np.int32)
    self.log_probs_NT = np.zeros((num_rows, num_new), np.float32)
    self.num_new_N = np.zeros(num_rows, np.int32)
    self.ended_N = np.zeros(num_rows, bool)
    self.ids_B = np.full(self._bucket(max(1, len(self.waiting))), -1)
    self.has_state = False
    self.prefixes = prefixes.Prefixes(
      self.programs,
      self.plan,
      self.prompts_NP,
      self.lengths_N,
      max_kept=max(self.max_kept_prompts, self.max_batch),
    )
    start, compiled_before = time.perf_counter(), self.programs.compile_secs
    self.params = self.programs.call(
      decoding.prepare, (self.plan.model,), self.params
    )
    self._prepare_drafter()
    self.is_behind = not self._choose(len(self.ids_B)).needs_model
    while self.waiting or (self.ids_B >= 0).any():
      is_over = self.stop is not None and self.stop()
      if is_over or self.waiting.is_closed:
        break
      self._join()
      num_live = int((self.ids_B >= 0).sum())
      if not num_live:
        continue
      shape = self._choose(num_live)
      self._refresh_drafter(resume=self.is_behind and shape.needs_model)
      self.is_behind = not shape.needs_model
      self._stretch(shape, num_live)
      self._shrink()
    self._take_out(np.flatnonzero(self.ids_B >= 0))
    self.stats.num_prompts_read = self.prefixes.num_read
    self.stats.compile_secs = self.programs.compile_secs - compiled_before
    self.stats.num_programs = len(self.programs)
    elapsed = time.perf_counter() - start
    self.stats.secs = elapsed - self.stats.compile_secs
    self.stats.num_tokens = int(self.num_new_N.sum())
    self.stats.num_decoded = self.stats.num_tokens - int(
      np.count_nonzero(self.num_new_N)
    )
    return generation.Generation(
      sampling_lib.Completion(
        tokens=jnp.asarray(self.tokens_NT),
        lengths=jnp.asarray(self.num_new_N),
        log_probs=jnp.asarray(self.log_probs_NT),
      ),
      self.stats,
      self.ended_N,
    )

  def _choose(self, num_live: int) -> tree_lib.DraftShape:
    if self.chooser is None:
      return tree_lib.DraftShape()
    return self.chooser.choose(num_live)

  def _bucket(self, num_rows: int) -> int:
    """Powers of two: few programs, and little of a batch is empty."""
    return min(self.max_batch, 1 << (num_rows - 1).bit_length())

  def _join(self) -> None:
    """Takes waiting rows into the free places of the batch."""
    ids = np.asarray(self.waiting.take(int((self.ids_B < 0).sum())), int)
    if not len(ids):
      return
    start = time.perf_counter()
    compiled_before = self.programs.compile_secs
    is_begun = self.begun.lengths_N[ids] > 0
    # Prompts are shared; a text with the beginning of an answer is its own.
    for some, read in (
      (ids[~is_begun], self._read_prompts),
      (ids[is_begun], self._read_texts),
    ):
      if len(some):
        self._begin(some, read)
    jax.block_until_ready(self.state)
    compiled = self.programs.compile_secs - compiled_before
    self.stats.prefill_secs += time.perf_counter() - start - compiled
    self._collect()

  def _begin(self, ids: np.ndarray, read: Callable[..., Any]) -> None:
    num_new = len(ids)
    size = self._bucket(num_new) if self.has_state else len(self.ids_B)
    # Rows that pad the batch repeat a prompt and are thrown away.
    padded = np.concatenate([ids, np.repeat(ids[:1], size - num_new)])
    joined = self.programs.call(
      _begin,
      (self.plan, self.is_behind),
      self.params,
      self.draft_params,
      *read(padded),
      self.keys_N[padded],
      None if self.groups_N is None else self.groups_N[padded],
      self.begun.lengths_N[padded],
    )
    free = np.flatnonzero(self.ids_B < 0)[:num_new]
    if self.has_state:
      rows = np.full(size, len(self.ids_B))
      rows[:num_new] = free
      self.state = self.programs.call(
        state_lib.put, (), self.state, rows, joined, donated=(0,)
      )
    else:
      over = np.arange(size) >= num_new
      self.state = dataclasses.replace(joined, ended_B=joined.ended_B | over)
      self.has_state = True
    self.ids_B[free] = ids

  def _read_prompts(self, rows: np.ndarray) -> tuple[Any, ...]:
    """The table of prompts, these rows' places in it, and their prompts."""
    waiting = [n for n in self.waiting.rows() if not self.begun.lengths_N[n]]
    table, places = self.prefixes.hold(
      self.params, self.draft_params, rows, waiting
    )
    return table, places, self.prompts_NP[rows], self.lengths_N[rows]

  def _read_texts(self, rows: np.ndarray) -> tuple[Any, ...]:
    """The same for prompts with what there is of the completions."""
    most = min(self.plan.capacity, self.plan.model.max_positions)
    texts_BP, lengths_B = self.begun.texts(
      self.prompts_NP, self.lengths_N, rows, most=most
    )
    prefix = self.programs.call(
      prefill.read,
      (self.plan,),
      self.params,
      self.draft_params,
      texts_BP,
      lengths_B,
    )
    return prefix, np.arange(len(rows)), texts_BP, lengths_B

  def _prepare_drafter(self) -> None:
    drafter = self.plan.drafter
    if drafter is not None and drafter.prepare is not None:
      self.draft_params = self.programs.call(
        drafter.prepare, (), self.draft_params
      )

  def _refresh_drafter(self, *, resume: bool) -> None:
    """Takes a newer drafter, or brings the memory of this one up to date."""
    drafter = self.plan.drafter
    if drafter is None:
      return
    newer = None if self.refresh is None else self.refresh()
    if newer is not None and newer.draft_params is not None:
      self.draft_params = newer.draft_params
      self._prepare_drafter()
      self.prefixes.forget()
      resume = not self.is_behind or resume
    if newer is not None and newer.texts is not None:
      if drafter.with_texts is None:
        raise ValueError(
          'This drafter does not copy; refresh it without texts.'
        )
      self.draft_params = drafter.with_texts(self.draft_params, newer.texts)
    if resume:
      self.state = self.programs.call(
        rounds.resume, (self.plan,), self.params, self.draft_params, self.state
      )

  def _stretch(self, shape: tree_lib.DraftShape, num_live: int) -> None:
    """Runs some rounds and tells the strategy how they went."""
    size = len(self.ids_B)
    # Enough rows must end to make it worth a look.
    min_live = (3 * size) // 4 if self.waiting else size // 2
    min_live = min(min_live, num_live - 1)
    before = np.asarray(self.state.num_new_B)
    passes_before = np.asarray(self.state.num_passes_B)
    compiled_before = self.programs.compile_secs
    start = time.perf_counter()
    self.state = self.programs.call(
      rounds.run,
      (self.plan, shape),
      self.params,
      self.draft_params,
      self.state,
      np.int32(self.rounds_at_once),
      np.int32(min_live),
      donated=(2,),
    )
    passes = np.asarray(self.state.num_passes_B) - passes_before
    secs = time.perf_counter() - start
    num_tokens = int((np.asarray(self.state.num_new_B) - before).sum())
    if self.chooser is not None:
      compiled = self.programs.compile_secs > compiled_before
      self.chooser.update(
        shape,
        num_live,
        num_tokens,
        secs,
        num_rounds=int(passes.max()),
        num_passes=int(passes.sum()),
        compiled=compiled,
      )
      off = self.chooser.tokens_per_sec(tree_lib.DraftShape(), num_live)
      if off and not shape.is_off and not compiled:
        self.stats.saved_secs += num_tokens / off - secs
    counts = self.stats.rounds_by_shape
    counts[shape] = counts.get(shape, 0) + int(passes.max())
    sizes = self.stats.rounds_by_size
    sizes[size] = sizes.get(size, 0) + int(passes.max())
    self._collect()

  def _collect(self) -> None:
    """Takes the completions of rows that have ended out of the batch."""
    rows = np.flatnonzero(np.asarray(self.state.ended_B) & (self.ids_B >= 0))
    ids = self.ids_B[rows]
    self._take_out(rows)
    self.ended_N[ids] = True
    if self.finished is not None:
      for n in ids:
        before, count = self.begun.lengths_N[n], self.num_new_N[n]
        whole = self.tokens_NT[n, : before + count].copy()
        whole[:before] = self.begun.tokens_NT[n, :before]
        self.finished(int(n), whole)

  def _take_out(self, rows: np.ndarray) -> None:
    """Takes what rows have drawn in this call out of the batch."""
    if not len(rows):
      return
    tokens = np.asarray(self.state.tokens_BS)
    log_probs = np.asarray(self.state.log_probs_BS)
    num_new = np.asarray(self.state.num_new_B)
    self.stats.num_passes += int(
      np.asarray(self.state.num_passes_B)[rows].sum()
    )
    for row in rows:
      n, count = self.ids_B[row], num_new[row]
      first, before = self.lengths_N[n], self.begun.lengths_N[n]
      here, there = slice(before, count), slice(first + before, first + count)
      self.tokens_NT[n, here] = tokens[row, there]
      self.log_probs_NT[n, here] = log_probs[row, there]
      self.num_new_N[n] = count - before
    self.ids_B[rows] = -1

  def _shrink(self) -> None:
    """Moves the live rows into a smaller batch where they fit one."""
    live = np.flatnonzero(self.ids_B >= 0)
    size = self._bucket(max(1, len(live)))
    if self.waiting or not len(live) or size == len(self.ids_B):
      return
    spare = np.flatnonzero(self.ids_B < 0)[: size - len(live)]
    rows = np.concatenate([live, spare])
    self.state = self.programs.call(_take, (), self.state, rows)
    self.ids_B = self.ids_B[rows]


def _take(state: state_lib.State, rows: Array) -> state_lib.State:
  return state.take(rows)


def _begin(
  plan: state_lib.Plan,
  is_off: bool,
  params: Params,
  draft_params: Any,
  table: prefill.Prefix,
  places: Array,
  *rows: Array,
) -> state_lib.State:
  prefix = jax.tree.map(lambda x: x[places], table)
  return prefill.begin(plan, is_off, params, draft_params, prefix, *rows)
