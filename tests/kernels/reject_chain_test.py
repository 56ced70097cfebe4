"""Rejection sampling of chains: the algorithm, and the law of the target."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from efficient_llm.kernels.speculative_sampling import (
  api,
  pallas_tpu_chain,
  reference,
)
from efficient_llm.typing import Array
from tests.kernels import interpreter

no_race = interpreter.no_race
STRICT = interpreter.STRICT
# A false alarm once in 10 000 runs, were the keys not fixed.
_SMALLEST_P = 1e-4


def _key_data(seed: int, num_rows: int) -> Array:
  return jax.random.key_data(jax.random.split(jax.random.key(seed), num_rows))


def _logits(*shape: int, seed: int = 0, dtype: str = 'float32') -> Array:
  logits = 3 * jax.random.normal(jax.random.key(seed), shape)
  return logits.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Chain:
  """Inputs of one `reject_chain`."""

  target_BWV: Array
  draft_BKV: Array
  tokens_BK: Array
  coins_BK: Array
  keys_B2: Array

  def arrays(self) -> tuple[Array, ...]:
    return tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def _chain(
  batch_size: int,
  num_drafts: int,
  vocab_size: int,
  *,
  gap: float = 0.7,
  same: bool = False,
) -> Chain:
  """Drafts drawn from logits that differ from the target's by `gap`.

  Args:
    same: Whether every row has the same logits, with other draws.
  """
  rows = 1 if same else batch_size
  target = _logits(rows, num_drafts + 1, vocab_size) / 2
  draft = target[:, :-1] + gap * _logits(rows, num_drafts, vocab_size, seed=1)
  target, draft = (
    jnp.broadcast_to(x, (batch_size, *x.shape[1:])) for x in (target, draft)
  )
  return Chain(
    target_BWV=target,
    draft_BKV=draft,
    tokens_BK=jax.random.categorical(jax.random.key(2), draft),
    coins_BK=jax.random.uniform(jax.random.key(3), (batch_size, num_drafts)),
    keys_B2=_key_data(4, batch_size),
  )


def _broken(chain: Chain) -> Chain:
  """Drafts that are absent: NaN, all -inf, no mass, and no token."""
  draft = np.array(chain.draft_BKV)
  tokens = np.array(chain.tokens_BK)
  draft[0, 0, 5] = np.nan
  draft[1, 0] = -np.inf
  draft[2, 0, tokens[2, 0]] = -np.inf
  tokens[3, 0] = -1
  tokens[4, 0] = draft.shape[-1]
  draft[5, 0, 3] = np.inf
  return dataclasses.replace(
    chain, draft_BKV=jnp.asarray(draft), tokens_BK=jnp.asarray(tokens)
  )


# Few shapes, as the interpreter compiles each for seconds.
CHAINS: dict[str, Callable[[], Chain]] = {
  'one draft': lambda: _chain(3, 1, 100),
  'a chain longer than a register': lambda: _chain(6, 9, 200, gap=0.1),
  'near laws': lambda: _chain(6, 2, 200, gap=0.3),
  'equal laws': lambda: _chain(6, 2, 200, gap=0.0),
  # No coin is 1: it stands for a rejection that rounding brings about.
  'equal laws, and yet a rejection': lambda: dataclasses.replace(
    _chain(6, 2, 200, gap=0.0), coins_BK=jnp.ones((6, 2))
  ),
  'far laws': lambda: _chain(6, 2, 200, gap=3.0),
  'no draft worth the name': lambda: _broken(_chain(6, 2, 200)),
}
_tpu_chain = functools.partial(
  pallas_tpu_chain.reject_chain, columns=128, interpret=STRICT
)


@pytest.mark.usefixtures('no_race')
@pytest.mark.parametrize('name', CHAINS)
def test_the_chain_kernel_matches_the_reference(name: str) -> None:
  arrays = CHAINS[name]().arrays()
  accepted_B, next_B = _tpu_chain(*arrays)
  expected_B, expected_next_B = reference.reject_chain(*arrays)
  assert accepted_B.tolist() == expected_B.tolist()
  assert next_B.tolist() == expected_next_B.tolist()


@pytest.mark.usefixtures('no_race')
def test_the_chain_kernel_takes_bfloat16() -> None:
  chain = CHAINS['near laws']()
  arrays = (
    chain.target_BWV.astype(jnp.bfloat16),
    chain.draft_BKV.astype(jnp.bfloat16),
    *chain.arrays()[2:],
  )
  ours = _tpu_chain(*arrays)
  theirs = reference.reject_chain(*arrays)
  assert [x.tolist() for x in ours] == [x.tolist() for x in theirs]


@pytest.mark.parametrize('name', CHAINS)
def test_the_reference_is_leviathans_algorithm(name: str) -> None:
  chain = CHAINS[name]()
  accepted_B, next_B = reference.reject_chain(*chain.arrays())
  for row, accepted in enumerate(accepted_B.tolist()):
    expected, law_V = _algorithm_1(chain, row)
    assert accepted == expected
    assert law_V[int(next_B[row])] > 0


def _algorithm_1(chain: Chain, row: int) -> tuple[int, np.ndarray]:
  """Accepted drafts of a row, and the law of the token behind them."""
  with np.errstate(invalid='ignore'):
    p_WV, q_KV = (
      np.exp(x - x.max(-1, keepdims=True))
      for x in (
        np.asarray(chain.target_BWV[row], np.float64),
        np.asarray(chain.draft_BKV[row], np.float64),
      )
    )
    p_WV, q_KV = (x / x.sum(-1, keepdims=True) for x in (p_WV, q_KV))
  for index, q_V in enumerate(q_KV):
    token = int(chain.tokens_BK[row, index])
    if not (0 <= token < len(q_V) and q_V[token] > 0):
      return index, p_WV[index]
    if chain.coins_BK[row, index] >= p_WV[index, token] / q_V[token]:
      residual_V = np.maximum(p_WV[index] - q_V, 0)
      return index, residual_V if residual_V.any() else p_WV[index]
  return len(q_KV), p_WV[-1]


def _emitted(chain: Chain) -> np.ndarray:
  """The first two tokens of each row, the second -1 where there is but one."""
  accepted_B, next_B = jax.jit(reference.reject_chain)(*chain.arrays())
  index_B2 = np.arange(2) - np.asarray(accepted_B)[:, None]
  tokens_B2 = np.where(index_B2 == 0, next_B[:, None], chain.tokens_BK[:, :2])
  return np.where(index_B2 > 0, -1, tokens_B2)


def _p_value(counts_V: np.ndarray, logits_V: Array) -> float:
  """Of the chi-square test that the counts follow the logits' law."""
  law_V = special.softmax(np.asarray(logits_V, np.float64))
  return stats.chisquare(counts_V, law_V * counts_V.sum()).pvalue


