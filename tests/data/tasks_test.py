"""Problems are reproducible, solvable as worked, and judged exactly.

Over 300 lines: one file for a package of small modules, most of it tables.
"""

import collections
import importlib
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from efficient_llm.data import tokenizer
from efficient_llm.data.tasks import registry, task, words

_GENERATORS = ('trace', 'arithmetic', 'countdown', 'sorting')
# The least of each difficulty, where held-out prompts are hardest to find.
_EASIEST = (
  task.TaskConfig('trace', max_steps=1),
  task.TaskConfig('arithmetic', max_digits=1),
  task.TaskConfig('countdown', max_numbers=2),
  task.TaskConfig('sorting', max_items=2),
)
_STEP = re.compile(
  r'v (\d) (\d) (even|odd) so add ([de]) (\d) (\d) ; '
  r'(\d) \+ (\d) = (\d) (\d) , (\d) \+ (\d) \+ (\d) = (\d) (\d) ;'
)
# From 37: by 41 as it is odd, then 78 by 26 as it is even, and 104 is 04.
_PROMPT = 'x 3 7 d 2 6 e 4 1 ='
_WRITTEN = (
  'v 3 7 odd so add e 4 1 ; 7 + 1 = 0 8 , 3 + 4 + 0 = 0 7 ; '
  'v 7 8 even so add d 2 6 ; 8 + 6 = 1 4 , 7 + 2 + 1 = 1 0 ; v 0 4 done'
)


def _problems(config, count, split: task.Split = 'train'):
  made = registry.make(config)
  return [made.problem(index, split=split) for index in range(count)]


def _worked(problem):
  """Returns the worked solution, which these tasks always have."""
  assert problem.worked
  return problem.worked


def _judge(name, completions, answers, **settings):
  module, _, function = registry.make(
    task.TaskConfig(name, **settings)
  ).reward.partition(':')
  reward = getattr(importlib.import_module(module), function)
  prompts = [''] * len(completions)
  return reward(prompts, completions, answer=answers, ignored=prompts)


def _true_trace(prompt):
  """Writes a trace once more, by way of the sum's own digits."""
  x, d, e = (int(a + b) for a, b in re.findall(r'(\d) (\d)', prompt))
  text = ''
  while x >= 10:
    by, rule = (e, 'odd so add e') if x & 1 else (d, 'even so add d')
    (a, b), (p, q) = f'{x:02}', f'{by:02}'
    ones = f'{int(b) + int(q):02}'
    tens = f'{int(a) + int(p) + int(ones[0]):02}'
    text += f'v {a} {b} {rule} {p} {q} ; {b} + {q} = {" ".join(ones)} , '
    text += f'{a} + {p} + {ones[0]} = {" ".join(tens)} ; '
    x = (x + by) % 100
  return f'{text}v 0 {x} done'


@pytest.mark.parametrize('name', _GENERATORS)
def test_every_worked_solution_is_rewarded(name):
  problems = _problems(task.TaskConfig(name), 200)
  worked = [problem.worked for problem in problems]
  answers = [problem.answer for problem in problems]
  assert _judge(name, worked, answers) == [1.0] * 200


@pytest.mark.parametrize('name', _GENERATORS)
def test_the_worked_solution_of_another_problem_is_not_rewarded(name):
  problems = _problems(task.TaskConfig(name), 20)
  first = problems[0]
  others = [p.worked for p in problems[1:] if p.answer != first.answer]
  rewards = _judge(name, others, [first.answer] * len(others))
  assert rewards == [0.0] * len(others)
  assert len(others) > 15


@pytest.mark.parametrize('name', _GENERATORS)
def test_a_cut_off_completion_is_unparsable(name):
  (problem,) = _problems(task.TaskConfig(name), 1)
  worked = _worked(problem)
  cut = worked.rpartition('\n')[0] or worked.removesuffix(' done')
  assert _judge(name, [cut, ''], [problem.answer] * 2) == [None, None]


