"""Tasks from files and packages take what is right and name what is not."""

import importlib
import json
import sys
import types

import numpy as np
import pytest

from efficient_llm.data.tasks import files, reasoning, registry, task

_JUICE = {
  'question': 'Ten cups of 1,200 drops each?',
  'answer': 'It is 10 * 1,200 = <<10*1200=12000>>12,000 drops.\n#### 12,000',
}


def _file(tmp_path, records, name='problems.jsonl'):
  path = tmp_path / name
  lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


def _numbered(count, *, prefix=''):
  return [{'prompt': f'{prefix}{i}?', 'answer': str(i)} for i in range(count)]


def _all(made):
  return {
    'train': [made.problem(i, split='train') for i in range(made.num_problems)],
    'validation': [
      made.problem(i, split='validation')
      for i in range(made.num_validation_problems)
    ],
  }


def _gsm8k(tmp_path, record):
  path = _file(tmp_path, [record])
  config = task.TaskConfig('gsm8k', path=path, validation_path=path)
  return registry.make(config)


def test_a_gsm8k_solution_comes_without_calculator_marks(tmp_path):
  problem = _gsm8k(tmp_path, _JUICE).problem(0, split='train')
  assert problem == task.Problem(
    prompt='Ten cups of 1,200 drops each?\n',
    answer='12000',
    worked='It is 10 * 1,200 = 12,000 drops.\n#### 12,000',
  )


def test_a_gsm8k_solution_is_rewarded_by_the_named_function(tmp_path):
  made = _gsm8k(tmp_path, _JUICE)
  module, _, function = made.reward.partition(':')
  reward = getattr(importlib.import_module(module), function)
  problem = made.problem(0, split='train')
  assert reward(['x'], [problem.worked], answer=[problem.answer]) == [1.0]


