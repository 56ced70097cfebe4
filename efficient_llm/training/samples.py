"""Text that a trained model writes, for people to read."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from efficient_llm import sharding, typing
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import sampling, transformer


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Beginnings of texts.

  Attributes:
    texts: As people read them.
    tokens_BP: Padded on the right.
    lengths_B: Tokens of each.
  """

  texts: tuple[str, ...]
  tokens_BP: np.ndarray
  lengths_B: np.ndarray


def encode(
  texts: Sequence[str],
  tokenizer: tokenizer_lib.Tokenizer | None,
  model: transformer.TransformerConfig,
  config: sampling.SamplingConfig,
) -> Prompts | None:
  """Makes prompts of texts; before training, so that bad ones are refused then.

  Args:
    texts: The beginnings.
    tokenizer: Of the model; None where it reads images.
    model: What will complete them.
    config: How.

  Returns:
    The prompts; None where there are none, or the model writes no text or has
    no layer, which could not keep what it read.

  Raises:
    ValueError: If a prompt has no token, or too many for the model.
  """
  writes = model.causal and model.num_layers
  if not texts or not writes or tokenizer is None:
    return None
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  rows = [[*begin, *tokenizer.encode(text).tolist()] for text in texts]
  lengths = np.array([len(row) for row in rows], np.int32)
  if lengths.min() == 0:
    raise ValueError(
      f'sample_prompts={tuple(texts)} must have a token each, as the tokenizer '
      'has no start token; set --config.sample_prompts.'
    )
  longest = int(lengths.max()) + config.max_new_tokens
  if longest > model.max_positions:
    raise ValueError(
      f'The longest of sample_prompts and sampling.max_new_tokens='
      f'{config.max_new_tokens} make {longest} tokens, which must not exceed '
      f'model.max_positions={model.max_positions}; shorten one of them.'
    )
  padded = np.zeros((len(rows), lengths.max()), np.int32)
  for target, row in zip(padded, rows, strict=True):
    target[: len(row)] = row
  return Prompts(tuple(texts), padded, lengths)


def draw(
  prompts: Prompts | None,
  params: typing.Params,
  *,
  model: transformer.TransformerConfig,
  config: sampling.SamplingConfig,
  tokenizer: tokenizer_lib.Tokenizer | None,
  mesh: Mesh,
  seed: int,
) -> list[Mapping[str, str]]:
  """Completes prompts; all processes call it and get the same texts."""
  if prompts is None or tokenizer is None:
    return []
  if tokenizer.eos_id is not None:
    stop_tokens = (*config.stop_tokens, tokenizer.eos_id)
    config = dataclasses.replace(config, stop_tokens=stop_tokens)

  def generate(
    params: typing.Params, tokens_BP: jax.Array, lengths_B: jax.Array
  ) -> sampling.Completion:
    key = jax.random.key(seed)
    return sampling.generate(model, params, tokens_BP, lengths_B, config, key)

  # Whole on every device, so that every process can read it.
  program = jax.jit(generate, out_shardings=sharding.replicated(mesh))
  completion = jax.device_get(
    program(params, prompts.tokens_BP, prompts.lengths_B)
  )
  return [
    {'prompt': text, 'text': tokenizer.decode(tokens[:length].tolist())}
    for text, tokens, length in zip(
      prompts.texts, completion.tokens, completion.lengths, strict=True
    )
  ]
