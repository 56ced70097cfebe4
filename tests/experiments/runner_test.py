"""Tests of what every binary does: bad input gives one line and code 2."""

import dataclasses
import errno
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest

from efficient_llm.data import pipeline
from efficient_llm.models import sampling
from efficient_llm.training import loop, pretrain, step, strict_json
from experiments import exits, runner
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
# What each case changes in a run of 300 short lines of text.
_REFUSED_RUNS: dict[str, tuple[dict[str, str], str]] = {
  'missing path': ({'data.path': '/nowhere/at/all'}, "'/nowhere/at/all' must"),
  'folder without text': ({'data.path': '{tmp}/empty'}, 'must hold files'),
  'empty file': ({'data.path': '{tmp}/empty.txt'}, 'text'),
  'binary file': ({'data.path': '{tmp}/binary.txt'}, 'binary.txt'),
  'record without the text key': ({'data.path': '{tmp}/a.jsonl'}, "'text'"),
  'invalid UTF-8 refused': (
    {'data.path': '{tmp}/latin.txt', 'data.invalid_utf8': 'refuse'},
    'latin.txt',
  ),
  'sequence longer than positions': (
    {'data.sequence_length': '65'},
    'data.sequence_length=65 must not exceed model.max_positions=64',
  ),
  'vocabulary smaller than the tokenizer': (
    {'model.vocab_size': '100'},
    'model.vocab_size=100 must be at least',
  ),
  'objective of the other kind': (
    {'data.objective': 'masked'},
    'needs data.objective=causal',
  ),
  'batch that microbatches do not divide': (
    {'loop.num_microbatches': '3'},
    'data.batch_size=8 must be divisible by',
  ),
  'empty mesh axis': ({'mesh.data': '0'}, 'mesh.data=0'),
  'more devices than there are': ({'mesh.data': '999'}, 'num_devices'),
  'warm-up as long as the run': (
    {'optimizer.warmup_steps': '12'},
    'optimizer.warmup_steps=12',
  ),
  'prompt longer than positions': (
    {'sample_prompts': 'x' * 60},
    'model.max_positions=64',
  ),
  'profile of steps that never come': (
    {'loop.profile_steps': '99:100'},
    'loop.num_steps=12',
  ),
  'missing tokenizer': ({'data.tokenizer': '/nowhere.json'}, '/nowhere.json'),
}


def _write_bad_texts(folder: pathlib.Path) -> None:
  (folder / 'empty').mkdir()
  (folder / 'empty.txt').touch()
  (folder / 'binary.txt').write_bytes(bytes(range(256)) * 64)
  (folder / 'a.jsonl').write_text('{"text": "good"}\n{"words": "bad"}\n')
  (folder / 'latin.txt').write_bytes(b'caf\xe9 ' * 4000)


