"""Takes over a model of transformers, or hands one of ours back.

./run.sh python -m experiments.convert --from=hf:DIR --to=out/imported
./run.sh python -m experiments.convert --from=out/ligo --to=hf:out/exported

./run.sh python -m experiments.convert --from=out/tlt/drafter \
  --to=hf:out/eagle --engine=vllm

The first makes a folder that every experiment takes where it takes a trained
run, with the tokenizer; the second a folder that transformers loads, in the
dtype the weights came in; the third writes a drafter of the form 'eagle' in
EAGLE's layout, which vLLM and SGLang load. --verify compares the two models'
logits where transformers is installed, and fails where they differ.
"""

import pathlib
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from efficient_llm.models.huggingface import (
  checkpoint,
  export,
  hub,
  safetensors_file,
  shards,
  verify,
)
from efficient_llm.speculative import drafter_training, eagle
from efficient_llm.training import interchange, trained_run
from experiments import command, exits

# Of logits of 1; float32 rounds what is larger by so much more.
_MAX_DIFFERENCE = 2e-4


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_string('from', None, 'Folder of a run, or hf: and a folder.')
  flags.DEFINE_string('to', None, 'Folder of a run, or hf: and a folder.')
  flags.DEFINE_string('family', None, 'Of the export; chosen by the model.')
  flags.DEFINE_enum(
    'dtype',
    None,
    list(export.DTYPES),
    'Of the exported weights; by default as they were imported, or float32.',
  )
  flags.DEFINE_integer('step', None, 'Checkpoint of the run; the newest.')
  flags.DEFINE_integer(
    'max_shard_bytes', shards.MAX_SHARD_BYTES, 'Of a file.', lower_bound=1
  )
  flags.DEFINE_enum(
    'engine', None, list(eagle.ARCHITECTURES), 'Which one loads the drafter.'
  )
  flags.DEFINE_bool('verify', False, 'Compare logits with transformers.')


def run(changes: dict[str, str]) -> int:
  """Converts, compares and says where the result is."""
  values = flags.FLAGS
  if changes:
    raise ValueError(
      f'--config.{next(iter(changes))} is not a flag here; see --help.'
    )
  for name in ('from', 'to'):
    if not values[name].value:
      raise ValueError(f'--{name} must be given; see --help.')
  source, target = str(values['from'].value), str(values['to'].value)
  if hub.is_reference(target):
    return _export(source, target.removeprefix(hub.PREFIX))
  if not hub.is_reference(source):
    raise ValueError(
      f'One of --from={source} and --to={target} must begin with hf:; put it '
      'before the folder of transformers.'
    )
  made = interchange.import_run(source, target)
  print(f'{target}: {made.model}')
  if not made.has_tokenizer and not made.model.reads_images:
    print(f'{source} holds no tokenizer.json, so that {target} has none.')
  if not values.verify:
    return exits.DONE
  return _verify(made.model, made.restore_params(None), hub.folder(source))


def _export(source: str, folder: str) -> int:
  values = flags.FLAGS
  if drafter_training.is_run(source):
    return _export_drafter(source, folder)
  if values.engine is not None:
    raise ValueError(
      f'--engine={values.engine} is for a drafter, which {source} is not; '
      'leave it out.'
    )
  found = trained_run.find(source, name='--from', step=values.step)
  interchange.export_run(
    found,
    folder,
    family=values.family,
    dtype=cast(Any, values.dtype),
    max_shard_bytes=values.max_shard_bytes,
  )
  opened = checkpoint.open_checkpoint(folder)
  print(f'{folder}: {opened.family.model_type}, {len(opened.tensors)} tensors')
  if not values.verify:
    return exits.DONE
  # The run's own parameters, rounded as they were written.
  dtype = safetensors_file.WEIGHT_DTYPES[opened.dtype]
  rounded = jax.tree.map(
    lambda x: np.asarray(x).astype(dtype).astype(np.float32),
    found.restore_params(None),
  )
  return _verify(found.model, rounded, pathlib.Path(folder))


def _export_drafter(source: str, folder: str) -> int:
  values = flags.FLAGS
  for name in ('family', 'step', 'verify'):
    if values[name].value:
      raise ValueError(f'--{name} is not for a drafter; leave it out.')
  if values.engine is None:
    raise ValueError(
      f'--engine must say which engine is to load the drafter; choose one of '
      f'{", ".join(eagle.ARCHITECTURES)}.'
    )
  eagle.export_run(
    source,
    folder,
    engine=cast(Any, values.engine),
    dtype=cast(Any, values.dtype or 'float32'),
  )
  print(f"{folder}: a drafter in EAGLE's layout")
  return exits.DONE


def _verify(model: Any, params: Any, folder: pathlib.Path) -> int:
  found = verify.compare(model, params, folder)
  print(
    f'max_abs_logit_diff {found.max_abs_logit_diff:.2e} of logits up to '
    f'{found.max_abs_logit:.2f}, top1_agreement {found.top1_agreement:.4f}'
  )
  allowed = _MAX_DIFFERENCE * max(1.0, found.max_abs_logit)
  return exits.DONE if found.max_abs_logit_diff <= allowed else exits.FAILED


if __name__ == '__main__':
  command.main(define_flags, run)
