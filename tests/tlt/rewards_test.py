"""Holds that reward functions are run as they should, and fail as they should.

Over 300 lines: every kind of failure is tried under either policy.
"""

import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from efficient_llm.tlt import reward_worker, rewards
from tests.tlt import reward_functions

_MODULE = reward_functions.__name__
_OBEY = f'{_MODULE}:obey'
_ROOT = pathlib.Path(__file__).parents[2]
# A parent that is killed while its worker hangs in 'regex' for it.
_PARENT = """
import sys
from efficient_llm.tlt import rewards
pool = rewards.RewardPool(rewards.RewardConfig(sys.argv[1], num_workers=1))
print(int(pool.score([''], ['pid'], {}).rewards_N[0]), flush=True)
pool.score([''], [sys.argv[2]], {})
"""


def _pool(
  function: str = 'obey',
  *,
  num_workers: int = 2,
  timeout_secs: float = 30.0,
  drop: bool = True,
) -> rewards.RewardPool:
  return rewards.RewardPool(
    rewards.RewardConfig(
      function=f'{_MODULE}:{function}',
      num_workers=num_workers,
      timeout_secs=timeout_secs,
      on_failure='drop' if drop else 'stop',
    )
  )


def _score(pool: rewards.RewardPool, orders: list[str]) -> rewards.Scores:
  return pool.score([''] * len(orders), orders, {})


def _pid(pool: rewards.RewardPool) -> int:
  return int(_score(pool, ['pid']).rewards_N[0])


