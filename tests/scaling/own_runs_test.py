"""Models that this project trained, predicted by their own learning curves."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from efficient_llm.models import transformer
from efficient_llm.scaling import data, job
from efficient_llm.scaling.config import ScalingConfig
from efficient_llm.training import pretrain
from tests import tiny


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
  runs = data.from_results(pattern)
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
