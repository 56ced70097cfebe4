"""Completes prompts with speculation, and says what it gained.

    python -m experiments.generate --checkpoint=out/pretrain \
      --drafter=out/drafter --prompts=prompts.txt

--drafter is the folder of an experiments.drafter run, 'ngram' (copies from the
text so far and needs no training), 'none', a folder and ngram joined by '+' for
both together, or 'int8': the model itself with rounded weights, a control that
is nearly always right and never fast. --prompts is a text file with a prompt a
line, or a .jsonl file with a `prompt` in each record. The same prompts are then
decoded plainly, with the same coins: the answers must be the same, only the
speed differs.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from efficient_llm.data import tokenizer as tokenizer_lib
from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import (
  drafter_training,
  drafting,
  engine,
  model_draft,
  self_draft,
  strategy,
  strategy_config,
  target_run,
)
from efficient_llm.speculative import generation as generation_lib
from efficient_llm.speculative import state as state_lib
from efficient_llm.training import samples, strict_json
from experiments import command, exits


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_string('checkpoint', None, 'Folder of a pre-training run.')
  flags.DEFINE_string(
    'drafter', 'ngram', 'Folder, ngram, FOLDER+ngram, int8, none.'
  )
  flags.DEFINE_string('prompts', None, 'File of prompts, .txt or .jsonl.')
  flags.DEFINE_string('output', None, 'Write completions here, as .jsonl.')
  flags.DEFINE_integer('answers', 1, 'Answers to each prompt.', lower_bound=1)
  flags.DEFINE_integer('max_new_tokens', 128, 'Longest completion.')
  flags.DEFINE_float('temperature', 1.0, '0 is greedy.')
  flags.DEFINE_integer('top_k', None, 'Keep the k likeliest tokens.')
  flags.DEFINE_float('top_p', None, 'Keep the likeliest up to this mass.')
  flags.DEFINE_integer('max_batch', 16, 'Rows decoded together.')
  flags.DEFINE_integer('seed', 0, 'Of the coins.')
  flags.DEFINE_list(
    'arms',
    None,
    'Draft shapes depth_topk_nodes to choose among, with a c behind those that '
    'only copy; by default those for CPUs or GPUs.',
  )
  flags.DEFINE_bool('compare', True, 'Decode plainly too, to see the gain.')
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')


@dataclasses.dataclass(frozen=True)
class Drafting:
  """A drafter, its parameters, and whether it drafts at all."""

  drafter: state_lib.Drafter | None
  params: Any


def run(changes: dict[str, str]) -> int:
  """Generates, compares and prints."""
  values = flags.FLAGS
  if changes:
    raise ValueError(
      f'--config.{next(iter(changes))} is not a flag here; a checkpoint brings '
      'its configuration.'
    )
  for name in ('checkpoint', 'prompts'):
    if getattr(values, name) is None:
      raise ValueError(f'--{name} must be given; see --help.')
  target = target_run.find(values.checkpoint, name='--checkpoint')
  sampling = sampling_lib.SamplingConfig(
    max_new_tokens=values.max_new_tokens,
    temperature=values.temperature,
    top_k=values.top_k,
    top_p=values.top_p,
  )
  sampling.validate()
  tokenizer = target.load_tokenizer()
  texts = read_prompts(pathlib.Path(values.prompts))
  encoded = samples.encode(texts, tokenizer, target.model, sampling)
  assert encoded is not None
  if tokenizer.eos_id is not None:
    sampling = dataclasses.replace(sampling, stop_tokens=(tokenizer.eos_id,))
  params = target.restore_params(None)
  chosen = _drafting(values.drafter, target, params)
  is_union = values.drafter.endswith('+ngram')
  chooser = strategy.Strategy(
    _strategy(values.arms, copies_beside_model=is_union)
  )

  def generate(drafter: state_lib.Drafter | None) -> generation_lib.Generation:
    machine = engine.Engine(
      target.model,
      drafter=drafter,
      chooser=chooser if drafter is not None else None,
      max_batch=values.max_batch,
    )
    return machine.generate(
      params,
      np.repeat(encoded.tokens_BP, values.answers, axis=0),
      np.repeat(encoded.lengths_B, values.answers),
      sampling,
      jax.random.key(values.seed),
      draft_params=chosen.params if drafter is not None else None,
      groups_N=np.repeat(np.arange(len(texts)), values.answers)
      if values.answers > 1
      else None,
    )

  speculative = generate(chosen.drafter)
  plain = generate(None) if values.compare else None
  rows = _rows(texts, values.answers, speculative.completion, tokenizer)
  if values.output:
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    strict_json.write_atomically(pathlib.Path(values.output), lines)
  else:
    for row in rows:
      print(f'{row["prompt"]}|{row["text"]}\n')
  gain = summary(speculative, plain)
  print(_table(gain))
  if values.json:
    print(strict_json.to_json(gain))
  return exits.DONE


def read_prompts(path: pathlib.Path) -> list[str]:
  """Reads prompts, one a line or one a record.

  Raises:
    ValueError: If the file is missing, empty or not as it should be.
  """
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', None) or 'it is not UTF-8'
    raise ValueError(
      f'--prompts={path} must be a readable text file: {reason}.'
    ) from error
  lines = [line for line in lines if line.strip()]
  if not lines:
    raise ValueError(f'--prompts={path} must hold a prompt; it is empty.')
  if path.suffix != '.jsonl':
    return lines
  prompts = []
  for number, line in enumerate(lines, 1):
    try:
      prompt = json.loads(line)['prompt']
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'--prompts={path}, record {number} must be a JSON object with a '
        "'prompt'; correct it."
      ) from error
    if not isinstance(prompt, str) or not prompt:
      raise ValueError(
        f"--prompts={path}, record {number}: 'prompt' must be a text that is "
        'not empty; correct it.'
      )
    prompts.append(prompt)
  return prompts


def _drafting(name: str, target: target_run.TargetRun, params: Any) -> Drafting:
  """Reads --drafter.

  Raises:
    ValueError: If it is no drafter of this target.
  """
  if name == 'none':
    return Drafting(None, None)
  if name == 'ngram':
    return Drafting(drafting.model_free(), None)
  if name == 'int8':
    drafter = self_draft.drafter(target.model)
    return Drafting(drafter, self_draft.quantize(params))
  folder, _, with_ngram = name.partition('+')
  if with_ngram not in ('', 'ngram'):
    raise ValueError(
      f'--drafter={name} must be a folder, ngram, FOLDER+ngram, int8 or none.'
    )
  saved = drafter_training.load(folder)
  target_run.check_same(
    target, saved.meta['target'], drafter=f'--drafter={folder}'
  )
  if not with_ngram:
    return Drafting(model_draft.drafter(target.model), saved.params)
  both = {'learned': saved.params, 'model_free': None}
  return Drafting(drafting.union(target.model), both)


def _strategy(
  arms: list[str] | None, *, copies_beside_model: bool
) -> strategy_config.StrategyConfig:
  known = strategy_config
  if arms:
    return known.StrategyConfig(arms=('+'.join(arms),), thresholds=(1,))
  if jax.default_backend() != 'cpu':
    return known.StrategyConfig()
  return known.CPU_COPYING if copies_beside_model else known.CPU


def _rows(
  texts: list[str],
  answers: int,
  completion: sampling_lib.Completion,
  tokenizer: tokenizer_lib.Tokenizer,
) -> list[dict[str, Any]]:
  lengths = np.asarray(completion.lengths)
  return [
    {
      'prompt': texts[index // answers],
      'text': tokenizer.decode(tokens[:length].tolist()),
      'num_tokens': int(length),
      'log_prob': float(log_probs.sum()),
    }
    for index, (tokens, log_probs, length) in enumerate(
      zip(
        np.asarray(completion.tokens),
        np.asarray(completion.log_probs),
        lengths,
        strict=True,
      )
    )
  ]


def summary(
  speculative: generation_lib.Generation,
  plain: generation_lib.Generation | None,
) -> dict[str, Any]:
  """What speculation gained, as JSON can hold it.

  Args:
    speculative: With drafts.
    plain: The same prompts with the same coins, without.
  """
  stats = speculative.stats
  gain: dict[str, Any] = {
    'num_tokens': stats.num_tokens,
    'tokens_per_sec': stats.tokens_per_sec,
    'acceptance_length': stats.acceptance_length,
    'passes_saved': stats.num_decoded - stats.num_passes,
    'secs': stats.secs,
    'prefill_secs': stats.prefill_secs,
    'compile_secs': stats.compile_secs,
    'rounds_by_shape': {
      shape.name: count for shape, count in stats.rounds_by_shape.items()
    },
  }
  if plain is not None:
    tokens, plain_tokens = (
      np.asarray(x.completion.tokens) for x in (speculative, plain)
    )
    same = np.equal(tokens, plain_tokens).all(axis=1)
    gain |= {
      'plain_tokens_per_sec': plain.stats.tokens_per_sec,
      'speedup': stats.tokens_per_sec / plain.stats.tokens_per_sec,
      'same_answers': int(same.sum()),
      'num_answers': len(tokens),
    }
  return gain


def _table(gain: dict[str, Any]) -> str:
  lines = [
    f'{gain["num_tokens"]} tokens in {gain["secs"]:.2f} s '
    f'({gain["prefill_secs"]:.2f} s prompts), compiled in '
    f'{gain["compile_secs"]:.1f} s',
    f'{gain["tokens_per_sec"]:.0f} tokens/s, '
    f'{gain["acceptance_length"]:.2f} tokens a target pass, '
    f'{gain["passes_saved"]} passes saved',
    'rounds by depth_topk_nodes: '
    + ', '.join(f'{k} {n}' for k, n in gain['rounds_by_shape'].items()),
  ]
  if 'speedup' in gain:
    lines.append(
      f'plain decoding: {gain["plain_tokens_per_sec"]:.0f} tokens/s, so '
      f'speculation is {gain["speedup"]:.2f} times as fast; '
      f'{gain["same_answers"]} of {gain["num_answers"]} answers are the same'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  command.main(define_flags, run)