def _is_running(pid: int) -> bool:
  """Whether there is such a process, other than one to be reaped."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'


def _wait_until(condition: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 20.0
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_rewards_come_in_the_order_of_the_rows() -> None:
  # Uneven times, so that chunks end in another order than they began.
  orders = [f'{i}' if i % 7 else 'sleep 0.02' for i in range(70)]
  with _pool() as pool:
    scores = _score(pool, orders)
  expected = [float(i) if i % 7 else 1.0 for i in range(70)]
  np.testing.assert_array_equal(scores.rewards_N, expected)
  assert scores.rewards_N.dtype == np.float64
  assert not scores.failed_N.any()
  assert not scores.unparsable_N.any()
  assert scores.secs > 0


def test_unparsable_completions_count_apart_from_wrong_ones() -> None:
  with _pool('is_right') as pool:
    scores = pool.score(
      ['?'] * 4, ['1', '2', 'two', ''], {'answer': ['1', '1', '1', '1']}
    )
  assert scores.rewards_N.tolist() == [1.0, 0.0, 0.0, 0.0]
  assert scores.unparsable_N.tolist() == [False, False, True, True]
  assert scores.failures == ()


def test_columns_stay_with_their_rows() -> None:
  numbers = [str(i) for i in range(50)]
  with _pool('is_right') as pool:
    scores = pool.score(numbers, numbers, {'answer': numbers})
  assert scores.rewards_N.tolist() == [1.0] * 50


def test_no_rows_give_no_rewards() -> None:
  with _pool() as pool:
    scores = _score(pool, [])
  assert scores.rewards_N.shape == scores.failed_N.shape == (0,)


def test_chunks_are_shared_by_all_workers() -> None:
  with _pool(num_workers=3) as pool:
    # Each is long enough for the other workers to take the next.
    scores = _score(pool, ['slow_pid'] * 12)
  assert len(set(scores.rewards_N)) == 3


def test_submissions_are_computed_while_the_caller_goes_on() -> None:
  with _pool(num_workers=2) as pool:
    slow = pool.submit([''], ['sleep 1'], {})
    quick = pool.submit([''], ['5'], {})
    assert quick.result().rewards_N.tolist() == [5.0]
    assert not slow.done()
    assert slow.result().rewards_N.tolist() == [1.0]


_FAULTS = {
  'raise': f'raised LookupError: no such thing ({reward_functions.__file__}, ',
  'leave': 'raised SystemExit: 0 (',
  'exit': 'ended its process (exit status 3)',
  'crash': 'ended its process (signal 11, ',
  'hang': 'was still running after ',
  'text': "returned '1.0', which is not a number",
  'nan': 'returned nan',
  'inf': 'returned inf',
}


@pytest.mark.parametrize('order', _FAULTS)
def test_stop_raises_one_line_that_names_the_failure(order: str) -> None:
  with (
    _pool(timeout_secs=0.5 if order == 'hang' else 30.0, drop=False) as pool,
    pytest.raises(rewards.RewardError) as caught,
  ):
    _score(pool, ['1', order, '3'])
  line = str(caught.value)
  assert line.startswith(f'{_OBEY} on row 1 {_FAULTS[order]}')
  assert line.endswith("; correct it, or set reward.on_failure to 'drop'.")
  assert '\n' not in line


@pytest.mark.parametrize('order', _FAULTS)
def test_drop_loses_the_failing_row_alone(order: str) -> None:
  # Several rows to a chunk, so that the others are to be rescued.
  orders = [str(i) for i in range(32)]
  orders[5] = order
  with _pool(timeout_secs=1.5 if order == 'hang' else 30.0) as pool:
    scores = _score(pool, orders)
  expected = np.arange(32.0)
  expected[5] = np.nan
  np.testing.assert_array_equal(scores.rewards_N, expected)
  assert np.flatnonzero(scores.failed_N).tolist() == [5]
  assert not scores.unparsable_N.any()
  (line,) = scores.failures
  assert line.startswith(f'{_OBEY} on row 5 {_FAULTS[order]}')


def test_an_exception_names_the_line_of_the_reward_function() -> None:
  source = pathlib.Path(reward_functions.__file__).read_text().splitlines()
  with _pool() as pool:
    (line,) = _score(pool, ['raise']).failures
  number = int(line.rpartition('line ')[2].removesuffix(')'))
  assert source[number - 1].strip().startswith('raise LookupError')


def test_several_failures_are_told_in_the_order_of_the_rows() -> None:
  orders = ['hang', '1', 'nan', 'exit', '2', 'raise']
  with _pool(timeout_secs=1.0) as pool:
    scores = _score(pool, orders)
  assert np.flatnonzero(scores.failed_N).tolist() == [0, 2, 3, 5]
  rows = [line.split(' on row ')[1].split()[0] for line in scores.failures]
  assert rows == ['0', '2', '3', '5']


@pytest.mark.parametrize(
  ('function', 'found'),
  [('too_few', '1 rewards'), ('nothing', 'a NoneType')],
)
def test_a_wrong_count_fails_all_rows_of_the_call(
  function: str, found: str
) -> None:
  # Tried one by one, the rows of `too_few` would pass.
  with _pool(function, num_workers=1) as pool:
    scores = _score(pool, ['1'] * 8)
  assert scores.failed_N.all()
  assert np.isnan(scores.rewards_N).all()
  assert scores.failures[0].endswith(
    f' on rows 0 to 1 returned {found}, not a list of 2 rewards'
  )


def test_a_failure_that_no_row_shows_alone_is_still_told() -> None:
  with _pool('fails_on_several', num_workers=1) as pool:
    scores = _score(pool, ['1'] * 8)
  assert scores.rewards_N.tolist() == [1.0] * 8
  assert not scores.failed_N.any()
  assert len(scores.failures) == 4
  assert 'on rows 0 to 1 raised ValueError: too many ' in scores.failures[0]
  assert scores.failures[3].endswith('but each row alone passed')


def test_a_hang_is_cut_off_near_the_limit() -> None:
  with _pool(num_workers=1, timeout_secs=0.5) as pool:
    began = time.monotonic()
    scores = _score(pool, ['hang'])
    assert 0.5 <= time.monotonic() - began < 3.0
  assert scores.failures[0].endswith('was still running after 0.5 s')


def test_a_regular_expression_that_never_ends_is_cut_off() -> None:
  with _pool(num_workers=1, timeout_secs=0.5) as pool:
    assert _score(pool, ['regex']).failed_N.all()


def test_a_submission_can_have_its_own_limit() -> None:
  with _pool() as pool:
    future = pool.submit([''], ['hang'], {}, timeout_secs=0.3)
    assert future.result().failures[0].endswith('after 0.3 s')


def test_other_submissions_outlive_a_hang() -> None:
  with _pool(timeout_secs=1.5, drop=False) as pool:
    bad = pool.submit([''], ['hang'], {})
    good = pool.submit([''] * 20, ['sleep 0.1'] * 20, {})
    assert good.result().rewards_N.tolist() == [1.0] * 20
    with pytest.raises(rewards.RewardError, match='still running'):
      bad.result()
    assert _score(pool, ['7']).rewards_N.tolist() == [7.0]


@pytest.mark.parametrize('order', ['exit', 'hang'])
def test_a_lost_worker_is_replaced(order: str) -> None:
  with _pool(num_workers=1, timeout_secs=0.5) as pool:
    before = _pid(pool)
    assert _score(pool, [order]).failed_N.all()
    assert _pid(pool) != before
    assert not _is_running(before)


def test_a_worker_killed_while_idle_costs_no_row() -> None:
  with _pool(num_workers=1, drop=False) as pool:
    before = _pid(pool)
    os.kill(before, signal.SIGKILL)
    _wait_until(lambda: not _is_running(before))
    assert _pid(pool) != before


def test_a_worker_that_ended_is_given_no_call() -> None:
  message = pickle.dumps({'prompts': [''], 'completions': ['pid']}), None
  workers = reward_worker.Workers(_OBEY, 1)
  try:
    while not workers.are_loaded:
      assert not list(workers.wait())
    assert workers.begin('first', message, timeout_secs=30.0)
    ((call, (kind, (pid,))),) = workers.wait()
    assert (call, kind) == ('first', 'scored')
    os.kill(int(pid), signal.SIGKILL)
    _wait_until(lambda: not _is_running(int(pid)))
    assert not workers.begin('second', message, timeout_secs=30.0)
  finally:
    workers.close()


def test_what_a_hanging_function_started_ends_with_it(
  capfd: pytest.CaptureFixture[str],
) -> None:
  with _pool(num_workers=1, timeout_secs=0.7) as pool:
    assert _score(pool, ['start']).failed_N.all()
  pid = int(capfd.readouterr().err)
  _wait_until(lambda: not _is_running(pid))


def test_closing_leaves_no_process() -> None:
  pool = _pool(num_workers=2)
  pids = {int(p) for p in _score(pool, ['slow_pid'] * 8).rewards_N}
  # One of them hangs while the pool is closed.
  future = pool.submit([''], ['hang'], {})
  assert all(_is_running(pid) for pid in pids)
  pool.close()
  pool.close()
  assert not any(_is_running(pid) for pid in pids)
  with pytest.raises(rewards.RewardError, match='closed'):
    future.result(timeout=5)
  with pytest.raises(rewards.RewardError, match='closed'):
    _score(pool, ['1'])


@pytest.mark.parametrize('order', ['hang', 'regex', 'sleep 0'])
def test_workers_end_when_the_parent_is_killed(order: str) -> None:
  parent = subprocess.Popen(
    [sys.executable, '-c', _PARENT, _OBEY, order],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    cwd=_ROOT,
  )
  assert parent.stdout
  pid = int(parent.stdout.readline())
  # Long enough for the order to arrive.
  time.sleep(0.2)
  parent.kill()
  parent.communicate()
  _wait_until(lambda: not _is_running(pid))


def test_ctrl_c_does_not_reach_a_worker() -> None:
  with _pool(num_workers=1) as pool:
    pid = _pid(pool)
    os.kill(pid, signal.SIGINT)
    assert _pid(pool) == pid
    assert os.getpgid(pid) != os.getpgrp()


def test_a_worker_imports_nothing_heavy() -> None:
  with _pool('num_heavy_modules') as pool:
    assert _score(pool, ['']).rewards_N.tolist() == [0.0]


def test_what_a_function_prints_goes_to_standard_error(
  capfd: pytest.CaptureFixture[str],
) -> None:
  with _pool() as pool:
    assert _score(pool, ['print']).rewards_N.tolist() == [1.0]
  assert capfd.readouterr() == ('', 'printed by the reward function\n')


def test_a_function_may_come_from_a_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / 'beside.py').write_text('REWARD = 0.25\n')
  (tmp_path / 'my-rewards.py').write_text(
    'import beside\n'
    'def reward(prompts, completions, level):\n'
    '  return tuple(beside.REWARD * each for each in level)\n'
  )
  monkeypatch.chdir(tmp_path)
  config = rewards.RewardConfig(function='my-rewards.py:reward')
  with rewards.RewardPool(config) as pool:
    scores = pool.score(['a', 'b'], ['c', 'd'], {'level': [2, 4]})
  assert scores.rewards_N.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
  ('function', 'reason'),
  [
    ('nowhere:reward', "ModuleNotFoundError: No module named 'nowhere'"),
    (f'{_MODULE}:missing', "has no attribute 'missing'"),
    (f'{_MODULE}:NOT_A_FUNCTION', 'it is a float, not a function'),
    ('missing.py:reward', 'FileNotFoundError: '),
  ],
)
def test_a_function_that_cannot_be_loaded_is_named_at_the_start(
  function: str, reason: str
) -> None:
  with pytest.raises(ValueError) as caught:
    rewards.RewardPool(rewards.RewardConfig(function=function))
  line = str(caught.value)
  assert line.startswith(f'reward.function={function!r} cannot be loaded: ')
  assert reason in line
  assert 'write module:function or path/to/file.py:function' in line
  assert '\n' not in line


@pytest.mark.parametrize(
  ('source', 'reason'),
  [
    ('import os\nos._exit(3)', 'ended its process (exit status 3)'),
    ('def reward(:', 'SyntaxError: '),
  ],
)
def test_a_file_that_fails_to_load_is_named_at_the_start(
  source: str, reason: str, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'bad.py').write_text(source)
  with pytest.raises(ValueError) as caught:
    rewards.RewardPool(rewards.RewardConfig(f'{tmp_path}/bad.py:reward'))
  assert reason in str(caught.value)


def test_a_file_that_never_loads_is_named_at_the_start(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(reward_worker, '_LOAD_LIMIT_SECS', 0.5)
  (tmp_path / 'bad.py').write_text('import time\ntime.sleep(600)')
  with pytest.raises(ValueError, match=r'still running after 0\.5 s'):
    rewards.RewardPool(rewards.RewardConfig(f'{tmp_path}/bad.py:reward'))


def test_a_function_that_can_no_longer_be_loaded_ends_the_wait(
  tmp_path: pathlib.Path,
) -> None:
  file = tmp_path / 'rewards.py'
  file.write_text('import os\ndef end(prompts, completions): os._exit(1)')
  config = rewards.RewardConfig(f'{file}:end', num_workers=1, on_failure='drop')
  with rewards.RewardPool(config) as pool:
    file.unlink()
    future = pool.submit([''] * 9, [''] * 9, {})
    with pytest.raises(rewards.RewardError, match='cannot be loaded'):
      future.result(timeout=10)


def test_rows_of_unequal_number_are_refused() -> None:
  with _pool('is_right') as pool, pytest.raises(ValueError, match='equal'):
    pool.score(['', ''], ['1', '1'], {'answer': ['1']})


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'function': 'no_place'}, "reward.function='no_place' must be module:"),
    ({'num_workers': 0}, 'reward.num_workers=0 must be at least 1.'),
    ({'timeout_secs': 0.0}, 'reward.timeout_secs=0.0 must be positive'),
    ({'on_failure': 'zero'}, "reward.on_failure='zero' must be 'stop' or"),
  ],
)
def test_a_configuration_is_checked(
  changes: dict[str, object], message: str
) -> None:
  config = rewards.RewardConfig()
  config.validate()
  for name, value in changes.items():
    object.__setattr__(config, name, value)
  with pytest.raises(ValueError) as caught:
    config.validate()
  assert str(caught.value).startswith(message)


def test_a_pool_needs_a_function() -> None:
  with pytest.raises(ValueError, match='function=None; write module:function'):
    rewards.RewardPool(rewards.RewardConfig())
