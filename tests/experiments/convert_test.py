"""Conversion as a user runs it."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import pytest

from efficient_llm.models.huggingface import shards
from efficient_llm.speculative import drafter
from efficient_llm.training import checkpoint
from tests import tiny
from tests.models.huggingface import made

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments: str) -> tuple[int, str, str]:
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.convert', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_a_model_comes_and_goes(tmp_path: pathlib.Path) -> None:
  theirs = made.write(tmp_path / 'theirs', 'gpt2')
  code, out, err = _run(f'--from=hf:{theirs}', f'--to={tmp_path / "run"}')
  assert code == 0, err
  assert 'holds no tokenizer.json' in out
  code, out, err = _run(
    f'--from={tmp_path / "run"}',
    f'--to=hf:{tmp_path / "back"}',
    '--max_shard_bytes=2000',
    '--dtype=bfloat16',
  )
  assert code == 0, err
  assert 'gpt2, 28 tensors' in out
  assert (tmp_path / 'back' / 'model.safetensors.index.json').is_file()


def test_bad_input_is_one_line_and_code_2(tmp_path: pathlib.Path) -> None:
  code, out, err = _run(f'--from={tmp_path}', f'--to={tmp_path / "x"}')
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert 'must begin with hf:' in err


def test_verification_compares_with_transformers(
  tmp_path: pathlib.Path,
) -> None:
  pytest.importorskip('torch', reason='needs the extra [hf] and PyTorch')
  pytest.importorskip('transformers', reason='needs the extra [hf]')
  theirs = made.write(tmp_path / 'theirs', 'qwen2')
  code, out, err = _run(
    f'--from=hf:{theirs}', f'--to={tmp_path / "run"}', '--verify'
  )
  assert code == 0, err
  assert 'top1_agreement 1.0000' in out
  code, out, err = _run(
    f'--from={tmp_path / "run"}', f'--to=hf:{tmp_path / "back"}', '--verify'
  )
  assert code == 0, err
  assert 'top1_agreement 1.0000' in out


def test_a_drafter_comes_in_eagles_layout(tmp_path: pathlib.Path) -> None:
  params = drafter.init(tiny.MODEL, jax.random.key(0), form='eagle')
  saver = checkpoint.Checkpointer(
    tmp_path / 'run' / 'checkpoints', checkpoint.CheckpointConfig()
  )
  saver.save(
    3,
    {'params': params},
    data_state=None,
    metadata={'target': {}, 'model': dataclasses.asdict(tiny.MODEL)},
  )
  saver.close()
  source, target = f'--from={tmp_path / "run"}', f'--to=hf:{tmp_path / "out"}'
  code, out, err = _run(source, target)
  assert (code, out) == (2, '')
  assert '--engine must say which engine' in err
  code, out, err = _run(source, target, '--engine=sglang')
  assert code == 0, err
  assert "a drafter in EAGLE's layout" in out
  assert 'fc.bias' in shards.open_folder(tmp_path / 'out')
