"""Sampling from a decoder: prefill, then a decode loop wholly on the device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from efficient_llm.models import decoding, transformer
from efficient_llm.typing import Array, Float, Int, typed


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the next token is drawn.

  Attributes:
    max_new_tokens: Longest completion.
    temperature: 0 is greedy; below 1e-6 logits would overflow.
    top_k: Keep the k likeliest tokens; None keeps all.
    top_p: Keep the likeliest tokens that together reach this probability.
    stop_tokens: A completion ends with the first of these, which it includes.
  """

  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  stop_tokens: tuple[int, ...] = ()

  def validate(self) -> None:
    if self.max_new_tokens < 1:
      raise ValueError(
        f'sampling.max_new_tokens={self.max_new_tokens} must be at least 1.'
      )
    if self.temperature and not 1e-6 <= self.temperature < float('inf'):
      raise ValueError(
        f'sampling.temperature={self.temperature} must be 0 (greedy) or at '
        'least 1e-6.'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f'sampling.top_k={self.top_k} must be at least 1; None keeps all.'
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(
        f'sampling.top_p={self.top_p} must be in (0, 1]; None keeps all.'
      )
    if any(token < 0 for token in self.stop_tokens):
      raise ValueError(
        f'sampling.stop_tokens={self.stop_tokens} must be token ids, 0 or more.'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completion:
  """What `generate` returns.

  Attributes:
    tokens: [B, T] completions, 0 behind the end of each.
    lengths: [B] tokens of each completion, the stop token included.
    log_probs: [B, T] log-probability of each token under the distribution it
      was drawn from (after temperature and truncation), 0 behind the end.
  """

  tokens: Array
  lengths: Array
  log_probs: Array


@typed
def truncate(
  logits: Float[Array, '*B V'], config: SamplingConfig
) -> Float[Array, '*B V']:
  """Log-probabilities of the distribution that `config` draws from.

  Temperature first, then top-k, then top-p over what top-k left, as in
  Hugging Face transformers. Excluded tokens get -inf. A token as likely as the
  last one kept is kept too. At temperature 0 all mass is on the likeliest
  token, the first of equals.

  Args:
    logits: Unnormalised log-probabilities, in nats.
    config: How to draw.
  """
  logits = logits.astype(jnp.float32)
  if config.temperature == 0:
    best = jnp.argmax(logits, -1, keepdims=True)
    ids = jnp.arange(logits.shape[-1])
    return jnp.where(ids == best, 0.0, -jnp.inf)
  logits = logits / config.temperature
  if config.top_k is not None and config.top_k < logits.shape[-1]:
    kth = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
    logits = jnp.where(logits < kth, -jnp.inf, logits)
  if config.top_p is not None and config.top_p < 1:
    probs = jax.nn.softmax(logits, -1)
    descending = jnp.sort(probs, -1, descending=True)
    # A token stays if those before it have not yet reached top_p.
    before = jnp.cumsum(descending, -1) - descending
    last = jnp.sum(before < config.top_p, -1, keepdims=True) - 1
    smallest = jnp.take_along_axis(descending, last, -1)
    logits = jnp.where(probs < smallest, -jnp.inf, logits)
  return jax.nn.log_softmax(logits, -1)


def row_keys(key: Array, batch_size: int) -> Array:
  """The key of each row of a batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))


@typed
def draw(
  logits_BV: Float[Array, 'B V'],
  keys_B: Array,
  index_B: Int[Array, 'B'],
  config: SamplingConfig,
) -> tuple[Int[Array, 'B'], Float[Array, 'B']]:
  """Draws the next token of each row, and gives its log-probability.

  The coins depend on the row's key and the token's number alone, so whoever
  draws the same token of a completion draws the same.

  Args:
    logits_BV: The model's logits.
    keys_B: From `row_keys`.
    index_B: Number of the token in its completion, from 0.
    config: How to draw.
  """
  log_probs_BV = truncate(logits_BV, config)
  if config.temperature == 0:
    token_B = jnp.argmax(log_probs_BV, -1)
  else:
    step_keys_B = jax.vmap(jax.random.fold_in)(keys_B, index_B)
    token_B = jax.vmap(jax.random.categorical)(step_keys_B, log_probs_BV)
  log_prob_B = jnp.take_along_axis(log_probs_BV, token_B[:, None], -1)[:, 0]
  return token_B.astype(jnp.int32), log_prob_B


@functools.partial(jax.jit, static_argnums=(0, 4))
def generate(
  config: transformer.TransformerConfig,
  params: Any,
  prompts_BP: Int[Array, 'B P'],
  prompt_lengths_B: Int[Array, 'B'],
  sampling: SamplingConfig,
  key: Array,
) -> Completion:
  """Completes a batch of prompts in one compiled program.

  Row b of a batch draws with key fold_in(key, b): what it says does not depend
  on how long the other rows go on.

  Args:
    config: A causal model.
    params: Its parameters.
    prompts_BP: Prompts, padded on the right; every prompt has a token.
    prompt_lengths_B: Real tokens of each prompt.
    sampling: How to draw.
    key: A typed random key.
  Raises:
    ValueError: If the model is not causal or has no positions for prompt and
      completion.
  """
  sampling.validate()
  _check_model(config, prompts_BP.shape[1] + sampling.max_new_tokens)
  batch_size, prompt_tokens = prompts_BP.shape
  params = decoding.prepare(config, params)
  cache = transformer.empty_cache(
    config,
    batch_size=batch_size,
    capacity=prompt_tokens + sampling.max_new_tokens,
  )
  output = transformer.apply(
    config,
    params,
    prompts_BP,
    cache=cache,
    num_new_B=prompt_lengths_B,
    with_logits=False,
  )
  last = (prompt_lengths_B - 1)[:, None, None]
  hidden_BD = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
  keys_B = row_keys(key, batch_size)
  stop_tokens = jnp.asarray(sampling.stop_tokens, jnp.int32)
  shape = (batch_size, sampling.max_new_tokens)
  start = (
    jnp.int32(0),
    output.cache,
    transformer.unembed(config, params, hidden_BD),
    jnp.zeros(batch_size, bool),
    Completion(
      tokens=jnp.zeros(shape, jnp.int32),
      lengths=jnp.zeros(batch_size, jnp.int32),
      log_probs=jnp.zeros(shape, jnp.float32),
    ),
  )

  def going(loop: Any) -> Array:
    index, _, _, done_B, _ = loop
    return (index < sampling.max_new_tokens) & ~done_B.all()

  def step(loop: Any) -> Any:
    index, cache, logits_BV, done_B, out = loop
    index_B = jnp.full(batch_size, index)
    token_B, log_prob_B = draw(logits_BV, keys_B, index_B, sampling)
    live_B = ~done_B
    out = Completion(
      tokens=out.tokens.at[:, index].set(jnp.where(live_B, token_B, 0)),
      lengths=out.lengths + live_B,
      log_probs=out.log_probs.at[:, index].set(
        jnp.where(live_B, log_prob_B, 0.0)
      ),
    )
    done_B |= jnp.isin(token_B, stop_tokens)
    output = transformer.apply(
      config,
      params,
      token_B[:, None],
      cache=cache,
      num_new_B=live_B.astype(jnp.int32),
      with_logits=False,
    )
    logits_BV = transformer.unembed(config, params, output.hidden[:, 0])
    return index + 1, output.cache, logits_BV, done_B, out

  return jax.lax.while_loop(going, step, start)[-1]


def _check_model(
  config: transformer.TransformerConfig, num_tokens: int
) -> None:
  """Refuses a model that cannot complete prompts, or not as long ones."""
  if not config.causal:
    raise ValueError(
      'model.causal=False: a bidirectional model cannot complete prompts; '
      'sample from a causal one.'
    )
  if config.positions == 'learned' and num_tokens > config.max_positions:
    raise ValueError(
      f'Prompt and completion of {num_tokens} tokens exceed '
      f'model.max_positions={config.max_positions}; lower '
      'sampling.max_new_tokens.'
    )