@pytest.mark.parametrize('gap', [0.0, 0.5, 3.0])
def test_every_token_has_the_law_of_the_target(gap: float) -> None:
  chain = _chain(50_000, 2, 6, gap=gap, same=True)
  emitted_B2 = _emitted(chain)
  for index in range(2):
    tokens = emitted_B2[emitted_B2[:, index] >= 0, index]
    assert len(tokens) > 1000
    counts_V = np.bincount(tokens, minlength=6)
    assert _p_value(counts_V, chain.target_BWV[0, index]) > _SMALLEST_P


@pytest.mark.parametrize('logit', [np.nan, -np.inf])
def test_a_broken_drafter_leaves_the_law_intact(logit: float) -> None:
  chain = _chain(50_000, 2, 6, same=True)
  chain = dataclasses.replace(
    chain,
    draft_BKV=jnp.full_like(chain.draft_BKV, logit),
    tokens_BK=jnp.full_like(chain.tokens_BK, 1),
  )
  emitted_B2 = _emitted(chain)
  assert (emitted_B2[:, 1] == -1).all()
  counts_V = np.bincount(emitted_B2[:, 0], minlength=6)
  assert _p_value(counts_V, chain.target_BWV[0, 0]) > _SMALLEST_P


def test_without_drafts_the_token_is_a_plain_draw() -> None:
  logits_B1V, keys_B2 = _logits(4, 1, 50), _key_data(0, 4)
  none = jnp.zeros((4, 0))
  accepted_B, next_B = api.reject_chain(
    logits_B1V, jnp.zeros((4, 0, 50)), none.astype(jnp.int32), none, keys_B2
  )
  plain_B = api.sample_tokens(logits_B1V[:, 0], keys_B2, temperature=1.0)
  assert accepted_B.tolist() == [0] * 4
  assert next_B.tolist() == plain_B.tolist()


def test_an_accepted_chain_ends_with_a_plain_draw() -> None:
  chain = CHAINS['one draft']()
  chain = dataclasses.replace(chain, coins_BK=jnp.zeros_like(chain.coins_BK))
  accepted_B, next_B = api.reject_chain(*chain.arrays())
  plain_B = api.sample_tokens(
    chain.target_BWV[:, 1], chain.keys_B2, temperature=1.0
  )
  assert accepted_B.tolist() == [1] * 3
  assert next_B.tolist() == plain_B.tolist()


def test_target_logits_of_the_wrong_length_are_refused() -> None:
  target, *rest = CHAINS['one draft']().arrays()
  arrays = tuple([target[:, :1], *rest])
  with pytest.raises(ValueError, match='add the row behind the last draft'):
    api.reject_chain(*arrays)
