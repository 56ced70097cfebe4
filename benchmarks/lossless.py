"""The certificate that speculation does not change what is generated.

    ./run.sh python -m benchmarks.lossless [--quick]

Three proofs, each over chains and trees, learned, copied and useless drafts:
  greedy_mismatches    prompts of real text whose greedy completion differs from
                       plain decoding, a trained target and drafter
  max_tv_enumerated    total variation between the law of the engine's output
                       and the target's own, over every sequence of a small
                       vocabulary, for all temperatures and truncations
  min_p_value          chi-square of samples of the trained target's next tokens
                       against their exact law

Over 300 lines: three proofs of one claim, with the exact laws they compare to.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks import harness, trained_pair
from efficient_llm.models import presets, transformer
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import drafter as drafter_lib
from efficient_llm.speculative import (
  drafting,
  engine,
  model_draft,
  prefill,
  rounds,
  strategy,
  strategy_config,
)
from efficient_llm.speculative import state as state_lib
from efficient_llm.speculative import tree as tree_lib

_SHAPES = {
  'chain 1': tree_lib.DraftShape(1, 1, 2),
  'chain 4': tree_lib.DraftShape(4, 1, 5),
  'sampled chain 4': tree_lib.DraftShape(4, 1, 5, sampled=True),
  'tree 2x2 of 4': tree_lib.DraftShape(2, 2, 4),
  'tree 3x3 of 12': tree_lib.DraftShape(3, 3, 12),
}
_SAMPLINGS = {
  'temperature 1': {},
  'temperature 0.3': {'temperature': 0.3},
  'temperature 2': {'temperature': 2.0},
  'top-k 2': {'top_k': 2},
  'top-p 0.6': {'top_p': 0.6},
  'top-k 2, top-p 0.8, temperature 0.7': {
    'top_k': 2,
    'top_p': 0.8,
    'temperature': 0.7,
  },
  'greedy': {'temperature': 0.0},
}


def nothing(*arguments: Any, **more: Any) -> None:
  """A drafter's memory of nothing."""
  del arguments, more


def useless(kind: str, vocab_size: int) -> state_lib.Drafter:
  """Drafts without sense: 'constant', 'random' or 'not_a_number'."""

  def draft(draft_params, params, state, shape, sampling):
    del draft_params, params, sampling
    batch_size = state.tokens_BS.shape[0]
    count = shape.num_nodes - 1
    key = jax.random.fold_in(jax.random.key(11), state.lengths_B.sum())
    tokens = jax.random.randint(key, (batch_size, count), 0, vocab_size)
    if kind == 'constant':
      tokens = jnp.ones_like(tokens)
    index = jnp.arange(count)
    # Chains of `depth` nodes, side by side.
    parents = jnp.where(index % shape.depth, index - 1, -1)
    scores = -1.0 * index
    if kind == 'not_a_number':
      scores = jnp.full_like(scores, jnp.nan)
    root = jnp.take_along_axis(state.tokens_BS, state.lengths_B[:, None] - 1, 1)
    return tree_lib.select(
      root[:, 0],
      tokens.astype(jnp.int32),
      jnp.broadcast_to(parents, tokens.shape).astype(jnp.int32),
      jnp.broadcast_to(scores, tokens.shape),
      num_nodes=shape.num_nodes,
    )

  return state_lib.Drafter(nothing, draft, nothing, nothing, nothing)


def drafters(
  config: transformer.TransformerConfig, draft_params: Any
) -> dict[str, tuple[state_lib.Drafter, Any]]:
  """Every drafter by name, with its parameters."""
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), draft_params)
  both = {'learned': draft_params, 'model_free': None}
  return {
    'learned': (model_draft.drafter(config), draft_params),
    'model-free': (drafting.model_free(), None),
    'union': (drafting.union(config), both),
    'learned, not a number': (model_draft.drafter(config), broken),
    **{
      kind: (useless(kind, config.vocab_size), None)
      for kind in ('constant', 'random', 'not_a_number')
    },
  }


def forced(
  logits_BV: jax.Array, tokens_BT: jax.Array, index_B: jax.Array, config: Any
) -> tuple[jax.Array, jax.Array]:
  """Draws what it is told, and says how likely the engine would have done so.

  The engine's only chance is this draw, so forcing every sequence once
  enumerates its law: the product of what it says here.
  """
  index_B1 = jnp.minimum(index_B, tokens_BT.shape[1] - 1)[:, None]
  token_B = jnp.take_along_axis(tokens_BT, index_B1, 1)[:, 0]
  log_probs_BV = sampling_lib.truncate(logits_BV, config)
  return token_B, jnp.take_along_axis(log_probs_BV, token_B[:, None], 1)[:, 0]


