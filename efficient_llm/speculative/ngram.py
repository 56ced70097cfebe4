"""Drafts from text that is already there: no model, nothing on the host.

The newest tokens of a row are looked for in its own text and in that of its
group; what followed them there is the draft.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from efficient_llm.speculative import tree as tree_lib
from efficient_llm.typing import Array, Int, typed

# Branches are chosen among so many places for each, so that a continuation seen
# at several of them outweighs one seen once.
_PLACES_PER_BRANCH = 4
# What no token equals: before the start of a source, before that of a tail.
_NO_SOURCE, _NO_TAIL = -1, -2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
  """What `draft` returns.

  Attributes:
    tree: Trees of `shape.num_nodes`, the root alone where nothing matched.
    match_lengths_B: Longest match of each row in [0, max_match]: how far the
      draft can be trusted.
  """

  tree: tree_lib.Tree
  match_lengths_B: Int[Array, 'B']


@functools.partial(jax.jit, static_argnames=('shape', 'max_match', 'min_match'))
@typed
def draft(
  history_BS: Int[Array, 'B S'],
  lengths_B: Int[Array, 'B'],
  *,
  shape: tree_lib.DraftShape,
  group_ids_B: Int[Array, 'B'] | None = None,
  extra_RE: Int[Array, 'R E'] | None = None,
  extra_lengths_R: Int[Array, 'R'] | None = None,
  extra_group_ids_R: Int[Array, 'R'] | None = None,
  max_match: int = 16,
  min_match: int = 1,
) -> Draft:
  """Drafts what followed the longest earlier occurrences of each row's end.

  A place is a position in a source where at least `min_match` of the row's
  newest tokens end and more text follows. Sources are the row itself and, of
  the same group, the other rows and the extra ones. Longer matches come first,
  then the row's own, then the latest. A chain is what followed the first place.
  Trees join what followed the first `4 * top_k` places; a path of depth d is
  scored by the share of places that agree with it, those with m matches
  weighing 2^m, times (m + 1) / (m + 1 + d): a match of m tokens, by the rule of
  succession, goes on for d more.

  Where a row's own continuation reaches the row's end it starts over, so that
  a loop is drafted as long as `depth` allows. Lengths are data, not shapes:
  one compilation serves the whole completion.

  Args:
    history_BS: Prompt and completion of each row, tokens from 0.
    lengths_B: Real tokens of each row; the last of them becomes the root.
    shape: Depth, branches and nodes of the trees.
    group_ids_B: Rows with the same id see each other; None keeps rows apart.
    extra_RE: Further texts, such as finished answers.
    extra_lengths_R: Their real tokens; 0 for a slot without a text.
    extra_group_ids_R: The group that may see each of them.
    max_match: Longest match that is told from longer ones.
    min_match: Shortest match that is used.
  Raises:
    ValueError: If matches are out of range, or extra texts lack lengths or
      groups.
  """
  _check(shape, max_match, min_match)
  root_B = _take(history_BS, jnp.maximum(lengths_B - 1, 0)[:, None])[:, 0]
  if shape.is_off:
    no_drafts_B0 = jnp.zeros((root_B.size, 0), root_B.dtype)
    return Draft(
      tree_lib.chain(root_B, no_drafts_B0), jnp.zeros_like(lengths_B)
    )
  sources = _sources(
    (history_BS, lengths_B, group_ids_B),
    (extra_RE, extra_lengths_R, extra_group_ids_R),
  )
  back_M = lengths_B[:, None] - 1 - jnp.arange(max_match)
  tails_BM = _take(history_BS, jnp.maximum(back_M, 0))
  tails_BM = jnp.where(back_M >= 0, tails_BM, _NO_TAIL)
  matches_BRS = _match_lengths(sources.tokens_QRS, tails_BM)
  is_place_BRS = sources.may_see_BR[..., None] & (matches_BRS >= min_match)
  places_S = jnp.arange(matches_BRS.shape[-1])
  is_place_BRS &= places_S + 1 < sources.lengths_QR[..., None]
  if group_ids_B is not None:
    shared_BR = _shared_prefixes(sources, history_BS, lengths_B)
    # There the row itself has the same place with the same continuation.
    is_copy_BRS = places_S + shape.depth < shared_BR[..., None]
    is_place_BRS &= ~is_copy_BRS | sources.is_own_BR[..., None]
  ranks_BRS = 2 * matches_BRS + sources.is_own_BR[..., None]
  ranks_BP, source_BP, place_BP = _best_places(
    jnp.where(is_place_BRS, ranks_BRS, 0),
    1 if shape.top_k == 1 else _PLACES_PER_BRANCH * shape.top_k,
  )
  matches_BP = ranks_BP // 2
  tokens_BPD, is_real_BPD = _continuations(
    sources, source_BP, place_BP, depth=shape.depth
  )
  is_real_BPD &= matches_BP[..., None] > 0
  tree = _join(root_B, tokens_BPD, is_real_BPD, matches_BP, shape)
  return Draft(tree, matches_BP[:, 0])


@dataclasses.dataclass(frozen=True)
class _Sources:
  """Where rows look; axis Q is B, or 1 if all rows look at the same texts."""

  tokens_QRS: Array
  lengths_QR: Array
  may_see_BR: Array
  is_own_BR: Array


def _check(shape: tree_lib.DraftShape, max_match: int, min_match: int) -> None:
  """Refuses impossible settings, while tracing."""
  shape.validate()
  if not 1 <= min_match <= max_match:
    raise ValueError(
      f'ngram.{min_match=} must be in [1, {max_match=}]; raise max_match.'
    )


def _sources(
  batch: tuple[Array, Array, Array | None],
  extra: tuple[Array | None, Array | None, Array | None],
) -> _Sources:
  """The row itself; with groups, all rows and below them the extra texts."""
  texts, lengths, groups = batch
  more, more_lengths, more_groups = extra
  has_extra = [part is not None for part in extra]
  if any(has_extra) and not (all(has_extra) and groups is not None):
    raise ValueError(
      'ngram.draft needs extra_RE, extra_lengths_R, extra_group_ids_R and '
      'group_ids_B together; give all four or no extra text.'
    )
  batch_size = lengths.size
  if groups is None:
    itself = jnp.ones((batch_size, 1), bool)
    return _Sources(texts[:, None], lengths[:, None], itself, itself)
  source_groups = groups
  if more is not None and more_lengths is not None and more_groups is not None:
    width = max(texts.shape[1], more.shape[1])
    texts = jnp.concatenate(
      [jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (texts, more)]
    )
    lengths = jnp.concatenate([lengths, more_lengths])
    source_groups = jnp.concatenate([groups, more_groups])
  return _Sources(
    texts[None],
    lengths[None],
    groups[:, None] == source_groups,
    jnp.arange(batch_size)[:, None] == jnp.arange(lengths.size),
  )


def _take(x_BS: Array, index_BP: Array) -> Array:
  return jnp.take_along_axis(x_BS, index_BP, axis=1)


def _match_lengths(sources_QRS: Array, tails_BM: Array) -> Array:
  """How many of a row's newest tokens end at each place of its sources."""
  max_match, num_places = tails_BM.shape[1], sources_QRS.shape[-1]
  padded_QRS = jnp.pad(
    sources_QRS,
    ((0, 0), (0, 0), (max_match - 1, 0)),
    constant_values=_NO_SOURCE,
  )
  going_on, matches = True, jnp.int32(0)
  # Unrolled: XLA makes one pass over the sources of it.
  for back in range(max_match):
    start = max_match - 1 - back
    earlier_QRS = padded_QRS[..., start : start + num_places]
    going_on &= earlier_QRS == tails_BM[:, back, None, None]
    matches += going_on
  return jnp.asarray(matches)


