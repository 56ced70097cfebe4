"""Plans a pre-training run before paying for it, without the hardware.

    python -m experiments.plan --config=FILE --topology=v5e:16x16

Compiles the real train step for the devices and prints memory per chip, FLOPs,
bytes between chips and an estimate of the time; when it does not fit, the first
knob to turn. --config.FIELD=VALUE changes a field, as for experiments.pretrain.
A configuration of the main job gives a line for each stage.
No data is read: the vocabulary is model.vocab_size. That a run does not fit is
an answer too: the exit code is 0, and `fits` in the output of --json says it,
for each stage of the main job.
"""

import os

import jax
from absl import flags

from efficient_llm.end_to_end import costs
from efficient_llm.end_to_end.config import EndToEndConfig
from efficient_llm.training import (
  estimates,
  planner,
  pretrain,
  strict_json,
  topology,
)
from experiments import command, configuration, exits, plan_text

# The TPU compiler asks the machine for its TPU unless all this is told to it.
_WITHOUT_TPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_LOG_DIR': 'disabled',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
# Autotuning would run kernels on the GPU that is not there.
_WITHOUT_GPU = '--xla_gpu_autotune_level=0'


def define_flags() -> None:
  """Defines the flags of this tool."""
  flags.DEFINE_string(
    'config', 'experiments/configs/pretrain_8b.py', 'Configuration file.'
  )
  flags.DEFINE_string('topology', 'local', f'Devices: {topology.SYNTAX}.')
  flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
  flags.DEFINE_bool(
    'fast', False, 'Compile without optimisation; memory comes out too high.'
  )
  flags.DEFINE_integer(
    'max_trials',
    4,
    'Changed configurations to compile when it does not fit.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'matmul_efficiency',
    estimates.MATMUL_EFFICIENCY,
    'Share of the peak rate that matrix products are taken to reach.',
  )


def run(changes: dict[str, str]) -> int:
  """Plans what the flags say and prints it."""
  values = flags.FLAGS
  name = topology.parse(values.topology)
  config = configuration.resolve(
    values.config, (pretrain.PretrainConfig, EndToEndConfig), changes
  )
  prepare(name)
  options = {
    'fast': values.fast,
    'max_trials': values.max_trials,
    'matmul_efficiency': values.matmul_efficiency,
  }
  if isinstance(config, EndToEndConfig):
    stages = costs.plan(config, topology.load(name), **options)
    print(plan_text.render_stages(stages))
    data = {name: planner.as_dict(plan) for name, plan in stages.items()}
  else:
    plan = planner.plan(config, topology.load(name), **options)
    print(plan_text.render(plan))
    data = planner.as_dict(plan)
  if values.json:
    print(strict_json.to_json(data))
  return exits.DONE


def prepare(name: topology.Name) -> None:
  """Sets up the process so that a compiler works without its devices."""
  if name.kind == 'local':
    return
  # Tracing needs some backend and must not take hold of an accelerator.
  jax.config.update('jax_platforms', 'cpu')
  # Programs for absent devices could be written to the cache but not read back.
  jax.config.update('jax_enable_compilation_cache', False)
  if name.kind == 'tpu':
    for key, value in _WITHOUT_TPU.items():
      os.environ.setdefault(key, value)
  else:
    flags_before = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags_before} {_WITHOUT_GPU}'.strip()


if __name__ == '__main__':
  command.main(define_flags, run)