def truncated(logits: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
  """Probabilities in float64, written without the code under test."""
  temperature = settings.get('temperature', 1.0)
  if temperature == 0:
    return np.eye(len(logits))[np.argmax(logits)]
  scaled = logits.astype(np.float64) / temperature
  if top_k := settings.get('top_k'):
    scaled[scaled < np.sort(scaled)[-top_k]] = -np.inf
  probs = np.exp(scaled - scaled.max())
  probs /= probs.sum()
  if top_p := settings.get('top_p'):
    kept, total = [], 0.0
    for token in np.argsort(-probs, kind='stable'):
      if total >= top_p:
        break
      kept.append(token)
      total += probs[token]
    mask = np.isin(np.arange(len(probs)), kept)
    probs = np.where(mask, probs, 0.0)
    probs /= probs.sum()
  return probs


def enumerate_laws(*, num_new: int, quick: bool) -> dict[str, float]:
  """Total variation by drafter, shape and truncation."""
  vocab_size = 3
  config = presets.get('test', vocab_size=vocab_size, max_positions=64)
  params = transformer.init(config, jax.random.key(0))
  params = jax.tree.map(lambda x: 1.5 * x if x.ndim > 1 else x, params)
  draft_params = drafter_lib.init(config, jax.random.key(1), params)
  sequences = np.asarray(
    list(itertools.product(range(vocab_size), repeat=num_new)), np.int32
  )
  count = len(sequences)
  prompt = np.asarray([2, 0, 1, 2, 0], np.int32)
  prompts = jnp.asarray(np.tile(prompt, (count, 1)))
  whole = jnp.concatenate([prompts, jnp.asarray(sequences)], 1)
  logits = np.asarray(
    jax.jit(lambda t: transformer.apply(config, params, t).logits)(whole)
  )
  found = {}
  names = ['learned', 'random']
  if not quick:
    names += ['model-free', 'union', 'not_a_number']
  for name, (shape_name, shape), (law, settings) in itertools.product(
    names, _SHAPES.items(), _SAMPLINGS.items()
  ):
    if shape.sampled:
      # Its coins are not those of one draw; `p_values` has it.
      continue
    few = quick or name not in ('learned', 'random')
    if few and shape_name not in ('chain 4', 'tree 3x3 of 12'):
      continue
    # The kernel bounds how many pieces of memory programs may be in.
    jax.clear_caches()
    plan_drafter, its_params = drafters(config, draft_params)[name]
    sampling = sampling_lib.SamplingConfig(num_new, **settings)
    plan = state_lib.Plan(config, sampling, plan_drafter, 64, draw=forced)
    state = _decode(plan, shape, params, its_params, prompts, sequences)
    if not np.array_equal(state.tokens_BS[:, 5 : 5 + num_new], sequences):
      raise RuntimeError('The engine must say what was drawn and does not.')
    ours = np.exp(np.asarray(state.log_probs_BS, np.float64).sum(1))
    plain = np.ones(count)
    for row, step in itertools.product(range(count), range(num_new)):
      probs = truncated(logits[row, 4 + step], settings)
      plain[row] *= probs[sequences[row, step]]
    found[f'{name}; {shape_name}; {law}'] = 0.5 * np.abs(ours - plain).sum()
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
  plan: state_lib.Plan,
  shape: tree_lib.DraftShape,
  params: Any,
  draft_params: Any,
  prompts: jax.Array,
  keys: jax.Array,
) -> state_lib.State:
  """A whole generation as one program; all prompts are of full length."""
  params = transformer.unstack_layers(params)
  batch_size, num_prompt = prompts.shape
  state = prefill.start(
    plan,
    shape.is_off,
    params,
    draft_params,
    prompts,
    jnp.full(batch_size, num_prompt, jnp.int32),
    keys,
    None,
  )
  limit = jnp.int32(plan.sampling.max_new_tokens)
  return rounds.run(
    plan, shape, params, draft_params, state, limit, jnp.int32(0)
  )


def greedy_mismatches(
  pair: trained_pair.Pair, *, num_prompts: int, num_new: int
) -> dict[str, int]:
  """Prompts of held-out text whose greedy completion differs, by drafter."""
  prompts = pair.prompts(num_prompts, num_tokens=48)
  lengths = np.full(num_prompts, prompts.shape[1], np.int32)
  sampling = sampling_lib.SamplingConfig(num_new, temperature=0.0)
  key = jax.random.key(0)
  plain = sampling_lib.generate(
    pair.config, pair.params, prompts, lengths, sampling, key
  )
  found = {}
  for name, (plan_drafter, its_params) in drafters(
    pair.config, pair.draft_params
  ).items():
    for shape_name in ('chain 4', 'sampled chain 4', 'tree 3x3 of 12'):
      shape = _SHAPES[shape_name]
      if shape.sampled and not plan_drafter.samples:
        continue
      chooser = strategy.Strategy(
        strategy_config.StrategyConfig(
          name='fixed', arms=(shape.name,), thresholds=(1,)
        )
      )
      machine = engine.Engine(
        pair.config, drafter=plan_drafter, chooser=chooser, max_batch=32
      )
      generation = machine.generate(
        pair.params, prompts, lengths, sampling, key, draft_params=its_params
      )
      differ = np.asarray(generation.completion.tokens != plain.tokens).any(1)
      name_shape = f'{name}; {shape_name}'
      found[name_shape] = int(differ.sum())
      print(
        f'{name_shape}: {found[name_shape]} of {num_prompts} differ, '
        f'{generation.stats.acceptance_length:.2f} tokens a pass',
        file=sys.stderr,
      )
  return found


