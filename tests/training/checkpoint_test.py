"""Checkpoints: what is saved comes back, and what is damaged never does.

Over 300 lines: every kind of damage, crash and device count is tried on the
same few small states, which the fixtures here make once.
"""

import errno
import os
import pathlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from efficient_llm.training import checkpoint, manifest
from tests import binary, simulated_devices
from tests.training import checkpoint_process

_ROOT = pathlib.Path(__file__).resolve().parents[2]
make, abstract = checkpoint_process.make, checkpoint_process.abstract


def _bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
  arrays = map(np.asarray, jax.tree.leaves(tree))
  return [(a.dtype.name, a.shape, a.tobytes()) for a in arrays]


def _open(directory: pathlib.Path, **settings: Any) -> checkpoint.Checkpointer:
  return checkpoint.Checkpointer(
    directory, checkpoint.CheckpointConfig(**settings)
  )


def _save(checkpointer: checkpoint.Checkpointer, *steps: int) -> None:
  for step in steps:
    checkpointer.save(step, make(step), data_state={'n': step}, metadata={})
  checkpointer.wait()


def _restored_step(directory: pathlib.Path) -> int | None:
  """The step restored, after a look at all that came with it."""
  restored = _open(directory).restore(abstract())
  if restored is None:
    return None
  assert _bits(restored.state) == _bits(make(restored.step))
  assert restored.data_state == {'n': restored.step}
  return restored.step


def _names(directory: pathlib.Path) -> set[str]:
  return {path.name for path in directory.iterdir()}


def _start(
  part: str, directory: pathlib.Path, *arguments: str, num_devices: int = 1
) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      checkpoint_process.__name__,
      part,
      str(directory),
      *arguments,
    ],
    cwd=_ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': simulated_devices.flags(num_devices),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture
def two_steps(tmp_path: pathlib.Path) -> pathlib.Path:
  checkpointer = _open(tmp_path)
  _save(checkpointer, 1, 2)
  checkpointer.close()
  return tmp_path


def test_a_train_state_comes_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
  params = {
    'layers': {'w': jax.random.normal(jax.random.key(0), (3, 5))},
    'half': jnp.array([jnp.nan, -0.0, jnp.inf, 1e-40], jnp.bfloat16),
    'empty': jnp.zeros((0, 3)),
  }
  state = {
    'params': params,
    'opt_state': optax.adamw(1e-3).init(params),
    'step': np.int32(7),
    'key': jax.random.key_data(jax.random.key(3)),
  }
  checkpointer = _open(tmp_path)
  checkpointer.save(
    7, state, data_state={'next': [1, 'a']}, metadata={'model': {'layers': 1}}
  )
  restored = checkpointer.restore(jax.eval_shape(lambda: state))
  assert restored is not None
  assert _bits(restored.state) == _bits(state)
  assert jax.tree.structure(restored.state) == jax.tree.structure(state)
  assert restored.step == 7
  assert restored.data_state == {'next': [1, 'a']}
  assert restored.metadata == {'model': {'layers': 1}}


@hypothesis.settings(max_examples=15)
@hypothesis.given(
  st.dictionaries(
    st.text('ab.*$é', min_size=1),
    st_numpy.arrays(
      st.sampled_from([np.float32, np.int32, np.uint8, np.bool_, np.float64]),
      st_numpy.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4),
    ),
    min_size=1,
    max_size=3,
  )
)
def test_any_tree_of_arrays_comes_back_bit_for_bit(
  tmp_path_factory: pytest.TempPathFactory, tree: dict[str, np.ndarray]
) -> None:
  checkpointer = _open(tmp_path_factory.mktemp('run'))
  state = {'params': tree, 'again': [tree], 'step': np.int32(1)}
  checkpointer.save(1, state, data_state=None, metadata={})
  restored = checkpointer.restore(
    jax.tree.map(lambda x: np.empty_like(x), state)
  )
  checkpointer.close()
  assert restored is not None
  assert _bits(restored.state) == _bits(state)


def test_buffers_may_be_donated_once_save_returns(
  tmp_path: pathlib.Path,
) -> None:
  bump = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  state = bump({'w': jnp.zeros((4, 500_000))})
  state = {**state, 'host': np.ones(5_000_000, np.float32)}
  saved = _bits(state)
  checkpointer = _open(tmp_path)
  checkpointer.save(1, state, data_state=None, metadata={})
  state['host'] += 1
  weights = {'w': state.pop('w')}
  for _ in range(10):
    weights = bump(weights)
  jax.block_until_ready(weights)
  restored = checkpointer.restore(
    {
      'w': jax.ShapeDtypeStruct((4, 500_000), np.float32),
      'host': jax.ShapeDtypeStruct((5_000_000,), np.float32),
    }
  )
  assert restored is not None
  assert _bits(restored.state) == saved


