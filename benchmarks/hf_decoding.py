"""Hugging Face transformers as a peer: the same weights, its own decoding.

A process of its own, as its threads spin for a while after every call. It is
started by `Peer` and answers one line of JSON for each.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from efficient_llm.models import transformer

# How it decodes: as usual, with drafts looked up in the text so far, with those
# of a smaller model. The last two take one row at a time, whatever the batch.
MODES = ('hf_plain', 'hf_prompt_lookup', 'hf_assisted')


def write_weights(
  path: pathlib.Path, config: transformer.TransformerConfig, params: Any
) -> None:
  """Writes a Llama-style model for the peer.

  Args:
    path: An .npz file; a .json file beside it holds the configuration.
    config: The defaults but for the sizes.
    params: From `transformer.init`.
  """
  sizes = config.sizes
  weights = {
    'model.embed_tokens.weight': params['embedding']['tokens'],
    'model.norm.weight': params['final_norm']['scale'],
  }
  for index, layer in enumerate(transformer.unstack_layers(params)['layers']):
    attention, mlp = layer['attention'], layer['mlp']
    matrices = {
      'self_attn.q_proj': (attention['query'], 1),
      'self_attn.k_proj': (attention['key'], 1),
      'self_attn.v_proj': (attention['value'], 1),
      'self_attn.o_proj': (attention['out'], 2),
      'mlp.up_proj': (mlp['up'], 1),
      'mlp.gate_proj': (mlp['gate'], 1),
      'mlp.down_proj': (mlp['down'], 1),
    }
    prefix = f'model.layers.{index}.'
    for name, (module, num_inputs) in matrices.items():
      kernel = np.asarray(module['kernel'])
      rows = int(np.prod(kernel.shape[:num_inputs]))
      weights[f'{prefix}{name}.weight'] = kernel.reshape(rows, -1).T
    for name, module in (
      ('input_layernorm', layer['attention_norm']),
      ('post_attention_layernorm', layer['mlp_norm']),
    ):
      weights[f'{prefix}{name}.weight'] = module['scale']
  np.savez(path, **jax.tree.map(np.asarray, weights))
  llama = {
    'vocab_size': sizes['vocab'],
    'hidden_size': sizes['embed'],
    'intermediate_size': sizes['mlp'],
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': sizes['heads'],
    'num_key_value_heads': sizes['kv_heads'],
    'head_dim': sizes['head_dim'],
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_epsilon,
    'rope_parameters': {
      'rope_type': 'default',
      'rope_theta': config.rotary_base,
    },
    'tie_word_embeddings': True,
    'eos_token_id': None,
    'bos_token_id': None,
  }
  path.with_suffix('.json').write_text(json.dumps(llama), encoding='utf-8')


class Peer:
  """Its process, which rests until asked."""

  def __init__(
    self, target: pathlib.Path, assistant: pathlib.Path | None = None
  ):
    """Starts it and waits until its models are there.

    Args:
      target: From `write_weights`.
      assistant: The same, of a smaller model, for 'hf_assisted'.
    """
    command = [sys.executable, '-m', 'benchmarks.hf_decoding']
    command += [f'--target={target}']
    if assistant is not None:
      command += [f'--assistant={assistant}']
    self._process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    self.versions = self._read()

  def decode(
    self,
    mode: str,
    prompts_NP: np.ndarray,
    *,
    batch_size: int,
    num_new: int,
    num_threads: int | None = None,
  ) -> tuple[float, np.ndarray]:
    """Seconds, and the completions [N, num_new], greedily.

    Args:
      mode: One of `MODES`.
      prompts_NP: All of one length.
      batch_size: Rows decoded together.
      num_new: Tokens of each completion.
      num_threads: One for each core by default.
    """
    asked = {
      'mode': mode,
      'prompts': prompts_NP.tolist(),
      'batch_size': batch_size,
      'num_new': num_new,
      'num_threads': num_threads or os.cpu_count() or 1,
    }
    assert self._process.stdin is not None
    self._process.stdin.write(json.dumps(asked) + '\n')
    self._process.stdin.flush()
    reply = self._read()
    return reply['secs'], np.asarray(reply['tokens'], np.int32)

  def fastest_threads(
    self,
    mode: str,
    prompts_NP: np.ndarray,
    *,
    batch_size: int,
    num_new: int,
  ) -> int:
    """One thread or one for each core, whichever decodes faster.

    Args:
      mode: As for `decode`, like the rest.
      prompts_NP: All of one length.
      batch_size: Rows decoded together.
      num_new: Tokens of each completion.
    """
    secs: dict[int, float] = {}
    for threads in (1, os.cpu_count() or 1):
      # Of two, as the first call of a size prepares it.
      secs[threads] = min(
        self.decode(
          mode,
          prompts_NP,
          batch_size=batch_size,
          num_new=num_new,
          num_threads=threads,
        )[0]
        for _ in range(2)
      )
    return min(secs, key=secs.__getitem__)

  def stop(self) -> None:
    """Closes its input, which ends it."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError('The transformers process died; see above.')
    return json.loads(line)


def _load(path: pathlib.Path) -> Any:
  """A model of transformers, in float32."""
  import torch
  import transformers

  config = transformers.LlamaConfig(
    **json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
  )
  model = transformers.LlamaForCausalLM(config).eval()
  weights = {name: torch.tensor(x) for name, x in np.load(path).items()}
  missing, unexpected = model.load_state_dict(weights, strict=False)
  if unexpected or set(missing) - {'lm_head.weight'}:
    raise RuntimeError(f'{missing=}, {unexpected=}')
  model.tie_weights()
  return model


def _serve(
  target_path: pathlib.Path, assistant_path: pathlib.Path | None
) -> None:
  """Decodes what each input line asks for."""
  import torch
  import transformers

  transformers.logging.set_verbosity_error()
  target = _load(target_path)
  assistant = None if assistant_path is None else _load(assistant_path)
  versions = {
    'torch': torch.__version__,
    'transformers': transformers.__version__,
  }
  print(json.dumps(versions), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    mode, num_new = asked['mode'], asked['num_new']
    torch.set_num_threads(asked['num_threads'])
    more: dict[str, Any] = {}
    if mode == 'hf_prompt_lookup':
      more = {'prompt_lookup_num_tokens': 10}
    elif mode == 'hf_assisted':
      more = {'assistant_model': assistant}
    rows = asked['batch_size'] if mode == 'hf_plain' else 1
    prompts = torch.tensor(asked['prompts'])
    start = time.perf_counter()
    with torch.inference_mode():
      parts = [
        target.generate(
          part,
          attention_mask=torch.ones_like(part),
          max_new_tokens=num_new,
          do_sample=False,
          pad_token_id=0,
          **more,
        )
        for part in prompts.split(rows)
      ]
    secs = time.perf_counter() - start
    tokens = torch.cat([part[:, prompts.shape[1] :] for part in parts])
    print(json.dumps({'secs': secs, 'tokens': tokens.tolist()}), flush=True)


def main() -> None:
  """The process that `Peer` starts."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--target', type=pathlib.Path, required=True)
  parser.add_argument('--assistant', type=pathlib.Path)
  arguments = parser.parse_args()
  _serve(arguments.target, arguments.assistant)


if __name__ == '__main__':
  main()
