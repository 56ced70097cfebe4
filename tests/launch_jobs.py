"""Batch runs for tests: each target, on several machines."""

from typing import Any

from experiments.launch import job as job_lib
from experiments.launch import targets

_IMAGE = 'us-docker.pkg.dev/project/repository/efficient_llm:1'
# A space in an argument must survive every shell on the way.
COMMAND = (
  'python -m experiments.diloco --workdir=/bucket/one '
  "--config.data.path='/bucket/my text'"
)
_CLOUD = {'bucket': 'gs://some-bucket', 'image': _IMAGE}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
  'tpu_vm': (
    'tpu_vm',
    {'accelerator': 'v5e:4x4,slices=4', 'zone': 'us-west4-a', **_CLOUD},
  ),
  'tpu_vm of one host': (
    'tpu_vm',
    {'accelerator': 'v6e:2x4', 'zone': 'z', 'spot': True, **_CLOUD},
  ),
  'gke TPU': ('gke', {'accelerator': 'v5p:2x2x4', 'spot': True, **_CLOUD}),
  'gke slices': ('gke', {'accelerator': 'v5e:4x4,slices=2', **_CLOUD}),
  'gke GPU': ('gke', {'accelerator': 'h100:8x2', **_CLOUD}),
  'gke one GPU': ('gke', {'accelerator': 'h200:1', **_CLOUD}),
  'xpk': (
    'xpk',
    {
      'accelerator': 'v6e:16x16,slices=2',
      'cluster': 'c',
      'zone': 'z',
      'project': 'p',
      **_CLOUD,
    },
  ),
  'slurm': ('slurm', {'accelerator': 'h100:8x2', 'partition': 'long'}),
  'slurm part of a node': ('slurm', {'accelerator': 'gpu:2'}),
  'slurm CPU': ('slurm', {'accelerator': 'cpu:1x3', 'prologue': '. ./env'}),
  'skypilot': (
    'skypilot',
    {'accelerator': 'h100:8x2', 'bucket': 's3://some-bucket', 'spot': True},
  ),
  'skypilot TPU': (
    'skypilot',
    {'accelerator': 'v5e:4x4', 'bucket': 'gs://some-bucket', 'zone': 'z'},
  ),
  'docker': ('docker', {'accelerator': 'gpu:8', 'bucket': 'out/bucket'}),
  'docker CPU': ('docker', {'accelerator': 'cpu:1', 'bucket': '/srv/bucket'}),
}


def files(case: str, **changes: Any) -> dict[str, str]:
  """Gives the files of a case by name."""
  target, fields = JOBS[case]
  job = job_lib.Job(**{'command': COMMAND, **fields, **changes})
  return targets.render(target, job)
