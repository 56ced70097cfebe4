"""Learns a growth operator on the large model's loss; the small model rests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from efficient_llm import optimizer as optimizer_lib
from efficient_llm import sharding, typing
from efficient_llm.ligo import layerwise
from efficient_llm.ligo import operator as operator_lib
from efficient_llm.ligo.config import LearnConfig
from efficient_llm.models import attention
from efficient_llm.models.config import TransformerConfig
from efficient_llm.training import objectives, step
from efficient_llm.training import state as state_lib

# What follows which matrix where ties are the paper's (algorithm 1).
_FOLLOWS = {
  'embed.read': 'embed.out',
  'embed.norm': 'embed.out',
  'embed.norm_bias': 'embed.out',
  'embed.head': 'embed.out',
  'embed.head_bias': 'embed.out',
  'embed.gain': 'embed.out',
  'mlp.read': 'mlp.out',
  'value.read': 'value.out',
  'query.read': 'query.out',
  'mix_logits.out': 'query.out',
  'mix_logits.read': 'query.out',
  'mix_weights.out': 'query.out',
  'class_mlp.read': 'class_mlp.out',
  'class_value.read': 'class_value.out',
}

# (state, batch, small params) -> (state, metrics), donating the state.
LearnStep = Callable[
  [state_lib.TrainState, typing.Batch, typing.Params],
  tuple[state_lib.TrainState, typing.Metrics],
]


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled-on-first-use functions of a growth and what they work on.

  Attributes:
    learn_step: (state, batch, small params) -> (state, metrics).
    operator: Of the operator's parameters.
    first_state: Makes the state before the first step.
    abstract_state: Its shapes, dtypes and shardings.
  """

  learn_step: LearnStep
  operator: Callable[[typing.Params], operator_lib.Operator]
  first_state: Callable[[], state_lib.TrainState]
  abstract_state: state_lib.TrainState


def build(
  config: LearnConfig,
  small: TransformerConfig,
  large: TransformerConfig,
  begin: operator_lib.Operator,
  mesh: Mesh,
  *,
  skip_nonfinite: bool = False,
) -> Program:
  """Puts operator, loss and optimiser together; compiles nothing yet.

  Args:
    config: How it is learned.
    small: The small model.
    large: The large model.
    begin: Where learning begins; of one term.
    skip_nonfinite: Leave the operator as it is where a loss is not finite.
    mesh: The devices. The operator lies whole on each, the grown parameters as
      the large model's do.
  Raises:
    ValueError: If the operator has several terms.
  """
  check(begin)
  large = dataclasses.replace(
    large,
    attention_implementation=attention.choose(
      large.attention_implementation, mesh.devices.flat[0].platform
    ),
  )
  params = parameters(begin, small, tie=config.tie, num_layers=large.num_layers)
  axes = jax.tree.map(lambda _: typing.LogicalAxes(), params)
  optimizer = optimizer_lib.make_optimizer(
    config.optimizer, axes, num_steps=max(config.num_steps, 1)
  )
  loss_fn = objectives.language_model_loss(large)

  def as_operator(params: typing.Params) -> operator_lib.Operator:
    return _operator(params, begin)

  def learn_step(
    state: state_lib.TrainState,
    batch: typing.Batch,
    small_params: typing.Params,
  ) -> tuple[state_lib.TrainState, typing.Metrics]:
    def loss(params: Any, batch: Any, key: Any) -> objectives.Loss:
      grown = layerwise.grow(
        small, small_params, as_operator(params), num_layers=large.num_layers
      )
      return loss_fn(grown, batch, key)

    one = step.make_train_step(loss, optimizer, skip_nonfinite=skip_nonfinite)
    return one(state, batch)

  def first_state() -> state_lib.TrainState:
    return state_lib.create(params, optimizer, jax.random.key(0))

  whole = sharding.replicated(mesh)
  shapes = jax.eval_shape(first_state)
  shardings = jax.tree.map(lambda _: whole, shapes)
  return Program(
    learn_step=jax.jit(
      learn_step,
      in_shardings=(shardings, sharding.batch_sharding(mesh), None),
      out_shardings=(shardings, None),
      donate_argnums=0,
    ),
    operator=as_operator,
    first_state=jax.jit(first_state, out_shardings=shardings),
    abstract_state=state_lib.abstract(shapes, shardings),
  )


def check(begin: operator_lib.Operator) -> None:
  """Raises ValueError if an operator cannot be learned."""
  if len(begin.terms) != 1:
    raise ValueError(
      f'An operator of {len(begin.terms)} terms cannot be learned; choose '
      'another --config.method or set --config.learn.num_steps=0.'
    )


def parameters(
  begin: operator_lib.Operator,
  small: TransformerConfig,
  *,
  tie: str,
  num_layers: int,
) -> dict[str, Any]:
  """What is learned of an operator, as a tree of arrays.

  Args:
    begin: Of one term.
    small: The small model.
    tie: As `LearnConfig.tie`.
    num_layers: Of the large model.
  """
  (term,) = begin.terms
  width = dict(term.width)
  if tie == 'paper':
    for name, other in _FOLLOWS.items():
      # Grouped queries: what reads heads cannot follow what writes fewer.
      both = name in width and other in width
      if both and width[name].shape == width[other].shape:
        del width[name]
  if tie == 'layer':
    for name in operator_lib.maps_of_layers(small) & set(width):
      shape = (num_layers, *width[name].shape)
      width[name] = jnp.broadcast_to(width[name], shape)
  return {'width': width, 'depth': dict(term.depth)}


def _operator(
  params: typing.Params, begin: operator_lib.Operator
) -> operator_lib.Operator:
  (term,) = begin.terms
  width = dict(params['width'])
  for name in term.width:
    if name not in width:
      width[name] = width[_FOLLOWS[name]]
  return operator_lib.Operator(
    (operator_lib.Term(width, params['depth']),), begin.added
  )
