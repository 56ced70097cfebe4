"""Acceptance against plain decoding with the same coins."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import tree as tree_lib
from efficient_llm.speculative import verify

_VOCAB = 4


def _laws(depth: int, seed: int) -> dict[tuple[int, ...], np.ndarray]:
  """Logits of the target behind every prefix of up to `depth` tokens."""
  rng = np.random.default_rng(seed)
  return {
    prefix: 2 * rng.normal(size=_VOCAB)
    for length in range(depth + 1)
    for prefix in itertools.product(range(_VOCAB), repeat=length)
  }


def _tree(paths: list[tuple[int, ...]], num_nodes: int) -> tree_lib.Tree:
  nodes = sorted({p[:n] for p in paths for n in range(1, len(p) + 1)})
  nodes.sort(key=len)
  index = {(): -1} | {node: i for i, node in enumerate(nodes)}
  return tree_lib.select(
    jnp.asarray([0]),
    jnp.asarray([[node[-1] for node in nodes]], jnp.int32),
    jnp.asarray([[index[node[:-1]] for node in nodes]], jnp.int32),
    -jnp.arange(len(nodes), dtype=jnp.float32)[None],
    num_nodes=num_nodes,
  )


def _node_logits(tree: tree_lib.Tree, laws: dict) -> jax.Array:
  """The target's logits at every node; padding gets nonsense."""
  prefixes: list[tuple[int, ...]] = [()]
  rows = [laws[()]]
  for node in range(1, tree.tokens_BW.shape[1]):
    above = prefixes[int(tree.parents_BW[0, node])]
    prefix = (*above, int(tree.tokens_BW[0, node]))
    prefixes.append(prefix)
    real = node < int(tree.num_nodes_B[0])
    rows.append(laws[prefix] if real else np.full(_VOCAB, 9.0))
  return jnp.asarray(np.stack(rows), jnp.float32)[None]


_TREES = {
  'root_only': [],
  'chain': [(2, 1, 0)],
  'wide': [(0,), (1,), (3,)],
  'bushy': [(0, 0), (0, 1), (1, 2, 3), (3,)],
  'whole': list(itertools.product(range(_VOCAB), repeat=2)),
}


_SAMPLINGS = {
  'whole_law': sampling_lib.SamplingConfig(20),
  'top_k': sampling_lib.SamplingConfig(20, temperature=0.5, top_k=3),
  'top_p': sampling_lib.SamplingConfig(20, top_p=0.7),
}


@pytest.mark.parametrize(
  ('tree_name', 'law'),
  [
    *((name, 'whole_law') for name in _TREES),
    ('bushy', 'top_k'),
    ('bushy', 'top_p'),
  ],
)
def test_accepted_tokens_are_those_of_plain_decoding(
  tree_name: str, law: str
) -> None:
  """With the same coins the walk says what one token at a time says."""
  paths, sampling = _TREES[tree_name], _SAMPLINGS[law]
  laws = _laws(3, seed=1)
  tree = _tree([p for p in paths if p] or [(0,)], num_nodes=21)
  if not paths:
    tree = tree_lib.chain(jnp.asarray([0]), jnp.zeros((1, 0), jnp.int32))
  logits = _node_logits(tree, laws)
  keys = jax.random.split(jax.random.key(3), 25)
  accepted = jax.jit(
    jax.vmap(
      lambda key: verify.accept(
        tree, logits, key[None], jnp.asarray([5]), sampling, depth=3
      )
    )
  )(keys)
  drafted = {p[:n] for p in paths for n in range(len(p) + 1)} | {()}
  draw = jax.jit(functools.partial(sampling_lib.draw, config=sampling))
  lengths = set()
  for index, key in enumerate(keys):
    prefix: tuple[int, ...] = ()
    while prefix in drafted:
      token, _ = draw(
        jnp.asarray(laws[prefix], jnp.float32)[None],
        key[None],
        jnp.asarray([5 + len(prefix)]),
      )
      prefix = (*prefix, int(token[0]))
    count = int(accepted.num_tokens_B[index, 0])
    lengths.add(count)
    assert tuple(accepted.tokens_BE[index, 0, :count].tolist()) == prefix
  # Both short and long walks were seen.
  if tree_name == 'bushy':
    assert len(lengths) > 1


def test_a_stop_token_ends_the_path_it_stands_in() -> None:
  logits = jnp.full((1, 4, _VOCAB), -20.0)
  for node, token in enumerate((2, 1, 3, 0)):
    logits = logits.at[0, node, token].set(20.0)
  tree = tree_lib.chain(jnp.asarray([0]), jnp.asarray([[2, 1, 3]]))
  key = sampling_lib.row_keys(jax.random.key(0), 1)
  first = jnp.asarray([0])
  stops = sampling_lib.SamplingConfig(9, temperature=0.0, stop_tokens=(1,))
  accepted = verify.accept(tree, logits, key, first, stops, depth=3)
  assert accepted.tokens_BE[0].tolist() == [2, 1, 0, 0]
  assert accepted.num_tokens_B.tolist() == [2]
  assert accepted.ended_B.tolist() == [True]
  short = sampling_lib.SamplingConfig(3, temperature=0.0)
  accepted = verify.accept(tree, logits, key, first, short, depth=3)
  assert accepted.tokens_BE[0].tolist() == [2, 1, 3, 0]
  assert accepted.ended_B.tolist() == [True]
  going = sampling_lib.SamplingConfig(9, temperature=0.0)
  accepted = verify.accept(tree, logits, key, first, going, depth=3)
  assert accepted.tokens_BE[0].tolist() == [2, 1, 3, 0]
  assert accepted.num_tokens_B.tolist() == [4]
  assert accepted.ended_B.tolist() == [False]
