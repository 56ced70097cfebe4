"""Draft trees: their shape, their ancestors, and how they are put together.

Node 0 is the root: the newest token, drawn but not yet in the cache. A chain is
the tree whose nodes have one child. Parents stand before their children.
"""

import dataclasses

import jax
import jax.numpy as jnp

from efficient_llm.typing import Array, Bool, Float, Int, typed


@dataclasses.dataclass(frozen=True)
class DraftShape:
  """How much is drafted and verified in one round.

  Attributes:
    depth: Longest path below the root; 0 switches speculation off.
    top_k: Children proposed for a node; 1 makes a chain of depth + 1 nodes.
    num_nodes: Tokens the target verifies in one pass, the root included.
    copied: Whether text that is there already is all that is drafted from, and
      a draft model rests.
    sampled: Whether a chain is drawn at random from the draft model's law.
    early: Whether a chain ends where the draft model no longer believes in it.
  """

  depth: int = 0
  top_k: int = 1
  num_nodes: int = 1
  copied: bool = False
  sampled: bool = False
  early: bool = False

  def validate(self) -> None:
    for name in ('depth', 'top_k', 'num_nodes'):
      value, least = getattr(self, name), 0 if name == 'depth' else 1
      if value < least:
        raise ValueError(f'draft.{name}={value} must be at least {least}.')
    if self.num_nodes <= self.depth:
      raise ValueError(
        f'draft.num_nodes={self.num_nodes} must exceed draft.depth='
        f'{self.depth}: the root counts too; raise it to {self.depth + 1}.'
      )
    if not self.depth and self.num_nodes > 1:
      raise ValueError(
        f'draft.num_nodes={self.num_nodes} must be 1 where draft.depth=0 '
        '(speculation off).'
      )
    if self.top_k == 1 and self.num_nodes != self.depth + 1:
      raise ValueError(
        f'draft.num_nodes={self.num_nodes} must be {self.depth + 1} for a '
        f'chain of draft.depth={self.depth}; change it or raise draft.top_k.'
      )
    if self.sampled and (self.copied or self.is_off or self.top_k != 1):
      raise ValueError(
        f'draft.sampled=True goes with chains of a draft model, not with '
        f'{self.name}; choose one such as 4_1_5s.'
      )
    if self.early and (
      self.sampled or self.copied or self.is_off or self.top_k != 1
    ):
      raise ValueError(
        f'draft.early=True goes with chains of a draft model that are not '
        f'drawn, not with {self.name}; choose one such as 7_1_8e.'
      )

  @property
  def is_off(self) -> bool:
    return self.depth == 0

  @property
  def needs_model(self) -> bool:
    """Whether a draft model's memory must be up to date."""
    return not (self.is_off or self.copied)

  @classmethod
  def parse(cls, name: str) -> 'DraftShape':
    """The shape of a name.

    Raises:
      ValueError: If the text is no such name, or the shape breaks a rule.
    """
    sizes = name[:-1] if name.endswith(('c', 's', 'e')) else name
    parts = sizes.split('_')
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
      raise ValueError(
        f'{name!r} must be depth_topk_nodes, such as 8_4_48 or 4_1_5; 0_1_1 is '
        'speculation off, 4_1_5c copies, 4_1_5s is drawn at random, and 4_1_5e '
        'may end early.'
      )
    depth, top_k, num_nodes = map(int, parts)
    shape = cls(
      depth,
      top_k,
      num_nodes,
      copied=name.endswith('c'),
      sampled=name.endswith('s'),
      early=name.endswith('e'),
    )
    shape.validate()
    return shape

  @property
  def name(self) -> str:
    """depth_topk_nodes, then 'c' copied, 's' sampled, or 'e' early."""
    sizes = f'{self.depth}_{self.top_k}_{self.num_nodes}'
    return sizes + 'c' * self.copied + 's' * self.sampled + 'e' * self.early


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
  """A batch of draft trees of the same room, W nodes.

  Attributes:
    tokens_BW: Token of each node.
    parents_BW: Index of each node's parent, below its own; the root's is 0.
    depths_BW: Edges to the root.
    num_nodes_B: Real nodes; those behind them are padding, never accepted.
    log_probs_BKV: The law that each draft of a sampled chain was drawn from;
      None where drafts were chosen without coins.
  """

  tokens_BW: Int[Array, 'B W']
  parents_BW: Int[Array, 'B W']
  depths_BW: Int[Array, 'B W']
  num_nodes_B: Int[Array, 'B']
  log_probs_BKV: Float[Array, 'B K V'] | None = None


@typed
def chain(
  root_B: Int[Array, 'B'],
  drafts_BD: Int[Array, 'B D'],
  num_drafts_B: Int[Array, 'B'] | None = None,
) -> Tree:
  """The tree of one path.

  Args:
    root_B: The newest token of each row.
    drafts_BD: Drafted tokens, in order.
    num_drafts_B: How many of them count; all by default.
  """
  batch_size, num_drafts = drafts_BD.shape
  if num_drafts_B is None:
    num_drafts_B = jnp.full(batch_size, num_drafts, jnp.int32)
  index_W = jnp.arange(num_drafts + 1, dtype=jnp.int32)
  shape = (batch_size, num_drafts + 1)
  return Tree(
    tokens_BW=jnp.concatenate([root_B[:, None], drafts_BD], 1),
    parents_BW=jnp.broadcast_to(jnp.maximum(index_W - 1, 0), shape),
    depths_BW=jnp.broadcast_to(index_W, shape),
    num_nodes_B=num_drafts_B + 1,
  )


