"""Models on the way, and layers that rest."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm import optimizer, sharding
from efficient_llm.ligo import config as config_lib
from efficient_llm.ligo import depth, methods, sub_models, train
from efficient_llm.models import transformer
from efficient_llm.training import objectives, pretrain, saved_run
from tests import tiny

_SMALL = dataclasses.replace(tiny.MODEL, num_layers=2)
_LARGE = dataclasses.replace(tiny.MODEL, num_layers=4)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a trained small model and its text."""
  folder = tmp_path_factory.mktemp('stages')
  text = tiny.write_text(folder)
  config = dataclasses.replace(
    tiny.config(text, cache_dir=folder / 'cache', num_steps=4), model=_SMALL
  )
  pretrain.train(config, workdir=folder / 'small')
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> config_lib.LigoConfig:
  base = tiny.config(
    folder / 'text.txt', cache_dir=folder / 'cache', num_steps=4
  )
  fields = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  fields |= {'model': _LARGE, 'small': str(folder / 'small'), **changes}
  return config_lib.LigoConfig(**fields)


def _params(workdir: pathlib.Path) -> Any:
  return saved_run.restore_params(workdir / 'checkpoints', None)


def _layers(params: Any, chosen: list[int]) -> dict[str, np.ndarray]:
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)[chosen]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params['layers'])
  }


def test_mslt_trains_the_new_layers_first_and_then_all(
  folder: pathlib.Path,
) -> None:
  stage = config_lib.StageConfig(num_steps=3, method='top', rest_old=True)
  workdir = folder / 'mslt'
  train.train(_config(folder, stages=(stage,)), workdir=workdir)
  before, after = _params(folder / 'small'), _params(workdir / 'stages' / '0')
  end = _params(workdir)
  old = _layers(after, [0, 1])
  for name, leaf in _layers(before, [0, 1]).items():
    np.testing.assert_array_equal(old[name], leaf)
  np.testing.assert_array_equal(
    after['embedding']['tokens'], before['embedding']['tokens']
  )
  new = _layers(after, [2, 3])
  moved = [
    (new[name] != leaf).any() for name, leaf in _layers(before, [0, 1]).items()
  ]
  assert all(moved)
  whole = [
    (leaf != _layers(end, [0, 1])[name]).any() for name, leaf in old.items()
  ]
  assert all(whole)
  card = json.loads((workdir / 'result.json').read_text())['growth']
  small = json.loads((folder / 'small' / 'result.json').read_text())
  staged = json.loads((workdir / 'stages/0/result.json').read_text())
  assert card['stage_flops'] == staged['flops'] > 0
  assert card['small_flops'] == small['flops']
  # The lower half has no backward pass.
  full = transformer.flops_per_token(_LARGE, num_tokens=32)
  assert staged['flops'] < 0.9 * full * staged['num_tokens']
  # The second call goes through the stages without a step.
  again = train.train(_config(folder, stages=(stage,)), workdir=workdir)
  assert int(again.state.step) == 4


def test_progressive_training_grows_several_times(folder: pathlib.Path) -> None:
  stage = config_lib.StageConfig(num_steps=3, num_layers=3)
  config = _config(folder, method='identity', stages=(stage,))
  workdir = folder / 'progressive'
  train.train(config, workdir=workdir)
  middle = _params(workdir / 'stages' / '0')
  assert middle['layers']['mlp']['up']['kernel'].shape[0] == 3
  assert _params(workdir)['layers']['mlp']['up']['kernel'].shape[0] == 4


def test_llama_pro_trains_only_the_layers_between(folder: pathlib.Path) -> None:
  config = _config(folder, method='identity', rest_old=True)
  workdir = folder / 'pro'
  train.train(config, workdir=workdir)
  before, after = _params(folder / 'small'), _params(workdir)
  assert depth.old_layers(methods.get('identity'), _SMALL, _LARGE) == (0, 2)
  old = _layers(after, [0, 2])
  for name, leaf in _layers(before, [0, 1]).items():
    np.testing.assert_array_equal(old[name], leaf)
  new = _layers(after, [1, 3])
  assert any(
    (new[name] != leaf).any() for name, leaf in _layers(before, [0, 1]).items()
  )


def test_sub_models_train_their_top_and_leave_the_rest(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, sub_model_layers=2)
  # So that the first step moves something.
  optim = dataclasses.replace(config.optimizer, warmup_steps=0)
  config = dataclasses.replace(config, optimizer=optim)
  # Of two or of four layers.
  model = config.model
  assert list(config.sub_model_lengths) == [2, 4]
  sizes = [
    transformer.flops_per_token(
      dataclasses.replace(model, num_layers=length),
      num_tokens=32,
      num_resting=length - 2,
    )
    for length in (2, 4)
  ]
  assert config.flops_per_token == sum(sizes) / 2
  mesh = sharding.make_mesh(config.mesh)
  program = pretrain.build(config, mesh)
  step = sub_models.make_step(config, program)
  seen = set()
  with jax.set_mesh(mesh):
    state = program.init_state()
    for seed in range(12):
      # The state is donated.
      before = jax.tree.map(np.array, state)
      key = jax.random.key_data(jax.random.key(seed))
      state = state.replace(step=jnp.int32(5), key=key)
      state, found = step(state, tiny.batch(vocab_size=300))
      assert np.isfinite(found['loss'])
      moved = {
        tuple(
          bool((_layers(after, [i])[name] != leaf).any())
          for i, leaf in enumerate(_layers(old, [0, 1, 2, 3])[name])
        )
        for old, after in (
          (before.params, state.params),
          *zip(_moments(before), _moments(state), strict=True),
        )
        for name in _layers(old, [0])
      }
      # The same layers of every parameter and of its moments.
      assert len(moved) == 1
      seen |= moved
      assert (
        state.params['final_norm']['scale']
        != before.params['final_norm']['scale']
      ).any()
  assert seen == {(True, True, False, False), (False, False, True, True)}


