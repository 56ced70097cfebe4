"""The small model teaches the large one."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.ligo import config as config_lib
from efficient_llm.ligo import inheritance, train
from efficient_llm.models import transformer
from efficient_llm.training import metrics, objectives, pretrain, saved_run
from tests import tiny

_SMALL = tiny.MODEL
_LARGE = dataclasses.replace(tiny.MODEL, num_layers=2)
_TAUGHT = config_lib.InheritConfig(weight=1.0, share_of_steps=0.5)


def _params() -> tuple[Any, Any]:
  return (
    transformer.init(_SMALL, jax.random.key(0)),
    transformer.init(_LARGE, jax.random.key(1)),
  )


def _logits(model: Any, params: Any, batch: Any) -> np.ndarray:
  found = transformer.apply(
    model,
    params,
    jnp.asarray(batch['tokens']),
    positions_BT=jnp.asarray(batch['positions']),
    segment_ids_BT=jnp.asarray(batch['segment_ids']),
  ).logits
  assert found is not None
  return np.asarray(found, np.float64)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('blocks', [1, 4])
def test_the_loss_is_the_paper_s(
  share: float, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  batch = tiny.batch(vocab_size=300)
  rows, columns = batch['tokens'].shape
  if blocks > 1:
    room = 4 * rows * columns * 2 * _LARGE.vocab_size
    monkeypatch.setattr(objectives, 'LOGITS_BYTES', room // blocks)
  small_params, params = _params()
  loss_fn = inheritance.loss(
    _TAUGHT, _SMALL, _LARGE, small_params, share=jnp.float32(share)
  )
  found = jax.jit(loss_fn)(params, batch, jax.random.key(0))
  theirs = _logits(_SMALL, small_params, batch)
  ours = _logits(_LARGE, params, batch)
  weights = np.asarray(batch['loss_weights'])
  chosen = np.asarray(batch['targets'])[..., None]
  nats = -np.take_along_axis(_log_softmax(ours), chosen, -1)[..., 0]
  soft = _log_softmax(theirs / 2)
  kl = (np.exp(soft) * (soft - _log_softmax(ours / 2))).sum(-1)
  expected = (1 - share) * nats + share * 4 * kl
  # Float32 sums of some hundred logits.
  np.testing.assert_allclose(found.total, (expected * weights).sum(), rtol=1e-5)
  np.testing.assert_allclose(
    found.metrics['kl'], (kl * weights).sum(), rtol=1e-4
  )


def test_a_model_that_is_its_teacher_learns_nothing() -> None:
  small_params = _params()[0]
  loss_fn = inheritance.loss(
    _TAUGHT, _SMALL, _SMALL, small_params, share=jnp.float32(1.0)
  )
  batch = jax.tree.map(jnp.asarray, tiny.batch(vocab_size=300))

  def total(params: Any) -> Any:
    return loss_fn(params, batch, jax.random.key(0)).total

  grads = jax.jit(jax.grad(total))(small_params)
  assert all(abs(x).max() < 1e-3 for x in jax.tree.leaves(grads))


def test_the_teacher_s_share_falls_along_a_line() -> None:
  shares = [
    float(inheritance.share_at(_TAUGHT, jnp.float32(step), num_steps=8))
    for step in range(8)
  ]
  assert shares == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a trained small model and its text."""
  folder = tmp_path_factory.mktemp('inheritance')
  text = tiny.write_text(folder)
  config = tiny.config(text, cache_dir=folder / 'cache', num_steps=4)
  pretrain.train(config, workdir=folder / 'small')
  return folder


def _config(folder: pathlib.Path, **changes: Any) -> config_lib.LigoConfig:
  base = tiny.config(
    folder / 'text.txt', cache_dir=folder / 'cache', num_steps=6
  )
  base = dataclasses.replace(
    base, loop=dataclasses.replace(base.loop, log_every=1)
  )
  fields = {
    field.name: getattr(base, field.name) for field in dataclasses.fields(base)
  }
  fields |= {'model': _LARGE, 'small': str(folder / 'small'), **changes}
  return config_lib.LigoConfig(**fields)


def test_a_random_model_is_taught_for_its_first_steps(
  folder: pathlib.Path,
) -> None:
  config = _config(folder, method='random', inherit=_TAUGHT)
  train.train(config, workdir=folder / 'taught')
  result = json.loads((folder / 'taught' / 'result.json').read_text())
  card = result['growth']
  assert card['loss_of_function'] == 'nothing of the small model is kept'
  # Three of six steps, a forward pass each.
  tokens = 3 * config.data.batch_size * config.data.sequence_length
  cost = transformer.flops_per_token(
    _SMALL, num_tokens=config.data.sequence_length
  )
  assert card['teacher_flops'] == pytest.approx(tokens * cost / 3)
  steps = metrics.read_metrics(folder / 'taught', kind='train')
  assert [x['kl'] > 0 for x in steps] == [True] * 3 + [False] * 3


def test_nothing_of_the_small_model_is_kept(folder: pathlib.Path) -> None:
  config = _config(folder, method='random')
  train.train(config, workdir=folder / 'random')
  first = saved_run.restore_params(folder / 'small' / 'checkpoints', None)
  last = saved_run.restore_params(folder / 'random' / 'checkpoints', None)
  ours = np.asarray(last['embedding']['tokens']).ravel()
  theirs = np.asarray(first['embedding']['tokens']).ravel()
  assert abs(np.corrcoef(ours, theirs)[0, 1]) < 0.1


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'inherit': config_lib.InheritConfig(weight=2.0)}, 'inherit.weight'),
    (
      {'inherit': config_lib.InheritConfig(share_of_steps=0.0)},
      'inherit.share_of_steps',
    ),
    (
      {'inherit': config_lib.InheritConfig(temperature=0.0)},
      'inherit.temperature',
    ),
    ({'inherit': _TAUGHT, 'rest_old': True}, 'go together'),
    ({'method': 'random', 'moments': True}, 'moments=True'),
    (
      {'method': 'random', 'learn': config_lib.LearnConfig(num_steps=2)},
      'terms',
    ),
  ],
)
def test_what_cannot_be_inherited_is_refused_in_one_line(
  folder: pathlib.Path, tmp_path: pathlib.Path, changes: Any, named: str
) -> None:
  with pytest.raises(ValueError, match=named) as caught:
    train.train(_config(folder, **changes), workdir=tmp_path)
  assert '\n' not in str(caught.value)
