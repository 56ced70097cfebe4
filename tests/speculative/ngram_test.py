import dataclasses
import itertools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.speculative import ngram, tree

_ROWS, _WIDTH, _EXTRA, _EXTRA_WIDTH = 3, 13, 2, 16
_MAX_MATCH = 4
_CHAIN, _TREE = tree.DraftShape(4, 1, 5), tree.DraftShape(3, 2, 7)
# Below the number of paths that three tokens can make, so that some are cut.
_SMALL_TREE = tree.DraftShape(3, 2, 4)


@dataclasses.dataclass(frozen=True)
class _Case:
  """Texts of few different tokens, with as random tokens behind their ends."""

  tokens: np.ndarray
  lengths: list[int]
  groups: list[int]

  def rows(self) -> list[list[int]]:
    texts = [self.tokens[: _ROWS * _WIDTH].reshape(_ROWS, -1)]
    texts.append(self.tokens[_ROWS * _WIDTH :].reshape(_EXTRA, -1))
    rows = [row for text in texts for row in text.tolist()]
    return [
      row[:length] for row, length in zip(rows, self.lengths, strict=True)
    ]

  def draft(self, shape: tree.DraftShape, **more: Any) -> ngram.Draft:
    rows, lengths = (
      self.tokens[: _ROWS * _WIDTH],
      np.asarray(self.lengths, np.int32),
    )
    groups = np.asarray(self.groups, np.int32)
    texts = {
      'group_ids_B': groups[:_ROWS],
      'extra_RE': self.tokens[_ROWS * _WIDTH :].reshape(_EXTRA, -1),
      'extra_lengths_R': lengths[_ROWS:],
      'extra_group_ids_R': groups[_ROWS:],
      'max_match': _MAX_MATCH,
    }
    return _draft(
      rows.reshape(_ROWS, -1), lengths[:_ROWS], shape, **(texts | more)
    )


def _draft(
  history: Any, lengths: Any, shape: tree.DraftShape, **more: Any
) -> ngram.Draft:
  arrays = {
    name: jnp.asarray(value, jnp.int32) if np.ndim(value) else value
    for name, value in more.items()
  }
  return jax.device_get(
    ngram.draft(
      jnp.asarray(history, jnp.int32),
      jnp.asarray(lengths, jnp.int32),
      shape=shape,
      **arrays,
    )
  )


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
  size = _ROWS * _WIDTH + _EXTRA * _EXTRA_WIDTH
  tokens = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
  lengths = [draw(st.integers(1, _WIDTH)) for _ in range(_ROWS)]
  lengths += [draw(st.integers(0, _EXTRA_WIDTH)) for _ in range(_EXTRA)]
  groups = [draw(st.integers(0, 1)) for _ in range(_ROWS + _EXTRA)]
  # Rows of a group begin with the same prompt.
  prompt = tokens[: draw(st.integers(0, _WIDTH))]
  for number in range(1, _ROWS + _EXTRA):
    start = _starts()[number]
    if draw(st.booleans()):
      tokens[start : start + len(prompt)] = prompt
  return _Case(np.asarray(tokens, np.int32), lengths, groups)


def _starts() -> list[int]:
  """Where each row stands in `_Case.tokens`, and where the last one ends."""
  widths = [_WIDTH] * _ROWS + [_EXTRA_WIDTH] * _EXTRA
  return np.cumsum([0, *widths]).tolist()


def _places(case: _Case, row: int, depth: int) -> list[tuple[int, list[int]]]:
  """Matches and continuations, the best first, by searching as one reads."""
  rows = case.rows()
  end = rows[row]
  found = []
  for number, source in enumerate(rows):
    if case.groups[number] != case.groups[row]:
      continue
    shared = 0
    while source[: shared + 1] == end[: shared + 1] and shared < len(end):
      shared += 1
    for stop in range(1, len(source)):
      match = 0
      while (
        match < min(_MAX_MATCH, stop, len(end))
        and source[stop - 1 - match] == end[-1 - match]
      ):
        match += 1
      is_own = number == row
      if not match or (not is_own and stop - 1 + depth < shared):
        continue
      follows = source[stop:] * (depth if is_own else 1)
      found.append((-match, not is_own, number, -stop, follows[:depth]))
  return [(-match, follows) for match, *_, follows in sorted(found)]


def _probabilities(
  places: list[tuple[int, list[int]]],
) -> dict[tuple[int, ...], float]:
  """The score of every path, from the formula in `ngram.draft`."""
  total = sum(2.0**match for match, _ in places)
  paths: dict[tuple[int, ...], float] = {}
  for match, follows in places:
    for depth in range(1, len(follows) + 1):
      path = tuple(follows[:depth])
      gain = 2.0**match / total * (match + 1) / (match + 1 + depth)
      paths[path] = paths.get(path, 0) + gain
  return paths


def _paths(draft: ngram.Draft, row: int) -> list[tuple[int, ...]]:
  """The path to every node but the root."""
  paths: list[tuple[int, ...]] = [()]
  for node in range(1, int(draft.tree.num_nodes_B[row])):
    above = paths[draft.tree.parents_BW[row, node]]
    assert len(above) + 1 == draft.tree.depths_BW[row, node]
    paths.append((*above, int(draft.tree.tokens_BW[row, node])))
  return paths[1:]


@hypothesis.given(_cases())
def test_a_chain_is_what_followed_the_longest_match(case: _Case) -> None:
  draft = case.draft(_CHAIN)
  for row in range(_ROWS):
    places = _places(case, row, _CHAIN.depth)
    match, follows = places[0] if places else (0, [])
    assert draft.match_lengths_B[row] == match
    longest = max(_paths(draft, row), key=len, default=())
    assert list(longest) == follows
    assert draft.tree.num_nodes_B[row] == len(follows) + 1