def _shared_prefixes(
  sources: _Sources, history_BS: Array, lengths_B: Array
) -> Array:
  """How many first tokens a row has in common with each source."""
  missing = sources.tokens_QRS.shape[-1] - history_BS.shape[1]
  history_BS = jnp.pad(history_BS, ((0, 0), (0, missing)))
  index_S = jnp.arange(history_BS.shape[1])
  differs_BRS = sources.tokens_QRS != history_BS[:, None]
  first_BR = jnp.where(differs_BRS, index_S, index_S.size).min(-1)
  # Behind the shorter of both, padding may happen to agree.
  shorter_BR = jnp.minimum(sources.lengths_QR, lengths_B[:, None])
  return jnp.minimum(first_BR, shorter_BR)


def _best_places(ranks_BRS: Array, num_best: int) -> tuple[Array, Array, Array]:
  """Rank, source and position of the best places, the latest of equals."""
  batch_size, num_sources, num_places = ranks_BRS.shape
  # Of equals top_k takes the first. In float32, exact here, as the top-k of
  # processors is slow for integers.
  latest_first_BX = ranks_BRS[..., ::-1].reshape(batch_size, -1)
  ranks_BP, index_BP = jax.lax.top_k(
    latest_first_BX.astype(jnp.float32),
    min(num_best, num_sources * num_places),
  )
  return (
    ranks_BP.astype(jnp.int32),
    index_BP // num_places,
    num_places - 1 - index_BP % num_places,
  )


