"""Models that this project trained, predicted by their own learning curves."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.scaling import job, own_runs
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import pretrain
from tests import tiny


def test_own_runs_give_their_learning_curves(tmp_path: pathlib.Path) -> None:
  for name, size in (('a', 1000), ('b', 2000)):
    folder = tmp_path / name
    folder.mkdir()
    result = {'num_params': size, 'num_tokens': 400, 'eval_loss': 2.0}
    (folder / 'result.json').write_text(json.dumps(result))
    records = [
      {'kind': 'train', 'step': 1, 'time': 0, 'tokens': 200, 'loss': 3.1},
      {'kind': 'eval', 'step': 1, 'time': 0, 'loss': 3.0},
      {'kind': 'train', 'step': 2, 'time': 0, 'tokens': 400, 'loss': 2.1},
    ]
    (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps(record) + '\n' for record in records)
    )
  runs = own_runs.read(str(tmp_path / '*' / 'result.json'))
  np.testing.assert_array_equal(runs.num_params, [1000, 1000, 2000, 2000])
  np.testing.assert_array_equal(runs.num_tokens, [200, 400, 200, 400])
  np.testing.assert_array_equal(runs.loss, [3, 2, 3, 2])
  with pytest.raises(ValueError, match='names no file'):
    own_runs.read(str(tmp_path / 'none' / '*.json'))
  images = {'num_params': 1, 'num_tokens': 1, 'eval_loss': 1, 'unit': 'images'}
  (tmp_path / 'b' / 'result.json').write_text(json.dumps(images))
  with pytest.raises(ValueError, match='one unit, not images, tokens'):
    own_runs.read(str(tmp_path / '*' / 'result.json'))


def _write(
  folder: pathlib.Path, losses: Sequence[float] = (4.0, 3.0, 2.0), **more: Any
) -> None:
  """A run of a million parameters, evaluated every thousand tokens."""
  folder.mkdir(parents=True)
  result = {'num_params': 1e6, 'num_tokens': 1000 * len(losses), **more}
  (folder / 'result.json').write_text(json.dumps(result))
  records = [
    {'kind': 'eval', 'step': i, 'time': 0, 'tokens': 1000 * i, 'loss': loss}
    for i, loss in enumerate(losses, 1)
  ]
  (folder / 'metrics.jsonl').write_text(
    ''.join(json.dumps(record) + '\n' for record in records)
  )


_COUNTS = {'num_params': 1, 'num_tokens': 1}


@pytest.mark.parametrize(
  ('result', 'why'),
  [
    ({'utilization': 0.5}, 'it lacks num_params'),
    ({'num_params': 1}, 'it lacks num_tokens'),
    ({**_COUNTS, 'target': {}}, 'of a drafter'),
    ({**_COUNTS, 'growth': {}}, 'model was grown'),
    ({**_COUNTS, 'config': {'start': 'out/a'}}, 'has a start'),
    (_COUNTS, 'has no evaluation'),
    ({**_COUNTS, 'eval_loss': math.nan}, 'no finite loss'),
  ],
)
def test_what_the_laws_do_not_speak_of_is_left_out_and_named(
  result: dict[str, Any], why: str, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a' / 'result.json').write_text(json.dumps(result))
  _write(tmp_path / 'b')
  pattern = str(tmp_path / '*' / 'result.json')
  runs = own_runs.read(pattern)
  assert len(runs) == 3
  (bad,) = runs.bad_rows
  assert bad.line == str(tmp_path / 'a' / 'result.json')
  assert why in bad.reason
  (tmp_path / 'b' / 'result.json').unlink()
  with pytest.raises(ValueError, match='names no training run'):
    own_runs.read(pattern)


@pytest.mark.parametrize(
  'changes',
  [
    {'path': 'laws'},
    {'tokenizer': 'bpe:512'},
    {'objective': 'masked'},
    {'validation_path': 'laws'},
  ],
)
def test_runs_on_another_text_are_another_family(
  changes: dict[str, str], tmp_path: pathlib.Path
) -> None:
  text = {'path': 'tales'}
  _write(tmp_path / 'a', config={'data': text})
  _write(tmp_path / 'b', config={'data': text | changes})
  pattern = str(tmp_path / '*' / 'result.json')
  (other,) = set(own_runs.read(pattern).by_family()) - {'tales'}
  assert len(own_runs.read(pattern, family=other)) == 3
  with pytest.raises(ValueError, match=r'must be one of .*tales'):
    own_runs.read(pattern, family='fables')


def test_runs_on_islands_are_a_family_of_their_own(
  tmp_path: pathlib.Path,
) -> None:
  config = {'data': {'path': 'tales'}}
  _write(tmp_path / 'a', config=config)
  _write(tmp_path / 'b', config=config, islands=4)
  runs = own_runs.read(str(tmp_path / '*' / 'result.json'))
  assert set(runs.by_family()) == {'tales', 'tales on 4 islands'}


def test_a_text_of_which_there_is_too_little_does_not_end_the_others(
  tmp_path: pathlib.Path,
) -> None:
  _write(tmp_path / 'a', config={'data': {'path': 'tales'}})
  _write(tmp_path / 'b', [3.0], config={'data': {'path': 'laws'}})
  pattern = str(tmp_path / '*' / 'result.json')
  runs = own_runs.read(pattern)
  assert set(runs.by_family()) == {'tales'}
  (bad,) = runs.bad_rows
  assert 'at least 3 for any law' in bad.reason


def test_pictures_of_several_texts_stay_in_the_workdir(
  tmp_path: pathlib.Path,
) -> None:
  texts = tmp_path / 'texts'
  texts.mkdir()
  _write(tmp_path / 'a', config={'data': {'path': 'stdlib'}})
  _write(tmp_path / 'b', config={'data': {'path': str(texts)}})
  config = ScalingConfig(runs=str(tmp_path / '*' / 'result.json'))
  result = job.run(config, workdir=tmp_path / 'out', say=lambda line: None)
  assert len(result['predictions']) == 2
  # Losses on different texts are not compared.
  assert result['a_or_b'] == []
  assert not list(texts.iterdir())
  for part in ('1', '2'):
    assert list((tmp_path / 'out' / 'plots' / part).glob('*.png'))
  planned = dataclasses.replace(config, mode='plan')
  with pytest.raises(ValueError, match=r'set rows\.family'):
    job.run(planned, workdir=tmp_path / 'plan', say=lambda line: None)


@pytest.mark.slow
def test_own_models_of_two_sizes_predict_a_third(
  tmp_path: pathlib.Path,
) -> None:
  text = tiny.write_text(tmp_path / 'text')
  models = {}
  for width in (8, 16, 32):
    config = tiny.config(text, num_steps=24, eval_every=4)
    model = dataclasses.replace(config.model, embed_dim=width)
    models[width] = transformer.num_params(model)
    pretrain.train(
      dataclasses.replace(config, model=model), workdir=tmp_path / str(width)
    )
  pattern = str(tmp_path / '[0-9]*' / 'result.json')
  runs = own_runs.read(pattern)
  np.testing.assert_array_equal(runs.sizes, sorted(models.values()))
  for width, size in models.items():
    result = json.loads((tmp_path / str(width) / 'result.json').read_text())
    mine = runs.where(runs.num_params == size)
    # An evaluation each four steps; the last is the result's.
    assert len(mine) == 6
    assert mine.num_tokens.max() == result['num_tokens']
    assert mine.loss[mine.is_final] == result['eval_loss']
    # A byte-level vocabulary of 320: nats per token, and they fall.
    assert mine.loss[0] < np.log(320) + 0.5
    assert mine.loss[-1] < mine.loss[0]
  (tmp_path / '32' / 'result.json').rename(tmp_path / 'held_out.json')
  target = runs.where(runs.num_params == models[32])
  config = ScalingConfig(
    runs=pattern,
    target_params=float(models[32]),
    target_tokens=float(target.num_tokens.max()),
    num_bootstraps=4,
  )
  result = job.run(config, workdir=tmp_path / 'out', say=lambda line: None)
  (one,) = result['predictions']
  assert one['num_sizes'] == 2
  assert one['num_rows'] == 12
  # Runs of 24 steps still learn which words there are, which is no power law:
  # the truth is below the interval, but the guess beats that nothing improves.
  truth = target.loss[-1]
  best = runs.where(runs.num_params < models[32]).loss.min()
  assert abs(one['loss'] - truth) < abs(best - truth)
  assert 'There are two sizes' in ' '.join(one['warnings'])
