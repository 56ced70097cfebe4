"""Tests of bad input: refused in one line, before any compilation."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from efficient_llm.data import pipeline
from efficient_llm.models import sampling
from efficient_llm.training import pretrain, step, strict_json
from experiments import runner
from tests import simulated_devices, tiny

Refusal = Callable[[Callable[[], Any]], str]


_ROOT = pathlib.Path(__file__).parents[2]


# What each case changes in a run of 300 short lines of text.
_REFUSED_RUNS: dict[str, tuple[dict[str, str], str]] = {
  'missing path': ({'data.path': '/nowhere/at/all'}, "'/nowhere/at/all' must"),
  'folder without text': ({'data.path': '{tmp}/empty'}, 'must hold files'),
  'empty file': ({'data.path': '{tmp}/empty.txt'}, 'has only 0'),
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


def _write_bad_texts(folder: pathlib.Path) -> None:
  (folder / 'empty').mkdir()
  (folder / 'empty.txt').touch()
  (folder / 'binary.txt').write_bytes(bytes(range(256)) * 64)
  (folder / 'a.jsonl').write_text('{"text": "good"}\n{"words": "bad"}\n')
  (folder / 'latin.txt').write_bytes(b'caf\xe9 ' * 4000)


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


@pytest.mark.usefixtures('uncompiled')
@pytest.mark.parametrize('case', _REFUSED_RUNS)
def test_a_bad_run_is_refused_before_compilation(
  case: str, tmp_path: pathlib.Path, refusal: Refusal
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

  assert expected in refusal(run)


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
  done = subprocess.run(
    [sys.executable, '-c', _MESHES],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': simulated_devices.flags()},
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
  refusal: Refusal,
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

  line = refusal(run)
  assert expected in line
  after = _contents(workdir)
  assert after.keys() == before.keys()
  assert [x for x in before if before[x] != after[x]] == []


def test_config_json_is_the_resolved_configuration(
  workdir: pathlib.Path,
) -> None:
  found = json.loads((workdir / 'config.json').read_text())
  config = _run_config(workdir.parent)
  assert found == json.loads(strict_json.to_json(dataclasses.asdict(config)))
  assert found['sampling'] == dataclasses.asdict(
    sampling.SamplingConfig(max_new_tokens=8)
  ) | {'stop_tokens': []}
