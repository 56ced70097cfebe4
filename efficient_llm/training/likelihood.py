"""How likely a model holds given texts to be, and what it goes on with.

The questions that evaluation harnesses ask of a model: the likelihood of a
continuation, that of a whole text in windows, a completion up to a mark.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_llm import typing
from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import sampling, transformer
from efficient_llm.typing import Array

# Places whose logits exist at once, in each row of a batch.
_CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of one continuation.

  Attributes:
    log_prob: Natural logarithm of its probability, all tokens together.
    is_greedy: Whether each of its tokens is the likeliest one.
  """

  log_prob: float
  is_greedy: bool


@dataclasses.dataclass(frozen=True)
class _Request:
  """Tokens that are read, and how many at their end are asked about."""

  tokens: list[int]
  num_asked: int


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A model that answers such questions about text.

  Attributes:
    model: A causal one.
    params: Its parameters.
    tokenizer: Its own.
    max_batch: Rows read together.
    max_tokens: Longest text that is read at once.
  """

  model: transformer.TransformerConfig
  params: typing.Params
  tokenizer: tokenizer_lib.Tokenizer
  max_batch: int = 16
  max_tokens: int | None = None

  def __post_init__(self) -> None:
    if not self.model.causal:
      raise ValueError(
        'model.causal=False: a bidirectional model gives texts no likelihood; '
        'choose a causal one.'
      )

  @property
  def window(self) -> int:
    """Tokens that are read at most."""
    return min(self.max_tokens or 1 << 30, self.model.max_positions)

  @property
  def prefix(self) -> int:
    """Stands before a text with nothing else before it."""
    for token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
      if token is not None:
        return token
    raise ValueError(
      'The tokenizer must have a token that begins or ends texts, to stand '
      'before a text; choose a checkpoint that has one.'
    )

  def encode(self, text: str) -> list[int]:
    """Tokens of a text from its beginning.

    A mark that only begins texts goes before it; one that ends texts too, as
    GPT-2's, does not, as is usual in evaluations.
    """
    bos = self.tokenizer.bos_id
    begin = [] if bos in (None, self.tokenizer.eos_id) else [bos]
    return [*begin, *self.tokenizer.encode(text).tolist()]

  def continuations(self, pairs: Iterable[tuple[str, str]]) -> list[Likelihood]:
    """Of texts behind other texts.

    Both are encoded together, and blanks at the end of a context count as the
    beginning of its continuation, as tokens hold blanks before words. Where
    they are too long, the beginning of the context is left out.

    Args:
      pairs: Context and continuation; a context may be empty.
    """
    return self._score([self._request(*pair) for pair in pairs])

  def _request(self, context: str, continuation: str) -> _Request:
    blanks = len(context) - len(context.rstrip())
    if blanks:
      context, continuation = (
        context[:-blanks],
        context[-blanks:] + continuation,
      )
    if context and (before := self.encode(context)):
      tokens = self.encode(context + continuation)
      num_asked = len(tokens) - len(before)
    else:
      asked = self.tokenizer.encode(continuation).tolist()
      tokens, num_asked = [self.prefix, *asked], len(asked)
    if num_asked > self.window:
      raise ValueError(
        f'A continuation of {num_asked} tokens must not exceed the '
        f'{self.window} that the model reads; take shorter ones.'
      )
    return _Request(tokens[-self.window - 1 :], max(num_asked, 0))

  def texts(self, texts: Iterable[str]) -> list[float]:
    """Log-probabilities of whole texts, each from its first token on.

    A text longer than the model reads is taken in windows, the last of which
    reads as much before its tokens as it can.
    """
    requests, counts = [], []
    for text in texts:
      tokens = self.tokenizer.encode(text).tolist()
      found = list(_windows([self.prefix, *tokens], self.window))
      requests += found
      counts.append(len(found))
    scores = iter(self._score(requests))
    return [sum(next(scores).log_prob for _ in range(n)) for n in counts]

  def _score(self, requests: Sequence[_Request]) -> list[Likelihood]:
    """Answers in the order of the requests, which are read by length."""
    found: dict[int, Likelihood] = {}
    for rows in self._batches([len(one.tokens) for one in requests]):
      found |= zip(rows, self._batch([requests[i] for i in rows]), strict=True)
    return [found[i] for i in range(len(requests))]

  def _batch(self, requests: Sequence[_Request]) -> Iterator[Likelihood]:
    longest = max(len(one.tokens) for one in requests) - 1
    num_asked = _bucket(max(1, *(one.num_asked for one in requests)))
    shape = (self.max_batch, min(_bucket(longest), self.window))
    inputs_BT = np.zeros(shape, np.int32)
    places_BA, targets_BA = np.zeros((2, self.max_batch, num_asked), np.int32)
    for row, one in enumerate(requests):
      length, asked = len(one.tokens) - 1, one.num_asked
      inputs_BT[row, :length] = one.tokens[:-1]
      places_BA[row, :asked] = np.arange(length - asked, length)
      targets_BA[row, :asked] = one.tokens[len(one.tokens) - asked :]
    log_probs_BA, is_best_BA = jax.device_get(
      _log_probs(self.model, self.params, inputs_BT, places_BA, targets_BA)
    )
    for row, one in enumerate(requests):
      asked = slice(0, one.num_asked)
      yield Likelihood(
        float(log_probs_BA[row, asked].sum(dtype=np.float64)),
        bool(is_best_BA[row, asked].all()),
      )

  def completions(
    self,
    prompts: Sequence[str],
    *,
    until: Sequence[str],
    config: sampling.SamplingConfig,
    seed: int = 0,
  ) -> list[str]:
    """What the model goes on with, cut before the first of the marks.

    Args:
      prompts: Their last tokens where the model does not read so many.
      until: Marks that end an answer and are no part of it.
      config: How tokens are drawn.
      seed: Of the coins.
    Raises:
      ValueError: If the model has no room for a prompt beside the answer.
    """
    room = self.window - config.max_new_tokens
    if room < 1:
      raise ValueError(
        f'max_new_tokens={config.max_new_tokens} must be below the '
        f'{self.window} that the model reads; lower it.'
      )
    if self.tokenizer.eos_id is not None:
      stop_tokens = (*config.stop_tokens, self.tokenizer.eos_id)
      config = dataclasses.replace(config, stop_tokens=stop_tokens)
    rows = [(self.encode(one) or [self.prefix])[-room:] for one in prompts]
    texts: dict[int, str] = {}
    for some in self._batches([len(row) for row in rows]):
      lengths_B = np.ones(self.max_batch, np.int32)
      lengths_B[: len(some)] = [len(rows[i]) for i in some]
      shape = (self.max_batch, min(_bucket(int(lengths_B.max())), room))
      prompts_BP = np.zeros(shape, np.int32)
      for prompt_P, i in zip(prompts_BP, some, strict=False):
        prompt_P[: len(rows[i])] = rows[i]
      key = jax.random.fold_in(jax.random.key(seed), some[0])
      found = sampling.generate(
        self.model, self.params, prompts_BP, lengths_B, config, key
      )
      for row, i in enumerate(some):
        tokens_T = np.asarray(found.tokens[row])[: int(found.lengths[row])]
        texts[i] = _cut(self.tokenizer.decode(tokens_T.tolist()), until)
    return [texts[i] for i in range(len(prompts))]

  def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about the same length, the longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), self.max_batch):
      yield order[start : start + self.max_batch]


def _cut(text: str, until: Sequence[str]) -> str:
  ends = [text.find(mark) for mark in until if mark and mark in text]
  return text[: min(ends, default=len(text))]


def _windows(tokens: list[int], size: int) -> Iterator[_Request]:
  """Requests that ask about every token but the first once."""
  for start in range(1, len(tokens), size):
    stop = min(start + size, len(tokens))
    yield _Request(tokens[max(stop - size - 1, 0) : stop], stop - start)


def _bucket(size: int) -> int:
  """Powers of two, so that few programs are compiled."""
  return 1 << (size - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(
  model: transformer.TransformerConfig,
  params: Any,
  inputs_BT: Array,
  places_BA: Array,
  targets_BA: Array,
) -> tuple[Array, Array]:
  """Log-probabilities of tokens behind some places, and which are likeliest."""
  output = transformer.apply(model, params, inputs_BT, with_logits=False)
  hidden_BAD = jnp.take_along_axis(output.hidden, places_BA[..., None], axis=1)
  size = min(_CHUNK_TOKENS, places_BA.shape[1])

  def of_chunk(start: Array) -> tuple[Array, Array]:
    hidden_BCD, targets_BC = (
      jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
      for x in (hidden_BAD, targets_BA)
    )
    logits_BCV = transformer.unembed(model, params, hidden_BCD)
    chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], -1)[
      ..., 0
    ]
    # All of the table at once would not fit for long texts.
    log_probs_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, -1)
    return log_probs_BC, logits_BCV.argmax(-1) == targets_BC

  starts = jnp.arange(0, places_BA.shape[1], size)
  found = jax.lax.map(of_chunk, starts)
  log_probs_BA, is_best_BA = (
    x.swapaxes(0, 1).reshape(places_BA.shape) for x in found
  )
  return log_probs_BA, is_best_BA
