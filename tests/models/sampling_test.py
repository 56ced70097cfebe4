import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_llm.models import sampling
from tests.models import architectures

_CONFIG = architectures.ARCHITECTURES['llama']
_GREEDY = sampling.SamplingConfig(max_new_tokens=6, temperature=0)
_DRAWN = sampling.SamplingConfig(
  max_new_tokens=6, temperature=0.7, top_k=9, stop_tokens=(3, 8, 20)
)
_PROMPTS = architectures.tokens(3, 5, seed=1)
_LENGTHS = np.array([2, 5, 3], np.int32)


def _generate(
  config: sampling.SamplingConfig,
  prompts_BP: np.ndarray = _PROMPTS,
  *,
  seed: int = 0,
) -> sampling.Completion:
  return jax.device_get(
    sampling.generate(
      _CONFIG,
      architectures.params('llama'),
      jnp.asarray(prompts_BP),
      jnp.asarray(_LENGTHS),
      config,
      jax.random.key(seed),
    )
  )


def _next_logits(row: list[int]) -> np.ndarray:
  """Logits behind a row, from a full forward pass without a cache."""
  padded_BT = np.zeros((1, 12), np.int32)
  padded_BT[0, : len(row)] = row
  output = architectures.forward(
    _CONFIG, architectures.params('llama'), padded_BT
  )
  return np.asarray(output.logits)[0, len(row) - 1]


@pytest.fixture(scope='module')
def greedy() -> sampling.Completion:
  return _generate(_GREEDY)


def test_greedy_completions_are_those_of_full_passes(
  greedy: sampling.Completion,
) -> None:
  for row, length in enumerate(_LENGTHS):
    text = _PROMPTS[row, :length].tolist()
    for token in greedy.tokens[row]:
      assert token == _next_logits(text).argmax()
      text.append(int(token))


def test_without_stop_tokens_completions_are_full(
  greedy: sampling.Completion,
) -> None:
  np.testing.assert_array_equal(greedy.lengths, [6, 6, 6])


def test_a_stop_token_ends_its_row_and_is_part_of_it(
  greedy: sampling.Completion,
) -> None:
  stop = int(greedy.tokens[0, 2])
  stopped = _generate(dataclasses.replace(_GREEDY, stop_tokens=(stop,)))
  assert stopped.lengths[0] <= 3
  for row in range(3):
    full = greedy.tokens[row].tolist()
    length = full.index(stop) + 1 if stop in full else 6
    assert stopped.lengths[row] == length
    expected = full[:length] + [0] * (6 - length)
    assert stopped.tokens[row].tolist() == expected


@pytest.fixture(scope='module')
def drawn() -> sampling.Completion:
  return _generate(_DRAWN)


def test_rows_end_at_their_first_stop_token(
  drawn: sampling.Completion,
) -> None:
  ended = []
  for tokens, length in zip(drawn.tokens, drawn.lengths, strict=True):
    stops = np.isin(tokens[:length], _DRAWN.stop_tokens)
    assert not stops[:-1].any()
    assert stops[-1] or length == 6
    assert not tokens[length:].any()
    ended.append(length < 6)
  # The seed is such that the test sees both.
  assert any(ended)
  assert not all(ended)


def test_log_probs_are_those_of_the_drawn_tokens(
  drawn: sampling.Completion,
) -> None:
  for row, prompt_length in enumerate(_LENGTHS):
    text = _PROMPTS[row, :prompt_length].tolist()
    for index in range(drawn.lengths[row]):
      token = int(drawn.tokens[row, index])
      expected = sampling.truncate(jnp.asarray(_next_logits(text)), _DRAWN)
      # Float32 rounding of logits of size about 3, over the temperature.
      assert drawn.log_probs[row, index] == pytest.approx(
        float(expected[token]), abs=5e-5
      )
      text.append(token)
    assert not drawn.log_probs[row, drawn.lengths[row] :].any()


def test_a_row_does_not_depend_on_the_others(
  drawn: sampling.Completion,
) -> None:
  prompts_BP = architectures.tokens(3, 5, seed=7)
  prompts_BP[1] = _PROMPTS[1]
  other = _generate(_DRAWN, prompts_BP)
  assert (other.tokens[0] != drawn.tokens[0]).any()
  np.testing.assert_array_equal(other.tokens[1], drawn.tokens[1])