def p_values(pair: trained_pair.Pair, *, num_samples: int) -> dict[str, float]:
  """Chi-square of the first three tokens behind one prompt, by drafter."""
  config, num_new, batch_size = pair.config, 3, 1000
  prompt = pair.prompts(1, num_tokens=8)
  prompts = jnp.asarray(np.tile(prompt, (batch_size, 1)))
  sampling = sampling_lib.SamplingConfig(num_new, temperature=0.8, top_k=12)
  law = _exact_law(pair, prompt[0], sampling)
  found = {}
  arms = (
    ('learned', 'chain 1'),
    ('learned', 'tree 2x2 of 4'),
    ('model-free', 'tree 2x2 of 4'),
    ('random', 'tree 2x2 of 4'),
    ('learned', 'sampled chain 4'),
    ('union', 'sampled chain 4'),
  )
  for arm, (name, shape_name) in enumerate(arms):
    # Coins of its own: with the same ones all arms say the same.
    arm_key = jax.random.fold_in(jax.random.key(5), arm)
    plan_drafter, its_params = drafters(config, pair.draft_params)[name]
    plan = state_lib.Plan(config, sampling, plan_drafter, 64)
    counts: dict[tuple[int, ...], int] = {}
    for batch in range(num_samples // batch_size):
      key = jax.random.fold_in(arm_key, batch)
      state = _decode(
        plan,
        _SHAPES[shape_name],
        pair.params,
        its_params,
        prompts,
        sampling_lib.row_keys(key, batch_size),
      )
      new = np.asarray(state.tokens_BS[:, prompt.shape[1] :][:, :num_new])
      for tokens in map(tuple, new.tolist()):
        counts[tokens] = counts.get(tokens, 0) + 1
    p_value = _p_value(counts, law, num_samples)
    found[f'{name}; {shape_name}'] = p_value
    print(f'{name}; {shape_name}: p {p_value:.3f}', file=sys.stderr)
  return found


def _exact_law(
  pair: trained_pair.Pair, prompt: np.ndarray, sampling: Any
) -> dict[tuple[int, ...], float]:
  """Probability of every continuation the truncated target can draw."""

  @jax.jit
  def apply(params: Any, tokens: jax.Array) -> jax.Array:
    hidden = transformer.apply(pair.config, params, tokens).hidden
    return transformer.unembed(pair.config, params, hidden[:, -1])

  settings = {'temperature': sampling.temperature, 'top_k': sampling.top_k}
  law: dict[tuple[int, ...], float] = {(): 1.0}
  for _ in range(sampling.max_new_tokens):
    prefixes = list(law)
    rows = np.asarray([[*prompt, *prefix] for prefix in prefixes], np.int32)
    logits = np.asarray(apply(pair.params, jnp.asarray(rows)))
    law = {
      (*prefix, int(token)): law[prefix] * probs[token]
      for prefix, row in zip(prefixes, logits, strict=True)
      for probs in [truncated(row, settings)]
      for token in np.flatnonzero(probs)
    }
  return law


def _p_value(
  counts: dict[tuple[int, ...], int],
  law: dict[tuple[int, ...], float],
  num_samples: int,
) -> float:
  """Pearson's test; what is expected less than ten times is one bin."""
  if set(counts) - set(law):
    return 0.0
  frequent = [t for t, p in law.items() if p * num_samples >= 10]
  observed = [counts.get(tokens, 0) for tokens in frequent]
  expected = [law[tokens] * num_samples for tokens in frequent]
  observed.append(num_samples - sum(observed))
  expected.append(num_samples - sum(expected))
  return float(stats.chisquare(observed, expected).pvalue)


def main() -> None:
  """Runs the three proofs."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='fewer of all')
  parser.add_argument('--cache_dir', type=pathlib.Path, default='out/pair')
  arguments = parser.parse_args()
  quick, start = arguments.quick, time.perf_counter()
  tv = enumerate_laws(num_new=3 if quick else 4, quick=quick)
  print(f'enumerated: {max(tv.values()):.2e}', file=sys.stderr)
  pair = trained_pair.load_or_train(arguments.cache_dir)
  mismatches = greedy_mismatches(
    pair, num_prompts=20 if quick else 200, num_new=32
  )
  p = p_values(pair, num_samples=5_000 if quick else 100_000)
  harness.record(
    'lossless',
    {
      'greedy_mismatches': sum(mismatches.values()),
      'max_tv_enumerated': max(tv.values()),
      'min_p_value': min(p.values()),
      'greedy_mismatches_by_drafter': mismatches,
      'tv_by_case': tv,
      'p_values': p,
      'num_prompts': 20 if quick else 200,
      'num_samples': 5_000 if quick else 100_000,
      'target': dataclasses.asdict(pair.config),
      'secs': time.perf_counter() - start,
    },
  )


if __name__ == '__main__':
  main()
