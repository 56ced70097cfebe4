"""What a pass of a model over one or several tokens behind a cache costs."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import decoding, transformer


def pass_secs(
  config: transformer.TransformerConfig,
  params: Any,
  *,
  batch_size: int,
  num_nodes: int,
  num_tokens: int,
) -> float:
  """Seconds of a pass over `num_nodes` tokens a row, half-way.

  Args:
    config: The model.
    params: Its parameters.
    batch_size: Rows.
    num_nodes: New tokens of each.
    num_tokens: That a row's cache has room for; half of it is filled.
  """
  num_passes = 24
  capacity = num_tokens + 16
  params = decoding.prepare(config, params)

  @jax.jit
  def passes(params: Any, cache: Any, tokens: jax.Array) -> jax.Array:
    def body(_: Any, carry: tuple) -> tuple:
      cache, tokens = carry
      output = transformer.apply(
        config,
        params,
        tokens,
        cache=cache,
        num_new_B=jnp.zeros(batch_size, jnp.int32),
        with_logits=False,
      )
      logits = transformer.unembed(config, params, output.hidden)
      return output.cache, jnp.argmax(logits, -1).astype(jnp.int32)

    return jax.lax.fori_loop(0, num_passes, body, (cache, tokens))[1]

  cache = transformer.empty_cache(
    config, batch_size=batch_size, capacity=capacity
  ).advance(num_tokens // 2)
  if batch_size == 1:
    cache = cache.flat()
  tokens = jnp.ones((batch_size, num_nodes), jnp.int32)
  jax.block_until_ready(passes(params, cache, tokens))
  secs = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(passes(params, cache, tokens))
    secs.append((time.perf_counter() - start) / num_passes)
  return statistics.median(secs)
