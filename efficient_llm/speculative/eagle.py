"""Hands a drafter out in EAGLE's layout, which vLLM and SGLang load.

The file holds one layer of Llama without the norm before its attention, and
`fc`, which joins a token's row and the target's feature in this order. Tables,
final norm and head are the target's, which engines share with the drafter; they
feed its own feature back as we do.

Our drafters of the form 'eagle' are such models. Those of the form 'normed'
are not and are refused: they norm the token's row, the input of the attention
and the predicted feature, for which this layout has no place. EAGLE-3's has
other norms: of row and feature one by one, before they are joined and not
behind, and what is fed back is taken before the last one.

The engines differ in two things. vLLM's fc has no bias and refuses to load one,
SGLang's has one and would draw it at random, so that it is given as zero. And
vLLM makes EAGLE's class of Llama's name, where SGLang has a name of its own.

Source: Li et al. 2024, EAGLE, arXiv:2401.15077; the names are those of
vLLM, vllm/model_executor/models/llama_eagle.py (EagleLlamaForCausalLM) and
transformers_utils/configs/eagle.py, and of SGLang,
python/sglang/srt/models/llama_eagle.py (LlamaForCausalLMEagle).
"""

import pathlib
from typing import Any, Literal

import numpy as np

from efficient_llm import typing
from efficient_llm.models import transformer
from efficient_llm.models.huggingface import export, families, rules
from efficient_llm.speculative import drafter, drafter_form, drafter_training

Engine = Literal['vllm', 'sglang']
# What config.json calls the model.
ARCHITECTURES = {'vllm': 'LlamaForCausalLM', 'sglang': 'LlamaForCausalLMEagle'}


def _linear(tensor: str, leaf: str) -> rules.Rule:
  return rules.Rule(f'layers.0.{tensor}.weight', f'{leaf}/kernel', 'transposed')


TABLE = (
  rules.Rule('fc.weight', 'fc/kernel', 'transposed'),
  rules.Rule('fc.bias', 'fc/bias'),
  _linear('self_attn.q_proj', 'block/attention/query'),
  _linear('self_attn.k_proj', 'block/attention/key'),
  _linear('self_attn.v_proj', 'block/attention/value'),
  _linear('self_attn.o_proj', 'block/attention/out'),
  rules.Rule(
    'layers.0.post_attention_layernorm.weight', 'block/mlp_norm/scale'
  ),
  _linear('mlp.gate_proj', 'block/mlp/gate'),
  _linear('mlp.up_proj', 'block/mlp/up'),
  _linear('mlp.down_proj', 'block/mlp/down'),
)


def write(
  folder: str | pathlib.Path,
  config: transformer.TransformerConfig,
  params: typing.Params,
  *,
  engine: Engine,
  dtype: export.Dtype = 'float32',
) -> None:
  """Writes config.json and safetensors.

  Args:
    folder: New.
    config: The target model.
    params: The drafter's.
    engine: Which one is to load it.
    dtype: Of the weights.
  Raises:
    ValueError: If the layout has no place for such a drafter, or the folder
      holds a checkpoint.
  """
  if drafter_form.of(params) != 'eagle':
    raise ValueError(
      "The drafter must be of the form 'eagle', as EAGLE's layout has no place "
      'for the norms of this one; train one with --config.form=eagle.'
    )
  leaves = rules.flatten(params)
  axes = rules.flatten(drafter.logical_axes(config, form='eagle'))
  if engine == 'sglang':
    leaves['fc/bias'] = np.zeros(config.embed_dim, np.float32)
    axes['fc/bias'] = typing.LogicalAxes(outputs=('embed',))
  placed = rules.place(TABLE, rules.nest(axes), {**config.sizes, 'pair': 2})
  export.write_checkpoint(
    folder,
    placed,
    rules.nest(leaves),
    _document(config, engine, dtype),
    dtype=dtype,
  )


def _document(
  config: transformer.TransformerConfig, engine: Engine, dtype: export.Dtype
) -> dict[str, Any]:
  """As of a Llama with one layer."""
  _, block = drafter_form.block(config, 'eagle')
  llama = families.FAMILIES['llama']
  return {
    **llama.write(block),
    'architectures': [ARCHITECTURES[engine]],
    'model_type': llama.model_type,
    'num_hidden_layers': 1,
    'dtype': dtype,
    'torch_dtype': dtype,
  }


def export_run(
  workdir: str | pathlib.Path,
  folder: str | pathlib.Path,
  *,
  engine: Engine,
  dtype: export.Dtype = 'float32',
) -> None:
  """Writes the drafter of a run.

  Args:
    workdir: Folder of a drafter's run, as in a TLT run's 'drafter'.
    folder: New.
    engine: Which one is to load it.
    dtype: Of the weights.
  Raises:
    ValueError: If there is no such drafter; see `write`.
  """
  saved = drafter_training.load(workdir)
  write(folder, saved.config, saved.params, engine=engine, dtype=dtype)