@pytest.mark.parametrize('name', _GENERATORS)
def test_a_problem_does_not_depend_on_those_made_before(name):
  config = task.TaskConfig(name, slip=0.3 if name == 'trace' else 0.0)
  in_order = _problems(config, 8)
  made = registry.make(config)
  backwards = [made.problem(i, split='train') for i in reversed(range(8))]
  assert backwards[::-1] == in_order


@pytest.mark.parametrize(
  ('name', 'prompt'),
  [
    ('trace', 'x 4 0 d 3 1 e 4 1 ='),
    ('arithmetic', 'Compute 7 * 4.\n'),
    (
      'countdown',
      'Make 111 from the numbers 13 29 19 50, each at most once, '
      'with + - * / and brackets.\n',
    ),
    ('sorting', 'Sort 34 34 12 16 37.\n'),
  ],
)
def test_a_problem_is_the_same_on_every_machine(name, prompt):
  # To regenerate, print the prompt; doing so changes every run's problems.
  assert _problems(task.TaskConfig(name), 1)[0].prompt == prompt


@pytest.mark.parametrize('name', _GENERATORS)
def test_another_seed_gives_other_problems(name):
  first, second = (
    {p.prompt for p in _problems(task.TaskConfig(name, seed=seed), 20)}
    for seed in (0, 1)
  )
  assert len(first & second) < 5


@pytest.mark.parametrize('config', _EASIEST, ids=lambda config: config.name)
def test_no_validation_prompt_is_ever_trained_on(config):
  train = {p.prompt for p in _problems(config, 1000)}
  validation = {p.prompt for p in _problems(config, 40, 'validation')}
  assert validation
  assert not train & validation


def test_traces_have_a_long_tail():
  lengths = [
    len(_worked(p).split()) for p in _problems(task.TaskConfig('trace'), 2000)
  ]
  median, longest = np.percentile(lengths, [50, 99])
  # 3.6 for these problems; 3 is what is asked of a task with a long tail.
  assert longest / median > 3.3


@pytest.mark.parametrize('name', ['arithmetic', 'countdown', 'sorting'])
def test_other_solutions_have_a_long_tail(name):
  lengths = [len(_worked(p)) for p in _problems(task.TaskConfig(name), 2000)]
  median, longest = np.percentile(lengths, [50, 99])
  # 12.6, 4.6 and 5.0 for these problems.
  assert longest / median > 4


def test_a_trace_is_written_as_documented():
  assert _true_trace(_PROMPT) == _WRITTEN


def test_every_answer_is_the_true_trace():
  for problem in _problems(task.TaskConfig('trace'), 300):
    assert problem.answer == _true_trace(problem.prompt)


def test_a_trace_counts_only_if_every_word_is_right():
  num_words = len(_WRITTEN.split())
  altered = []
  for place in range(num_words - 1):
    words_of = _WRITTEN.split()
    words_of[place] = '9' if words_of[place] != '9' else '8'
    altered.append(' '.join(words_of))
  rewards = _judge('trace', altered, [_WRITTEN] * len(altered))
  assert rewards == [0.0] * (num_words - 1)


def test_a_trace_may_be_spaced_in_any_way():
  completion = '\n' + _WRITTEN.replace(' ; ', ' ;\n') + ' '
  assert _judge('trace', [completion], [_WRITTEN]) == [1.0]


@pytest.mark.parametrize('max_steps', [1, 5])
def test_no_trace_is_longer_than_allowed(max_steps):
  config = task.TaskConfig('trace', max_steps=max_steps, slip=0.5)
  for problem in _problems(config, 100):
    for text in (problem.answer, _worked(problem)):
      assert text.count('so add') <= max_steps


def test_steps_slip_as_often_as_asked():
  num_steps = num_slips = 0
  for problem in _problems(task.TaskConfig('trace', slip=0.08), 1000):
    for step in _STEP.findall(_worked(problem)):
      num_steps += 1
      num_slips += _num_wrong_digits(step) > 0
  # Six standard deviations of 6,000 steps are 0.02; long traces are redrawn.
  assert num_slips / num_steps == pytest.approx(0.08, abs=0.02)


