"""The configurations of growth fit together."""

import itertools

import pytest

from efficient_llm.ligo import methods, pair
from efficient_llm.ligo.config import LigoConfig
from efficient_llm.models import presets
from experiments import configuration

_FILE = 'experiments/configs/ligo_cpu.py'


@pytest.mark.parametrize(
  'name',
  ['double', 'mslt', 'progressive', 'llama_pro', 'bert2bert', 'inherit'],
)
def test_every_model_on_the_way_grows_out_of_the_one_before(name: str) -> None:
  config = configuration.resolve(f'{_FILE}:{name}', LigoConfig, {})
  config.validate()
  on_the_way = [stage.model(config.model) for stage in config.stages]
  models = [presets.get('ladder_1m'), *on_the_way, config.model]
  for small, large in itertools.pairwise(models):
    pair.check(small, large)
  for stage in config.stages:
    methods.get(stage.method or config.method)
    # Each stage has the run's warm-up in its own schedule.
    assert stage.num_steps > config.optimizer.warmup_steps


def test_an_unknown_schedule_is_named() -> None:
  with pytest.raises(ValueError, match='mslt, progressive'):
    configuration.resolve(f'{_FILE}:hope', LigoConfig, {})