def _continuations(
  sources: _Sources, source_BP: Array, place_BP: Array, *, depth: int
) -> tuple[Array, Array]:
  """What follows places, and which of it is real."""
  num_outer, rows_B = sources.lengths_QR.shape[0], jnp.arange(len(source_BP))
  outer_B1 = jnp.minimum(rows_B, num_outer - 1)[:, None]
  lengths_BP = sources.lengths_QR[outer_B1, source_BP]
  following_BP1 = jnp.maximum(lengths_BP - 1 - place_BP, 1)[..., None]
  ahead_D = jnp.arange(depth)
  tokens_BPD = sources.tokens_QRS[
    outer_B1[..., None],
    source_BP[..., None],
    # Only the row itself starts over: what follows its end is like its end.
    place_BP[..., None] + 1 + ahead_D % following_BP1,
  ]
  is_own_BP1 = _take(sources.is_own_BR, source_BP)[..., None]
  return tokens_BPD, is_own_BP1 | (ahead_D < following_BP1)


def _join(
  root_B: Array,
  tokens_BPD: Array,
  is_real_BPD: Array,
  matches_BP: Array,
  shape: tree_lib.DraftShape,
) -> tree_lib.Tree:
  """Joins continuations with common beginnings to the likeliest tree."""
  batch_size, num_places, depth = tokens_BPD.shape
  # Whether continuations p and q agree up to depth d.
  agree_BPPD = tokens_BPD[:, :, None] == tokens_BPD[:, None]
  agree_BPPD &= is_real_BPD[:, :, None] & is_real_BPD[:, None]
  agree_BPPD = jnp.cumprod(agree_BPPD, -1, dtype=jnp.int32)

  weights_BP = jnp.exp2((matches_BP - matches_BP[:, :1]).astype(jnp.float32))
  weights_BP = jnp.where(matches_BP > 0, weights_BP, 0.0)
  shares_BP = weights_BP / jnp.maximum(weights_BP.sum(1, keepdims=True), 1.0)
  seen_BP1 = matches_BP[..., None] + 1
  goes_on_BPD = seen_BP1 / (seen_BP1 + 1 + jnp.arange(depth))
  probs_BPD = jnp.einsum(
    'bpqd,bqd->bpd',
    agree_BPPD.astype(jnp.float32),
    shares_BP[..., None] * goes_on_BPD,
    precision='highest',
  )
  # The first place with the same beginning stands for all of them.
  first_BPD = jnp.argmax(agree_BPPD, axis=2)
  is_first_BPD = first_BPD == jnp.arange(num_places)[:, None]
  parents_BPD = first_BPD * depth + jnp.arange(depth)
  parents_BPD = jnp.pad(
    parents_BPD[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1
  )
  scores_BPD = jnp.where(
    is_first_BPD & is_real_BPD, jnp.log(probs_BPD), -jnp.inf
  )
  flat = (batch_size, num_places * depth)
  return tree_lib.select(
    root_B,
    tokens_BPD.reshape(flat),
    parents_BPD.reshape(flat),
    scores_BPD.reshape(flat),
    num_nodes=shape.num_nodes,
  )