@hypothesis.given(_cases())
def test_without_groups_a_row_sees_only_itself(case: _Case) -> None:
  draft = case.draft(
    _CHAIN,
    group_ids_B=None,
    extra_RE=None,
    extra_lengths_R=None,
    extra_group_ids_R=None,
  )
  alone = dataclasses.replace(case, groups=list(range(_ROWS + _EXTRA)))
  expected = alone.draft(_CHAIN)
  jax.tree.map(np.testing.assert_array_equal, draft, expected)


@hypothesis.given(_cases(), st.sampled_from([_TREE, _SMALL_TREE]))
def test_a_tree_holds_the_likeliest_paths_behind_the_best_places(
  case: _Case, shape: tree.DraftShape
) -> None:
  draft = case.draft(shape)
  for row in range(_ROWS):
    places = _places(case, row, shape.depth)[: 4 * shape.top_k]
    probs, paths = _probabilities(places), _paths(draft, row)
    assert len(set(paths)) == len(paths)
    assert len(paths) == min(shape.num_nodes - 1, len(probs))
    kept = sorted((probs[path] for path in paths), reverse=True)
    best = sorted(probs.values(), reverse=True)[: len(kept)]
    np.testing.assert_allclose(kept, best, rtol=1e-5)


@hypothesis.given(_cases(), st.integers(0, 10**6))
def test_other_groups_and_padding_change_nothing(
  case: _Case, seed: int
) -> None:
  group = case.groups[0]
  tokens, rng = case.tokens.copy(), np.random.default_rng(seed)
  spans = itertools.pairwise(_starts())
  for number, (start, stop) in enumerate(spans):
    kept = case.lengths[number] if case.groups[number] == group else 0
    others = tokens[start + kept : stop]
    others[:] = rng.integers(0, 3, others.size)
  changed = dataclasses.replace(case, tokens=tokens)
  rows = np.flatnonzero(np.equal(case.groups[:_ROWS], group))
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x[rows], y[rows]),
    case.draft(_TREE),
    changed.draft(_TREE),
  )


def test_a_loop_is_drafted_beyond_the_end_of_the_row() -> None:
  draft = _draft([[7, 8, 9, 8, 9]], [5], tree.DraftShape(6, 1, 7))
  assert draft.tree.tokens_BW.tolist() == [[9, 8, 9, 8, 9, 8, 9]]


def test_a_row_prefers_its_own_text_among_equal_matches() -> None:
  history = [[1, 5, 2, 1, 0], [1, 6, 3, 1, 6]]
  draft = _draft(history, [4, 5], tree.DraftShape(1, 1, 2), group_ids_B=[0, 0])
  assert draft.tree.tokens_BW[0].tolist() == [1, 5]


def test_a_prompt_that_a_group_shares_counts_once() -> None:
  # The next token is 3 in the prompt of all rows, 4 in the last's own answer.
  prompt = [1, 3, 8, 9]
  history = [[*prompt, 6, 1], [*prompt, 7, 0], [*prompt, 1, 4]]
  draft = _draft(
    history, [6, 5, 6], tree.DraftShape(1, 2, 3), group_ids_B=[0, 0, 0]
  )
  assert sorted(draft.tree.tokens_BW[0].tolist()) == [1, 3, 4]


@pytest.mark.parametrize('min_match', [1, 2, 3])
def test_shorter_matches_than_asked_for_are_not_used(min_match: int) -> None:
  draft = _draft(
    [[1, 2, 5, 1, 2]], [5], tree.DraftShape(1, 1, 2), min_match=min_match
  )
  assert draft.match_lengths_B[0] == (2 if min_match <= 2 else 0)
  assert draft.tree.num_nodes_B[0] == (2 if min_match <= 2 else 1)


def test_speculation_off_gives_the_root_alone() -> None:
  draft = _draft([[1, 2, 1], [3, 3, 0]], [3, 2], tree.DraftShape())
  assert draft.tree.tokens_BW.tolist() == [[1], [3]]
  assert draft.tree.num_nodes_B.tolist() == [1, 1]


def test_a_tree_wider_than_all_continuations_is_padded() -> None:
  draft = _draft([[1, 2, 1]], [3], tree.DraftShape(2, 3, 16))
  assert draft.tree.tokens_BW.shape == (1, 16)
  assert draft.tree.num_nodes_B.tolist() == [3]


def test_all_lengths_share_one_compilation() -> None:
  history = jnp.arange(40).reshape(2, 20) % 5
  num_traces = 0

  @jax.jit
  def draft(lengths_B: jax.Array) -> ngram.Draft:
    nonlocal num_traces
    num_traces += 1
    return ngram.draft(history, lengths_B, shape=tree.DraftShape(5, 2, 9))

  roots = [
    draft(jnp.asarray([length, 20 - length])).tree.tokens_BW[:, 0].tolist()
    for length in range(1, 20)
  ]
  assert roots == [[(n - 1) % 5, (19 - n) % 5] for n in range(1, 20)]
  assert num_traces == 1


def test_matches_out_of_range_are_refused() -> None:
  with pytest.raises(ValueError, match=r'min_match=3 must be in \[1, max_mat'):
    _draft([[1, 1]], [2], _CHAIN, min_match=3, max_match=2)


def test_extra_texts_without_groups_are_refused() -> None:
  with pytest.raises(ValueError, match='needs extra_RE, extra_len'):
    _draft([[1, 1]], [2], _CHAIN, extra_RE=[[1, 1]], extra_lengths_R=[2])