def test_a_slip_never_writes_the_right_digit():
  problems = _problems(task.TaskConfig('trace', slip=1 - 1e-9), 100)
  steps = [s for p in problems for s in _STEP.findall(_worked(p))]
  assert len(steps) > 100
  assert all(_num_wrong_digits(step) == 1 for step in steps)


def test_a_slip_replaces_one_digit_and_the_trace_goes_on_from_it():
  config = task.TaskConfig('trace', slip=0.3)
  wrong = collections.Counter()
  for problem in _problems(config, 200):
    steps = _STEP.findall(_worked(problem))
    wrong.update(map(_num_wrong_digits, steps))
    values = [step[0] + step[1] for step in steps]
    results = [step[14] + step[9] for step in steps]
    last = ''.join(_worked(problem).split()[-3:-1])
    assert [*values[1:], last] == results
    assert int(last) < 10
  assert wrong[1] > 100
  assert set(wrong) == {0, 1}


def _num_wrong_digits(step):
  tens, ones, parity, by, more_tens, more_ones, *sums = step
  assert (parity, by) == (('odd', 'e') if int(ones) % 2 else ('even', 'd'))
  low = f'{int(ones) + int(more_ones):02}'
  high = f'{int(tens) + int(more_tens) + int(low[0]):02}'
  right = [ones, more_ones, *low, tens, more_tens, low[0], *high]
  return sum(a != b for a, b in zip(right, sums, strict=True))


def test_slips_change_neither_prompts_nor_answers():
  with_slips = _problems(task.TaskConfig('trace', slip=0.5), 50)
  without = _problems(task.TaskConfig('trace'), 50)
  assert [(p.prompt, p.answer) for p in with_slips] == [
    (p.prompt, p.answer) for p in without
  ]
  assert [p.worked for p in with_slips] != [p.worked for p in without]


def test_validation_problems_have_no_slips():
  problems = _problems(task.TaskConfig('trace', slip=0.9), 20, 'validation')
  assert all(p.worked == p.answer for p in problems)


@pytest.mark.parametrize('sign', ['+', '*'])
def test_every_line_of_long_hand_is_true(sign):
  problems = _problems(task.TaskConfig('arithmetic'), 200)
  lines = [
    line
    for p in problems
    if f' {sign} ' in p.prompt
    for line in _worked(p).split('\n')
    if '=' in line
  ]
  assert len(lines) > 200
  for line in lines:
    terms, total, *rest = re.split(' = |, ', line)
    assert _calculate(terms) == int(total)
    if rest:
      carry, write = divmod(int(total), 10)
      assert rest == [f'write {write}', f'carry {carry}']


def _calculate(terms):
  """Adds up products of non-negative integers."""
  return sum(
    int(np.prod([int(f) for f in term.split(' * ')], dtype=object))
    for term in terms.split(' + ')
  )


def test_an_arithmetic_answer_solves_its_prompt():
  for problem in _problems(task.TaskConfig('arithmetic'), 100):
    terms = problem.prompt.removeprefix('Compute ').removesuffix('.\n')
    assert int(problem.answer) == _calculate(terms)


def test_all_numbers_of_digits_are_drawn():
  problems = _problems(task.TaskConfig('arithmetic', max_digits=4), 300)
  numbers = [n for p in problems for n in re.findall(r'\d+', p.prompt)]
  assert {len(number) for number in numbers} == {1, 2, 3, 4}


@pytest.mark.parametrize(
  ('final', 'reward'),
  [
    ('answer: 562', 1.0),
    ('so the answer: 1\nanswer:  0562 \n', 1.0),
    ('answer: 563', 0.0),
    ('answer: -562', 0.0),
    ('562', None),
    ('answer:', None),
    ('answer: 562 or 563', None),
    ('answer: 562 563', None),
    ('answer: 562.', None),
    # More digits than Python reads.
    (f'answer: {"5" * 9999}', None),
  ],
)
def test_arithmetic_compares_the_number_behind_the_last_mark(final, reward):
  assert _judge('arithmetic', [final], ['562']) == [reward]