def test_another_key_draws_another_text(drawn: sampling.Completion) -> None:
  assert (_generate(_DRAWN, seed=1).tokens != drawn.tokens).any()


def test_padding_of_a_prompt_does_not_matter(
  drawn: sampling.Completion,
) -> None:
  prompts_BP = _PROMPTS.copy()
  prompts_BP[0, 2:] = 11
  np.testing.assert_array_equal(
    _generate(_DRAWN, prompts_BP).tokens, drawn.tokens
  )


def test_new_prompts_of_equal_shape_do_not_compile_again(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  traces = []
  truncate = sampling.truncate

  def counted(*arguments: Any) -> jax.Array:
    traces.append(arguments)
    return truncate(*arguments)

  monkeypatch.setattr(sampling, 'truncate', counted)
  config = sampling.SamplingConfig(max_new_tokens=2, temperature=0.9)
  _generate(config)
  num_traces = len(traces)
  _generate(config, architectures.tokens(3, 5, seed=2), seed=5)
  assert num_traces == len(traces) > 0


def test_first_tokens_are_distributed_as_the_model_says() -> None:
  num_rows, prompt = 4096, [4, 9]
  config = sampling.SamplingConfig(max_new_tokens=1, temperature=1.5, top_k=12)
  completion = sampling.generate(
    _CONFIG,
    architectures.params('llama'),
    jnp.tile(jnp.array([prompt]), (num_rows, 1)),
    jnp.full(num_rows, 2),
    config,
    jax.random.key(0),
  )
  expected = np.exp(
    sampling.truncate(jnp.asarray(_next_logits(prompt)), config)
  )
  seen = np.bincount(np.asarray(completion.tokens)[:, 0], minlength=37)
  kept = expected > 0
  assert kept.sum() == 12
  assert not seen[~kept].any()
  counts = expected[kept] * num_rows
  statistic = np.sum((seen[kept] - counts) ** 2 / counts)
  # The seed is fixed, so this cannot fail by chance.
  assert jax.scipy.stats.chi2.sf(statistic, 11) > 1e-3


def _abstract_generate(
  name: str, *, prompt_tokens: int, max_new_tokens: int
) -> sampling.Completion:
  return jax.eval_shape(
    lambda prompts_BP, lengths_B, key: sampling.generate(
      architectures.ARCHITECTURES[name],
      architectures.params(name),
      prompts_BP,
      lengths_B,
      sampling.SamplingConfig(max_new_tokens=max_new_tokens),
      key,
    ),
    jnp.zeros((1, prompt_tokens), jnp.int32),
    jnp.ones(1, jnp.int32),
    jax.random.key(0),
  )


def test_a_completion_may_fill_learned_positions_but_no_more() -> None:
  full = _abstract_generate('gpt2', prompt_tokens=30, max_new_tokens=2)
  assert full.tokens.shape == (1, 2)
  with pytest.raises(ValueError, match=r'^Prompt and completion of 33 tokens'):
    _abstract_generate('gpt2', prompt_tokens=30, max_new_tokens=3)


def test_a_bidirectional_model_is_refused() -> None:
  with pytest.raises(ValueError, match=r'^model.causal=False'):
    _abstract_generate('bert', prompt_tokens=3, max_new_tokens=3)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'max_new_tokens': 0}, 'sampling.max_new_tokens=0 must be at least 1'),
    ({'temperature': -1.0}, 'sampling.temperature=-1.0 must be 0'),
    ({'temperature': 1e-9}, 'sampling.temperature=1e-09 must be 0'),
    ({'temperature': float('nan')}, 'sampling.temperature=nan must be 0'),
    ({'temperature': float('inf')}, 'sampling.temperature=inf must be 0'),
    ({'top_k': 0}, 'sampling.top_k=0 must be at least 1'),
    ({'top_p': 0.0}, r'sampling.top_p=0.0 must be in \(0, 1\]'),
    ({'top_p': 1.5}, r'sampling.top_p=1.5 must be in \(0, 1\]'),
    ({'stop_tokens': (-1,)}, r'sampling.stop_tokens=\(-1,\) must be token'),
  ],
)
def test_a_setting_out_of_range_is_refused(
  changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(ValueError, match=message) as caught:
    sampling.SamplingConfig(**changes).validate()
  assert '\n' not in str(caught.value)
