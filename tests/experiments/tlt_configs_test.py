"""The configurations of reinforcement learning fit together, traced whole."""

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm import sharding
from efficient_llm.data import batches
from efficient_llm.models import sampling, transformer
from efficient_llm.speculative import (
  drafter,
  drafting,
  engine,
  prefill,
  rounds,
  strategy,
)
from efficient_llm.tlt import update
from efficient_llm.tlt.config import TltConfig
from experiments import configuration
from tests import binary

_CONFIGS = pathlib.Path(__file__).parents[2] / 'experiments' / 'configs'
_WORDS = 32


def _load(name: str) -> TltConfig:
  return configuration.resolve(str(_CONFIGS / name), TltConfig, {})


def _gpu_model() -> transformer.TransformerConfig:
  """With the vocabulary that the task's words give it."""
  model = _load('tlt_gpu.py').supervised.model
  return dataclasses.replace(model, vocab_size=_WORDS)


@pytest.mark.parametrize(
  'name', sorted(path.name for path in _CONFIGS.glob('tlt*.py'))
)
def test_an_answer_of_full_length_has_room_in_the_model(name: str) -> None:
  config = _load(name)
  assert config.supervised.model.max_positions >= config.update.sequence_length
  assert (
    config.supervised.data.sequence_length
    <= config.supervised.model.max_positions
  )


def test_the_model_for_a_gpu_is_of_the_size_it_says() -> None:
  config, model = _load('tlt_gpu.py'), _gpu_model()
  assert 300e6 < transformer.num_params(model) < 310e6
  assert model.dtype == 'bfloat16'
  assert config.rollout.sampling.max_new_tokens == 8192
  # Keys and values of all live answers, beside parameters and their moments.
  sizes = model.sizes
  row_bytes = 2 * 2 * sizes['kv_heads'] * sizes['head_dim'] * sizes['layers']
  cache_bytes = (
    row_bytes * config.rollout.max_live * config.update.sequence_length
  )
  assert 2 * cache_bytes + 16 * transformer.num_params(model) < 80e9


@pytest.mark.slow
def test_every_draft_shape_for_a_gpu_makes_a_round() -> None:
  config, model = _load('tlt_gpu.py'), _gpu_model()
  chooser = strategy.Strategy(config.rollout.strategy)
  machine = engine.Engine(
    model,
    drafter=drafting.union(model),
    chooser=chooser,
    max_batch=config.rollout.max_live,
  )
  plan = machine._plan(config.max_prompt_tokens, config.rollout.sampling)

  num_texts = config.rollout.num_texts
  num_positions = config.update.sequence_length

  def inputs(batch_size: int, key: jax.Array) -> Any:
    params = transformer.unstack_layers(transformer.init(model, key))
    draft_params = {
      'learned': drafter.init(model, key),
      'model_free': {
        'extra_RE': jnp.zeros((num_texts, num_positions), jnp.int32),
        'extra_lengths_R': jnp.zeros(num_texts, jnp.int32),
        'extra_group_ids_R': jnp.zeros(num_texts, jnp.int32),
      },
    }
    state = prefill.start(
      plan,
      False,
      params,
      draft_params,
      jnp.ones((batch_size, config.max_prompt_tokens), jnp.int32),
      jnp.ones(batch_size, jnp.int32),
      sampling.row_keys(key, batch_size),
      jnp.zeros(batch_size, jnp.int32),
    )
    return params, draft_params, state

  for batch_size in config.rollout.strategy.thresholds:
    made = jax.eval_shape(
      functools.partial(inputs, batch_size), jax.random.key(0)
    )
    for shape in chooser.arms(batch_size):
      state = jax.eval_shape(
        functools.partial(rounds.run, plan, shape), *made, 32, 0
      )
      assert jax.tree.structure(state) == jax.tree.structure(made[2])
      assert state.tokens_BS.shape[0] == batch_size


def test_the_policy_for_a_gpu_is_updated_on_whole_answers() -> None:
  config, model = _load('tlt_gpu.py'), _gpu_model()
  rows = config.rollout.num_prompts * config.rollout.group_size
  updater = update.Updater(
    config.update,
    model,
    sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1]),
    sampling=config.rollout.sampling,
    num_answers=rows,
    num_steps=config.loop.num_steps,
    pad_id=0,
  )
  batch = batches.padding(rows, config.update.sequence_length, pad_id=0)
  for name in ('advantages', 'rollout_log_probs'):
    batch[name] = np.zeros_like(batch['loss_weights'])
  state, metrics = jax.eval_shape(
    updater._train_step, updater.abstract_state, dict(batch)
  )
  assert jax.tree.map(lambda x: x.shape, state.params) == jax.tree.map(
    lambda x: x.shape, updater.abstract_state.params
  )
  assert metrics['loss'].shape == ()
  assert math.prod(batch['tokens'].shape) == rows * 8704


def test_another_task_comes_with_its_own_settings(
  tmp_path: pathlib.Path,
) -> None:
  run = binary.start(
    ['--task=jsonl', '--config.task.path=mine.jsonl', '--print_config'],
    cache=tmp_path,
    module='experiments.tlt',
  )
  out, err = run.communicate()
  assert run.returncode == 0, err
  task = json.loads(out)['task']
  assert task['path'] == 'mine.jsonl'
  assert (task['name'], task['slip'], task['max_steps']) == ('jsonl', 0.0, 24)
