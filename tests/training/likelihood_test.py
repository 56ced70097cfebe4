"""Likelihoods of texts against sums that are made directly, and completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import sampling, transformer
from efficient_llm.training import likelihood
from tests import tiny

# Weights that make it sure of something.
_MODEL = dataclasses.replace(tiny.MODEL, max_positions=16, init_std=0.3)
_BYTES = tokenizer_lib.load('bytes')
_BOS = 256


@functools.cache
def _scorer() -> likelihood.Scorer:
  return likelihood.Scorer(_MODEL, tiny.params(_MODEL), _BYTES, max_batch=4)


def _directly(tokens: list[int], num_asked: int) -> likelihood.Likelihood:
  """Of the last tokens, one forward pass without batch or padding."""
  inputs_1T = jnp.array([tokens[:-1]], jnp.int32)
  apply = jax.jit(transformer.apply, static_argnums=0)
  logits = apply(_MODEL, tiny.params(_MODEL), inputs_1T).logits
  log_probs = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
  asked = range(len(tokens) - num_asked, len(tokens))
  return likelihood.Likelihood(
    sum(float(log_probs[at - 1, tokens[at]]) for at in asked),
    all(log_probs[at - 1].argmax() == tokens[at] for at in asked),
  )


def _ids(text: str) -> list[int]:
  return list(text.encode())


def _check(found: likelihood.Likelihood, tokens: list[int], asked: int) -> None:
  wanted = _directly(tokens, asked)
  # Float32 sums of another order.
  assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)
  assert found.is_greedy == wanted.is_greedy


def test_continuations_are_as_likely_as_a_direct_sum_says() -> None:
  pairs = [('a bc', ' d'), ('', 'xyz'), ('q', 'r'), ('in ', 'to'), ('z', '')]
  found = _scorer().continuations(pairs)
  for one, (context, continuation) in zip(found, pairs, strict=True):
    blanks = len(context) - len(context.rstrip())
    tokens = [_BOS, *_ids(context + continuation)]
    _check(one, tokens, len(continuation) + blanks)
  assert found[-1].log_prob == 0.0


def test_the_likeliest_token_is_greedy_and_another_is_not() -> None:
  logits = transformer.apply(
    _MODEL, tiny.params(_MODEL), jnp.array([[_BOS, 97]], jnp.int32)
  ).logits
  ranked = [t for t in np.argsort(-np.asarray(logits)[0, -1]) if t < 128]
  best, other = (chr(int(t)) for t in (ranked[0], ranked[-1]))
  # The likeliest of all tokens must be one that text can spell.
  assert int(np.asarray(logits)[0, -1].argmax()) == ranked[0]
  found = _scorer().continuations([('a', best), ('a', other)])
  assert [one.is_greedy for one in found] == [True, False]


def test_a_long_context_loses_its_beginning() -> None:
  (found,) = _scorer().continuations([('abcdefghijklmnopqrst', 'uvw')])
  _check(found, _ids('abcdefghijklmnopqrstuvw')[-17:], 3)
  with pytest.raises(ValueError, match='of 17 tokens must not exceed the 16'):
    _scorer().continuations([('a', 'b' * 17)])


def test_a_long_text_is_read_in_windows_that_overlap_only_at_the_end() -> None:
  text = 'abcdefghijklmnopqrstuvwxyz0123456789'
  ids = _ids(text)
  (found,) = _scorer().texts([text])
  wanted = (
    _directly([_BOS, *ids[:16]], 16).log_prob
    + _directly(ids[15:32], 16).log_prob
    + _directly(ids[19:36], 4).log_prob
  )
  assert found == pytest.approx(wanted, abs=1e-3)
  assert _scorer().texts(['', 'ab'])[0] == 0.0


def test_completions_end_before_a_mark() -> None:
  greedy = sampling.SamplingConfig(max_new_tokens=5, temperature=0.0)
  prompts = ['ab', 'abcdefghijklmnopqrstuvw', 'x y z', 'q', 'r']
  whole = _scorer().completions(prompts, until=(), config=greedy)
  # One by one, each is as in the batch.
  for prompt, text in zip(prompts, whole, strict=True):
    (again,) = _scorer().completions([prompt], until=(), config=greedy)
    assert again == text
  mark = next(text[2] for text in whole if len(text) > 2)
  cut = _scorer().completions(prompts, until=(mark, ''), config=greedy)
  assert cut == [text.split(mark)[0] for text in whole]
  assert cut != whole
  with pytest.raises(ValueError, match='max_new_tokens=16 must be below the'):
    _scorer().completions(
      ['a'], until=(), config=sampling.SamplingConfig(max_new_tokens=16)
    )


def test_a_bidirectional_model_is_refused() -> None:
  model = dataclasses.replace(_MODEL, causal=False)
  with pytest.raises(ValueError, match='gives texts no likelihood'):
    likelihood.Scorer(model, {}, _BYTES)
