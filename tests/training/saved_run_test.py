import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.training import checkpoint, manifest, saved_run

_WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  """Checkpoints of steps 1 and 2; each element is offset by its step."""
  directory = tmp_path / 'run'
  checkpointer = checkpoint.Checkpointer(
    directory, checkpoint.CheckpointConfig()
  )
  for step in (1, 2):
    state = {
      'params': {
        'layers': {'w': _WEIGHTS + step},
        'embed': jnp.ones(3, jnp.bfloat16),
      },
      'opt_state': [np.zeros(3)],
    }
    checkpointer.save(
      step, state, data_state=None, metadata={'model': {'width': step}}
    )
  checkpointer.close()
  return directory


def _abstract_params(**changes: Any) -> dict[str, Any]:
  params = {
    'layers': {'w': jax.ShapeDtypeStruct((3, 4), np.float32)},
    'embed': jax.ShapeDtypeStruct((3,), jnp.bfloat16),
  }
  return {**params, **changes}


def _flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[0] ^= 1
  path.write_bytes(data)


def _contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {
    path.relative_to(directory).as_posix(): path.read_bytes()
    for path in directory.rglob('*')
    if path.is_file()
  }


def test_params_come_back_without_the_rest(run: pathlib.Path) -> None:
  params = saved_run.restore_params(run, _abstract_params())
  assert set(params) == {'layers', 'embed'}
  np.testing.assert_array_equal(params['layers']['w'], _WEIGHTS + 2)


def test_params_come_back_as_saved_when_nothing_is_wanted(
  run: pathlib.Path,
) -> None:
  params = saved_run.restore_params(run, None)
  np.testing.assert_array_equal(params['layers']['w'], _WEIGHTS + 2)
  assert params['embed'].dtype == jnp.bfloat16


def test_params_come_back_with_the_wanted_sharding(run: pathlib.Path) -> None:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    _abstract_params(),
  )
  params = saved_run.restore_params(run, wanted)
  assert params['layers']['w'].sharding == device


def test_params_of_a_given_step_come_back(run: pathlib.Path) -> None:
  params = saved_run.restore_params(run, None, step=1)
  np.testing.assert_array_equal(params['layers']['w'], _WEIGHTS + 1)


def test_params_of_another_model_are_refused(run: pathlib.Path) -> None:
  wanted = _abstract_params(embed=jax.ShapeDtypeStruct((5,), jnp.bfloat16))
  with pytest.raises(
    ValueError, match=r'params/embed is bfloat16\[3\] in it and bfloat16\[5\]'
  ):
    saved_run.restore_params(run, wanted)


def test_a_checkpoint_without_params_is_refused(tmp_path: pathlib.Path) -> None:
  checkpointer = checkpoint.Checkpointer(
    tmp_path, checkpoint.CheckpointConfig()
  )
  checkpointer.save(1, {'x': np.ones(1)}, data_state=None, metadata={})
  checkpointer.close()
  with pytest.raises(ValueError, match='must hold params'):
    saved_run.restore_params(tmp_path, None)


def test_metadata_is_that_of_the_newest_step(run: pathlib.Path) -> None:
  assert saved_run.read_metadata(run) == {'model': {'width': 2}}


def test_a_damaged_step_is_passed_over_and_left_alone(
  run: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
  _flip(run / '2' / 'metadata.json')
  before = _contents(run)
  assert saved_run.read_metadata(run) == {'model': {'width': 1}}
  params = saved_run.restore_params(run, None)
  np.testing.assert_array_equal(params['layers']['w'], _WEIGHTS + 1)
  assert _contents(run) == before
  assert 'step 2: metadata.json has changed contents' in caplog.text


@pytest.mark.parametrize('name', ['empty', 'missing'])
def test_a_directory_without_checkpoints_is_refused(
  tmp_path: pathlib.Path, name: str
) -> None:
  (tmp_path / 'empty').mkdir()
  with pytest.raises(checkpoint.CheckpointError, match='no checkpoint in'):
    saved_run.read_metadata(tmp_path / name)


def test_verifying_names_what_is_wrong_in_every_step(run: pathlib.Path) -> None:
  assert saved_run.verify(run) == []
  _flip(run / '1' / 'metadata.json')
  (run / '2' / 'extra').touch()
  assert saved_run.verify(run) == [
    manifest.Finding(1, 'metadata.json', 'has changed contents'),
    manifest.Finding(2, "'extra'", 'is not in the manifest'),
  ]


def test_a_clone_is_a_whole_checkpoint_of_its_own(
  run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  copy = tmp_path / 'copy'
  assert saved_run.clone(run, copy) == 2
  assert saved_run.verify(copy) == []
  assert _contents(copy / '2') == _contents(run / '2')


def test_a_clone_over_an_existing_step_is_refused(
  run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  saved_run.clone(run, tmp_path / 'copy')
  with pytest.raises(checkpoint.CheckpointError, match='newer than 2'):
    saved_run.clone(run, tmp_path / 'copy')
