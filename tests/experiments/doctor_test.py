"""Tests of the checks before a run, with real sockets, files and processes."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from experiments import coordinator, health

_ROOT = pathlib.Path(__file__).parents[2]
_CPU = {'platform': 'cpu', 'count': 1, 'kind': 'cpu', 'memory': None}
_GPU = {
  'platform': 'gpu',
  'count': 8,
  'kind': 'NVIDIA H200',
  'memory': {'bytes_limit': 100 * 2**30, 'bytes_in_use': 2**30},
}


def _run(
  *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, '-m', 'experiments.doctor', *arguments],
    cwd=_ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', **environment},
    capture_output=True,
    text=True,
    check=False,
  )


def _devices(
  found: dict[str, Any] | str,
  *,
  want: str | None = None,
  num_devices: int | None = None,
) -> health.Check:
  checks = health.check_devices(found, want=want, num_devices=num_devices)
  return next(iter(checks))


@pytest.fixture(name='bare_machine')
def bare_machine_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
  """A machine without accelerator, plug-in or settings."""
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(health, '_DEVICE_FILES', {'tpu': (), 'gpu': ()})
  monkeypatch.setattr(health, '_PLUGINS', {'tpu': (), 'gpu': ()})


@contextlib.contextmanager
def _listener() -> Iterator[int]:
  with socket.socket() as server:
    server.bind(('127.0.0.1', 0))
    server.listen()
    yield server.getsockname()[1]


def _coordinator(
  address: str, *, process_id: int, num_hosts: int | None = 1
) -> health.Check:
  (check,) = coordinator.check(
    address, process_id=process_id, num_hosts=num_hosts, timeout_secs=1.0
  )
  return check


def test_a_healthy_machine_gets_a_line_per_check_and_exit_code_0(
  tmp_path: pathlib.Path,
) -> None:
  run = _run('--want=cpu', f'--workdir={tmp_path}', '--json')
  assert run.returncode == 0, run.stdout + run.stderr
  *lines, last = run.stdout.splitlines()
  answer = json.loads(last)
  assert answer['ok'] is True
  assert [check['name'] for check in answer['checks']] == [
    line.split()[1] if 'memory' not in line else ' '.join(line.split()[1:3])
    for line in lines
  ]
  assert {'python', 'jax', 'devices', 'workdir'} <= {
    check['name'] for check in answer['checks']
  }


def test_a_wish_that_is_not_met_fails_with_exit_code_1() -> None:
  run = _run('--want=tpu', '--devices=4')
  assert run.returncode == 1
  (line,) = [s for s in run.stdout.splitlines() if s.startswith('FAIL')]
  assert 'not tpu' in line
  assert 'pip install' in line or 'JAX_PLATFORMS' in line


@pytest.mark.parametrize(
  ('arguments', 'remedy'),
  [
    (('--want=abacus',), 'want'),
    (('--devices=0',), 'devices'),
    (('--nonsense',), 'nonsense'),
    (('nonsense',), 'nonsense'),
    (('--process_id=1',), '--coordinator'),
    (
      ('--coordinator=x', '--process_id=0', '--num_processes=2'),
      'HOST:PORT',
    ),
    (
      ('--coordinator=x:1', '--process_id=2', '--num_processes=2'),
      '--process_id=2',
    ),
  ],
)
def test_flags_that_make_no_sense_are_refused(
  arguments: tuple[str, ...], remedy: str
) -> None:
  run = _run(*arguments)
  assert run.returncode == 2
  (line,) = run.stderr.splitlines()
  assert remedy in line


@pytest.mark.parametrize(
  ('version', 'status'),
  [
    ('0.10.1', 'FAIL'),
    ('0.9.9', 'FAIL'),
    ('0.10.2', 'ok'),
    ('0.11.7', 'ok'),
    ('0.12.0.1', 'ok'),
    ('0.13.0', 'warn'),
    ('1.0', 'warn'),
  ],
)
def test_a_version_is_too_old_tested_or_untested(
  version: str, status: str
) -> None:
  check = health.judge_version(
    'jax', version, (0, 10, 2), ('0.10', '0.11', '0.12')
  )
  assert check.status == status


@pytest.mark.usefixtures('bare_machine')
def test_a_cpu_is_fine_where_there_is_nothing_else() -> None:
  assert _devices(_CPU).status == 'ok'


@pytest.mark.usefixtures('bare_machine')
def test_an_accelerator_that_stands_idle_fails(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  (tmp_path / 'nvidia0').touch()
  files = {'tpu': (), 'gpu': (str(tmp_path / 'nvidia*'),)}
  monkeypatch.setattr(health, '_DEVICE_FILES', files)
  check = _devices(_CPU)
  assert check.status == 'FAIL'
  assert 'pip install -e .[gpu]' in check.message
  monkeypatch.setattr(health, '_PLUGINS', {'tpu': (), 'gpu': ('json',)})
  assert 'driver' in _devices(_CPU).message
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert 'JAX_PLATFORMS=cpu' in _devices(_CPU).message
  assert _devices(_CPU, want='cpu').status == 'ok'


@pytest.mark.usefixtures('bare_machine')
def test_a_plug_in_without_its_device_fails(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(health, '_PLUGINS', {'tpu': ('json',), 'gpu': ()})
  check = _devices(_CPU)
  assert check.status == 'FAIL'
  assert 'no TPU is here' in check.message


def test_a_gpu_that_is_wanted_and_found_is_fine() -> None:
  devices, memory = health.check_devices(_GPU, want='gpu', num_devices=8)
  assert (devices.status, memory.status) == ('ok', 'ok')
  assert memory.message == '99.0 GiB free'


def test_another_number_of_devices_fails() -> None:
  assert _devices(_GPU, want='gpu', num_devices=16).status == 'FAIL'


def test_a_jax_that_fails_is_reported_in_its_own_words() -> None:
  check = _devices('JAX failed with code 1: no such driver')
  assert check.status == 'FAIL'
  assert 'no such driver' in check.message


def test_a_jax_that_hangs_is_given_up() -> None:
  answer = health.ask_jax(timeout_secs=0.01)
  assert isinstance(answer, str)
  assert 'did not answer' in answer


def test_a_workdir_that_is_yet_to_be_made_is_fine(
  tmp_path: pathlib.Path,
) -> None:
  (check,) = health.check_disk(tmp_path / 'a' / 'b')
  assert check.status in ('ok', 'warn')
  assert not (tmp_path / 'a').exists()


def test_a_workdir_that_is_a_file_fails(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'file').touch()
  (check,) = health.check_disk(tmp_path / 'file')
  assert check.status == 'FAIL'


def test_a_full_disk_fails(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  monkeypatch.setattr(health, '_MIN_DISK_BYTES', 2**80)
  (check,) = health.check_disk(tmp_path)
  assert check.status == 'FAIL'
  assert 'make room' in check.message


def test_settings_are_listed_and_forgotten_ones_warned_of(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=somewhere')
  monkeypatch.setenv('JAX_DEBUG_NANS', '1')
  monkeypatch.setenv('HOMEWARD', 'bound')
  found = {check.name: check for check in health.check_environment()}
  assert found['XLA_FLAGS'].message == '--xla_dump_to=somewhere'
  assert found['JAX_DEBUG_NANS'].status == 'warn'
  assert 'HOMEWARD' not in found


def test_the_others_reach_a_coordinator_that_listens() -> None:
  with _listener() as port:
    assert _coordinator(f'127.0.0.1:{port}', process_id=1).status == 'ok'


def test_a_coordinator_that_is_not_there_fails() -> None:
  with _listener() as port:
    pass
  check = _coordinator(f'127.0.0.1:{port}', process_id=1)
  assert check.status == 'FAIL'
  assert 'start process 0 first' in check.message


def test_process_0_wants_a_free_port() -> None:
  with _listener() as port:
    check = _coordinator(f'127.0.0.1:{port}', process_id=0)
    assert check.status == 'FAIL'
    assert 'another port' in check.message
  assert _coordinator(f'127.0.0.1:{port}', process_id=0).status == 'ok'


def test_process_0_must_run_at_its_address() -> None:
  # Of TEST-NET-1 (RFC 5737), which no machine has.
  check = _coordinator('192.0.2.1:1234', process_id=0)
  assert check.status == 'FAIL'
  assert 'not an address of this machine' in check.message


def test_several_machines_cannot_meet_at_a_loopback_address() -> None:
  for host in ('127.0.0.1', 'localhost', '[::1]'):
    check = _coordinator(f'{host}:1234', process_id=0, num_hosts=2)
    assert check.status == 'FAIL'
    assert 'in the network' in check.message


def test_a_name_without_an_address_fails() -> None:
  check = _coordinator('no-such-host.invalid:1234', process_id=1)
  assert check.status == 'FAIL'
  assert 'no address' in check.message


@hypothesis.given(st.text(max_size=30))
def test_no_text_breaks_the_reader_of_addresses(text: str) -> None:
  try:
    host, port = coordinator.parse_address(text)
  except ValueError as error:
    assert 'HOST:PORT' in str(error)
  else:
    assert host
    assert 0 < port < 2**16
