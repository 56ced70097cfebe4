"""Rollouts of one step of reinforcement learning, and their packed batches.

Everything here is numpy on the host. N counts answers, P prompt positions, and
T positions of a completion or, next to B, of a packed row.
"""

import dataclasses
from typing import Literal

import numpy as np

from efficient_llm.data import batches as data_batches
from efficient_llm.data import packing

Aggregation = Literal['token', 'sequence', 'constant']


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """Answers of one step, in arrays padded on the right.

  Attributes:
    prompts_NP: Token ids.
    prompt_lengths_N: Tokens of each prompt, at least 1.
    tokens_NT: Token ids of the completions.
    lengths_N: Tokens of each completion, its stop token included, at least 1.
    log_probs_NT: Of each token, under the law that the sampler drew it from.
    rewards_N: As the verifier gave them.
    groups_N: A number for each answer, the same for answers to one prompt.
    step: Of the run, that uses the answers.
    drawn_NT: Step at whose parameters each token was drawn; None where that is
      this step for all.
  """

  prompts_NP: np.ndarray
  prompt_lengths_N: np.ndarray
  tokens_NT: np.ndarray
  lengths_N: np.ndarray
  log_probs_NT: np.ndarray
  rewards_N: np.ndarray
  groups_N: np.ndarray
  step: int
  drawn_NT: np.ndarray | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if field.name not in ('step', 'drawn_NT'):
        shape = getattr(self, field.name).shape
        if len(shape) != len(field.name.rsplit('_', 1)[1]) or (
          shape[0] != self.num_answers
        ):
          raise ValueError(
            f'rollouts.{field.name} must have the shape that its name says '
            f'and {self.num_answers} rows, has shape {shape}.'
          )
    _check_same_shape('rollouts.log_probs_NT', self.log_probs_NT, self)
    if self.drawn_NT is not None:
      _check_same_shape('rollouts.drawn_NT', self.drawn_NT, self)
    for lengths, width in (
      ('prompt_lengths_N', self.prompts_NP.shape[1]),
      ('lengths_N', self.tokens_NT.shape[1]),
    ):
      x_N = getattr(self, lengths)
      if ((x_N < 1) | (x_N > width)).any():
        raise ValueError(
          f'rollouts.{lengths} must be from 1 to {width}, is {x_N.min()} to '
          f'{x_N.max()}; leave empty answers out.'
        )

  @property
  def num_answers(self) -> int:
    return len(self.tokens_NT)

  @property
  def num_tokens(self) -> int:
    """Tokens of all completions."""
    return int(self.lengths_N.sum())

  @property
  def completion_mask_NT(self) -> np.ndarray:
    """Which positions of `tokens_NT` hold a token of the completion."""
    return np.arange(self.tokens_NT.shape[1]) < self.lengths_N[:, None]

  @property
  def staleness(self) -> np.ndarray:
    """Of every token: steps of the run between its drawing and its use."""
    if self.drawn_NT is None:
      return np.zeros(self.num_tokens, np.int32)
    return self.step - self.drawn_NT[self.completion_mask_NT]

  def take(self, rows: np.ndarray) -> 'Rollouts':
    """Some of the answers.

    Args:
      rows: Their numbers, or a mask.
    """
    arrays = {
      field.name: value[rows]
      for field in dataclasses.fields(self)
      if isinstance(value := getattr(self, field.name), np.ndarray)
    }
    return Rollouts(**arrays, step=self.step)


def pack(
  rollouts: Rollouts,
  advantages_N: np.ndarray,
  *,
  sequence_length: int,
  aggregation: Aggregation,
  num_rows_multiple: int = 1,
  num_rows: int | None = None,
  max_completion_tokens: int | None = None,
  pad_id: int = 0,
  old_log_probs_NT: np.ndarray | None = None,
  reference_log_probs_NT: np.ndarray | None = None,
) -> data_batches.Batch:
  """Packs prompts with their completions into rows, for `policy_loss`.

  On top of the arrays that `data.batches` speaks of, 'advantages',
  'rollout_log_probs' and, where given, 'old_log_probs' and
  'reference_log_probs' [B, T] float32. All of these belong to the position's
  target, so a completion's first ones stand at the last token of its prompt;
  they are 0 wherever the target is no token of a completion.

  With M tokens in all N completions, the loss weights of an answer's tokens are
  1 ('token'), M / (N * its length) ('sequence': each answer weighs the same) or
  M / (N * max_completion_tokens) ('constant'): divided by M, the policy loss is
  the algorithm's. M, N count what is packed here, so a batch that several
  processes share is packed whole by each, which then takes its rows.

  Args:
    rollouts: At least one answer.
    advantages_N: Of each answer.
    sequence_length: Tokens in a row.
    aggregation: How the losses of tokens are averaged.
    num_rows_multiple: Rows that hold nothing fill up to a multiple of this.
    num_rows: Rows to fill up to, so that one program serves every step.
    max_completion_tokens: What 'constant' divides by.
    pad_id: Token id of padding.
    old_log_probs_NT: Of the policy before its first update on these answers.
    reference_log_probs_NT: Of the reference policy.
  Returns:
    The batch; `unpack` finds the answers in it again.
  Raises:
    ValueError: If an answer with its prompt is longer than a row, the rows do
      not suffice, or an input does not fit the rollouts.
  """
  if np.shape(advantages_N) != (rollouts.num_answers,):
    raise ValueError(
      f'advantages_N must have shape ({rollouts.num_answers},), has shape '
      f'{np.shape(advantages_N)}.'
    )
  layout = _layout(rollouts, sequence_length)
  batch = data_batches.padding(
    _num_rows(layout.plan.num_sequences, num_rows_multiple, num_rows),
    sequence_length,
    pad_id=pad_id,
  )
  sequences = np.arange(layout.plan.num_sequences)
  data_batches.fill(
    batch,
    sequences,
    plan=layout.plan,
    tokens=layout.tokens,
    sequences=sequences,
  )
  weights_N = _token_weights(rollouts, aggregation, max_completion_tokens)
  mask_NT = rollouts.completion_mask_NT
  values = {
    'loss_weights': np.repeat(weights_N, rollouts.lengths_N),
    'advantages': np.repeat(advantages_N, rollouts.lengths_N),
  }
  for name, x_NT in (
    ('rollout_log_probs', rollouts.log_probs_NT),
    ('old_log_probs', old_log_probs_NT),
    ('reference_log_probs', reference_log_probs_NT),
  ):
    if x_NT is not None:
      _check_same_shape(f'{name}_NT', x_NT, rollouts)
      values[name] = x_NT[mask_NT]
  for name, x in values.items():
    batch[name] = np.zeros_like(batch['loss_weights'])
    batch[name].reshape(-1)[layout.places] = x
  return batch


