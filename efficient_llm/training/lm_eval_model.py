"""A run's model as lm-eval asks it: EleutherAI's harness for evaluations.

    from efficient_llm.training import lm_eval_model
    model = lm_eval_model.Model(scorer)
    lm_eval.simple_evaluate(model=model, tasks=['hellaswag'])

Needs the extra 'lm_eval'.
Source: lm-evaluation-harness, lm_eval/api/model.py, its class LM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api import instance, model

from efficient_llm.models import sampling
from efficient_llm.training import likelihood

_MAX_NEW_TOKENS = 256
# What tasks ask of generation, and what it is called here.
_SETTINGS = {
  'temperature': 'temperature',
  'top_k': 'top_k',
  'top_p': 'top_p',
  'max_gen_toks': 'max_new_tokens',
  'max_new_tokens': 'max_new_tokens',
}


class Model(model.LM):
  """Answers the harness with a `likelihood.Scorer`."""

  def __init__(self, scorer: likelihood.Scorer, *, seed: int = 0):
    """Wraps a scorer.

    Args:
      scorer: The model.
      seed: Of the coins, where a task asks for sampling.
    """
    super().__init__()
    self._scorer, self._seed = scorer, seed

  def loglikelihood(
    self, requests: Sequence[instance.Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    found = self._scorer.continuations(one.args for one in requests)
    return [(one.log_prob, one.is_greedy) for one in found]

  def loglikelihood_rolling(
    self, requests: Sequence[instance.Instance], disable_tqdm: bool = False
  ) -> list[float]:
    return self._scorer.texts(one.args[0] for one in requests)

  def generate_until(
    self, requests: Sequence[instance.Instance], disable_tqdm: bool = False
  ) -> list[str]:
    # Mostly all of a task's answers are drawn in one way.
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(requests):
      groups.setdefault(repr(one.args[1]), []).append(index)
    answers: dict[int, str] = {}
    for rows in groups.values():
      until, config = read_settings(requests[rows[0]].args[1])
      texts = self._scorer.completions(
        [requests[i].args[0] for i in rows],
        until=until,
        config=config,
        seed=self._seed,
      )
      answers |= zip(rows, texts, strict=True)
    return [answers[i] for i in range(len(requests))]


def read_settings(
  settings: Mapping[str, Any],
) -> tuple[list[str], sampling.SamplingConfig]:
  """What a task says of its answers: the marks that end them, and the rest.

  Args:
    settings: A task's generation_kwargs.
  Raises:
    ValueError: If there is one that this sampler does not have.
  """
  settings = dict(settings)
  until = settings.pop('until', None) or []
  do_sample = settings.pop('do_sample', bool(settings.get('temperature')))
  if unknown := sorted(set(settings) - set(_SETTINGS)):
    raise ValueError(
      f'generation_kwargs of a task must be of until, do_sample, '
      f'{", ".join(_SETTINGS)}; {unknown[0]} is none, leave it out.'
    )
  changes = {
    _SETTINGS[name]: value
    for name, value in settings.items()
    if value is not None
  }
  if not do_sample:
    changes['temperature'] = 0.0
  config = sampling.SamplingConfig(
    **{'max_new_tokens': _MAX_NEW_TOKENS, **changes}
  )
  config.validate()
  return [until] if isinstance(until, str) else list(until), config
