"""Damages checkpoints on purpose and counts what restoring did not notice.

Two checkpoints of a small train state are saved. In a copy of the newer one
a bit is flipped or a file cut, and the directory is restored, which must give
the older one, bit for bit. Every kind of file is hit.

Run:
  ./run.sh python -m benchmarks.checkpoint_damage
Takes about a minute on two CPU cores. Expected: undetected 0, wrong_restores 0.
"""

import argparse
import collections
import logging
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from efficient_llm.models import transformer
from efficient_llm.training import checkpoint

_GOOD, _DAMAGED = 1, 2


def main() -> None:
  """Runs the benchmark from the command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='a tenth as many')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  # One line for each of the damages found would hide the result.
  logging.disable(logging.ERROR)
  divisor = 10 if options.quick else 1
  with tempfile.TemporaryDirectory() as folder:
    result = measure(
      pathlib.Path(folder),
      num_flips=100 // divisor,
      num_truncations=20 // divisor,
      seed=options.seed,
    )
  harness.record('checkpoint_damage', result)


def measure(
  folder: pathlib.Path, *, num_flips: int, num_truncations: int, seed: int
) -> dict[str, Any]:
  """Damages a checkpoint again and again, restoring after each time.

  Returns:
    Counts of damages that went unnoticed and of restored states that were not
    the good one's, in all and by kind of file.
  """
  rng = random.Random(seed)
  pristine, copy = folder / 'pristine', folder / 'copy'
  good = _save_two(pristine)
  files = _files_by_kind(pristine / str(_DAMAGED))
  undetected = wrong_restores = 0
  hits: collections.Counter[str] = collections.Counter()
  damages = ['flip'] * num_flips + ['truncation'] * num_truncations
  for damage, (kind, name) in zip(damages, _turns(files, rng), strict=False):
    shutil.copytree(pristine, copy)
    path = copy / str(_DAMAGED) / name
    (_flip_bit if damage == 'flip' else _truncate)(path, rng)
    restored = _restore(copy, good)
    undetected += restored is not None and restored.step != _GOOD
    wrong_restores += restored is None or not _same(restored.state, good)
    hits[kind] += 1
    shutil.rmtree(copy)
  return {
    'undetected': undetected,
    'wrong_restores': wrong_restores,
    'flips': num_flips,
    'truncations': num_truncations,
    'file_kinds': dict(sorted(hits.items())),
    'kinds_not_hit': sorted(set(files) - set(hits)),
    'files': sum(map(len, files.values())),
    'params': sum(x.size for x in jax.tree.leaves(good['params'])),
    'seed': seed,
  }


def _save_two(directory: pathlib.Path) -> Any:
  """Saves two states that differ in every leaf and returns the first."""
  config = transformer.TransformerConfig()
  params = transformer.init(config, jax.random.key(0))
  optimizer = optax.adamw(1e-3)
  state = {
    'step': np.int32(_GOOD),
    'params': params,
    'opt_state': optimizer.init(params),
    'key': jax.random.key_data(jax.random.key(1)),
  }
  later = jax.tree.map(lambda x: jnp.asarray(x) + 1, state)
  checkpointer = checkpoint.Checkpointer(
    directory, checkpoint.CheckpointConfig()
  )
  for step, saved in ((_GOOD, state), (_DAMAGED, later)):
    checkpointer.save(
      step, saved, data_state={'next_index': step}, metadata={'model': 'small'}
    )
  checkpointer.close()
  return state


def _files_by_kind(step: pathlib.Path) -> dict[str, list[str]]:
  """The step's files by what they are, random names left out."""
  kinds: dict[str, list[str]] = collections.defaultdict(list)
  for path in sorted(step.rglob('*')):
    if path.is_file() and path.stat().st_size:
      name = path.relative_to(step)
      kind = name.parent / '*' if name.parent.name == 'd' else name
      kinds[kind.as_posix()].append(name.as_posix())
  return kinds


def _turns(
  files: dict[str, list[str]], rng: random.Random
) -> Iterator[tuple[str, str]]:
  """Kinds in turn, so that rare and small ones are hit as often."""
  while True:
    for kind, names in files.items():
      yield kind, rng.choice(names)


def _flip_bit(path: pathlib.Path, rng: random.Random) -> None:
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def _truncate(path: pathlib.Path, rng: random.Random) -> None:
  data = path.read_bytes()
  path.write_bytes(data[: rng.randrange(len(data))])


def _restore(
  directory: pathlib.Path, wanted: Any
) -> checkpoint.Restored | None:
  """Restores, or returns None where even the good step was refused."""
  checkpointer = checkpoint.Checkpointer(
    directory, checkpoint.CheckpointConfig()
  )
  try:
    return checkpointer.restore(wanted)
  except checkpoint.CheckpointError:
    return None
  finally:
    checkpointer.close()


def _same(tree: Any, other: Any) -> bool:
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
  )


if __name__ == '__main__':
  main()
