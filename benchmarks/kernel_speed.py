"""Tree attention on a GPU: ours, XLA's, cuDNN's, and a copy of the same bytes.

    python -m benchmarks.kernel_speed [--quick]

A draft tree against a long cache in bfloat16. Every arm runs many times inside
one program, in turns. For each batch size and tree:
  secs                    by arm
  fraction_of_copy        bytes a second that the kernel reads, of those that a
                          copy of the cache reads and writes
  speedup                 the fastest other arm's time by the kernel's
  max_error               against float32 on the same inputs
--smoke runs small shapes and XLA alone on any device, to try the script.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from efficient_llm.kernels import selection
from efficient_llm.kernels.tree_attention import api, reference

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 32, 8, 128


def repeated(attend: Callable[..., jax.Array], count: int) -> Any:
  """A program that runs it `count` times, each after the one before."""

  def run(q: jax.Array, *arrays: jax.Array) -> jax.Array:
    def body(_: int, q: jax.Array) -> jax.Array:
      # Too little to change the queries, enough to need the result.
      return q + 1e-6 * attend(q, *arrays).astype(q.dtype)

    return jax.lax.fori_loop(0, count, body, q)

  return jax.jit(run)


def copy_all(count: int) -> Any:
  """A program that copies two arrays `count` times, there and back."""

  def run(*arrays: jax.Array) -> Any:
    def body(_: int, arrays: Any) -> Any:
      # Negation reads and writes all, and is no copy that XLA could leave out.
      return jax.tree.map(jnp.negative, arrays)

    return jax.lax.fori_loop(0, count, body, arrays)

  return jax.jit(run)


def dense(implementation: Any) -> Callable[..., jax.Array]:
  """JAX's attention with a dense mask; keys and values are [B, S, K, H]."""
  return lambda q, k, v, mask: jax.nn.dot_product_attention(
    q, k, v, mask=mask, implementation=implementation
  )


def measure(
  *, batch_size: int, num_tokens: int, context: int, rounds: int, smoke: bool
) -> dict[str, Any]:
  """Times all arms on one shape."""
  capacity = context + 64
  keys = jax.random.split(jax.random.key(0), 3)
  cache = (batch_size, _NUM_KV_HEADS, capacity, _HEAD_DIM)
  q, k, v = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(
      keys,
      ((batch_size, num_tokens, _NUM_HEADS, _HEAD_DIM), cache, cache),
      strict=True,
    )
  )
  lengths = jnp.full(batch_size, context, jnp.int32)
  # A binary tree, every node seeing its ancestors.
  seen = np.eye(num_tokens, dtype=bool)
  for node in range(1, num_tokens):
    seen[node] |= seen[(node - 1) // 2]
  words = api.pack(jnp.broadcast_to(seen, (batch_size, *seen.shape)))
  mask = reference.visible(lengths, words, capacity=capacity)[:, None]
  # Each arm has the layout that it wants.
  swapped = [jnp.copy(x.swapaxes(1, 2)) for x in (k, v)]
  num_bytes = k.nbytes + v.nbytes
  # About 20 ms at 4 TB/s.
  count = 2 if smoke else max(4, int(8e10 / num_bytes))
  programs = {
    'xla': (repeated(dense('xla'), count), (q, *swapped, mask)),
    'copy': (copy_all(count), (k, v)),
  }
  if not smoke:
    kernel = functools.partial(api.attend, implementation='pallas_gpu')
    programs['pallas_gpu'] = repeated(kernel, count), (q, k, v, lengths, words)
    programs['cudnn'] = repeated(dense('cudnn'), count), (q, *swapped, mask)
  arms = {}
  for name, (program, arguments) in programs.items():
    try:
      jax.block_until_ready(program(*arguments))
    except Exception as error:  # what a library cannot do is a result too
      print(f'{name}: {type(error).__name__}: {error}'[:300], file=sys.stderr)
      continue
    arms[name] = functools.partial(program, *arguments)
  secs = {
    name: statistics.median(values) / count
    for name, values in harness.alternate(arms, rounds).items()
  }
  row: dict[str, Any] = {
    'batch_size': batch_size,
    'num_tokens': num_tokens,
    'context': context,
    'secs': secs,
    'copy_bytes_per_sec': 2 * num_bytes / secs['copy'],
  }
  if 'pallas_gpu' in secs:
    others = [secs[name] for name in ('xla', 'cudnn') if name in secs]
    first_q, first_k, first_v = (x.astype(jnp.float32)[:1] for x in (q, k, v))
    exact = reference.attend(first_q, first_k, first_v, lengths[:1], words[:1])
    ours = api.attend(q, k, v, lengths, words, implementation='pallas_gpu')
    row |= {
      'fraction_of_copy': num_bytes
      / secs['pallas_gpu']
      / row['copy_bytes_per_sec'],
      'speedup': min(others) / secs['pallas_gpu'],
      'max_error': float(jnp.abs(ours[:1].astype(jnp.float32) - exact).max()),
    }
  return row


def main() -> None:
  """Measures all shapes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--quick', action='store_true', help='two shapes only')
  parser.add_argument('--smoke', action='store_true', help='to try the script')
  parser.add_argument('--rounds', type=int, default=9)
  arguments = parser.parse_args()
  device = jax.devices()[0]
  kernel = selection.kernel_for(device.platform, device.device_kind)
  if kernel != 'pallas_gpu' and not arguments.smoke:
    print(
      f'error: this needs a Hopper GPU, found {device.device_kind}; --smoke '
      'tries the script without one.',
      file=sys.stderr,
    )
    sys.exit(2)
  shapes = [(b, t) for b in (1, 4, 8, 16, 32) for t in (16, 32, 64)]
  if arguments.quick or arguments.smoke:
    shapes = [(1, 64), (8, 16)]
  rows = []
  for batch_size, num_tokens in shapes:
    row = measure(
      batch_size=batch_size,
      num_tokens=num_tokens,
      context=448 if arguments.smoke else 32_768 - 64,
      rounds=2 if arguments.smoke else arguments.rounds,
      smoke=arguments.smoke,
    )
    print(row, file=sys.stderr, flush=True)
    rows.append(row)
  if arguments.smoke:
    return
  harness.record(
    'kernel_speed',
    {
      'fraction_of_copy_min': min(row['fraction_of_copy'] for row in rows),
      'speedup_min': min(row['speedup'] for row in rows),
      'rows': rows,
    },
  )


if __name__ == '__main__':
  main()