@pytest.mark.parametrize(
  ('completion', 'answer', 'reward'),
  [
    ('so\n#### 42', '42', 1.0),
    ('####42.0', '42', 1.0),
    ('#### 42.', '42', 1.0),
    ('#### $4,200', '4200', 1.0),
    ('#### 4 200', '4200', 1.0),
    ('#### 42 apples', '42', 1.0),
    ('#### .5', '0.5', 1.0),
    ('#### -3', '-3', 1.0),
    ('#### 41\n#### 42\n', '42', 1.0),
    ('#### 42\nand 43', '42', 1.0),
    ('#### 42\n#### 41', '42', 0.0),
    ('#### 42.01', '42', 0.0),
    ('#### 3', '-3', 0.0),
    ('42', '42', None),
    ('#### ', '42', None),
    ('#### none', '42', None),
    ('#### 42 or 43', '42', None),
    ('#### 84/2', '42', None),
    # More digits than Python reads.
    ('#### ' + '4' * 9999, '42', None),
  ],
)
def test_gsm8k_compares_the_number_behind_the_last_mark(
  completion, answer, reward
):
  assert files.gsm8k_reward(['?'], [completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
  ('completion', 'reward'),
  [
    ('first\nsecond\n blue \n\n', 1.0),
    ('blue', 1.0),
    ('Blue', 0.0),
    ('it is blue', 0.0),
    ('blue\nno', 0.0),
    ('no\x0bblue', 0.0),  # str.splitlines would end a line here
    (' \n', None),
  ],
)
def test_the_last_line_must_be_the_answer(completion, reward):
  assert files.last_line_reward(['?'], [completion], answer=['blue']) == [
    reward
  ]


def test_one_problem_in_twenty_is_held_out(tmp_path):
  path = _file(tmp_path, _numbered(2000))
  made = registry.make(task.TaskConfig('jsonl', path=path))
  splits = _all(made)
  # 100 are expected; five standard deviations are 49.
  assert 51 <= len(splits['validation']) <= 149
  prompts = [p.prompt for split in splits.values() for p in split]
  assert sorted(prompts) == sorted(f'{i}?' for i in range(2000))


def test_more_problems_or_another_seed_do_not_move_a_held_out_one(tmp_path):
  config = task.TaskConfig('jsonl', path=_file(tmp_path, _numbered(300)))
  more = task.TaskConfig(
    'jsonl', path=_file(tmp_path, _numbered(400), 'more.jsonl'), seed=1
  )
  held_out, more_held_out = (
    {p.prompt for p in _all(registry.make(c))['validation']}
    for c in (config, more)
  )
  assert held_out
  assert held_out == {p for p in more_held_out if int(p[:-1]) < 300}


def test_the_seed_sets_the_order(tmp_path):
  path = _file(tmp_path, _numbered(100))
  first, again, other = (
    _all(registry.make(task.TaskConfig('jsonl', path=path, seed=seed)))
    for seed in (0, 0, 1)
  )
  assert first == again
  assert first['train'] != other['train']
  assert set(first['train']) == set(other['train'])


def test_a_file_to_validate_on_leaves_all_others_to_train_on(tmp_path):
  config = task.TaskConfig(
    'jsonl',
    path=_file(tmp_path, _numbered(100)),
    validation_path=_file(tmp_path, _numbered(7, prefix='v'), 'more.jsonl'),
  )
  splits = _all(registry.make(config))
  assert len(splits['train']) == 100
  assert sorted(p.prompt for p in splits['validation']) == [
    f'v{i}?' for i in range(7)
  ]


def test_a_worked_solution_is_kept_where_there_is_one(tmp_path):
  records = [
    {'prompt': 'p', 'answer': ' 2 ', 'worked': '1 + 1\n2'},
    {'prompt': 'q', 'answer': '3', 'other': None},
  ]
  path = _file(tmp_path, records)
  config = task.TaskConfig('jsonl', path=path, validation_path=path)
  assert set(_all(registry.make(config))['train']) == {
    task.Problem('p', '2', '1 + 1\n2'),
    task.Problem('q', '3', None),
  }


def test_blank_lines_are_passed_over(tmp_path):
  path = _file(tmp_path, ['', *_numbered(3), ' '])
  config = task.TaskConfig('jsonl', path=path, validation_path=path)
  assert registry.make(config).num_problems == 3


@pytest.mark.parametrize('index', [-1, 3])
def test_a_problem_beyond_the_last_is_refused(tmp_path, index):
  path = _file(tmp_path, _numbered(3))
  config = task.TaskConfig('jsonl', path=path, validation_path=path)
  with pytest.raises(
    ValueError, match=f'index={index} must be from 0 to below the 3 train'
  ):
    registry.make(config).problem(index, split='train')


@pytest.mark.parametrize(
  ('name', 'line', 'message'),
  [
    ('jsonl', '{"prompt": "a"', "Expecting ',' delimiter"),
    ('jsonl', '[1]', r'must be a JSON object, found \[1\]'),
    ('jsonl', {'answer': '1'}, "key 'prompt' must be text, found None"),
    ('jsonl', {'prompt': 'a', 'answer': 1}, "key 'answer' must be text, .* 1"),
    ('jsonl', {'prompt': ' ', 'answer': '1'}, "'prompt' must be text"),
    ('jsonl', {'prompt': '\ud800', 'answer': '1'}, 'surrogates not allowed'),
    ('jsonl', {'prompt': 'a', 'answer': '1\n2'}, "'answer' must be one line"),
    (
      'jsonl',
      {'prompt': 'a', 'answer': '1', 'worked': 'b\n2'},
      "key 'worked' must end in the line '1' of 'answer', found '2'",
    ),
    ('jsonl', '[' * 99_999, 'recursion'),
    ('gsm8k', {'question': 'a', 'answer': '4'}, "must end in '#### NUMBER'"),
    ('gsm8k', {'answer': '#### 4'}, "key 'question' must be text"),
  ],
)
def test_a_bad_line_is_named(tmp_path, name, line, message):
  good = {'prompt': 'p', 'question': 'q', 'answer': '#### 1'}
  path = _file(tmp_path, [good, line])
  with pytest.raises(ValueError, match=message) as raised:
    registry.make(task.TaskConfig(name, path=path))
  assert str(raised.value).startswith(f'{path!r} line 2: ')
  assert '\n' not in str(raised.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_bytes(b'{"prompt": "\xff", "answer": "1"}\n')
  with pytest.raises(ValueError, match=r"bad.jsonl' line 1: .*can't decode"):
    registry.make(task.TaskConfig('jsonl', path=str(path)))


def test_a_missing_file_is_named(tmp_path):
  path = str(tmp_path / 'none.jsonl')
  with pytest.raises(ValueError, match=r"none.jsonl' must be a readable file"):
    registry.make(task.TaskConfig('jsonl', path=path))


def test_an_empty_file_is_refused(tmp_path):
  with pytest.raises(ValueError, match='must hold at least one problem'):
    registry.make(task.TaskConfig('jsonl', path=_file(tmp_path, [])))


def test_a_missing_package_is_named(monkeypatch):
  # None among the modules makes an import fail as if nothing were installed.
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(ValueError, match='pip install reasoning-gym') as raised:
    registry.make(task.TaskConfig('reasoning_gym', dataset='leg_counting'))
  assert '\n' not in str(raised.value)


class _Sums:
  """Stands in for a data set; a problem is made from seed plus index."""

  def __init__(self, seed):
    self._seed = seed

  def __getitem__(self, index):
    number = self._seed + index
    # A tuple and NumPy's scalars, as in some data sets of the package.
    metadata = {'difficulty': (1, np.int64(2)), 'names': [np.str_('Zoe')]}
    return {'question': f'{number}?', 'answer': '7', 'metadata': metadata}


@pytest.fixture
def gym(monkeypatch):
  def create_dataset(name, *, seed, size):
    if name != 'sums':
      raise ValueError(f"Dataset '{name}' not registered")
    assert size == 50
    return _Sums(seed)

  def verify(answer, entry):
    assert entry['metadata'] == {'difficulty': (1, 2), 'names': ['Zoe']}
    return 1.0 if answer == entry['answer'] else 0.25

  package = types.ModuleType('reasoning_gym')
  monkeypatch.setattr(package, 'create_dataset', create_dataset, raising=False)
  monkeypatch.setattr(
    package, 'get_score_answer_fn', lambda name: verify, raising=False
  )
  monkeypatch.setitem(sys.modules, 'reasoning_gym', package)
  config = task.TaskConfig('reasoning_gym', dataset='sums', dataset_size=50)
  return registry.make(config)


def test_the_package_judges_the_tagged_answer(gym):
  answer = gym.problem(3, split='train').answer
  completions = ['so <answer> 7\n</answer>', '<answer>8</answer>', '7']
  rewards = reasoning.reward([''] * 3, completions, answer=[answer] * 3)
  assert rewards == [1.0, 0.25, None]


def test_splits_of_the_package_share_no_problem(gym):
  train, validation = (
    {int(p.prompt.partition('?')[0]) for p in problems}
    for problems in _all(gym).values()
  )
  assert len(train) == len(validation) == 50
  # Not by luck: whatever is drawn for the seeds, they are on either side.
  assert max(train) < 2**30 <= min(validation)


def test_an_unknown_data_set_of_the_package_is_named(gym):
  del gym
  config = task.TaskConfig('reasoning_gym', dataset='none')
  with pytest.raises(ValueError, match="dataset='none' must be a data set"):
    registry.make(config)
