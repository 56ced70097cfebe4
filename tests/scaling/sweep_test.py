import csv
import dataclasses
import functools
import gzip
import json

import numpy as np
import pytest

from efficient_llm.scaling import data, fit, published, sweep

_FOLDER = published.DEFAULT_FOLDER
_NEEDS_DATA = pytest.mark.skipif(
  not published.is_here(), reason='the published families are not at hand'
)
# The reference has two decimals.
_PUBLISHED = 0.01


@functools.cache
def _opt() -> data.Runs:
  """OPT with perplexities as losses, as the guide's loader has it."""
  path = _FOLDER / 'opt.csv.gz'
  with gzip.open(path, 'rt') as file:
    perplexity = [float(row['ppl']) for row in csv.DictReader(file)]
  return dataclasses.replace(data.read(path), loss=np.array(perplexity))


@functools.cache
def _reference() -> dict:
  path = _FOLDER / 'reference_values.json'
  return json.loads(path.read_text())['colpret_choshen_2024']


@_NEEDS_DATA
@pytest.mark.parametrize('solver', ['guide', 'batched'])
@pytest.mark.parametrize(
  ('name', 'config'),
  [
    ('OPT_on_PERPLEXITY_no_cut_last30', sweep.SweepConfig(min_tokens=0)),
    (
      'OPT_on_PERPLEXITY_cut10B_last_ckpt',
      sweep.SweepConfig(target_share=None),
    ),
  ],
)
def test_the_guide_s_heat_maps_are_reproduced(
  name: str, config, solver
) -> None:
  found = sweep.heat_map(_opt(), config, solver=solver)
  for count, row in _reference()[name].items():
    expected = np.array([np.nan if x is None else x for x in row])
    errors = found.errors[found.num_models.index(int(count))]
    np.testing.assert_allclose(errors, expected, atol=_PUBLISHED, rtol=0)


@_NEEDS_DATA
def test_the_guide_s_borrowed_laws_are_reproduced() -> None:
  runs = _opt()
  target = sweep.target_of(runs)
  rows = _reference()['OPT_one_model_A_alpha_fixed_last30'].values()
  borrowed = sweep.MUENNIGHOFF[0], sweep.MUENNIGHOFF[3]
  for size, row in zip(runs.sizes, rows, strict=True):
    for share, expected in zip(sweep.GUIDE.shares, row, strict=True):
      seen = sweep.seen_of(runs, np.array([size]), share)
      if expected is None:
        assert not len(seen)
        continue
      law = sweep.guide_fit(seen, borrowed=borrowed)
      assert law is not None
      predicted = fit.predict(law, target.num_params, target.num_tokens)
      error = sweep.relative_error(predicted, target)
      assert error == pytest.approx(expected, abs=_PUBLISHED)


def _family() -> data.Runs:
  sizes = np.repeat(np.geomspace(1e8, 1e10, 5), 10)
  tokens = np.tile(np.arange(1, 11) * 1e10, 5)
  planted = np.array([1.7, 400.0, 2000.0, 0.34, 0.37])
  return data.make(sizes, tokens, fit.predict(planted, sizes, tokens))


def test_a_perfect_family_is_predicted_in_every_square() -> None:
  found = sweep.heat_map(_family())
  assert found.num_models == (2, 3, 4)
  # From half of training on there are three checkpoints, which tell E from D.
  assert np.nanmax(found.errors[1:, 4:]) < 0.01


def test_no_square_shows_the_target_to_the_fit() -> None:
  runs = _family()
  for order in ('smallest', 'nearest', 'scale_down'):
    config = dataclasses.replace(sweep.GUIDE, order=order)
    for cell in sweep.cells(runs, config):
      assert set(cell.target.num_params) == {
        runs.sizes[0 if order == 'scale_down' else -1]
      }
      assert not set(cell.target.num_params) & set(cell.seen.num_params)
      assert len(cell.seen.sizes) <= cell.num_models
      assert cell.seen.num_tokens.min() > 1e10


def test_settings_that_make_no_sense_are_refused() -> None:
  with pytest.raises(ValueError, match='shares='):
    sweep.SweepConfig(shares=(0.5, 1.5)).validate()
  with pytest.raises(ValueError, match='order='):
    dataclasses.replace(sweep.GUIDE, order='random').validate()
