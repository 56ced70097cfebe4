"""What speculation saves, where every step is decoded plainly as well."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_llm.tlt import rollout


def compared(
  plain: rollout.Outcome, answered: rollout.Outcome
) -> dict[str, float]:
  """What plain decoding took for the answers of a step.

  Args:
    plain: By plain decoding.
    answered: By speculation, to the same problems with the same coins.
  Returns:
    Seconds, and the share of equal tokens up to the end of the longer answers.
  """
  longest_N = np.maximum(plain.lengths_N, answered.lengths_N)
  inside_NT = np.arange(plain.tokens_NT.shape[1]) < longest_N[:, None]
  same_NT = plain.tokens_NT == answered.tokens_NT
  return {
    'plain_rollout_secs': plain.secs,
    'plain_compile_secs': plain.compile_secs,
    'plain_same_tokens': float(same_NT[inside_NT].mean()),
  }


def savings(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What speculation saved over a run, where plain decoding was measured.

  Args:
    records: Lines of metrics. Steps in which either compiled are left out,
      unless there are no others.
  """
  measured = [x for x in records if 'plain_step_secs' in x]
  if not measured:
    return {}
  kept = [
    x
    for x in measured
    if x['step'] > 1
    and not x['plain_compile_secs']
    and not x['rollout_compile_secs']
  ] or measured
  return {
    'speedup_step': _total(kept, 'plain_step_secs') / _total(kept, 'step_secs'),
    'speedup_rollout': _total(kept, 'plain_rollout_secs')
    / _total(kept, 'rollout_secs'),
    'plain_same_tokens': _total(measured, 'plain_same_tokens') / len(measured),
    'plain_step_secs': _total(kept, 'plain_step_secs'),
    'step_secs': _total(kept, 'step_secs'),
    'compared_steps': len(kept),
  }


def _total(records: Sequence[Mapping[str, Any]], name: str) -> float:
  return sum(record[name] for record in records)
