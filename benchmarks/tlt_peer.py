"""Plain rollouts beside Hugging Face's generate: equal weights, equal work."""

import dataclasses
import importlib.util
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks import hf_decoding
from efficient_llm.models import config as model_config
from efficient_llm.models import sampling
from efficient_llm.tlt import problems, rollout
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt.config import TltConfig

# The sampler is no greedy one; so cold it is, but for ties.
_COLD = 1e-5
# A pool of threads of the arm before may still be spinning.
_REST_SECS = 0.2
_SIZES = (
  'vocab_size',
  'num_layers',
  'embed_dim',
  'num_heads',
  'num_kv_heads',
  'head_dim',
  'mlp_dim',
  'max_positions',
  'scan_unroll',
)


def compare(
  config: TltConfig,
  start: start_lib.Start,
  *,
  cache_dir: pathlib.Path,
  rounds: int,
  num_new: int = 192,
) -> dict[str, Any]:
  """Tokens a second of both, in turn, over answers of one fixed length.

  Workers decode as in the arm without speculation, from one queue; transformers
  decodes as many rows together as all workers do, with one thread and with one
  for each core, of which the faster counts: small products lose by sharing, and
  on a busy machine threads that wait for each other all but stand still. Both
  are float32, and greedy but for ties.

  Args:
    config: Of the run; its rollouts say how many rows are decoded together.
    start: The model.
    cache_dir: Gets the weights for the peer.
    rounds: In which all take turns, after one that is not counted.
    num_new: Tokens of each answer, at most as many as the run's have.
  Returns:
    plain_tps, hf_plain_tps, their ratio plain_vs_hf, hf_tps_by_threads and
    rows_as_hf, the share of answers that are the same; None where nothing was
    compared, and 'hf_note' says why.
  """
  names = (
    'plain_tps',
    'hf_plain_tps',
    'plain_vs_hf',
    'hf_tps_by_threads',
    'rows_as_hf',
  )
  reason = _obstacle(start.target.model)
  if reason is not None:
    return {**dict.fromkeys(names), 'hf_note': f'not compared: {reason}'}
  num_new = min(num_new, config.rollout.sampling.max_new_tokens)
  params = start.target.restore_params(None)
  weights = cache_dir / 'hf_target.npz'
  hf_decoding.write_weights(weights, start.target.model, params)
  workers = rollout.Workers(
    dataclasses.replace(
      config.rollout,
      speculation='off',
      sampling=sampling.SamplingConfig(num_new, temperature=_COLD),
    ),
    start.target.model,
    stop_tokens=(),
    devices=jax.local_devices(),
  )
  batch_size = config.rollout.max_live * len(jax.local_devices())
  tokens_NP = _prompts(config, start, count=2 * batch_size)
  num_rows, num_prompt = tokens_NP.shape
  peer = hf_decoding.Peer(weights)
  # Of the peer by its threads, of the workers under 0.
  secs: dict[int, list[float]] = {0: [], 1: [], os.cpu_count() or 1: []}
  answers: dict[int, np.ndarray] = {}
  for index in range(-1, rounds):
    for threads in list(secs)[:: 1 if index % 2 else -1]:
      if not threads:
        outcome = workers.run(
          params,
          tokens_NP,
          np.full(num_rows, num_prompt, np.int32),
          np.arange(num_rows, dtype=np.int32),
          jax.random.key(0),
          draft_params=None,
          trainer=None,
        )
        spent, answers[threads] = outcome.secs, outcome.tokens_NT
      else:
        time.sleep(_REST_SECS)
        spent, answers[threads] = peer.decode(
          'hf_plain',
          tokens_NP,
          batch_size=batch_size,
          num_new=num_new,
          num_threads=threads,
        )
        time.sleep(_REST_SECS)
      if index >= 0:
        secs[threads].append(spent)
  peer.stop()
  tps = {
    threads: num_rows * num_new / statistics.median(values)
    for threads, values in secs.items()
  }
  plain = tps.pop(0)
  best = max(tps, key=tps.__getitem__)
  same = (answers[0] == answers[best]).all(1)
  values = (plain, tps[best], plain / tps[best], tps, float(same.mean()))
  return {
    **dict(zip(names, values, strict=True)),
    'hf_note': f'batch {batch_size}, {num_new} new tokens, {peer.versions}',
  }


def _obstacle(model: model_config.TransformerConfig) -> str | None:
  """Why there is nothing to compare with, None where there is."""
  for name in ('torch', 'transformers'):
    if importlib.util.find_spec(name) is None:
      return './run.sh pip install torch==2.13.0 transformers'
  if jax.default_backend() != 'cpu':
    return 'the peer decodes on a CPU'
  usual = model_config.TransformerConfig()
  sizes = {name: getattr(usual, name) for name in _SIZES}
  if dataclasses.replace(model, **sizes) != usual:
    return 'the peer knows the default model of any size only'
  return None


def _prompts(
  config: TltConfig, start: start_lib.Start, *, count: int
) -> np.ndarray:
  """Prompts of the run, of the commonest length, which the peer can batch."""
  encoded = problems.encode(
    [start.task.problem(n, split='train') for n in range(4 * count)],
    start.target.load_tokenizer(),
    group_size=1,
    max_prompt_tokens=config.max_prompt_tokens,
  )
  length = statistics.mode(encoded.lengths_N.tolist())
  rows = np.flatnonzero(encoded.lengths_N == length)[:count]
  return encoded.tokens_NP[rows, :length]