@pytest.mark.parametrize(
  ('expression', 'reward'),
  [
    ('6 * 7 - 3', 1.0),
    ('(7*6)-3', 1.0),
    # 39, but with more threes than were given.
    ('7 / 3 * 6 * 3 - 3', 0.0),
    ('13 * 3', 0.0),
    ('6 * 6 + 3', 0.0),
    ('6 + 7 + 3', 0.0),
    ('3 / (6 - 6)', 0.0),
    ('3 / (7 - 6 - 1)', 0.0),
    ('7 / (3 - 6 / 2)', 0.0),
    ('6 ** 2 + 3', None),
    ('-3 + 6 * 7', None),
    ('6(7)', None),
    ('()', None),
    ('6 * 7 -', None),
    ('6 * 7 - 3 = 39', None),
    ('39.0', None),
    ('__import__("os")', None),
    ('(' * 9999, None),
    ('3 ' + '+ 3' * 9999, None),
  ],
)
def test_countdown_takes_any_right_expression(expression, reward):
  answer = json.dumps({'numbers': [7, 3, 6, 2], 'target': 39})
  assert _judge('countdown', [f'answer: {expression}'], [answer]) == [reward]


def test_countdown_divides_exactly():
  # In floating point 1 / 49 * 49 is below 1.
  answer = json.dumps({'numbers': [1, 49, 49], 'target': 1})
  assert 1 / 49 * 49 != 1
  assert _judge('countdown', ['answer: 1 / 49 * 49'], [answer]) == [1.0]


def test_attempts_of_a_countdown_search_are_true():
  calculated = set()
  for problem in _problems(task.TaskConfig('countdown'), 200):
    *lines, _ = _worked(problem).split('\n')
    for line in lines:
      expression, value, verdict = re.split(' = |, ', line)
      target = json.loads(problem.answer)['target']
      assert (int(value) == target) == (verdict == 'yes')
      answer = json.dumps(
        {
          'numbers': json.loads(problem.answer)['numbers'],
          'target': int(value),
        }
      )
      completion = f'answer: {expression}'
      assert _judge('countdown', [completion], [answer]) == [1.0]
      calculated.add(verdict)
  assert calculated == {'yes', 'no'}


@pytest.mark.parametrize(
  ('completion', 'reward'),
  [
    ('answer: 1 3 3 9', 1.0),
    ('answer: 1 3 9', 0.0),
    ('answer: 1 3 9 3', 0.0),
    ('answer: 1 3 3 x', None),
    ('1 3 3 9', None),
  ],
)
def test_sorting_compares_lists(completion, reward):
  assert _judge('sorting', [completion], ['1 3 3 9']) == [reward]


def test_sorting_takes_the_least_of_what_is_left():
  made = registry.make(task.TaskConfig('sorting', max_items=5))
  problem = made.problem(0, split='train')
  assert problem.prompt == 'Sort 34 34 12 16 37.\n'
  assert problem.worked == (
    'take 12, left 34 34 16 37\n'
    'take 16, left 34 34 37\n'
    'take 34, left 34 37\n'
    'take 34, left 37\n'
    'answer: 12 16 34 34 37'
  )


def test_a_sorting_answer_holds_the_numbers_of_its_prompt_in_order():
  for problem in _problems(task.TaskConfig('sorting'), 100):
    asked = [int(n) for n in re.findall(r'\d+', problem.prompt)]
    answer = [int(n) for n in problem.answer.split()]
    assert collections.Counter(asked) == collections.Counter(answer)
    assert all(a <= b for a, b in itertools.pairwise(answer))


