"""A small CaiT is trained on images, grown and trained on."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from efficient_llm import optimizer, sharding
from efficient_llm.ligo import config as config_lib
from efficient_llm.ligo import learning, methods, state, train
from efficient_llm.models import transformer
from efficient_llm.training import metrics, pretrain, saved_run, trained_run
from tests import tiny, tiny_images

_LARGE = dataclasses.replace(
  tiny_images.MODEL, num_layers=4, embed_dim=32, num_heads=4
)
_LEARN = config_lib.LearnConfig(
  num_steps=6,
  tie='paper',
  optimizer=optimizer.OptimizerConfig(
    learning_rate=1e-2, schedule='constant', warmup_steps=0, weight_decay=0.0
  ),
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a trained small model and its images."""
  folder = tmp_path_factory.mktemp('ligo_vision')
  tiny_images.write_folder(folder / 'images', size=tiny_images.SIZE)
  pretrain.train(_base(folder), workdir=folder / 'small')
  return folder


def _base(folder: pathlib.Path) -> pretrain.PretrainConfig:
  return tiny_images.config(
    folder / 'images', cache_dir=folder / 'cache', eval_every=4
  )


def _config(folder: pathlib.Path, **changes: Any) -> config_lib.LigoConfig:
  base = _base(folder)
  fields = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  fields |= {'model': _LARGE, 'small': str(folder / 'small'), **changes}
  return config_lib.LigoConfig(**fields)


def _card(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / 'result.json').read_text())['growth']


def test_a_lossless_method_keeps_the_loss_and_the_moments_grow(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, method='staged', moments=True)
  train.train(config, workdir=folder / 'staged')
  card = _card(folder / 'staged')
  assert card['loss_of_function'] is None
  assert card['function_error'] < 1e-5
  assert card['grown_loss'] == pytest.approx(card['small_loss'], rel=1e-5)


@pytest.mark.slow
def test_a_learned_operator_lowers_the_loss_and_images_are_counted(
  folder: pathlib.Path,
) -> None:
  scratch = dataclasses.replace(_base(folder), model=_LARGE)
  pretrain.train(scratch, workdir=folder / 'scratch')
  config = _config(
    folder,
    method='ligo_released',
    learn=_LEARN,
    scratch=str(folder / 'scratch'),
  )
  train.train(config, workdir=folder / 'learned')
  card = _card(folder / 'learned')
  assert card['grown_loss'] < card['begun_loss']
  assert card['operator_tokens'] == 6 * 8
  flops = 6 * 8 * transformer.flops_per_image(_LARGE)
  assert card['operator_flops'] == pytest.approx(flops)
  small_flops = 12 * 8 * transformer.flops_per_image(tiny_images.MODEL)
  assert card['small_flops'] == pytest.approx(small_flops)
  text = (folder / 'learned' / 'report.html').read_text()
  assert 'Growth card' in text
  assert 'nats per image' in text
  assert 'token' not in text.split('<details>')[0]


def test_moments_of_gains_and_mixed_heads_grow(folder: pathlib.Path) -> None:
  run = trained_run.find(folder / 'small', name='small')
  mesh = sharding.make_mesh(sharding.MeshConfig())
  small = state.restore(run, mesh)
  built = methods.build(methods.get('clone'), run.model, _LARGE)
  grown = state.grow(
    run.model,
    small,
    built,
    tiny.optimizer(_LARGE),
    key=jax.random.key(0),
    moments=True,
  )

  def moments(state: Any) -> dict[str, np.ndarray]:
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }

  before, after = moments(small), moments(grown)
  gain = next(x for x in after if x.endswith('mu/layers/mlp_gain/scale'))
  # The same layers twice, each place of the stream twice.
  np.testing.assert_allclose(after[gain], np.tile(before[gain], (2, 2)))
  mix = next(x for x in after if 'nu/layers/attention/mix_logits/kernel' in x)
  # Copies share what they read: a quarter of the variance each.
  np.testing.assert_allclose(
    after[mix], np.tile(before[mix] / 4, (2, 2, 2)), rtol=1e-6
  )
  name = next(x for x in after if x.endswith('mu/class_layers/mlp/up/bias'))
  np.testing.assert_allclose(after[name], np.tile(before[name], (1, 2)))


