"""Runs one part of a checkpoint test in a process of its own.

python -m tests.training.checkpoint_process PART DIRECTORY [ARGUMENT ...]
"""

import pathlib
import resource
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm.training import checkpoint

_SHAPE = (16, 1024)


def make(step: int, sharding: jax.sharding.Sharding | None = None) -> dict:
  """A state every element of which tells its step."""
  if sharding is None:
    weights = jnp.full(_SHAPE, step, jnp.float32)
  else:
    weights = jax.make_array_from_callback(
      _SHAPE, sharding, lambda index: np.full(_SHAPE, step, np.float32)[index]
    )
  return {'params': {'w': weights}, 'step': np.int32(step)}


def abstract(sharding: jax.sharding.Sharding | None = None) -> dict:
  """What `make` is restored into."""
  return {
    'params': {
      'w': jax.ShapeDtypeStruct(_SHAPE, np.float32, sharding=sharding)
    },
    'step': jax.ShapeDtypeStruct((), np.int32),
  }


def open_checkpoints(directory: str | pathlib.Path) -> checkpoint.Checkpointer:
  return checkpoint.Checkpointer(directory, checkpoint.CheckpointConfig())


def save_until_killed(directory: str) -> None:
  """Continues as a training run does, and says so after the first save."""
  checkpointer = open_checkpoints(directory)
  restored = checkpointer.restore(abstract())
  step = restored.step if restored else 0
  while True:
    step += 1
    checkpointer.save(step, make(step), data_state={'n': step}, metadata={})
    print(step, flush=True)


def move_mesh(directory: str) -> None:
  """Restores step 1 onto eight devices and saves it as step 2 from there."""
  mesh = jax.make_mesh(
    (4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  sharding = jax.NamedSharding(mesh, jax.P('b', 'a'))
  checkpointer = open_checkpoints(directory)
  restored = checkpointer.restore(abstract(sharding))
  if restored is None or restored.state['params']['w'].sharding != sharding:
    sys.exit(f'restored {restored}')
  checkpointer.save(2, restored.state, data_state=None, metadata={})
  checkpointer.close()


def overfill(directory: str) -> None:
  """Saves step 2 where no file may grow beyond a few thousand bytes."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
  checkpointer = open_checkpoints(directory)
  noise = np.random.default_rng(0).normal(size=_SHAPE).astype(np.float32)
  state = {'params': {'w': noise}, 'step': np.int32(2)}
  checkpointer.save(2, state, data_state=None, metadata={})
  try:
    checkpointer.wait()
  except checkpoint.CheckpointError as error:
    print(error)
  else:
    sys.exit('the save did not fail')


def run_together(directory: str, index: str, count: str, port: str) -> None:
  """Saves twice, damages step 2 and restores, as one of several processes."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(
    f'127.0.0.1:{port}', num_processes=int(count), process_id=int(index)
  )
  mesh = jax.make_mesh(
    (jax.device_count(),), ('a',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  by_rows = jax.NamedSharding(mesh, jax.P('a'))
  by_columns = jax.NamedSharding(mesh, jax.P(None, 'a'))
  checkpointer = open_checkpoints(directory)
  for step in (1, 2):
    checkpointer.save(
      step, make(step, by_rows), data_state={'n': step}, metadata={}
    )
  checkpointer.wait()
  if jax.process_index() == 0:
    folder = pathlib.Path(directory) / '2' / 'state' / 'ocdbt.process_1' / 'd'
    for path in folder.iterdir():
      path.write_bytes(path.read_bytes()[:-1])
  restored = checkpointer.restore(abstract(by_columns))
  if restored is None:
    sys.exit('nothing was restored')
  values = {
    float(value)
    for shard in restored.state['params']['w'].addressable_shards
    for value in np.unique(shard.data)
  }
  answer = (restored.step, restored.data_state, values, checkpointer.steps())
  print('answer:', *answer, flush=True)
  try:
    checkpointer.restore({'params': {}})
  except ValueError as error:
    print('answer:', error, flush=True)
  checkpointer.close()


if __name__ == '__main__':
  parts = (save_until_killed, move_mesh, overfill, run_together)
  {part.__name__: part for part in parts}[sys.argv[1]](*sys.argv[2:])
