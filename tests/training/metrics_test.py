import importlib
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_llm.training import metrics

# Its classes are made at import, where a type checker cannot see them.
_EVENT_PB2 = importlib.import_module('tensorboardX.proto.event_pb2')
_NAMES = st.text(min_size=1).filter(
  lambda name: name not in ('kind', 'step', 'time')
)
_NUMBERS = st.floats() | st.integers(-(2**63), 2**63 - 1)
_LINES = st.lists(
  st.tuples(
    st.integers(0, 5),
    st.dictionaries(_NAMES, _NUMBERS, max_size=3),
    st.sampled_from(['train', 'eval']),
  ),
  max_size=8,
)


def _write_all(folder, lines):
  with metrics.MetricWriter(folder, tensorboard=False) as writer:
    for step, values, kind in lines:
      writer.write(step, values, kind=kind)


def _without_time(records):
  return [{k: v for k, v in r.items() if k != 'time'} for r in records]


def _events(folder):
  """Reads every event file: length, checksum, message, checksum."""
  files = sorted(folder.glob('events.*'), key=os.path.getmtime)
  events = []
  for path in files:
    content, at = path.read_bytes(), 0
    while at < len(content):
      (size,) = struct.unpack_from('<Q', content, at)
      events.append(_EVENT_PB2.Event.FromString(content[at + 12 :][:size]))
      at += 16 + size
  return events


@settings(max_examples=40)
@given(_LINES)
def test_every_number_is_read_back_as_it_was_written(lines):
  with tempfile.TemporaryDirectory() as folder:
    _write_all(folder, lines)
    records = metrics.read_metrics(folder)
  assert len(records) == len(lines)
  for record, (step, values, kind) in zip(records, lines, strict=True):
    assert (record['step'], record['kind']) == (step, kind)
    for name, value in values.items():
      both_nan = math.isnan(value) and math.isnan(record[name])
      assert both_nan or record[name] == value


def test_values_that_are_not_finite_leave_the_file_strict_json(tmp_path):
  values = {'loss': math.nan, 'grad_norm': math.inf, 'low': -math.inf}
  _write_all(tmp_path, [(1, values, 'train')])

  def refuse(constant):
    raise AssertionError(f'{constant} is not strict JSON')

  line = (tmp_path / 'metrics.jsonl').read_text()
  read = json.loads(line, parse_constant=refuse)
  assert (read['loss'], read['grad_norm'], read['low']) == (
    'nan',
    'inf',
    '-inf',
  )


@settings(max_examples=60)
@given(lines=_LINES, share=st.floats(0, 1), step=st.integers(0, 5))
def test_after_a_cut_at_any_byte_a_rewind_keeps_the_whole_lines_up_to_its_step(
  lines, share, step
):
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name) / 'metrics.jsonl'
    _write_all(name, lines)
    whole = metrics.read_metrics(name)
    content = path.read_bytes()
    content = content[: round(share * len(content))]
    path.write_bytes(content)
    survivors = whole[: content.count(b'\n')]
    assert repr(metrics.read_metrics(name)) == repr(survivors)
    with metrics.MetricWriter(name, tensorboard=False) as writer:
      writer.rewind(step)
      writer.write(step + 1, {'loss': 1.0})
    kept = [record for record in survivors if record['step'] <= step]
    assert repr(metrics.read_metrics(name)[:-1]) == repr(kept)


def test_a_line_written_after_a_half_line_is_whole(tmp_path):
  _write_all(tmp_path, [(1, {'loss': 2.0}, 'train')])
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"kind": "train", "step": 2, "lo')
  _write_all(tmp_path, [(2, {'loss': 1.5}, 'train')])
  assert [r['loss'] for r in metrics.read_metrics(tmp_path)] == [2.0, 1.5]