def test_rewards_need_neither_jax_nor_a_tokenizer():
  names = sorted(
    {
      registry.make(task.TaskConfig(name)).reward.partition(':')[0]
      for name in _GENERATORS
    }
    | {f'{task.__package__}.files', f'{task.__package__}.reasoning'}
  )
  code = (
    'import importlib, sys\n'
    f'for name in {names}: importlib.import_module(name)\n'
    "heavy = {'jax', 'tokenizers', 'pyarrow'} & set(sys.modules)\n"
    'sys.exit(str(heavy) if heavy else 0)'
  )
  run = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=False
  )
  assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'name': 'chess'}, r"name='chess' must be one of \('trace', .*task.name"),
    ({'seed': -1}, r'seed=-1 must be from 0 to 4294967295; set task.seed'),
    ({'slip': 1.0}, r'slip=1.0 must be in \[0, 1\); set task.slip'),
    ({'slip': float('nan')}, 'slip=nan must be in'),
    ({'max_steps': 0}, 'max_steps=0 must be from 1 to 1000'),
    (
      {'name': 'sorting', 'slip': 0.1},
      'slip=0.1 must be left alone .* belongs to trace; set task.slip=0.0',
    ),
    ({'path': 'x'}, "path='x' must be left alone .* gsm8k and jsonl"),
    ({'name': 'arithmetic', 'max_digits': 19}, 'max_digits=19 must be'),
    ({'name': 'countdown', 'max_numbers': 1}, 'max_numbers=1 must be'),
    ({'name': 'sorting', 'max_items': 1}, 'max_items=1 must be'),
    ({'name': 'gsm8k'}, "path=None must name the file of task 'gsm8k'"),
    ({'name': 'reasoning_gym'}, 'dataset=None must name a data set'),
  ],
)
def test_a_wrong_setting_is_refused_in_one_line(settings, message):
  with pytest.raises(ValueError, match=message) as raised:
    registry.make(task.TaskConfig(**settings))
  assert '\n' not in str(raised.value)


def _word_tokenizer(tmp_path, vocabulary):
  path = tmp_path / 'tokenizer.json'
  path.write_text(words.tokenizer_json(vocabulary))
  return tokenizer.load(str(path))


def test_every_text_of_a_word_level_task_round_trips(tmp_path):
  made = registry.make(task.TaskConfig('trace', slip=0.2))
  encoder = _word_tokenizer(tmp_path, made.words)
  for index in range(100):
    problem = made.problem(index, split='train')
    for text in (problem.prompt, problem.answer, _worked(problem)):
      tokens = encoder.encode(text)
      assert len(tokens) == len(text.split())
      assert encoder.decode(tokens) == text


def test_special_tokens_come_first(tmp_path):
  encoder = _word_tokenizer(tmp_path, ['a', 'b'])
  assert (encoder.pad_id, encoder.bos_id, encoder.eos_id) == (0, 1, 2)
  assert encoder.special_ids == {0, 1, 2}
  assert encoder.encode('b a').tolist() == [4, 3]
  assert encoder.vocab_size == 5


def test_documents_of_words_are_framed(tmp_path):
  encoder = _word_tokenizer(tmp_path, ['a', 'b'])
  tokens, lengths = encoder.encode_documents([b'a b', b'b'])
  assert tokens.tolist() == [1, 3, 4, 2, 1, 4, 2]
  assert lengths.tolist() == [4, 3]


def test_decoding_leaves_special_tokens_out(tmp_path):
  encoder = _word_tokenizer(tmp_path, ['a', 'b'])
  assert encoder.decode([1, 3, 4, 2, 0, 0]) == 'a b'


@pytest.mark.parametrize('text', ['a c', 'ab', 'A', '<|eos|>', 'a <|pad|> b'])
def test_an_unknown_word_is_refused(tmp_path, text):
  encoder = _word_tokenizer(tmp_path, ['a', 'b'])
  with pytest.raises(ValueError, match=r'of the 2 words .*, such as a b;'):
    encoder.encode(text)
  with pytest.raises(ValueError, match='of the 2 words'):
    encoder.encode_documents([b'a', text.encode()])


@pytest.mark.parametrize(
  ('vocabulary', 'message'),
  [
    (['a', ''], "word='' must be text without blanks"),
    (['a b'], "word='a b' must be text without blanks"),
    (['<|eos|>'], r"word='<\|eos\|>' must be"),
    (['a', 'b', 'a'], r"words must differ, found \['a'\] repeated"),
  ],
)
def test_a_word_that_would_not_round_trip_is_refused(vocabulary, message):
  with pytest.raises(ValueError, match=message):
    words.tokenizer_json(vocabulary)
