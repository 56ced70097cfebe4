"""Holds run.sh and .ci/run to their promises, with a pretended Python."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
# Stands in for a Python: its venv is a folder, its pip a log line.
_FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
  '- '*) exec '{python}' "$@" ;;
  '-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip')
    echo begin >>'{log}'
    sleep 0.2
    [[ ! -e '{broken}' ]] || exit 1
    echo end >>'{log}'
    ;;
  *) echo "ran $*" ;;
esac
"""


class Checkout:
  """A folder with run.sh, a lock and a Python that only pretends."""

  def __init__(self, root: pathlib.Path) -> None:
    self.root = root
    self.log = root / 'pip.log'
    self.broken = root / 'broken'
    self.python = root / 'fake_python'
    root.mkdir()
    shutil.copy(_ROOT / 'run.sh', root)
    shutil.copy(_ROOT / 'requirements.lock', root)
    self.python.write_text(
      _FAKE_PYTHON.format(
        python=sys.executable, log=self.log, broken=self.broken
      )
    )
    self.python.chmod(0o755)

  def start(self, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
      [self.root / 'run.sh', *args],
      cwd=self.root.parent,
      env={**os.environ, 'PYTHON': str(self.python)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def run(self, *args: str) -> tuple[int, str, str]:
    process = self.start(*args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def num_installs(self) -> int:
    return self.log.read_text().split().count('begin')


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
  return Checkout(tmp_path / 'a folder')


def test_run_sets_up_once(checkout: Checkout) -> None:
  assert checkout.run('echo', 'hello')[:2] == (0, 'hello\n')
  assert checkout.run('echo', 'again') == (0, 'again\n', '')
  assert checkout.num_installs() == 1


def test_run_remakes_an_environment_whose_installation_failed(
  checkout: Checkout,
) -> None:
  checkout.broken.touch()
  status, out, err = checkout.run('echo', 'hello')
  assert (status, out) == (1, '')
  assert err.endswith('failed; run again to retry.\n')
  checkout.broken.unlink()
  assert checkout.run('echo', 'hello')[:2] == (0, 'hello\n')
  assert checkout.num_installs() == 2


def test_run_remakes_an_environment_that_was_cut_short(
  checkout: Checkout,
) -> None:
  process = checkout.start('echo', 'hello')
  while not checkout.log.exists():
    assert process.poll() is None
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  assert checkout.run('echo', 'hello')[:2] == (0, 'hello\n')
  assert checkout.num_installs() == 2


def test_run_remakes_an_environment_that_lost_its_python(
  checkout: Checkout,
) -> None:
  checkout.run('true')
  (checkout.root / '.venv/bin/python').unlink()
  assert checkout.run('true')[0] == 0
  assert checkout.num_installs() == 2


def test_run_remakes_the_environment_for_another_lock(
  checkout: Checkout,
) -> None:
  checkout.run('true')
  with (checkout.root / 'requirements.lock').open('a') as lock:
    lock.write('# changed\n')
  assert checkout.run('true')[0] == 0
  assert checkout.num_installs() == 2


@pytest.mark.skipif(not shutil.which('flock'), reason='run.sh locks by flock')
def test_two_runs_at_once_set_up_once(checkout: Checkout) -> None:
  both = [checkout.start('echo', 'hello') for _ in range(2)]
  assert [p.communicate()[0] for p in both] == ['hello\n', 'hello\n']
  assert checkout.log.read_text().split() == ['begin', 'end']


def test_run_keeps_the_folder_the_arguments_and_the_status(
  checkout: Checkout,
) -> None:
  status, out, _ = checkout.run(
    'bash', '-c', 'pwd; echo "$1"; exit 7', '', 'a b'
  )
  assert (status, out) == (7, f'{checkout.root.parent}\na b\n')


def test_run_without_arguments_does_the_main_job(checkout: Checkout) -> None:
  for arguments, workdir in (((), 'end_to_end'), (('--quick',), '_quick')):
    out = checkout.run(*arguments)[1]
    assert out.startswith('ran -m experiments.end_to_end ')
    assert workdir in out
  assert ':quick' in out


def test_run_test_hands_its_arguments_to_pytest(checkout: Checkout) -> None:
  out = checkout.run('test', '--slow', '-k', 'one thing')[1]
  assert out.startswith('ran -m pytest ')
  assert out.endswith('--slow -k one thing\n')


def test_run_refuses_a_python_that_is_missing_or_too_old(
  checkout: Checkout,
) -> None:
  checkout.python.write_text('#!/bin/bash\nexit 1\n')
  status, out, err = checkout.run('true')
  assert (status, out) == (2, '')
  assert err.count('\n') == 1
  assert 'Python 3.11 or later' in err
  assert 'set PYTHON=' in err


def test_run_names_the_package_that_lacks_when_venv_does(
  checkout: Checkout,
) -> None:
  text = checkout.python.read_text()
  checkout.python.write_text(text.replace('mkdir -p "$3/bin"', 'false'))
  status, _, err = checkout.run('true')
  assert status == 1
  assert 'apt install python3-venv' in err


def test_continuous_integration_fails_when_a_test_fails(
  checkout: Checkout,
) -> None:
  shutil.copytree(_ROOT / '.ci', checkout.root / '.ci')
  text = checkout.python.read_text()
  checkout.python.write_text(text.replace('echo "ran $*"', 'exit 1'))
  run = subprocess.run(
    ['bash', '.ci/run'],
    cwd=checkout.root,
    env={**os.environ, 'CI': 'true', 'PYTHON': str(checkout.python)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    check=False,
  )
  assert run.returncode == 1