def test_an_empty_directory_gives_nothing(tmp_path: pathlib.Path) -> None:
  assert _restored_step(tmp_path / 'new') is None


def test_the_newest_step_is_restored(two_steps: pathlib.Path) -> None:
  assert _open(two_steps).latest_step() == 2
  assert _restored_step(two_steps) == 2


def test_a_given_step_is_restored(two_steps: pathlib.Path) -> None:
  restored = _open(two_steps).restore(abstract(), step=1)
  assert restored is not None
  assert restored.step == 1


def test_a_step_that_is_not_there_is_refused(two_steps: pathlib.Path) -> None:
  with pytest.raises(checkpoint.CheckpointError, match=r'step=9 .* \[1, 2\]'):
    _open(two_steps).restore(abstract(), step=9)


def _flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def _truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def _copy(path: pathlib.Path) -> None:
  path.with_name(f'{path.name}.copy').write_bytes(path.read_bytes())


@pytest.mark.parametrize(
  'damage', [_flip, _truncate, pathlib.Path.unlink, _copy]
)
@pytest.mark.parametrize(
  'pattern',
  [
    'MANIFEST.json',
    'data_state.json',
    'metadata.json',
    'state/_METADATA',
    'state/_sharding',
    'state/manifest.ocdbt',
    'state/d/*',
    'state/ocdbt.process_0/d/*',
  ],
)
def test_a_damaged_step_is_named_and_set_aside(
  two_steps: pathlib.Path,
  caplog: pytest.LogCaptureFixture,
  pattern: str,
  damage: Callable[[pathlib.Path], None],
) -> None:
  path = min((two_steps / '2').glob(pattern))
  damage(path)
  assert _restored_step(two_steps) == 1
  assert _names(two_steps) == {'1', 'damaged-2-0'}
  assert f'step 2: {path.relative_to(two_steps / "2")}' in caplog.text.replace(
    "'", ''
  )


def test_a_step_set_aside_twice_keeps_both(two_steps: pathlib.Path) -> None:
  for number in range(2):
    _flip(two_steps / '2' / 'metadata.json')
    checkpointer = _open(two_steps)
    checkpointer.restore(abstract())
    assert _names(two_steps) == {
      '1',
      *(f'damaged-2-{n}' for n in range(number + 1)),
    }
    _save(checkpointer, 2)


def test_steps_swapped_on_the_disk_are_not_restored(
  two_steps: pathlib.Path,
) -> None:
  (two_steps / '2').rename(two_steps / '3')
  assert _restored_step(two_steps) == 1


def test_only_damaged_steps_are_an_error_and_stay(
  two_steps: pathlib.Path,
) -> None:
  for step in '12':
    _flip(two_steps / step / 'metadata.json')
  for _ in range(2):  # the same command again must not start afresh either
    with pytest.raises(checkpoint.CheckpointError, match='is whole') as caught:
      _open(two_steps).restore(abstract())
    assert '\n' not in str(caught.value)
  assert _names(two_steps) == {'1', '2'}


