import dataclasses
import json
import pathlib

import numpy as np
import pytest

from efficient_llm.scaling import (
  allocation,
  auto,
  checks,
  data,
  fit,
  job,
  planner,
  sweep,
)
from efficient_llm.scaling.config import PlanConfig, ScalingConfig
from experiments import configuration

_PLANTED = np.array([1.7, 400.0, 2000.0, 0.34, 0.37])


def _runs(num_sizes: int, *, scale: float = 1.0) -> data.Runs:
  sizes = np.repeat(1e8 * 3.0 ** np.arange(num_sizes), 8)
  tokens = np.tile(np.geomspace(3e9, 1e11, 8), num_sizes)
  loss = scale * fit.predict(_PLANTED, sizes, tokens)
  noise = np.random.default_rng(0).normal(0, 0.002, len(loss))
  return data.make(sizes, tokens, loss * np.exp(noise))


def _file(folder: pathlib.Path, **families: data.Runs) -> str:
  path = folder / 'runs.csv'
  lines = ['family,N,D,loss,run']
  for name, runs in families.items():
    lines += [
      f'{name},{n},{d},{loss},{n}'
      for n, d, loss in zip(
        runs.num_params, runs.num_tokens, runs.loss, strict=True
      )
    ]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def test_a_file_becomes_a_prediction_with_pictures(
  tmp_path: pathlib.Path,
) -> None:
  config = ScalingConfig(
    data=_file(tmp_path, a=_runs(4), b=_runs(4, scale=1.1)),
    target_params=1e10,
    target_tokens=2e11,
    num_bootstraps=16,
  )
  job.run(config, workdir=tmp_path / 'out', say=lambda line: None)
  result = json.loads((tmp_path / 'out' / 'result.json').read_text())
  first = result['predictions'][0]
  truth = fit.predict(_PLANTED, np.array([1e10]), np.array([2e11]))[0]
  assert first['low'] < truth < first['high']
  # Four noisy sizes, and four times the largest: a hundredth.
  assert first['loss'] == pytest.approx(truth, rel=0.01)
  assert first['held_out']['are'] < first['held_out']['best_seen_are']
  (duel,) = result['a_or_b']
  assert duel['probability_a_better'] > 0.95  # B is a tenth above A
  page = (tmp_path / 'out' / 'report.html').read_text()
  for title in ('Loss over compute', 'Residuals', 'Exponents by bootstrap'):
    assert title in page
  assert len(list((tmp_path / 'out' / 'plots' / '1').glob('*.png'))) >= 4


def test_a_plan_keeps_to_its_budget(tmp_path: pathlib.Path) -> None:
  config = ScalingConfig(
    mode='plan',
    target_params=1e9,
    target_tokens=2e10,
    plan=PlanConfig(budget_flops=1e19, accuracy=2.0),
  )
  result = job.run(config, workdir=tmp_path, say=lambda line: None)
  assert all(one['flops'] <= 1e19 for one in result['designs'])
  errors = [one['expected_error'] for one in result['designs']]
  assert errors == sorted(errors)
  assert (tmp_path / 'report.html').exists()
  with pytest.raises(ValueError, match='pays for no design'):
    job.run(
      dataclasses.replace(config, plan=PlanConfig(budget_flops=1e10)),
      workdir=tmp_path,
      say=lambda line: None,
    )


def test_more_noise_makes_a_plan_expect_more_error() -> None:
  errors = [
    planner.designs(
      budget_flops=1e19,
      target_params=1e9,
      target_tokens=2e10,
      noise=noise,
    )[0].expected_error
    for noise in (0.001, 0.05)
  ]
  assert errors[0] < errors[1]


def test_noise_is_measured_where_runs_were_repeated() -> None:
  rng = np.random.default_rng(0)
  loss = 3 * np.exp(rng.normal(0, 0.01, 400))
  repeated = data.make(
    np.repeat([1e8, 1e9], 200),
    [1e10] * 400,
    loss,
    run=np.arange(400).astype(str),
  )
  # Four standard errors of a deviation of 400 draws.
  assert planner.noise_of(repeated) == pytest.approx(0.01, rel=4 / 800**0.5)
  assert planner.noise_of(_runs(3)) is None