@typed
def ancestors(parents_BW: Int[Array, 'B W']) -> Bool[Array, 'B W W']:
  """Whether node j is node i or stands above it, at [b, i, j].

  Args:
    parents_BW: Of `Tree`.
  """
  num_nodes = parents_BW.shape[1]
  seen_BWW = jnp.broadcast_to(
    jnp.eye(num_nodes, dtype=bool), (*parents_BW.shape, num_nodes)
  )
  above_BW = parents_BW
  # Each step doubles how far up every node has looked.
  for _ in range((num_nodes - 1).bit_length()):
    seen_BWW |= jnp.take_along_axis(seen_BWW, above_BW[..., None], axis=1)
    above_BW = jnp.take_along_axis(above_BW, above_BW, axis=1)
  return seen_BWW


@typed
def select(
  root_B: Int[Array, 'B'],
  tokens_BC: Int[Array, 'B C'],
  parents_BC: Int[Array, 'B C'],
  scores_BC: Float[Array, 'B C'],
  *,
  num_nodes: int,
) -> Tree:
  """Keeps the likeliest candidates: a tree, as a child is never likelier.

  Args:
    root_B: The newest token of each row.
    tokens_BC: Candidates; parents stand before their children.
    parents_BC: Index of another candidate, or -1 for the root.
    scores_BC: Cumulative log-probability of the path; at most the parent's.
      -inf marks no candidate. Not-a-number counts as such too.
    num_nodes: W, the root included.
  Source: Li et al. 2024, EAGLE-2, section 4.2, arXiv:2406.16858.
  """
  batch_size, num_candidates = tokens_BC.shape
  scores_BC = jnp.where(jnp.isnan(scores_BC), -jnp.inf, scores_BC)
  num_kept = min(num_nodes - 1, num_candidates)
  # Of equals the earlier one wins, so a parent never loses to its child.
  best_scores_BK, best_BK = jax.lax.top_k(scores_BC, num_kept)
  kept_B = (best_scores_BK > -jnp.inf).sum(1)
  # Back in the order of the candidates: parents before children.
  order_BK = jnp.where(best_scores_BK > -jnp.inf, best_BK, num_candidates)
  order_BK = jnp.sort(order_BK, axis=1)
  place_BC = jnp.zeros((batch_size, num_candidates + 1), jnp.int32)
  rows_B1 = jnp.arange(batch_size)[:, None]
  place_BC = place_BC.at[rows_B1, order_BK].set(jnp.arange(1, num_kept + 1))
  safe_BK = jnp.minimum(order_BK, num_candidates - 1)
  parents_BK = jnp.take_along_axis(parents_BC, safe_BK, 1)
  parents_BK = jnp.where(
    parents_BK < 0, 0, jnp.take_along_axis(place_BC, parents_BK, 1)
  )
  real_BK = jnp.arange(num_kept) < kept_B[:, None]
  padding = ((0, 0), (0, num_nodes - 1 - num_kept))
  tokens_BK = jnp.take_along_axis(tokens_BC, safe_BK, 1)
  tokens_BK = jnp.pad(jnp.where(real_BK, tokens_BK, 0), padding)
  parents_BK = jnp.pad(jnp.where(real_BK, parents_BK, 0), padding)
  parents_BW = jnp.pad(parents_BK, ((0, 0), (1, 0))).astype(jnp.int32)
  return Tree(
    tokens_BW=jnp.concatenate([root_B[:, None], tokens_BK], 1),
    parents_BW=parents_BW,
    depths_BW=ancestors(parents_BW).sum(-1, dtype=jnp.int32) - 1,
    num_nodes_B=(kept_B + 1).astype(jnp.int32),
  )


@typed
def merge(first: Tree, second: Tree, *, num_nodes: int) -> Tree:
  """The union of two trees with the same root, under one budget.

  Equal paths are joined. Where the budget does not hold both, nodes of the
  first come before those of the second, a node of the second never without its
  parent.

  Args:
    first: The tree that is kept first.
    second: What fills the rest.
    num_nodes: W of the union.
  """
  width = first.tokens_BW.shape[1]

  def join(one: Tree, two: Tree) -> tuple[Array, Array, Array]:
    """One row: where each node of `two` stands among both trees' nodes."""
    real = jnp.arange(width) < one.num_nodes_B

    def place(places: Array, index: Array) -> tuple[Array, None]:
      parent = places[two.parents_BW[index]]
      same = real & (one.tokens_BW == two.tokens_BW[index])
      same &= (one.parents_BW == parent) & (jnp.arange(width) > 0)
      own = jnp.where(same.any(), jnp.argmax(same), width + index)
      own = jnp.where(index == 0, 0, own)
      return places.at[index].set(own), None

    others = two.tokens_BW.shape[0]
    places = jax.lax.scan(
      place, jnp.zeros(others, jnp.int32), jnp.arange(others, dtype=jnp.int32)
    )[0]
    is_new = (places >= width) & (jnp.arange(others) < two.num_nodes_B)
    return places, is_new, places[two.parents_BW]

  _, is_new_BX, new_parents_BX = jax.vmap(join)(first, second)
  real_BW = jnp.arange(width)[None] < first.num_nodes_B[:, None]
  # Candidates are the nodes of both but the root; -1 stands for it.
  parents_BC = jnp.concatenate([first.parents_BW, new_parents_BX], 1)
  tokens_BC = jnp.concatenate([first.tokens_BW, second.tokens_BW], 1)
  real_BC = jnp.concatenate([real_BW, is_new_BX], 1).at[:, 0].set(False)
  order_BC = jnp.broadcast_to(
    -jnp.arange(tokens_BC.shape[1], dtype=jnp.float32), tokens_BC.shape
  )
  return select(
    first.tokens_BW[:, 0],
    tokens_BC,
    jnp.where(parents_BC == 0, -1, parents_BC),
    jnp.where(real_BC, order_BC, -jnp.inf),
    num_nodes=num_nodes,
  )
