"""The whole train state grows: parameters, moments, counters."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import saved_run, trained_run
from efficient_llm.training import state as state_lib

_Path = tuple[Hashable, ...]
# Moments by the name that optax gives them: whether they are variances.
_IS_VARIANCE = {'mu': False, 'nu': True}


def grow(
  config: TransformerConfig,
  small: state_lib.TrainState,
  operator: operator_lib.Operator,
  optimizer: optimizer_lib.Optimizer,
  *,
  key: jax.Array,
  moments: bool,
) -> state_lib.TrainState:
  """The large model's state of step 0.

  First moments grow as parameters do, without what is added to these, and
  second ones by the squared matrices. With them Adam's counter is kept, so that
  nothing is corrected as if moments were young. Steps and the learning rate's
  schedule begin anew.

  Args:
    config: The small model.
    small: Its state, of the same kind of optimiser.
    operator: What is applied.
    optimizer: Of the large model.
    key: A typed random key, of the large model's training.
    moments: Whether they grow too; they begin at zero otherwise.
  """
  params = operator_lib.grow(config, small.params, operator)
  state = state_lib.create(params, optimizer, key)
  if not moments:
    return state
  plain = operator_lib.Operator(operator.terms)
  squared = operator_lib.square(operator)
  found: dict[_Path, jax.Array] = {}
  counted = set()
  for prefix, moment in _moments(small).items():
    is_variance = _IS_VARIANCE[_name(prefix[-1])]
    grown = operator_lib.grow(config, moment, squared if is_variance else plain)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grown):
      found[prefix + tuple(path)] = leaf
    counted.add(prefix[:-1])
  counters = {
    tuple(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(small.opt_state)
    if tuple(path[:-1]) in counted and _name(path[-1]) == 'count'
  }

  def take(path: Any, leaf: jax.Array) -> jax.Array:
    return (found | counters).get(tuple(path), leaf)

  opt_state = jax.tree_util.tree_map_with_path(take, state.opt_state)
  return state.replace(opt_state=opt_state)


def check_moments(
  run: trained_run.TrainedRun, config: optimizer_lib.OptimizerConfig
) -> None:
  """Refuses to carry moments over to an optimiser of another kind.

  Raises:
    ValueError: Naming both.
  """
  before = optimizer_lib.OptimizerConfig(**_training(run)['optimizer'])
  if config.name != before.name:
    raise ValueError(
      f'moments=True needs optimizer.name={before.name!r}, as of the small '
      f'model, is {config.name!r}; change one of them.'
    )
  if (config.clip_norm is None) != (before.clip_norm is None):
    # The optimiser's state is nested in another way.
    raise ValueError(
      f'moments=True needs optimizer.clip_norm to be None or not as in the '
      f'small model ({before.clip_norm}), is {config.clip_norm}; change it.'
    )


def restore(run: trained_run.TrainedRun, mesh: Mesh) -> state_lib.TrainState:
  """The small model's state with its moments.

  Args:
    run: A pre-training run.
    mesh: Where the state is to lie.
  Raises:
    ValueError: If the run's checkpoint has no such state.
  """
  config = _training(run)
  axes = transformer.logical_axes(run.model)
  optimizer = optimizer_lib.make_optimizer(
    optimizer_lib.OptimizerConfig(**config['optimizer']),
    axes,
    num_steps=config['loop']['num_steps'],
  )
  shapes = jax.eval_shape(
    lambda key: state_lib.create(
      transformer.init(run.model, key), optimizer, key
    ),
    jax.random.key(0),
  )
  wanted = state_lib.abstract(shapes, state_lib.shardings(shapes, axes, mesh))
  parts = {'params': wanted.params, 'opt_state': wanted.opt_state}
  return wanted.replace(
    **saved_run.restore(run.workdir / 'checkpoints', parts, step=run.step),
    step=jnp.int32(run.step),
    key=jax.random.key_data(jax.random.key(0)),
  )


def _training(run: trained_run.TrainedRun) -> dict[str, Any]:
  """The configuration that the small model was trained with."""
  if run.imported is not None:
    raise ValueError(
      f'moments=True needs a pre-training run, {run.reference} is none; set '
      '--config.moments=False.'
    )
  checkpoints = run.workdir / 'checkpoints'
  config = saved_run.read_metadata(checkpoints, step=run.step)['config']
  if not {'optimizer', 'loop'} <= set(config):
    raise ValueError(
      f'moments=True needs a pre-training run, {run.workdir} is none; set '
      '--config.moments=False.'
    )
  return config


def _moments(small: state_lib.TrainState) -> dict[_Path, Any]:
  """Moments as trees of parameters, by where they stand in the optimiser.

  Some optimisers keep moments of some parameters only; the others' are 0.
  """
  zeros = jax.tree.map(jnp.zeros_like, small.params)
  places = {
    tuple(path): place
    for place, (path, _) in enumerate(
      jax.tree_util.tree_leaves_with_path(zeros)
    )
  }
  found: dict[_Path, list[jax.Array]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(small.opt_state):
    for start in range(1, len(path)):
      place = places.get(tuple(path[start:]))
      if place is not None and _name(path[start - 1]) in _IS_VARIANCE:
        prefix = tuple(path[:start])
        found.setdefault(prefix, jax.tree.leaves(zeros))[place] = leaf
        break
  structure = jax.tree.structure(zeros)
  return {
    prefix: jax.tree.unflatten(structure, leaves)
    for prefix, leaves in found.items()
  }


def _name(key: Any) -> str:
  return operator_lib.keys_of((key,))[0]