def test_lines_written_before_a_kill_survive_it(tmp_path):
  # Waits after the last step, so that no later write can push it out.
  code = (
    'import sys, time\n'
    'from efficient_llm.training import metrics\n'
    'writer = metrics.MetricWriter(sys.argv[1], tensorboard=False)\n'
    'for step in range(1, 21):\n'
    '  writer.write(step, {"loss": 1 / step})\n'
    'print("written", flush=True)\n'
    'time.sleep(60)\n'
  )
  process = subprocess.Popen(
    (sys.executable, '-c', code, str(tmp_path)),
    stdout=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert process.stdout is not None
  assert process.stdout.readline() == b'written\n'
  process.send_signal(signal.SIGKILL)
  process.communicate()
  steps = [record['step'] for record in metrics.read_metrics(tmp_path)]
  assert steps == list(range(1, 21))


def test_only_lines_of_the_asked_kind_are_read(tmp_path):
  _write_all(tmp_path, [(1, {'a': 1.0}, 'train'), (1, {'a': 2.0}, 'eval')])
  assert [r['a'] for r in metrics.read_metrics(tmp_path, kind='eval')] == [2.0]


def test_scalars_of_numpy_and_jax_are_written_as_numbers(tmp_path):
  values = {
    'bfloat16': jnp.bfloat16(1.5),
    'jax': jnp.float32(0.25),
    'numpy': np.float64(0.1),
    'tokens': np.int64(2**62),
  }
  _write_all(tmp_path, [(np.int32(3), values, 'train')])
  (record,) = _without_time(metrics.read_metrics(tmp_path))
  assert record == {
    'kind': 'train',
    'step': 3,
    'bfloat16': 1.5,
    'jax': 0.25,
    'numpy': 0.1,
    'tokens': 2**62,
  }


@pytest.mark.parametrize('value', ['2.0', None, [1.0, 2.0], {}, 1j])
def test_a_value_that_is_not_one_number_is_refused(tmp_path, value):
  with (
    metrics.MetricWriter(tmp_path, tensorboard=False) as writer,
    pytest.raises(ValueError, match=r"^Metric 'loss' must be one number, is "),
  ):
    writer.write(1, {'loss': value})
  assert metrics.read_metrics(tmp_path) == []


def test_a_name_that_every_line_has_is_refused(tmp_path):
  with (
    metrics.MetricWriter(tmp_path, tensorboard=False) as writer,
    pytest.raises(ValueError, match="must not be named 'step'"),
  ):
    writer.write(1, {'step': 2.0})


@pytest.mark.parametrize('line', ['{"step": 1', '[]', '{"step": 2}', '\0\0'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
  good = '{"kind": "train", "step": 1}\n'
  (tmp_path / 'metrics.jsonl').write_text(f'{good}{line}\n{good}')
  with pytest.raises(ValueError, match='line 2 must be a JSON object'):
    metrics.read_metrics(tmp_path)


def test_processes_that_are_not_first_write_nothing(tmp_path):
  folder = tmp_path / 'run'
  with metrics.MetricWriter(folder, primary=False) as writer:
    writer.write(1, {'loss': 1.0})
    writer.rewind(0)
  assert not folder.exists()


def test_tensorboard_gets_every_number_under_its_kind(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(7, {'loss': 2.5})
    writer.write(8, {'loss': 1.5}, kind='eval')
  points = [
    (value.tag, event.step, value.simple_value)
    for event in _events(tmp_path / 'tensorboard')
    for value in event.summary.value
  ]
  assert points == [('train/loss', 7, 2.5), ('eval/loss', 8, 1.5)]


def test_tensorboard_is_told_to_hide_what_a_rewind_drops(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    for step in range(6):
      writer.write(step, {'loss': 1.0})
    writer.rewind(3)
    writer.write(4, {'loss': 0.5})
  starts = [
    event.step
    for event in _events(tmp_path / 'tensorboard')
    if event.HasField('session_log')
  ]
  assert starts == [4]
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2


def test_missing_wandb_is_one_line_with_the_remedy(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match='pip install') as error:
    metrics.MetricWriter(tmp_path, wandb_project='p')
  assert '\n' not in str(error.value)


def test_a_continued_run_continues_its_wandb_run(tmp_path, monkeypatch):
  started, logged = [], []

  def init(**settings):
    started.append(settings)
    return types.SimpleNamespace(
      define_metric=lambda *names, **settings: None,
      log=logged.append,
      finish=lambda: None,
    )

  monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
  for step in (1, 2):
    with metrics.MetricWriter(
      tmp_path, tensorboard=False, wandb_project='p', config={'steps': 2}
    ) as writer:
      writer.write(step, {'loss': 0.5})
  assert started[0] == started[1]
  assert started[0]['project'] == 'p'
  assert logged == [{'train/loss': 0.5, 'step': s} for s in (1, 2)]