def _refusal(
  task: Callable[[], Any], capsys: pytest.CaptureFixture[str]
) -> str:
  """The line of a refusal; fails if there is no such, or more of them."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as exit_info:
    exits.guarded(task)
  assert exit_info.value.code == exits.BAD_INPUT
  lines = capsys.readouterr().err.splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  assert len(errors) == 1
  assert lines[-1] == errors[0]
  return errors[0]


@pytest.fixture(autouse=True)
def handlers() -> Any:
  """`exits.guarded` answers SIGTERM, which pytest must not."""
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
  """Fails a run that comes as far as making a state or taking a step."""

  def build(*arguments: Any) -> Any:
    def called(*_: Any) -> Any:
      raise AssertionError('compiled')

    return dataclasses.replace(original(*arguments), init_state=called)

  original = pretrain.build
  monkeypatch.setattr(pretrain, 'build', build)
  monkeypatch.setattr(step, 'jit_train_step', lambda *_: None)


@pytest.mark.usefixtures('uncompiled')
@pytest.mark.parametrize('case', _REFUSED_RUNS)
def test_a_bad_run_is_refused_before_compilation(
  case: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  _write_bad_texts(tmp_path)
  changes, expected = _REFUSED_RUNS[case]
  text = tiny.write_text(tmp_path / 'good')
  file = _write_config(tmp_path, text)
  changes = {
    name: value.replace('{tmp}', str(tmp_path))
    for name, value in changes.items()
  }

  def run() -> int:
    config = runner.resolve(str(file), pretrain.PretrainConfig, changes)
    pretrain.train(config, workdir=tmp_path / 'run')
    return 0

  assert expected in _refusal(run, capsys)


def _write_config(folder: pathlib.Path, text: pathlib.Path) -> pathlib.Path:
  """A configuration file that gives `tiny.config`."""
  file = folder / 'tiny_run.py'
  file.write_text(
    'import pathlib\n'
    'from tests import tiny\n'
    'def get_config():\n'
    f'  return tiny.config(pathlib.Path({str(text)!r}))\n'
  )
  return file


def test_invalid_text_is_counted_where_it_is_not_refused(
  tmp_path: pathlib.Path,
) -> None:
  _write_bad_texts(tmp_path)
  config = tiny.config(tmp_path / 'latin.txt').data
  dataset = pipeline.open_dataset(
    config, split='train', cache_dir=tmp_path / 'cache'
  )
  assert dataset.statistics()['invalid_utf8'] == 4000


_MESHES = """
import dataclasses, json, pathlib, sys
from efficient_llm import sharding
from efficient_llm.training import pretrain
from tests import tiny
config = tiny.config(pathlib.Path('unread'))
found = []
for field, changes, mesh in (
  ('model', {'vocab_size': 318}, {'tensor': 4}),
  ('data', {'batch_size': 12}, {'fsdp': 8}),
  ('loop', {'num_microbatches': 2}, {'data': 8, 'fsdp': 1}),
  ('model', {}, {'fsdp': 3}),
):
  part = dataclasses.replace(getattr(config, field), **changes)
  mesh = sharding.MeshConfig(**mesh)
  changed = dataclasses.replace(config, mesh=mesh, **{field: part})
  try:
    changed.validate()
    pretrain.build(changed, sharding.make_mesh(mesh))
    found.append(None)
  except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_what_does_not_fit_the_mesh_is_refused_with_the_next_legal_size() -> (
  None
):
  flags = '--xla_force_host_platform_device_count=8'
  done = subprocess.run(
    [sys.executable, '-c', _MESHES],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    check=True,
  )
  vocabulary, batch, microbatches, devices = json.loads(done.stdout)
  assert 'embedding/tokens: axis vocab=318' in vocabulary
  assert 'next legal size is 320' in vocabulary
  assert 'data.batch_size=12' in batch
  assert 'set --config.data.batch_size=16' in batch
  assert 'loop.num_microbatches=2; set --config.data.batch_size=16' in (
    microbatches
  )
  assert 'num_devices=8' in devices
  assert not any('\n' in x for x in (vocabulary, batch, microbatches, devices))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of a run of four steps."""
  folder = tmp_path_factory.mktemp('run')
  tiny.write_text(folder)
  config = _run_config(folder)
  runner.write_config(config, folder / 'work')
  pretrain.train(config, workdir=folder / 'work')
  return folder / 'work'


def _run_config(folder: pathlib.Path, **changes: Any) -> Any:
  return tiny.config(folder / 'text.txt', num_steps=4, **changes)


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and 'cache' not in path.parts
  }


@pytest.mark.usefixtures('uncompiled')
@pytest.mark.parametrize(
  ('group', 'changes', 'expected'),
  [
    ('model', {'embed_dim': 32}, 'is of another model: leaf params/'),
    ('model', {'num_layers': 2}, 'is of another model: leaf params/'),
    ('optimizer', {'name': 'muon'}, 'is of another model: leaf opt_state/'),
    ('data', {'seed': 7}, 'the state is of data set'),
    ('data', {'batch_size': 24}, 'set data.batch_size'),
  ],
)
def test_the_workdir_of_another_run_is_refused_and_left_as_it_was(
  workdir: pathlib.Path,
  group: str,
  changes: dict[str, Any],
  expected: str,
  capsys: pytest.CaptureFixture[str],
) -> None:
  config = _run_config(workdir.parent)
  config = dataclasses.replace(
    config,
    loop=dataclasses.replace(config.loop, num_steps=8),
    **{group: dataclasses.replace(getattr(config, group), **changes)},
  )
  before = _contents(workdir)

  def run() -> int:
    with runner.config_written(config, workdir):
      pretrain.train(config, workdir=workdir)
    return 0

  line = _refusal(run, capsys)
  assert expected in line
  after = _contents(workdir)
  assert after.keys() == before.keys()
  assert [x for x in before if before[x] != after[x]] == []


@pytest.mark.parametrize('kind', ['file', 'below a file', 'no file system'])
def test_a_workdir_that_cannot_be_written_is_refused(
  kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (tmp_path / 'file').touch()
  folder = {
    'file': tmp_path / 'file',
    'below a file': tmp_path / 'file' / 'run',
    'no file system': pathlib.Path('/proc/run'),
  }[kind]
  line = _refusal(
    functools.partial(runner.write_config, pretrain.PretrainConfig(), folder),
    capsys,
  )
  assert f'--workdir={folder} must be a writable folder' in line


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_read_only_workdir_is_refused(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  tmp_path.chmod(0o500)
  task = functools.partial(
    runner.write_config, pretrain.PretrainConfig(), tmp_path
  )
  assert 'Permission denied; choose another' in _refusal(task, capsys)


def test_a_full_disk_is_refused_when_the_configuration_is_written(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  monkeypatch.setattr(strict_json, 'write_atomically', _disk_full)
  task = functools.partial(
    runner.write_config, pretrain.PretrainConfig(), tmp_path
  )
  assert 'No space left on device' in _refusal(task, capsys)


def test_a_disk_that_fills_up_later_is_named_in_one_line(
  capsys: pytest.CaptureFixture[str],
) -> None:
  line = _refusal(functools.partial(_disk_full, 'metrics.jsonl', ''), capsys)
  assert 'metrics.jsonl cannot be written: No space left on device' in line


def _disk_full(path: Any, text: str) -> int:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_an_error_of_a_library_is_a_defect_and_keeps_its_traceback() -> None:
  with pytest.raises(json.JSONDecodeError):
    exits.guarded(lambda: json.loads('{'))


def test_a_storage_error_of_another_kind_keeps_its_traceback() -> None:
  def task() -> int:
    raise OSError(errno.EIO, 'broken')

  with pytest.raises(OSError, match='broken'):
    exits.guarded(task)


def test_a_loss_that_is_not_finite_is_a_failure_of_one_line(
  capsys: pytest.CaptureFixture[str],
) -> None:
  def task() -> int:
    raise loop.NonFiniteError('at step=3')

  assert exits.guarded(task) == exits.FAILED
  assert capsys.readouterr().err == 'error: at step=3\n'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_the_loop_ends_with_the_code_for_stopped(
  number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
  def task() -> int:
    signal.raise_signal(number)
    return 0

  assert exits.guarded(task) == exits.STOPPED
  assert 'the same command continues' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    (None, 'is not a file; those that come with the project are experiments/'),
    ('def get_config(:', 'SyntaxError'),
    ('x = 1', "has no attribute 'get_config'"),
    ('def get_config():\n  return 3', 'must return a PretrainConfig, got int'),
    ('\n\nraise KeyError("a\\nb")', 'failed in line 3: KeyError'),
    ('def get_config():\n  return 1 / 0', 'in line 2: ZeroDivisionError'),
    (
      'from efficient_llm.models import presets\n'
      'def get_config():\n'
      "  return presets.get('huge')",
      "in line 3: ValueError: Unknown model preset 'huge'",
    ),
    (
      'from efficient_llm.training import pretrain\n'
      'def get_config():\n'
      '  return pretrain.PretrainConfig(seed="0")',
      "config.seed='0' must be a whole number",
    ),
  ],
)
def test_a_bad_configuration_file_is_refused(
  source: str | None,
  expected: str,
  tmp_path: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
) -> None:
  file = tmp_path / 'run.py'
  if source is not None:
    file.write_text(source)
  task = functools.partial(
    runner.resolve, str(file), pretrain.PretrainConfig, {}
  )
  assert expected in _refusal(task, capsys)


def test_a_configuration_file_may_take_an_argument(
  tmp_path: pathlib.Path,
) -> None:
  file = tmp_path / 'run.py'
  file.write_text(
    'from efficient_llm.training import pretrain\n'
    'def get_config(seed="1"):\n'
    '  return pretrain.PretrainConfig(seed=int(seed))\n'
  )
  load = functools.partial(
    runner.load_config, config_type=pretrain.PretrainConfig
  )
  assert load(str(file)).seed == 1
  assert load(f'{file}:23').seed == 23


@pytest.mark.parametrize(
  'file', sorted((_ROOT / 'experiments' / 'configs').glob('pretrain*.py'))
)
def test_every_configuration_of_the_project_is_valid(
  file: pathlib.Path,
) -> None:
  runner.resolve(str(file), pretrain.PretrainConfig, {})


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
  flags: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
  if 'together' not in expected:
    flags = {
      'coordinator': 'localhost:1', 'num_processes': 2, 'process_id': 0, **flags
    }  # fmt: skip
  task = functools.partial(runner.start_jax, **flags)
  assert expected in _refusal(task, capsys)


def test_a_platform_that_is_not_there_is_refused(
  capsys: pytest.CaptureFixture[str],
) -> None:
  missing = 'tpu' if jax.default_backend() != 'tpu' else 'cpu'
  task = functools.partial(runner.start_jax, platform=missing)
  assert 'python -m experiments.doctor' in _refusal(task, capsys)


def test_config_json_is_the_resolved_configuration(
  workdir: pathlib.Path,
) -> None:
  found = json.loads((workdir / 'config.json').read_text())
  config = _run_config(workdir.parent)
  assert found == json.loads(strict_json.to_json(dataclasses.asdict(config)))
  assert found['sampling'] == dataclasses.asdict(
    sampling.SamplingConfig(max_new_tokens=8)
  ) | {'stop_tokens': []}