def test_a_half_written_step_is_named_and_set_aside(
  two_steps: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  (two_steps / '3.partial').mkdir()
  assert _restored_step(two_steps) == 2
  assert _names(two_steps) == {'1', '2', 'damaged-3-0'}
  assert 'HALF-WRITTEN CHECKPOINT' in caplog.text
  assert '3.partial has no MANIFEST.json' in caplog.text


def test_a_first_save_that_was_cut_off_counts_as_no_checkpoint(
  tmp_path: pathlib.Path,
) -> None:
  (tmp_path / '1.partial').mkdir()
  assert _restored_step(tmp_path) is None
  assert _restored_step(tmp_path) is None


def test_folders_set_aside_do_not_fill_the_disk(tmp_path: pathlib.Path) -> None:
  for step in range(1, 7):
    (tmp_path / f'{step}.partial').mkdir()
    _open(tmp_path, max_to_keep=2).close()
  assert _names(tmp_path) == {'damaged-5-0', 'damaged-6-0'}


def test_a_deletion_that_was_cut_off_is_finished(
  two_steps: pathlib.Path,
) -> None:
  (two_steps / '1').rename(two_steps / '1.deleting')
  _open(two_steps).close()
  assert _names(two_steps) == {'2'}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'w': jax.ShapeDtypeStruct((16, 8), np.float32)},
      r'leaf params/w is float32\[16, 1024\] in it and float32\[16, 8\] here',
    ),
    (
      {'w': jax.ShapeDtypeStruct((16, 1024), jnp.bfloat16)},
      r'float32\[16, 1024\] in it and bfloat16\[16, 1024\] here',
    ),
    (
      {'v': jax.ShapeDtypeStruct((1,), np.int8)},
      r'leaf params/v is absent in it and int8\[1\] here',
    ),
    ({}, r'leaf params/w is float32\[16, 1024\] in it and absent here'),
  ],
)
def test_the_tree_of_another_model_is_refused_and_nothing_set_aside(
  two_steps: pathlib.Path, change: dict[str, Any], message: str
) -> None:
  _flip(two_steps / '2' / 'metadata.json')
  with pytest.raises(ValueError, match=message) as caught:
    _open(two_steps).restore({**abstract(), 'params': change})
  assert 'use another --workdir or the same model' in str(caught.value)
  assert '\n' not in str(caught.value)
  assert _names(two_steps) == {'1', '2'}


def test_a_float64_leaf_is_not_narrowed_silently(
  tmp_path: pathlib.Path,
) -> None:
  checkpointer = _open(tmp_path)
  checkpointer.save(1, {'x': np.float64(0.1)}, data_state=None, metadata={})
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.ShapeDtypeStruct((), np.float64, sharding=device)
  with pytest.raises(ValueError, match='leaf x of float64'):
    checkpointer.restore({'x': wanted})


def test_the_newest_steps_and_the_marked_ones_stay(
  tmp_path: pathlib.Path,
) -> None:
  checkpointer = _open(tmp_path, max_to_keep=2, keep_every_steps=4)
  _save(checkpointer, *range(1, 8))
  assert checkpointer.steps() == [4, 6, 7]
  assert _names(tmp_path) == {'4', '6', '7'}


