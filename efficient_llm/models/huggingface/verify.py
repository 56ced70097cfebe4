"""Compares a model of ours with what transformers makes of a folder."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from efficient_llm.models import transformer
from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import families
from efficient_llm.typing import Params


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two models agree.

  Attributes:
    max_abs_logit_diff: Largest difference of a logit, in float32.
    top1_agreement: Share of positions where the likeliest token is the same.
    max_abs_logit: Largest logit.
  """

  max_abs_logit_diff: float
  top1_agreement: float
  max_abs_logit: float


def compare(
  config: TransformerConfig,
  params: Params,
  folder: str | pathlib.Path,
  *,
  num_rows: int = 4,
  num_tokens: int = 64,
) -> Agreement:
  """Runs both on random tokens; of a model without a head the hidden states.

  Args:
    config: Our model.
    params: Its parameters.
    folder: With the other one; its code is never taken from there.
    num_rows: Sequences.
    num_tokens: Of each, or fewer where the model has fewer positions.
  Raises:
    ValueError: If transformers or PyTorch is not installed.
  """
  num_tokens = min(num_tokens, config.max_positions)
  rng = np.random.default_rng(0)
  # The lowest numbers may be padding, of which RoBERTa counts no position.
  tokens = rng.integers(
    min(4, config.vocab_size - 1),
    config.vocab_size,
    (num_rows, num_tokens),
    np.int32,
  )
  theirs = run_peer(folder, tokens)
  exact = dataclasses.replace(
    config, dtype='float32', attention_implementation='xla'
  )
  output = transformer.apply(exact, params, jnp.asarray(tokens))
  # Without a head ours repeats the table, which theirs leaves out.
  of_logits = theirs.shape[-1] == config.vocab_size
  ours = np.asarray(output.logits if of_logits else output.hidden)
  return Agreement(
    max_abs_logit_diff=float(np.abs(ours - theirs).max()),
    top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    max_abs_logit=float(np.abs(theirs).max()),
  )


def run_peer(folder: str | pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  """Logits (or hidden states) of transformers' model, in float32."""
  torch = _library('torch')
  with torch.inference_mode():
    output = load_peer(folder)(torch.tensor(tokens, dtype=torch.long))
  for name in ('logits', 'prediction_logits', 'last_hidden_state'):
    if hasattr(output, name):
      return getattr(output, name).numpy()
  raise AssertionError(f'unknown output {type(output).__name__}')


def load_peer(folder: str | pathlib.Path) -> Any:
  """The model of a folder as transformers loads it, in float32."""
  torch, library = _library('torch'), _library('transformers')
  folder = pathlib.Path(folder)
  of, _, document = families.read(folder)
  # One of a list of ours, so that the folder does not choose what is run.
  name = (document.get('architectures') or [of.architectures[0]])[0]
  model = getattr(library, name).from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation='eager',
    local_files_only=True,
    use_safetensors=True,
  )
  return model.eval()


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ValueError(
      f"--verify needs {name}; install the extras 'hf' and 'torch'."
    ) from error
