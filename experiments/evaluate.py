"""Scores a checkpoint with the tasks of lm-eval, the field's usual harness.

./run.sh pip install 'lm-eval>=0.4.9,<0.5'
./run.sh python -m experiments.evaluate --checkpoint=out/pretrain \
  --tasks=hellaswag,arc_easy
./run.sh python -m experiments.evaluate --checkpoint=hf:DIR \
  --tasks=mine --include_path=tasks --output=scores.json

--include_path is a folder of tasks of your own, each a YAML file as lm-eval has
them; its data may be a file beside it. Code in a task's folder is run, as in
lm-eval. A run's parameters, a folder of transformers and its tokenizer do as
they are.
"""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from efficient_llm.training import likelihood, strict_json, trained_run
from experiments import command, exits


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_string('checkpoint', None, 'Folder of a run, or hf: and one.')
  flags.DEFINE_list('tasks', None, 'Names of tasks, separated by commas.')
  flags.DEFINE_string('include_path', None, 'Folder of more tasks.')
  flags.DEFINE_integer('num_fewshot', None, 'Examples before each question.')
  flags.DEFINE_integer('limit', None, 'Documents of each task; all.')
  flags.DEFINE_integer('max_batch', 16, 'Rows read together.', lower_bound=1)
  flags.DEFINE_integer(
    'max_tokens', None, 'Longest text read at once; what the model reads.'
  )
  flags.DEFINE_integer('seed', 0, 'Of examples and coins.')
  flags.DEFINE_string('output', None, 'Write the scores here, as JSON.')


def run(changes: dict[str, str]) -> int:
  """Evaluates and prints."""
  values = flags.FLAGS
  if changes:
    raise ValueError(
      f'--config.{next(iter(changes))} is not a flag here; a checkpoint brings '
      'its configuration.'
    )
  for name in ('checkpoint', 'tasks'):
    if not getattr(values, name):
      raise ValueError(f'--{name} must be given; see --help.')
  found = trained_run.find(values.checkpoint, name='--checkpoint')
  if not found.has_tokenizer:
    raise ValueError(
      f'--checkpoint={values.checkpoint} must have a tokenizer.json; put one '
      'into its folder.'
    )
  lm_eval, tasks, adapter = (
    _library(name)
    for name in (
      'lm_eval',
      'lm_eval.tasks',
      'efficient_llm.training.lm_eval_model',
    )
  )
  manager = tasks.TaskManager(include_path=values.include_path)
  known = set(manager.all_tasks)
  if unknown := [name for name in values.tasks if name not in known]:
    raise ValueError(
      f'--tasks={unknown[0]} must be a task of lm-eval or of --include_path; '
      'choose another.'
    )
  scorer = likelihood.Scorer(
    found.model,
    jax.device_put(found.restore_params(None)),
    found.load_tokenizer(),
    max_batch=values.max_batch,
    max_tokens=values.max_tokens,
  )
  results = lm_eval.simple_evaluate(
    model=adapter.Model(scorer, seed=values.seed),
    tasks=values.tasks,
    task_manager=manager,
    num_fewshot=values.num_fewshot,
    limit=values.limit,
    random_seed=values.seed,
    numpy_random_seed=values.seed,
    fewshot_random_seed=values.seed,
  )
  scores = {
    'checkpoint': found.describe(),
    'lm_eval': lm_eval.__version__,
    'num_fewshot': results['n-shot'],
    'num_documents': results['n-samples'],
    'results': results['results'],
  }
  for line in table(scores['results']):
    print(line)
  if values.output:
    text = strict_json.to_json(scores) + '\n'
    strict_json.write_atomically(pathlib.Path(values.output), text)
  return exits.DONE


def table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """A line for each score, with its standard error.

  Args:
    results: By task, as lm-eval gives them.
  """
  lines = []
  for task, scores in results.items():
    for name, value in scores.items():
      metric, _, kind = name.partition(',')
      if metric.endswith('_stderr') or not isinstance(value, float):
        continue
      error = scores.get(f'{metric}_stderr,{kind}')
      margin = f' +- {error:.4f}' if isinstance(error, float) else ''
      lines.append(f'{task} {metric} ({kind}): {value:.4f}{margin}')
  return lines


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f"Evaluating needs lm-eval ({error}); install the extra 'lm_eval'."
    ) from error


if __name__ == '__main__':
  command.main(define_flags, run)