def unpack(values_BT: np.ndarray, rollouts: Rollouts) -> np.ndarray:
  """Values at the completions' targets, [N, T] as `rollouts.tokens_NT`.

  Args:
    values_BT: At the positions of a batch that `pack` made of the rollouts,
      such as the log-probability of each target.
    rollouts: The same that were packed.
  Returns:
    0 behind the end of each completion.
  """
  layout = _layout(rollouts, values_BT.shape[1])
  values_NT = np.zeros(rollouts.tokens_NT.shape, values_BT.dtype)
  found = np.asarray(values_BT).reshape(-1)[layout.places]
  values_NT[rollouts.completion_mask_NT] = found
  return values_NT


@dataclasses.dataclass(frozen=True)
class _Layout:
  """Where the answers lie, a function of their lengths alone.

  Attributes:
    plan: Over `tokens`.
    tokens: All prompts with their completions, end to end.
    places: For each token of a completion, answer by answer, the place in a
      flattened batch whose target it is.
  """

  plan: packing.Plan
  tokens: np.ndarray
  places: np.ndarray


def _layout(rollouts: Rollouts, sequence_length: int) -> _Layout:
  lengths_N = (rollouts.prompt_lengths_N + rollouts.lengths_N).astype(np.int64)
  if not len(lengths_N):
    raise ValueError('A batch needs at least one answer; skip the step.')
  if lengths_N.max() > sequence_length:
    raise ValueError(
      f'Prompt and completion of answer {lengths_N.argmax()} have '
      f'{lengths_N.max()} tokens and must fit into {sequence_length=}; raise '
      'it or lower sampling.max_new_tokens.'
    )
  starts_N = np.cumsum(lengths_N) - lengths_N
  plan = packing.make_plan(
    starts_N, lengths_N, sequence_length=sequence_length, packing='best_fit'
  )
  # Pieces are whole documents here, those of a row one behind the other.
  before = np.cumsum(plan.lengths) - plan.lengths
  firsts, ends = plan.piece_offsets[:-1], plan.piece_offsets[1:]
  shift = np.arange(plan.num_sequences) * sequence_length - before[firsts]
  first_places_N = np.empty_like(starts_N)
  first_places_N[np.searchsorted(starts_N, plan.starts)] = before + np.repeat(
    shift, ends - firsts
  )
  columns_P = np.arange(rollouts.prompts_NP.shape[1])
  prompt_mask_NP = columns_P < rollouts.prompt_lengths_N[:, None]
  is_token = np.concatenate([prompt_mask_NP, rollouts.completion_mask_NT], 1)
  tokens = np.concatenate([rollouts.prompts_NP, rollouts.tokens_NT], 1)
  # The last token of the prompt has the completion's first as its target.
  last_places_N = first_places_N + rollouts.prompt_lengths_N - 1
  return _Layout(
    plan=plan,
    tokens=tokens[is_token],
    places=packing.ranges(last_places_N, rollouts.lengths_N),
  )


def _num_rows(needed: int, multiple: int, wanted: int | None) -> int:
  if wanted is None:
    return -(-needed // multiple) * multiple
  if wanted < needed or wanted % multiple:
    raise ValueError(
      f'num_rows={wanted} must be at least the {needed} rows that the answers '
      f'fill and divisible by num_rows_multiple={multiple}; set '
      f'num_rows={-(-needed // multiple) * multiple}.'
    )
  return wanted


def _token_weights(
  rollouts: Rollouts,
  aggregation: Aggregation,
  max_completion_tokens: int | None,
) -> np.ndarray:
  """Weight of each token of an answer; see `pack`."""
  mean_length = rollouts.num_tokens / rollouts.num_answers
  if aggregation == 'token':
    return np.ones(rollouts.num_answers)
  if aggregation == 'sequence':
    return mean_length / rollouts.lengths_N
  if aggregation != 'constant':
    raise ValueError(
      f'{aggregation=} must be one of token, sequence, constant.'
    )
  longest = int(rollouts.lengths_N.max())
  if max_completion_tokens is None or max_completion_tokens < longest:
    raise ValueError(
      f"aggregation='constant' divides by {max_completion_tokens=}, which must "
      f'be at least the longest completion, {longest}; pass '
      'sampling.max_new_tokens.'
    )
  return np.full(rollouts.num_answers, mean_length / max_completion_tokens)


def _check_same_shape(name: str, x_NT: np.ndarray, rollouts: Rollouts) -> None:
  if x_NT.shape != rollouts.tokens_NT.shape:
    raise ValueError(
      f'{name} must have the shape {rollouts.tokens_NT.shape} of tokens_NT, '
      f'has shape {x_NT.shape}.'
    )
