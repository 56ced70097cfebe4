"""Tests of what every binary does before its run."""

import errno
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from efficient_llm.training import pretrain, strict_json
from experiments import runner

Refusal = Callable[[Callable[[], Any]], str]


@pytest.mark.parametrize('kind', ['file', 'below a file', 'no file system'])
def test_a_workdir_that_cannot_be_written_is_refused(
  kind: str, tmp_path: pathlib.Path, refusal: Refusal
) -> None:
  (tmp_path / 'file').touch()
  folder = {
    'file': tmp_path / 'file',
    'below a file': tmp_path / 'file' / 'run',
    'no file system': pathlib.Path('/proc/run'),
  }[kind]
  line = refusal(
    functools.partial(runner.write_config, pretrain.PretrainConfig(), folder)
  )
  assert f'--workdir={folder} must be a writable folder' in line


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_workdir_is_refused(
  tmp_path: pathlib.Path, refusal: Refusal
) -> None:
  tmp_path.chmod(0o500)
  task = functools.partial(
    runner.write_config, pretrain.PretrainConfig(), tmp_path
  )
  assert 'Permission denied; choose another' in refusal(task)


def _disk_full(path: Any, text: str) -> int:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_refused_when_the_configuration_is_written(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  refusal: Refusal,
) -> None:
  monkeypatch.setattr(strict_json, 'write_atomically', _disk_full)
  task = functools.partial(
    runner.write_config, pretrain.PretrainConfig(), tmp_path
  )
  assert 'No space left on device' in refusal(task)


def test_overrides_are_told_from_flags() -> None:
  others, found = runner.split_overrides(
    ['x', '--config=a', '--config.b=c=d', '--config.e', 'f', '--g']
  )
  assert others == ['x', '--config=a', '--g']
  assert found == {'b': 'c=d', 'e': 'f'}


@pytest.mark.parametrize('rest', [[], ['--workdir=x'], ['--config.b=1']])
def test_an_override_without_a_value_is_refused(rest: list[str]) -> None:
  with pytest.raises(ValueError, match=r'write --config\.a=VALUE'):
    runner.split_overrides(['--config.a', *rest])


@pytest.mark.parametrize(
  ('flags', 'expected'),
  [
    ({'num_processes': 2}, 'must be given together'),
    ({'process_id': 0, 'coordinator': 'a:1'}, 'must be given together'),
    ({'coordinator': 'host'}, 'must be HOST:PORT'),
    ({'coordinator': 'host:99999'}, 'must be HOST:PORT'),
    ({'process_id': 2}, 'count processes from 0'),
    ({'process_id': -1}, 'count processes from 0'),
    ({'num_processes': 0}, 'count processes from 0'),
  ],
)
def test_flags_of_several_processes_that_do_not_fit_are_refused(
  flags: dict[str, Any], expected: str, refusal: Refusal
) -> None:
  if 'together' not in expected:
    flags = {
      'coordinator': 'localhost:1', 'num_processes': 2, 'process_id': 0, **flags
    }  # fmt: skip
  task = functools.partial(runner.start_jax, **flags)
  assert expected in refusal(task)


def test_a_platform_that_is_not_there_is_refused(
  refusal: Refusal,
) -> None:
  missing = 'tpu' if jax.default_backend() != 'tpu' else 'cpu'
  task = functools.partial(runner.start_jax, platform=missing)
  assert 'python -m experiments.doctor' in refusal(task)
