import json
import math
import subprocess

import pytest

from efficient_llm.training import chart, metrics, report, sections


def _train(folder, num_steps):
  with metrics.MetricWriter(folder, tensorboard=False) as writer:
    for step in range(1, num_steps + 1):
      values = {
        'loss': 5.0 / step,
        'learning_rate': 1e-3,
        'tokens_per_sec': 1000.0 * step,
        'tokens': 64 * step,
      }
      writer.write(step, values)
    if num_steps:
      values = {'loss': 1.25, 'bits_per_byte': 1.8}
      writer.write(num_steps, values, kind='eval')


def _tiles(built):
  tiles = next(s for s in built if isinstance(s, sections.KeyNumbers)).tiles
  return {(tile.label, tile.unit): tile.value for tile in tiles}


def _curves(built):
  return {s.title: s for s in built if isinstance(s, chart.Curve)}


def test_a_result_says_what_it_was_made_by(tmp_path):
  path = report.write_result(tmp_path / 'run', {'eval_loss': math.nan})
  result = json.loads(path.read_text(), parse_constant=pytest.fail)
  assert result['eval_loss'] == 'nan'
  assert result['environment']['device_kind'] == 'cpu'
  assert result['environment']['versions']['jax'].count('.') >= 2
  assert result['finished'].endswith('+00:00')


def test_a_result_cannot_hide_what_it_was_made_by(tmp_path):
  with pytest.raises(ValueError, match="must not hold 'environment'"):
    report.write_result(tmp_path, {'environment': 'mine'})


def test_the_commit_is_that_of_the_checkout_or_unknown(tmp_path, monkeypatch):
  for name in ('GIT_AUTHOR', 'GIT_COMMITTER'):
    monkeypatch.setenv(f'{name}_NAME', 'a')
    monkeypatch.setenv(f'{name}_EMAIL', 'a@b')

  def git(*arguments):
    return subprocess.run(
      ('git', *arguments), cwd=tmp_path, check=True, capture_output=True
    ).stdout.decode()

  assert report.git_commit(tmp_path) is None
  git('init', '-q')
  (tmp_path / 'file').write_text('a')
  git('add', 'file')
  git('commit', '-qm', 'a')
  commit = git('rev-parse', 'HEAD').strip()
  assert report.git_commit(tmp_path) == commit
  (tmp_path / 'file').write_text('b')
  assert report.git_commit(tmp_path) == f'{commit}-dirty'


def test_key_numbers_come_from_the_metrics_where_the_result_has_none(tmp_path):
  _train(tmp_path, 3)
  tiles = _tiles(report.training_sections(tmp_path))
  assert tiles['Validation loss', 'nats'] == 1.25
  assert tiles['Validation', 'bits per byte'] == 1.8
  assert tiles['Trained on', 'tokens'] == '192'
  assert tiles['Speed', 'tokens/s'] == '2k'


def test_the_result_counts_before_the_metrics(tmp_path):
  _train(tmp_path, 3)
  report.write_result(
    tmp_path, {'eval_loss': 0.5, 'num_params': 4_600_000, 'flops': 2.5e15}
  )
  tiles = _tiles(report.training_sections(tmp_path))
  assert tiles['Validation loss', 'nats'] == 0.5
  assert tiles['Parameters', ''] == '4.6M'
  assert tiles['Compute', 'FLOPs'] == '2.5e15'


def test_losses_are_drawn_against_the_tokens_seen(tmp_path):
  _train(tmp_path, 3)
  loss = _curves(report.training_sections(tmp_path))['Loss']
  training, validation = loss.series
  assert (training.x, validation.x) == ([64, 128, 192], [192])


def test_losses_are_drawn_against_steps_where_tokens_were_not_counted(tmp_path):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(5, {'loss': 1.0})
  loss = _curves(report.training_sections(tmp_path))['Loss']
  assert (loss.x_label, loss.series[0].x) == ('steps', [5])


def test_only_what_was_recorded_is_drawn(tmp_path):
  _train(tmp_path, 2)
  assert set(_curves(report.training_sections(tmp_path))) == {
    'Loss',
    'Throughput',
    'Learning rate',
  }


def test_a_loss_that_was_not_finite_is_said(tmp_path):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {'loss': 1.0})
    writer.write(2, {'loss': math.nan})
  loss = _curves(report.training_sections(tmp_path))['Loss']
  assert loss.note == 'The loss was not finite at 1 steps, first 2.'


@pytest.mark.parametrize('num_steps', [0, 1, 400])
def test_a_run_of_any_length_has_a_report_in_one_file(tmp_path, num_steps):
  _train(tmp_path, num_steps)
  (tmp_path / 'config.json').write_text('{"model": {"num_layers": 2}}')
  report.write_result(
    tmp_path, {'samples': ['plain', {'prompt': '<b>', 'text': '</pre>'}]}
  )
  path = report.write_report(
    tmp_path, title='A run', sections=report.training_sections(tmp_path)
  )
  text = path.read_text(encoding='utf-8')
  assert 'model.num_layers' in text
  assert '<mark>&lt;b&gt;</mark>&lt;/pre&gt;' in text
  assert text.endswith('</html>\n')


def test_a_folder_without_any_file_still_has_a_report(tmp_path):
  path = report.write_report(
    tmp_path, title='t', sections=report.training_sections(tmp_path)
  )
  assert 'No data was recorded.' in path.read_text(encoding='utf-8')