def test_the_operator_s_step_makes_layers_inside_the_scan(
  folder: pathlib.Path,
) -> None:
  run = trained_run.find(folder / 'small', name='small')
  begin = methods.build(methods.get('ligo_released'), run.model, _LARGE)
  mesh = sharding.make_mesh(sharding.MeshConfig())
  program = learning.build(_LEARN, run.model, _LARGE, begin, mesh)
  dataset, _ = pretrain.datasets.open_both(
    _base(folder).data, cache_dir=folder / 'cache'
  )
  before = program.first_state()
  first = jax.tree.map(np.array, before.params)
  with jax.set_mesh(mesh):
    after, found = program.learn_step(
      before, dataset.batch_at(0), run.restore_params(None)
    )
  assert found['grad_norm'] > 0
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), after.params, first)
  assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_the_small_model_teaches_the_large_one(folder: pathlib.Path) -> None:
  taught = config_lib.InheritConfig(weight=1.0, share_of_steps=0.5)
  config = _config(folder, method='random', inherit=taught)
  train.train(config, workdir=folder / 'taught')
  # A forward pass of the teacher in six of twelve steps.
  flops = 6 * 8 * transformer.flops_per_image(tiny_images.MODEL) / 3
  assert _card(folder / 'taught')['teacher_flops'] == pytest.approx(flops)
  logged = metrics.read_metrics(folder / 'taught', kind='train')
  assert logged[0]['kl'] > 0
  assert logged[-1]['kl'] == 0


@pytest.mark.slow
def test_auto_chooses_the_trial_of_lowest_loss(folder: pathlib.Path) -> None:
  probe = config_lib.ProbeConfig(num_steps=3)
  config = _config(folder, method='auto', probe=probe)
  train.train(config, workdir=folder / 'auto')
  card = _card(folder / 'auto')
  losses = {trial['name']: trial['loss'] for trial in card['probes']}
  assert set(losses) == {'stack', 'lemon'}
  assert card['method'] == min(losses, key=lambda name: losses[name])
  # Of the other trial.
  assert card['probe_tokens'] == 3 * 8
  text = (folder / 'auto' / 'report.html').read_text()
  assert 'Trials of methods' in text
  assert 'token' not in text.split('<details>')[0]


@pytest.mark.slow
def test_new_layers_of_a_stage_are_trained_alone(folder: pathlib.Path) -> None:
  stage = config_lib.StageConfig(num_steps=4, method='top', rest_old=True)
  deeper = dataclasses.replace(tiny_images.MODEL, num_layers=4)
  config = _config(folder, model=deeper, stages=(stage,))
  workdir = folder / 'mslt'
  train.train(config, workdir=workdir)
  small, staged, end = (
    saved_run.restore_params(path / 'checkpoints', None)
    for path in (folder / 'small', workdir / 'stages' / '0', workdir)
  )

  def moved(before: Any, after: Any) -> list[bool]:
    changes = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    return jax.tree.leaves(changes)

  def layers(params: Any, chosen: slice) -> Any:
    return jax.tree.map(lambda x: x[chosen], params['layers'])

  lower, upper = slice(0, 2), slice(2, 4)
  assert not any(moved(layers(small, lower), layers(staged, lower)))
  assert not any(moved(small['class_layers'], staged['class_layers']))
  assert all(moved(layers(small, lower), layers(staged, upper)))
  assert all(moved(staged['class_layers'], end['class_layers']))
  assert _card(workdir)['stage_flops'] > 0


def test_other_classes_than_the_small_model_s_are_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  other = tiny_images.write_folder(tmp_path / 'other', size=tiny_images.SIZE)
  (other / 'ant').rename(other / 'ape')
  config = _config(folder, method='stack')
  data = dataclasses.replace(config.data, path=str(other))
  with pytest.raises(
    ValueError, match=r"classes of the small.*'ape'"
  ) as caught:
    train.train(
      dataclasses.replace(config, data=data), workdir=tmp_path / 'run'
    )
  assert '\n' not in str(caught.value)


def test_another_number_of_classes_is_refused(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _config(folder, model=dataclasses.replace(_LARGE, vocab_size=4))
  with pytest.raises(ValueError, match='vocab_size must be 3'):
    train.train(config, workdir=tmp_path)