def _warnings(runs: data.Runs, target_params: float) -> str:
  target = data.make(target_params, 1e11, np.nan)
  plain = fit.solve([sweep.problem_of(runs)])
  guess = auto.predict(runs, target)
  return ' '.join(checks.warnings(runs, target, guess, plain))


def test_what_the_data_cannot_carry_is_said() -> None:
  assert 'There are two sizes' in _warnings(_runs(2), 3e9)
  assert 'There is one size' in _warnings(_runs(1), 3e8)
  assert '1000 times the largest' in _warnings(_runs(3), 9e11)
  flat = _runs(3)
  flat = dataclasses.replace(flat, loss=np.full(len(flat), 3.0))
  assert 'no better than the best loss already seen' in _warnings(flat, 1.5e9)
  falling = _runs(4)
  # A power law without a floor.
  loss = 50 * falling.num_params**-0.1 * falling.num_tokens**-0.05
  pure = dataclasses.replace(falling, loss=loss)
  assert 'E is 0' in _warnings(pure, 1e10)
  assert checks.refusal(_runs(3)) is None
  assert 'must be at least 3' in str(
    checks.refusal(_runs(3).where(np.arange(2)))
  )
  end = _runs(1).where(np.arange(5, 8))
  narrow = dataclasses.replace(end, num_tokens=np.array([1e10, 1.1e10, 1.2e10]))
  assert 'One size' in str(checks.refusal(narrow))


def test_sound_data_are_not_warned_of() -> None:
  assert _warnings(_runs(5), 3e10) == ''


def test_an_exponent_at_its_bound_is_said() -> None:
  runs = _runs(4)
  # All sizes but the smallest are as good: no finite exponent falls so fast.
  loss = 2.0 + 0.5 * (runs.num_params < 2e8) + 2000 / runs.num_tokens**0.37
  step = dataclasses.replace(runs, loss=loss)
  assert 'alpha runs off to its bound' in _warnings(step, 1e10)


def test_sizes_that_lie_close_are_ill_conditioned() -> None:
  wide = _runs(3)
  size = wide.sizes[0] * (wide.num_params / wide.sizes[0]) ** 0.1
  close = dataclasses.replace(
    wide, num_params=size, loss=fit.predict(_PLANTED, size, wide.num_tokens)
  )
  assert 'is ill-conditioned' in _warnings(close, 3e8)


def test_budgets_whose_best_size_is_at_an_end_are_said() -> None:
  flops = np.repeat(np.geomspace(1e18, 1e20, 3), 9)
  best = np.array([allocation.optimal(_PLANTED, c)[0] for c in flops])

  def warned(low: float, high: float) -> str:
    size = best * np.tile(np.geomspace(low, high, 9), 3)
    tokens = flops / 6 / size
    loss = fit.predict(_PLANTED, size, tokens)
    names = np.arange(len(loss)).astype(str)
    runs = data.make(size, tokens, loss, run=names)
    return _warnings(runs, 3 * size.max())

  assert '3 of 3 budgets (1.0e+18, ' in warned(1.3, 8.0)
  assert 'budgets' not in warned(0.25, 4.0)


@pytest.mark.parametrize(
  ('field', 'value', 'expected'),
  [
    ('rows.unit', 'nepers', 'must be one of nats, bits, perplexity'),
    ('target_params', '-1', 'target_params=-1'),
    ('num_bootstraps', '1', 'at least 2'),
    ('sweep.shares', '0.5,2', 'shares='),
    ('mode', 'plan', 'needs --config.target_params'),
  ],
)
def test_a_configuration_that_makes_no_sense_is_refused(
  field: str, value: str, expected: str
) -> None:
  with pytest.raises(ValueError, match=expected):
    configuration.resolve(
      'experiments/configs/scaling.py', ScalingConfig, {field: value}
    )


def test_nothing_to_fit_is_said(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match='There is nothing to fit'):
    job.run(ScalingConfig(), workdir=tmp_path)
  with pytest.raises(ValueError, match='is not a file'):
    job.run(ScalingConfig(data='none.csv'), workdir=tmp_path)
