"""One target makes the configuration of every stage; bad lines are refused."""

import dataclasses
import pathlib
from typing import Any

import pytest

from efficient_llm.end_to_end.config import EndToEndConfig, Rung
from efficient_llm.ligo import pair
from efficient_llm.models import transformer
from experiments import configuration
from tests.end_to_end import tiny_line

_FOLDER = pathlib.Path('line')
_CONFIGS = [
  'experiments/configs/end_to_end_cpu.py',
  'experiments/configs/end_to_end_cpu.py:quick',
  'experiments/configs/end_to_end_gpu.py',
  'experiments/configs/end_to_end_tpu_v5e.py',
]


@pytest.mark.parametrize('name', _CONFIGS)
def test_every_line_fits_together(name: str) -> None:
  config = configuration.resolve(name, EndToEndConfig, {})
  config.validate()
  rungs = config.rungs(_FOLDER)
  sizes = [transformer.num_params(rung.model) for rung in rungs]
  assert sizes == sorted(set(sizes))
  for rung in rungs:
    pair.check(rung.model, config.target.model)
  grown = config.grown(_FOLDER, small=_FOLDER, scratch=_FOLDER)
  assert grown.loop.num_steps < config.target.loop.num_steps
  # Islands and their control read as many tokens.
  islands = config.distributed(_FOLDER, start=_FOLDER)
  control = config.control(_FOLDER, start=_FOLDER)
  assert islands.islands * islands.tokens_per_step == control.tokens_per_step
  assert islands.loop.num_steps == control.loop.num_steps
  # And are evaluated on as many.
  evaluated = [
    one.loop.eval_batches and one.loop.eval_batches * one.data.batch_size
    for one in (islands, control)
  ]
  assert evaluated[0] == evaluated[1]
  assert islands.loop.num_steps % islands.sync_period == 0
  reasoning = config.reasoned(start=_FOLDER)
  assert reasoning.supervised.model == config.target.model
  assert reasoning.update.sequence_length <= config.target.model.max_positions


def test_all_stages_share_the_cache_of_the_text() -> None:
  config = tiny_line.config()
  folders = {
    one.data.cache_dir
    for one in (
      config.scratch(_FOLDER),
      *config.rungs(_FOLDER),
      config.grown(_FOLDER, small=_FOLDER, scratch=_FOLDER),
      config.distributed(_FOLDER, start=_FOLDER),
    )
  }
  assert folders == {str(_FOLDER / 'cache')}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'ladder': (Rung(num_layers=1),)}, 'two or more; add smaller'),
    (
      {'ladder': (Rung(num_layers=1), Rung(num_layers=3))},
      'must be smaller than the target',
    ),
    (
      {'islands': dataclasses.replace(tiny_line.config().islands, islands=3)},
      'divisible by islands.islands=3',
    ),
    (
      {'target': dataclasses.replace(tiny_line.config().target, start='x')},
      'what the stage before made',
    ),
    (
      {
        'reasoning': dataclasses.replace(
          tiny_line.config().reasoning, checkpoint='x'
        )
      },
      'what the stage before made',
    ),
  ],
)
def test_a_bad_line_is_refused_before_anything_runs(
  changes: dict[str, Any], message: str
) -> None:
  config = dataclasses.replace(tiny_line.config(), **changes)
  with pytest.raises(ValueError, match=message):
    config.validate()
