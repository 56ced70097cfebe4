"""Compares a model of ours with what transformers or timm makes of a folder."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from efficient_llm.models import transformer, vision
from efficient_llm.models.config import TransformerConfig
from efficient_llm.models.huggingface import families, shards
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
  """Runs both on random inputs; of a model without a head the hidden states.

  Args:
    config: Our model.
    params: Its parameters.
    folder: With the other one; its code is never taken from there.
    num_rows: Sequences.
    num_tokens: Of each, or fewer where the model has fewer positions.
  Raises:
    ValueError: If the other library or PyTorch is not installed.
  """
  inputs = random_inputs(config, num_rows=num_rows, num_tokens=num_tokens)
  theirs = run_peer(folder, inputs)
  exact = dataclasses.replace(
    config, dtype='float32', attention_implementation='xla'
  )
  output = transformer.apply(exact, params, jnp.asarray(inputs))
  if config.reads_images:
    theirs = theirs[:, None]
  # Without a head ours repeats the table, which theirs leaves out.
  of_logits = theirs.shape[-1] == config.vocab_size
  ours = np.asarray(output.logits if of_logits else output.hidden)
  return Agreement(
    max_abs_logit_diff=float(np.abs(ours - theirs).max()),
    top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    max_abs_logit=float(np.abs(theirs).max()),
  )


def random_inputs(
  config: TransformerConfig, *, num_rows: int, num_tokens: int
) -> np.ndarray:
  """Tokens [B, T], or the bytes of images [B, Y, X, C].

  Args:
    config: The model.
    num_rows: B.
    num_tokens: T, or fewer where the model has fewer positions.
  """
  rng = np.random.default_rng(0)
  if config.image_size is not None:
    side, channels = config.image_size, config.image_channels
    return rng.integers(0, 256, (num_rows, side, side, channels), np.uint8)
  # The lowest numbers may be padding, of which RoBERTa counts no position.
  return rng.integers(
    min(4, config.vocab_size - 1),
    config.vocab_size,
    (num_rows, min(num_tokens, config.max_positions)),
    np.int32,
  )


def run_peer(folder: str | pathlib.Path, inputs: np.ndarray) -> np.ndarray:
  """Logits (or hidden states) of the other model, in float32.

  Args:
    folder: As of `compare`.
    inputs: From `random_inputs`.
  """
  torch, model = _library('torch'), load_peer(folder)
  of, config, _ = families.read(pathlib.Path(folder))
  with torch.inference_mode():
    if of.library == 'timm':
      mean_C, deviation_C = (
        np.asarray(colours[: config.image_channels], np.float32)
        for colours in vision.NORMS[config.image_norm]
      )
      images = (inputs.astype(np.float32) / 255 - mean_C) / deviation_C
      return model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    output = model(torch.tensor(inputs, dtype=torch.long))
  for name in ('logits', 'prediction_logits', 'last_hidden_state'):
    if hasattr(output, name):
      return getattr(output, name).numpy()
  raise AssertionError(f'unknown output {type(output).__name__}')


def load_peer(folder: str | pathlib.Path) -> Any:
  """The model of a folder as its own library loads it, in float32."""
  folder = pathlib.Path(folder)
  of, _, document = families.read(folder)
  torch, library = _library('torch'), _library(of.library)
  if of.library == 'timm':
    # By a name of our table; the folder chooses sizes and no code.
    settings = {'num_classes': document['num_classes']}
    settings |= document.get('model_args', {})
    model = library.create_model(document['architecture'], **settings)
    load_file, state = _library('safetensors.torch').load_file, {}
    for path in shards.files(shards.open_folder(folder)):
      state |= load_file(path)
    model.load_state_dict(state)
    return model.float().eval()
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
      f"--verify needs {name}; install the extras 'hf' and 'torch', of images "
      "'timm' and 'torch'."
    ) from error
