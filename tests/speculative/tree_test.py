import itertools

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.kernels.tree_attention import api, reference
from efficient_llm.speculative import tree as tree_lib


@st.composite
def _parents(draw) -> list[int]:
  # Few sizes, around the words' ends: each is a program to compile.
  num_nodes = draw(st.sampled_from([1, 2, 31, 32, 33, 64, 65, 70]))
  return [draw(st.integers(0, max(0, i - 1))) for i in range(num_nodes)]


def _ancestors(parents: list[int], node: int) -> set[int]:
  found = {node}
  while node:
    node = parents[node]
    found.add(node)
  return found


@hypothesis.given(_parents())
@hypothesis.settings(max_examples=30, deadline=None)
def test_ancestors_are_what_walking_up_finds(parents: list[int]) -> None:
  seen = tree_lib.ancestors(jnp.asarray([parents], jnp.int32))[0]
  for node in range(len(parents)):
    assert set(np.flatnonzero(seen[node])) == _ancestors(parents, node)


@hypothesis.given(_parents())
@hypothesis.settings(max_examples=30, deadline=None)
def test_packed_ancestors_come_back(parents: list[int]) -> None:
  seen = tree_lib.ancestors(jnp.asarray([parents], jnp.int32))
  words = api.pack(seen)
  assert words.shape[-1] == -(-len(parents) // 32)
  # Behind an empty cache the kernels see the ancestors and nothing else.
  visible = reference.visible(
    jnp.zeros(1, jnp.int32), words, capacity=len(parents) + 2
  )
  np.testing.assert_array_equal(visible[..., : len(parents)], seen)
  assert not visible[..., len(parents) :].any()


def _paths(tree: tree_lib.Tree, row: int = 0) -> list[tuple[int, ...]]:
  """The tokens from the root to every real node, in the nodes' order."""
  paths = []
  for node in range(int(tree.num_nodes_B[row])):
    parent = int(tree.parents_BW[row, node])
    assert node == 0 or parent < node
    above = paths[parent] if node else ()
    paths.append((*above, int(tree.tokens_BW[row, node])))
    assert len(paths[-1]) - 1 == int(tree.depths_BW[row, node])
  return paths


def test_a_chain_is_one_path() -> None:
  tree = tree_lib.chain(jnp.asarray([7]), jnp.asarray([[1, 2, 3]]))
  assert _paths(tree) == [(7,), (7, 1), (7, 1, 2), (7, 1, 2, 3)]


@st.composite
def _candidates(draw):
  # Few sizes, as each is a program to compile.
  count = draw(st.sampled_from([1, 2, 7, 20]))
  parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
  scores = []
  for parent in parents:
    above = 0.0 if parent < 0 else scores[parent]
    # Ties included: a sure child is as likely as its parent.
    scores.append(above - draw(st.sampled_from([0.0, 0.5, 1.0])))
  return parents, scores, draw(st.sampled_from([1, 2, 8, 24]))


@hypothesis.given(_candidates())
@hypothesis.settings(max_examples=50, deadline=None)
def test_the_best_candidates_are_kept_and_make_a_tree(case) -> None:
  parents, scores, num_nodes = case
  tokens = list(range(100, 100 + len(parents)))
  tree = tree_lib.select(
    jnp.asarray([7]),
    jnp.asarray([tokens], jnp.int32),
    jnp.asarray([parents], jnp.int32),
    jnp.asarray([scores], jnp.float32),
    num_nodes=num_nodes,
  )
  assert tree.tokens_BW.shape == (1, num_nodes)
  kept = [path[-1] - 100 for path in _paths(tree)[1:]]
  assert len(kept) == min(num_nodes - 1, len(parents))
  for node, path in zip(kept, _paths(tree)[1:], strict=True):
    above = parents[node]
    assert path[-2] == (7 if above < 0 else 100 + above)
  left = set(range(len(parents))) - set(kept)
  if kept and left:
    assert min(scores[n] for n in kept) >= max(scores[n] for n in left)


def test_no_candidate_no_node() -> None:
  tree = tree_lib.select(
    jnp.asarray([7, 7]),
    jnp.asarray([[1, 2], [1, 2]], jnp.int32),
    jnp.asarray([[-1, -1], [-1, -1]], jnp.int32),
    jnp.asarray([[-jnp.inf, jnp.nan], [jnp.nan, -1.0]]),
    num_nodes=3,
  )
  assert _paths(tree, 0) == [(7,)]
  assert _paths(tree, 1) == [(7,), (7, 2)]


def _tree_of(paths: list[str], num_nodes: int) -> tree_lib.Tree:
  """A tree from words, all of whose beginnings are nodes."""
  nodes = sorted(
    {word[:n] for word in paths for n in range(1, len(word) + 1)},
    key=lambda word: (len(word), word),
  )
  index = {'': -1} | {word: i for i, word in enumerate(nodes)}
  # All of one size, so that one program serves them: the rest is impossible.
  room = (0, 16 - len(nodes))
  tokens = np.pad([ord(word[-1]) for word in nodes], room)
  parents = np.pad([index[word[:-1]] for word in nodes], room)
  scores = np.pad(
    -np.arange(len(nodes), dtype=np.float32), room, constant_values=-np.inf
  )
  return tree_lib.select(
    jnp.asarray([0]),
    jnp.asarray(tokens[None], jnp.int32),
    jnp.asarray(parents[None], jnp.int32),
    jnp.asarray(scores[None]),
    num_nodes=num_nodes,
  )


def _words(tree: tree_lib.Tree) -> set[str]:
  return {''.join(map(chr, path[1:])) for path in _paths(tree)}


_WORD = st.text('ab', min_size=1, max_size=4)


@hypothesis.given(
  st.lists(_WORD, min_size=1, max_size=4),
  st.lists(_WORD, min_size=1, max_size=4),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_union_holds_every_path_of_both_once(one, two) -> None:
  first, second = _tree_of(one, 17), _tree_of(two, 17)
  union = tree_lib.merge(first, second, num_nodes=33)
  assert _words(union) == _words(first) | _words(second)
  assert len(_paths(union)) == len(_words(union))


def test_a_small_budget_keeps_the_first_tree() -> None:
  union = tree_lib.merge(
    _tree_of(['ab', 'ac'], 5), _tree_of(['xyz'], 5), num_nodes=6
  )
  assert _words(union) == {'', 'a', 'ab', 'ac', 'x', 'xy'}


@pytest.mark.parametrize(
  ('depth', 'top_k', 'num_nodes', 'rule'),
  [
    (-1, 1, 1, 'draft.depth=-1 must be at least 0'),
    (2, 0, 3, 'draft.top_k=0 must be at least 1'),
    (4, 2, 4, 'draft.num_nodes=4 must exceed draft.depth=4'),
    (0, 1, 2, 'draft.num_nodes=2 must be 1'),
    (2, 1, 5, 'draft.num_nodes=5 must be 3 for a chain'),
  ],
)
def test_shapes_that_make_no_sense_are_refused(
  depth: int, top_k: int, num_nodes: int, rule: str
) -> None:
  with pytest.raises(ValueError, match=rule):
    tree_lib.DraftShape(depth, top_k, num_nodes).validate()


def test_sensible_shapes_are_not_refused() -> None:
  for depth, top_k in itertools.product((1, 4), (1, 3)):
    tree_lib.DraftShape(depth, top_k, depth + 1).validate()
  tree_lib.DraftShape().validate()


@pytest.mark.parametrize('name', ['7_4_20e', '0_1_1e', '0_1_1s', '4_2_5s'])
def test_only_chains_of_a_draft_model_end_early_or_are_drawn(name: str) -> None:
  with pytest.raises(ValueError, match=f'not with {name}'):
    tree_lib.DraftShape.parse(name)


@pytest.mark.parametrize('name', ['8_4_48', '4_1_5c', '4_1_5s', '7_1_8e'])
def test_a_shape_has_its_name_back(name: str) -> None:
  assert tree_lib.DraftShape.parse(name).name == name