def test_no_step_is_deleted_before_the_newer_one_is_whole(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpointer = _open(tmp_path, max_to_keep=1)
  _save(checkpointer, 1)

  def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write_atomically', fail)
    with pytest.raises(checkpoint.CheckpointError):
      _save(checkpointer, 2)
  assert _names(tmp_path) == {'1'}
  assert _restored_step(tmp_path) == 1


@pytest.mark.parametrize('asynchronous', [True, False])
def test_a_full_disk_is_one_line_and_the_run_may_go_on(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  asynchronous: bool,
) -> None:
  checkpointer = _open(tmp_path, asynchronous=asynchronous)
  _save(checkpointer, 1)

  def fail(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(manifest, 'write_atomically', fail)
    with pytest.raises(
      checkpoint.CheckpointError, match=r'step=2 .*No space left'
    ) as caught:
      _save(checkpointer, 2)
  assert '\n' not in str(caught.value)
  _save(checkpointer, 3)
  checkpointer.close()
  assert _names(tmp_path) == {'1', '3'}
  assert _restored_step(tmp_path) == 3


def test_a_failed_save_is_raised_by_the_next_one(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpointer = _open(tmp_path)

  def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(manifest, 'write', fail)
  checkpointer.save(1, make(1), data_state=None, metadata={})
  with pytest.raises(
    checkpoint.CheckpointError, match=r'step=1 .*Input/output'
  ):
    checkpointer.save(2, make(2), data_state=None, metadata={})


def test_files_that_cannot_grow_leave_the_earlier_step(
  tmp_path: pathlib.Path,
) -> None:
  _save(_open(tmp_path), 1)
  process = _start('overfill', tmp_path)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  assert output.startswith('checkpoint step=2 could not be saved')
  assert output.count('\n') == 1
  assert _names(tmp_path) == {'1'}
  assert _restored_step(tmp_path) == 1


def test_a_file_in_the_place_of_the_directory_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  (tmp_path / 'file').touch()
  with pytest.raises(checkpoint.CheckpointError, match='writable') as caught:
    _open(tmp_path / 'file' / 'checkpoints')
  assert '\n' not in str(caught.value)


def test_a_directory_that_cannot_be_written_is_refused_at_once(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  # Simulated: the superuser, who runs many containers, may write anywhere.
  def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, 'Read-only file system', str(tmp_path))

  monkeypatch.setattr('tempfile.TemporaryFile', fail)
  with pytest.raises(checkpoint.CheckpointError, match='Read-only'):
    _open(tmp_path)


def test_saving_the_last_step_again_does_nothing(
  tmp_path: pathlib.Path,
) -> None:
  checkpointer = _open(tmp_path)
  _save(checkpointer, 1)
  before = (tmp_path / '1' / manifest.FILE_NAME).read_bytes()
  _save(checkpointer, 1)
  assert (tmp_path / '1' / manifest.FILE_NAME).read_bytes() == before


def test_a_step_older_than_the_newest_is_refused(
  two_steps: pathlib.Path,
) -> None:
  with pytest.raises(checkpoint.CheckpointError, match='newer than 2'):
    _save(_open(two_steps), 1)


def test_a_synchronous_save_is_whole_when_it_returns(
  tmp_path: pathlib.Path,
) -> None:
  checkpointer = _open(tmp_path, asynchronous=False)
  checkpointer.save(1, make(1), data_state={'n': 1}, metadata={})
  assert _names(tmp_path) == {'1'}


@pytest.mark.parametrize(
  ('state', 'message'),
  [
    ({}, 'at least one number'),
    ({'w': np.zeros((0, 3))}, 'at least one number'),
    ({'key': jax.random.key(0)}, 'leaf key .*key_data'),
    ({'name': 'gpt'}, 'leaf name must be numbers, got str'),
    ({'a/b': np.ones(2)}, 'without slashes'),
    ({'a.b': np.ones(2), 'a': {'b': np.ones(2)}}, 'stored once'),
    (np.ones(2), 'non-empty'),
  ],
)
def test_a_state_that_cannot_be_saved_is_refused(
  tmp_path: pathlib.Path, state: Any, message: str
) -> None:
  with pytest.raises(ValueError, match=message):
    _open(tmp_path).save(1, state, data_state=None, metadata={})
  assert _names(tmp_path) == set()


def test_metadata_that_json_cannot_hold_is_refused(
  tmp_path: pathlib.Path,
) -> None:
  with pytest.raises(ValueError):
    _open(tmp_path).save(
      1, make(1), data_state=None, metadata={'model': object()}
    )


@pytest.mark.parametrize(
  'field', ['every_steps', 'max_to_keep', 'keep_every_steps']
)
def test_a_setting_below_one_is_refused(field: str) -> None:
  settings: dict[str, Any] = {field: 0}
  with pytest.raises(ValueError, match=rf'checkpoint\.{field}=0 must be'):
    checkpoint.CheckpointConfig(**settings).validate()


def test_a_checkpoint_moves_between_meshes(tmp_path: pathlib.Path) -> None:
  _save(_open(tmp_path), 1)
  process = _start('move_mesh', tmp_path, num_devices=8)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  restored = _open(tmp_path).restore(abstract())
  assert restored is not None
  assert restored.step == 2
  assert _bits(restored.state) == _bits(make(1))


def test_several_processes_save_and_fall_back_together(
  tmp_path: pathlib.Path,
) -> None:
  port = str(binary.free_port())
  processes = [
    _start('run_together', tmp_path, str(index), '2', port)
    for index in range(2)
  ]
  for process in processes:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    # Gloo writes to the same stream, at times into the middle of a line.
    lines = re.findall(r'answer: (.*)', output)
    assert lines[0] == "1 {'n': 1} {1.0} [1]"
    assert 'is of another model' in lines[1]
  assert _names(tmp_path) == {'1', 'damaged-2-0'}


def _kill_while_saving(directory: pathlib.Path, rng: random.Random) -> int:
  """Kills a run at a random moment and returns the last step it reported."""
  process = _start('save_until_killed', directory)
  assert process.stdout is not None
  last = process.stdout.readline()
  time.sleep(rng.uniform(0, 0.5))
  process.kill()
  rest, _ = process.communicate(timeout=60)
  # The last line may be cut off; all before it are whole.
  return int((last + rest).splitlines(keepends=True)[-1].split()[0])


@pytest.mark.parametrize(
  'num_kills', [2, pytest.param(20, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_any_moment_can_continue(
  tmp_path: pathlib.Path, num_kills: int
) -> None:
  rng = random.Random(num_kills)
  for _ in range(num_kills):
    reported = _kill_while_saving(tmp_path, rng)
    step = _restored_step(tmp_path)
    # A save is whole once the next one has begun; the last may be cut off.
    assert (step or 0) >= reported - 1
