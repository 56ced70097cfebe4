"""A small model is trained, grown and trained on.

Over 300 lines: all grow one small model, made once.
"""

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
from efficient_llm.ligo import learning, methods, operator, state, train
from efficient_llm.training import (
  loop,
  metrics,
  pretrain,
  saved_run,
  signals,
  trained_run,
)
from tests import tiny
from tests.ligo import pairs
from tests.models import architectures

_LARGE = dataclasses.replace(
  tiny.MODEL, num_layers=2, embed_dim=32, num_heads=4
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a trained small model and its text."""
  folder = tmp_path_factory.mktemp('ligo')
  text = tiny.write_text(folder)
  config = tiny.config(text, cache_dir=folder / 'cache')
  assert pretrain.train(config, workdir=folder / 'small').stopped_by is None
  return folder


def _config(
  folder: pathlib.Path, num_steps: int = 6, **changes: Any
) -> config_lib.LigoConfig:
  base = tiny.config(
    folder / 'text.txt', cache_dir=folder / 'cache', num_steps=num_steps
  )
  fields = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  fields |= {'model': _LARGE, 'small': str(folder / 'small'), **changes}
  return config_lib.LigoConfig(**fields)


_LEARN = config_lib.LearnConfig(
  num_steps=4,
  optimizer=optimizer.OptimizerConfig(
    learning_rate=1e-2, schedule='constant', warmup_steps=0, weight_decay=0.0
  ),
)


def _card(workdir: pathlib.Path) -> dict[str, Any]:
  return json.loads((workdir / 'result.json').read_text())['growth']


def test_the_card_tells_of_the_growth(folder: pathlib.Path) -> None:
  config = _config(folder, method='ligo_released', learn=_LEARN)
  outcome = train.train(config, workdir=folder / 'learned')
  assert outcome.stopped_by is None
  card = _card(folder / 'learned')
  assert card['operator_steps'] == 4
  assert card['operator_flops'] > 0
  assert card['loss_of_function']
  assert card['function_error'] > 1e-3
  # Learning is for this.
  assert card['grown_loss'] < card['begun_loss']
  small = json.loads((folder / 'small' / 'result.json').read_text())
  assert card['small_loss'] == pytest.approx(small['eval_loss'], rel=1e-5)
  assert card['small_flops'] == small['flops']
  assert (folder / 'learned' / 'report.html').is_file()


def test_a_lossless_method_keeps_the_loss(folder: pathlib.Path) -> None:
  config = _config(folder, method='staged')
  train.train(config, workdir=folder / 'staged')
  card = _card(folder / 'staged')
  assert card['loss_of_function'] is None
  assert card['function_error'] < 1e-5
  assert card['grown_loss'] == pytest.approx(card['small_loss'], rel=1e-5)
  assert card['operator_flops'] == 0


def test_savings_are_those_of_the_curves(folder: pathlib.Path) -> None:
  base = tiny.config(folder / 'text.txt', cache_dir=folder / 'cache')
  scratch = dataclasses.replace(base, model=_LARGE)
  pretrain.train(scratch, workdir=folder / 'scratch')
  config = _config(
    folder, num_steps=12, method='staged', scratch=str(folder / 'scratch')
  )
  train.train(config, workdir=folder / 'compared')
  card = _card(folder / 'compared')
  assert card['warm_flops_saving'] > card['cold_flops_saving']
  text = (folder / 'compared' / 'report.html').read_text()
  assert 'Saved against training from nothing' in text


@pytest.mark.parametrize('in_operator', [True, False])
def test_a_stopped_run_goes_on_to_the_same_end(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, in_operator: bool
) -> None:
  config = _config(folder, method='ligo_released', learn=_LEARN)
  whole = folder / 'learned'
  expected = train.train(config, workdir=whole)
  workdir = folder / f'stopped{in_operator}'
  stops = [2] if in_operator else [None, 3]

  def is_set(self: signals.StopRequest, step: int) -> bool:
    wanted = stops[0]
    is_here = wanted is not None and step == wanted
    if is_here:
      self.signal_name = 'SIGTERM'
    elif step + 1 == _LEARN.num_steps and len(stops) > 1:
      stops.pop(0)
    return is_here

  with monkeypatch.context() as patched:
    patched.setattr(signals.StopRequest, 'is_set', is_set)
    assert train.train(config, workdir=workdir).stopped_by == 'SIGTERM'
  assert not (workdir / 'result.json').exists()
  outcome = train.train(config, workdir=workdir)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, expected.state)


def test_the_whole_state_grows(folder: pathlib.Path) -> None:
  run = trained_run.find(folder / 'small', name='small')
  mesh = sharding.make_mesh(sharding.MeshConfig())
  small = state.restore(run, mesh)
  built = methods.build(methods.get('staged'), run.model, _LARGE)
  grown = state.grow(
    run.model,
    small,
    built,
    tiny.optimizer(_LARGE),
    key=jax.random.key(0),
    moments=True,
  )
  assert int(grown.step) == 0
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(grown.opt_state)
  }
  before = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(small.opt_state)
  }
  name = next(x for x in found if x.endswith('mu/layers/mlp/up/kernel'))
  # Two copies of every place of the stream read half each.
  half = np.asarray(before[name])[0] / 2
  doubled = np.concatenate([half, half])
  np.testing.assert_allclose(
    found[name][0][:, : half.shape[1]], doubled, rtol=1e-6
  )
  variance = name.replace('/mu/', '/nu/')
  np.testing.assert_allclose(
    found[variance][0][: half.shape[0], : half.shape[1]],
    np.asarray(before[variance])[0] / 4,
    rtol=1e-6,
  )
  counts = [int(x) for path, x in found.items() if path.endswith('count')]
  # Adam's counter is kept, that of the learning rate's schedule begins anew.
  assert sorted(counts) == [0, 12]


def test_gradients_reach_the_operator_alone(folder: pathlib.Path) -> None:
  run = trained_run.find(folder / 'small', name='small')
  begin = methods.build(methods.get('ligo_released'), run.model, _LARGE)
  mesh = sharding.make_mesh(sharding.MeshConfig())
  program = learning.build(_LEARN, run.model, _LARGE, begin, mesh)
  params = run.restore_params(None)
  kept = jax.tree.map(np.array, params)
  before = program.first_state()
  first = jax.tree.map(np.array, before.params)
  with jax.set_mesh(mesh):
    after, found = program.learn_step(
      before, tiny.batch(vocab_size=300), params
    )
  assert found['grad_norm'] > 0
  jax.tree.map(np.testing.assert_array_equal, params, kept)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), after.params, first)
  assert all(jax.tree.leaves(moved))


def test_ties_of_the_paper_go_with_grouped_queries() -> None:
  small = dataclasses.replace(
    tiny.MODEL, num_heads=4, num_kv_heads=2, head_dim=4
  )
  large = dataclasses.replace(small, num_heads=8)
  begin = methods.build(methods.get('ligo_released'), small, large)
  learned = learning.parameters(begin, small, tie='paper', num_layers=1)
  assert set(learned['width']) == {'query.out', 'value.read'}


def test_every_layer_may_have_matrices_of_its_own(
  folder: pathlib.Path,
) -> None:
  run = trained_run.find(folder / 'small', name='small')
  begin = methods.build(methods.get('ligo_released'), run.model, _LARGE)
  own = learning.parameters(begin, run.model, tie='layer', num_layers=2)
  ndims = {name: x.ndim for name, x in own['width'].items()}
  assert ndims['mlp.out'] == ndims['value.read'] == 3
  # The tables are written once.
  assert ndims['embed.out'] == 2
  learn = dataclasses.replace(_LEARN, tie='layer')
  mesh = sharding.make_mesh(sharding.MeshConfig())
  program = learning.build(learn, run.model, _LARGE, begin, mesh)
  params = run.restore_params(None)
  with jax.set_mesh(mesh):
    state = program.first_state()
    same = operator.grow(run.model, params, program.operator(state.params))
    for _ in range(2):
      state, _ = program.learn_step(state, tiny.batch(vocab_size=300), params)
  plain = operator.grow(run.model, params, begin)
  # Einsums of another order.
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), same, plain
  )
  matrices = state.params['width']['mlp.out']
  assert (matrices[0] != matrices[1]).any()


def test_ties_are_the_paper_s_where_wanted(folder: pathlib.Path) -> None:
  run = trained_run.find(folder / 'small', name='small')
  begin = methods.build(methods.get('ligo_released'), run.model, _LARGE)
  tied = learning.parameters(begin, run.model, tie='paper', num_layers=2)
  assert set(tied['width']) == {
    'embed.out',
    'mlp.out',
    'query.out',
    'key.out',
    'value.out',
  }
  free = learning.parameters(begin, run.model, tie='free', num_layers=2)
  # An RMS norm has no bias, and the others are of images.
  unused = {'embed.norm_bias', 'embed.head_bias', 'embed.gain', 'query.read'}
  of_text = {x for x in operator.MAPS if not x.startswith(('mix_', 'class_'))}
  assert set(free['width']) == of_text - unused


def test_one_matrix_is_that_of_all_mixed_heads_where_wanted() -> None:
  small = architectures.ALL['cait']
  large = pairs.large('cait', width=pairs.HALF_MORE)
  begin = methods.build(methods.get('ligo_released'), small, large)
  tied = learning.parameters(begin, small, tie='paper', num_layers=2)
  in_layers = {'mlp.out', 'query.out', 'key.out', 'value.out'}
  of_class = {f'class_{name}' for name in in_layers}
  assert set(tied['width']) == {'embed.out'} | in_layers | of_class
  # An untied head has no norm of its own.
  unused = {'embed.head', 'embed.head_bias'}
  free = learning.parameters(begin, small, tie='free', num_layers=2)
  assert set(free['width']) == set(operator.MAPS) - unused


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    ({'small': ''}, 'config.small'),
    ({'small': 'nowhere'}, 'checkpoints'),
    ({'method': 'hope'}, 'stack'),
    (
      {'method': 'auto', 'probe': config_lib.ProbeConfig(('stack+learn',), 2)},
      'learn.num_steps',
    ),
    ({'method': 'auto'}, 'probe.num_steps'),
    (
      {
        'method': 'auto',
        'probe': config_lib.ProbeConfig(('stack', 'stack'), 2),
      },
      'must differ',
    ),
    (
      {'method': 'auto', 'probe': config_lib.ProbeConfig(('stack', 'auto'), 2)},
      'Unknown method',
    ),
    ({'scratch': 'nowhere'}, 'scratch=.*nowhere'),
    ({'learn': _LEARN, 'method': 'aki'}, 'terms'),
    ({'model': dataclasses.replace(_LARGE, norm='layer')}, 'model.norm'),
    (
      {
        'moments': True,
        'optimizer': optimizer.OptimizerConfig(name='muon', warmup_steps=2),
      },
      'moments',
    ),
  ],
)
def test_what_cannot_be_grown_is_refused_in_one_line(
  folder: pathlib.Path, tmp_path: pathlib.Path, change: dict, named: str
) -> None:
  with pytest.raises(ValueError, match=named) as caught:
    train.train(_config(folder, **change), workdir=tmp_path)
  assert '\n' not in str(caught.value)


def test_a_run_that_did_not_grow_is_left_alone(folder: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='holds another'):
    train.train(_config(folder), workdir=folder / 'small')


def test_auto_needs_something_to_judge_by(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  probe = config_lib.ProbeConfig(num_steps=2)
  config = _config(folder, method='auto', probe=probe)
  data = dataclasses.replace(config.data, validation_fraction=0.0)
  with pytest.raises(ValueError, match='validation'):
    train.train(dataclasses.replace(config, data=data), workdir=tmp_path)


def test_a_warm_up_longer_than_learning_is_refused_if_there_is_learning() -> (
  None
):
  learn = config_lib.LearnConfig(
    num_steps=3,
    optimizer=dataclasses.replace(
      config_lib.LearnConfig().optimizer, warmup_steps=3
    ),
  )
  with pytest.raises(ValueError, match=r'learn\.optimizer\.warmup_steps=3'):
    learn.validate()
  # As of the trials that learn nothing.
  dataclasses.replace(learn, num_steps=0).validate()


def test_moments_need_an_optimiser_of_the_same_build(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  config = _config(folder, method='staged', moments=True)
  optim = dataclasses.replace(config.optimizer, clip_norm=None)
  with pytest.raises(ValueError, match='clip_norm'):
    train.train(dataclasses.replace(config, optimizer=optim), workdir=tmp_path)


def test_the_small_model_stays_the_one_of_the_first_call(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, method='stack', small_step=8)
  train.train(config, workdir=folder / 'pinned')
  again = dataclasses.replace(config, small_step=None)
  train.train(again, workdir=folder / 'pinned')
  assert _card(folder / 'pinned')['small']['step'] == 8


def test_auto_takes_the_best_of_its_trials_and_counts_them(
  folder: pathlib.Path,
) -> None:
  probe = config_lib.ProbeConfig(
    candidates=('direct_copy', 'staged', 'ligo_released+learn'), num_steps=2
  )
  config = _config(folder, method='auto', probe=probe, learn=_LEARN)
  workdir = folder / 'auto'
  train.train(config, workdir=workdir)
  card = _card(workdir)
  losses = {probe['name']: probe['loss'] for probe in card['probes']}
  assert list(losses) == list(probe.candidates)
  best = min(losses, key=lambda name: losses[name])
  assert card['method'] == best.removesuffix('+learn')
  tokens = [probe['tokens'] for probe in card['probes']]
  # The operator's own steps are counted.
  assert tokens[2] > tokens[0] == tokens[1] > 0
  # The best one's trial is the beginning of the run.
  others = sum(x['tokens'] for x in card['probes'] if not x['chosen'])
  assert (
    card['probe_tokens']
    == others
    == sum(tokens)
    - max(x['tokens'] for x in card['probes'] if x['name'] == best)
  )
  assert not (workdir / 'probes' / best / 'checkpoints').exists()
  logged = metrics.read_metrics(workdir, kind='eval')
  assert logged[0]['step'] == 2
  assert logged[0]['loss'] == losses[best]
  # A second call trains nothing again.
  report = (workdir / 'probes' / 'staged' / 'report.html').stat().st_mtime_ns
  train.train(config, workdir=workdir)
  again = (workdir / 'probes' / 'staged' / 'report.html').stat().st_mtime_ns
  assert again == report
  assert 'Trials of methods' in (workdir / 'report.html').read_text()


def test_moments_are_carried_over_into_the_run(folder: pathlib.Path) -> None:
  config = _config(folder, method='staged', moments=True)
  outcome = train.train(config, workdir=folder / 'moments')
  assert outcome.stopped_by is None
  saved = saved_run.restore_params(folder / 'moments' / 'checkpoints', None)
  assert jnp.shape(saved['embedding']['tokens']) == (320, 32)
  assert isinstance(outcome, loop.Outcome)


@pytest.mark.slow
def test_a_trial_that_is_half_adopted_is_adopted_whole_at_the_next_call(
  folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  probe = config_lib.ProbeConfig(
    candidates=('direct_copy', 'staged', 'ligo_released+learn'), num_steps=2
  )
  config = _config(folder, method='auto', probe=probe, learn=_LEARN)
  expected = train.train(config, workdir=folder / 'auto')
  workdir = folder / 'half_adopted'
  rename, moved = pathlib.Path.rename, []

  def killed(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    if self.parent.parent.name == 'probes':
      if len(moved) == 2:
        raise KeyboardInterrupt
      moved.append(self.name)
    return rename(self, target)

  with monkeypatch.context() as patched:
    patched.setattr(pathlib.Path, 'rename', killed)
    with pytest.raises(KeyboardInterrupt):
      train.train(config, workdir=workdir)
  outcome = train.train(config, workdir=workdir)
  jax.tree.map(np.testing.assert_array_equal, outcome.state, expected.state)
  assert _card(workdir)['probes'] == [
    {**x, 'secs': y['secs']}
    for x, y in zip(
      _card(folder / 'auto')['probes'], _card(workdir)['probes'], strict=True
    )
  ]
