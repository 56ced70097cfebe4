"""Evaluation by lm-eval, whose own evaluator runs a task from a local file."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models.huggingface import export
from efficient_llm.training import likelihood, trained_run
from experiments import evaluate
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_CHOICES = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
_TEXTS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
_ANSWERS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["b"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
_DOCUMENTS = [
  {'question': 'ab', 'choices': [' cd', ' ab', 'c'], 'answer': 0},
  {'question': 'cd ab', 'choices': ['d', ' cd'], 'answer': 1},
  {'question': 'a', 'choices': ['b', ' b', 'd'], 'answer': 2},
]


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a checkpoint and tasks, data beside them."""
  folder = tmp_path_factory.mktemp('evaluate')
  model = dataclasses.replace(tiny.MODEL, init_std=0.3)
  export.write(folder / 'model', model, tiny.params(model))
  for name, content in tokenizer_lib.load('bytes').files().items():
    (folder / 'model' / name).write_bytes(content)
  (folder / 'tasks').mkdir()
  data = folder / 'tasks' / 'data.jsonl'
  data.write_text(''.join(json.dumps(one) + '\n' for one in _DOCUMENTS))
  for name, text in (
    ('choices', _CHOICES),
    ('texts', _TEXTS),
    ('answers', _ANSWERS),
  ):
    path = folder / 'tasks' / f'{name}.yaml'
    path.write_text(text.format(name=f'local_{name}', data=data))
  return folder


def _run(*arguments: str) -> tuple[int, str, str]:
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.evaluate', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_a_local_task_is_scored_by_the_evaluator_itself(
  base: pathlib.Path,
) -> None:
  pytest.importorskip('lm_eval', reason='needs the extra [lm_eval]')
  code, out, err = _run(
    f'--checkpoint=hf:{base / "model"}',
    '--tasks=local_choices,local_texts,local_answers',
    f'--include_path={base / "tasks"}',
    f'--output={base / "scores.json"}',
    '--max_batch=2',
  )
  assert code == 0, err
  results = json.loads((base / 'scores.json').read_text())['results']
  run = trained_run.find(f'hf:{base / "model"}', name='checkpoint')
  scorer = likelihood.Scorer(
    run.model, run.restore_params(None), run.load_tokenizer()
  )
  right = 0
  for document in _DOCUMENTS:
    found = scorer.continuations(
      (document['question'], choice) for choice in document['choices']
    )
    best = max(range(len(found)), key=lambda i: found[i].log_prob)
    right += best == document['answer']
  assert results['local_choices']['acc,none'] == pytest.approx(right / 3)
  assert 'local_choices acc (none)' in out
  assert results['local_texts']['byte_perplexity,none'] > 1
  assert 0 <= results['local_answers']['exact_match,none'] <= 1


def test_what_is_missing_is_said_in_one_line(base: pathlib.Path) -> None:
  code, out, err = _run(f'--checkpoint=hf:{base / "model"}')
  assert (code, out) == (2, '')
  assert err == 'error: --tasks must be given; see --help.\n'


def test_scores_have_a_line_each_with_their_error() -> None:
  scores = {'alias': 'x', 'acc,none': 0.25, 'acc_stderr,none': 0.125}
  assert evaluate.table({'x': {**scores, 'n,none': 'N/A'}}) == [
    'x acc (none): 0.2500 +- 0.1250'
  ]


def test_settings_of_answers_that_there_are_not_are_refused() -> None:
  pytest.importorskip('lm_eval', reason='needs the extra [lm_eval]')
  from efficient_llm.training import lm_eval_model

  until, config = lm_eval_model.read_settings({'until': 'x', 'top_k': 3})
  assert (until, config.temperature, config.top_k) == (['x'], 0.0, 3)
  drawn = {'do_sample': True, 'temperature': 0.5, 'max_gen_toks': 7}
  _, config = lm_eval_model.read_settings(drawn)
  assert (config.temperature, config.max_new_tokens) == (0.5, 7)
  with pytest.raises(ValueError, match='num_beams is none, leave it out'):
    lm_eval_model.read_settings({'num_beams': 4})
