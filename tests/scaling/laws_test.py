import csv
import json

import numpy as np
import pytest

from efficient_llm.scaling import laws, published

_NEEDS_DATA = pytest.mark.skipif(
  not published.is_here(), reason='the published families are not at hand'
)
_PLANTED = {
  'chinchilla': (1.7, 6.0, 7.5, 0.34, 0.37),
  'kaplan': (32.0, 31.5, 0.076, 0.103),
  'data_constrained': (1.8, 6.2, 7.3, 0.35, 0.35, 2.73, 1.67),
  'routed': (-0.082, -0.108, 0.009, 2.5, 0.6, 5.5),
  'diloco': (2.96, -0.0985, 0.0116),
  'diloco_floor': (1.5, 3.5, -0.2, 0.03),
  'overtraining': (1.5, 4.0, 5.5, 0.12),
  'downstream': (0.85, 0.9, 1.1),
  'coverage': (0.5, 0.4),
}


def _inputs(rng: np.random.Generator, count: int = 200) -> dict:
  tokens = np.exp(rng.uniform(np.log(1e8), np.log(1e12), count))
  return {
    'num_params': np.exp(rng.uniform(np.log(1e7), np.log(1e10), count)),
    'num_tokens': tokens,
    'unique_tokens': tokens / rng.choice([1, 4, 20, 60], count),
    'num_experts': 2.0 ** rng.integers(0, 10, count),
    'num_islands': 2.0 ** rng.integers(0, 4, count),
    'loss': rng.uniform(2.2, 5.0, count),
    'num_samples': np.exp(rng.uniform(0, 9, count)),
  }


@pytest.mark.parametrize('name', _PLANTED)
def test_planted_constants_of_every_law_are_recovered(name: str) -> None:
  inputs = _inputs(np.random.default_rng(0))
  law = laws.CATALOGUE[name]
  planted = np.array(_PLANTED[name])
  found = laws.fit_law(name, inputs, law.value(planted, inputs))
  # No noise: what is left is where the optimiser stops.
  assert found.rms < 1e-5
  np.testing.assert_allclose(
    list(found.constants.values()), planted, rtol=0.02, atol=1e-3
  )
  assert not found.at_bound


def test_every_law_names_its_source_and_what_it_needs() -> None:
  for name, law in laws.CATALOGUE.items():
    assert name == 'multi_power' or name in _PLANTED
    assert len(law.constants) == len(law.lower) == len(law.upper)
    assert len(law.constants) == len(law.starts)
    assert 'arXiv' in law.source or law.source == 'the same with a floor'


@_NEEDS_DATA
def test_the_published_fit_of_diloco_is_reproduced() -> None:
  path = published.DEFAULT_FOLDER / 'diloco_table4.csv'
  with path.open() as file:
    rows = [r for r in csv.DictReader(file) if r['algorithm'] == 'diloco']
  inputs = {
    name: np.array([float(row[column]) for row in rows])
    for name, column in (('num_params', 'n_params'), ('num_islands', 'M'))
  }
  loss = np.array([float(row['loss']) for row in rows])
  found = laws.fit_law('diloco', inputs, loss).constants
  # 19.226 N^-0.0985 M^0.0116 was published, of losses with more digits.
  assert np.exp(found['log_A']) == pytest.approx(19.226, rel=5e-3)
  assert found['alpha'] == pytest.approx(-0.0985, abs=2e-4)
  assert found['beta'] == pytest.approx(0.0116, abs=2e-4)


@_NEEDS_DATA
def test_a_schedule_s_curve_is_predicted_from_other_schedules() -> None:
  runs = published.families()['mpl_25m']
  names = np.array([run.partition('_')[2] for run in runs.run.tolist()])
  inputs = {
    'run': runs.run,
    'step': runs.num_tokens / 5e5,
    'learning_rate': runs.learning_rate,
  }
  seen = np.isin(names, ['cosine_24000', 'constant_24000', 'wsdcon_9'])
  found = laws.fit_law(
    'multi_power',
    {name: values[seen] for name, values in inputs.items()},
    runs.loss[seen],
    huber_delta=1e-3,
  )
  predicted = found.predict(inputs)
  for name in ('wsd_20000_24000', 'wsdld_20000_24000', 'cosine_72000'):
    mine = names == name
    error = np.abs(predicted[mine] / runs.loss[mine] - 1).mean()
    # The paper has 0.11 to 0.17 % with the rate of every step, not of each 128.
    assert error < 0.003, name


@_NEEDS_DATA
def test_gadre_s_overtrained_models_are_predicted() -> None:
  text = (published.DEFAULT_FOLDER / 'reference_values.json').read_text()
  reference = json.loads(text)['gadre_2024']
  runs = published.families()['overtrain_rpj']
  per_param = runs.num_tokens / runs.num_params

  def rows(*runs_of: tuple[float, float]) -> np.ndarray:
    return np.array(
      [
        np.flatnonzero(
          (np.abs(runs.num_params / n - 1) < 0.1)
          & (np.abs(per_param / m - 1) < 0.01)
        )[0]
        for n, m in runs_of
      ]
    )

  # The five runs of their table 1, the dearest a twentieth of the target.
  seen = rows(
    (1.06e7, 20), (7.9e7, 20), (1.54e8, 20), (4.1e8, 20), (1.06e7, 320)
  )
  inputs = {'num_params': runs.num_params, 'num_tokens': runs.num_tokens}
  found = laws.fit_law(
    'overtraining',
    {name: values[seen] for name, values in inputs.items()},
    runs.loss[seen],
    huber_delta=1e-3,
  )
  targets = {
    'rel_error_loss_1p4B_900Btok': (1.44e9, 640.0),
    'rel_error_loss_6p9B_138Btok': (6.89e9, 20.0),
  }
  for name, target in targets.items():
    (row,) = rows(target)
    error = 100 * abs(found.predict(inputs)[row] / runs.loss[row] - 1)
    # Five runs for four constants: Huber's loss of L instead of log L gives
    # 0.62 and 0.71, squares 1.1 to 1.6.
    assert error == pytest.approx(reference[name], abs=0.2)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
  # Of 4 answers 1 is right; half of the pairs hold it.
  assert laws.pass_at_k(np.array([4]), np.array([1]), 2) == pytest.approx(0.5)
  assert laws.pass_at_k(np.array([4]), np.array([0]), 4) == pytest.approx(0.0)
  assert laws.pass_at_k(np.array([4]), np.array([3]), 2) == pytest.approx(1.0)
  with pytest.raises(ValueError, match='from 1 to 4'):
    laws.pass_at_k(np.array([4]), np.array([1]), 5)


def test_what_no_law_can_be_fitted_to_is_refused() -> None:
  inputs = _inputs(np.random.default_rng(0), 4)
  with pytest.raises(ValueError, match='must be one of chinchilla, kaplan'):
    laws.fit_law('moore', inputs, np.ones(4))
  with pytest.raises(ValueError, match='has 5 constants and 4 values'):
    laws.fit_law('chinchilla', inputs, np.ones(4))
  with pytest.raises(ValueError, match='needs num_params, num_tokens'):
    laws.fit_law('chinchilla', {}, np.ones(9))