def _moments(state: Any) -> list[Any]:
  found = []

  def is_adam(node: Any) -> bool:
    return hasattr(node, 'mu')

  for node in jax.tree.leaves(state.opt_state, is_leaf=is_adam):
    if is_adam(node):
      found += [node.mu, node.nu]
  assert found
  return found


def test_bert2bert_is_a_stage_of_sub_models(folder: pathlib.Path) -> None:
  stage = config_lib.StageConfig(num_steps=3, sub_model_layers=2)
  config = _config(folder, method='aki', stages=(stage,))
  workdir = folder / 'bert2bert'
  train.train(config, workdir=workdir)
  card = json.loads((workdir / 'result.json').read_text())['growth']
  staged = json.loads((workdir / 'stages/0/result.json').read_text())
  assert staged['growth']['method'] == 'aki'
  assert card['stage_flops'] == staged['flops']
  assert staged['flops'] < 0.8 * staged['num_tokens'] * config.flops_per_token


def test_resting_layers_change_no_loss_and_no_gradient_above() -> None:
  params = transformer.init(_LARGE, jax.random.key(0))
  tokens_BT = jax.random.randint(jax.random.key(1), (2, 32), 0, 200)
  batch = {
    'tokens': tokens_BT,
    'targets': jnp.roll(tokens_BT, -1, 1),
    'loss_weights': jnp.ones((2, 32)),
  }

  def grads(num_resting: int) -> Any:
    loss = objectives.language_model_loss(_LARGE, num_resting=num_resting)

    def total(params: Any) -> Any:
      return loss(params, batch, jax.random.key(0)).total

    return jax.jit(jax.value_and_grad(total))(params)

  (all_loss, all_grads), (loss, found) = grads(0), grads(2)
  np.testing.assert_allclose(loss, all_loss, rtol=1e-6)
  for name, leaf in _layers(found, [2, 3]).items():
    np.testing.assert_allclose(
      leaf, _layers(all_grads, [2, 3])[name], rtol=1e-4, atol=1e-5
    )
  assert not any(x.any() for x in _layers(found, [0, 1]).values())


def test_what_rests_does_not_decay_either() -> None:
  params = transformer.init(_LARGE, jax.random.key(0))
  made = optimizer.resting(tiny.optimizer(_LARGE), (0, 3))
  ones = jax.tree.map(jnp.ones_like, params)
  updates: Any = made.transform.update(
    ones, made.transform.init(params), params
  )[0]
  assert not any(x.any() for x in _layers(updates, [0, 3]).values())
  assert all(x.all() for x in _layers(updates, [1, 2]).values())
  assert not updates['embedding']['tokens'].any()


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'stages': (config_lib.StageConfig(0),)}, 'num_steps'),
    # Warm-up takes two.
    ({'stages': (config_lib.StageConfig(2),)}, 'warmup_steps'),
    ({'stages': (config_lib.StageConfig(3, num_layers=1),)}, 'layers'),
    ({'model': _SMALL, 'rest_old': True}, 'nothing grows'),
    (
      {
        'model': dataclasses.replace(_LARGE, embed_dim=32, num_heads=4),
        'rest_old': True,
      },
      'layers alone',
    ),
    # What only the last growth, or a later stage, would stumble over.
    (
      {'method': 'hope', 'stages': (config_lib.StageConfig(3, method='top'),)},
      'Unknown method',
    ),
    (
      {
        'stages': (
          config_lib.StageConfig(3, num_layers=3),
          config_lib.StageConfig(3, method='hope'),
        )
      },
      'Unknown method',
    ),
    ({'stages': (config_lib.StageConfig(3),), 'rest_old': True}, 'nothing'),
    ({'stages': (config_lib.StageConfig(3),), 'scratch': 'no'}, 'scratch'),
    ({'resting_layers': (0,)}, 'leave it empty'),
    ({'sub_model_layers': 3}, 'sub_model_layers=3 must divide'),
    (
      {'stages': (config_lib.StageConfig(3, sub_model_layers=3),)},
      'sub_model_layers=3 must divide',
    ),
    ({'sub_model_layers': 2, 'rest_old': True}, 'go together'),
  ],
)
def test_impossible_stages_are_refused_before_the_first(
  folder: pathlib.Path, tmp_path: pathlib.Path, changes: Any, named: str
) -> None:
  with pytest.raises(ValueError, match=named) as caught:
    train.train(_config(folder, **changes), workdir=tmp_path)
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'stages').exists()
