"""A SkyPilot managed job: any cloud, recovered when machines are taken away."""

import json

from experiments.launch import docker, template, tpu_vm
from experiments.launch import job as job_lib

FILE = 'skypilot.yaml'

_TASK = """\
# sky jobs launch @{file}, from the project's folder.
name: @{name}
@{num_nodes}
workdir: .
resources:
  accelerators: @{accelerators}
@{runtime}
@{zone}
  use_spot: @{use_spot}
  job_recovery:
    strategy: EAGER_NEXT_REGION
    max_restarts_on_errors: @{max_restarts}
    # Stopped and saved: no failure, begin again.
    recover_on_exit_codes: [3]
file_mounts:
  @{mount}:
    source: @{bucket}
    mode: MOUNT
setup: |
  set -euo pipefail
  # The hosts' own Python may be older than 3.11.
  conda create --quiet --yes --name=efficient_llm python=3.12
  eval "$(conda shell.bash hook)"
  conda activate efficient_llm
  python -m pip install --quiet --require-hashes --only-binary=:all: \\
    --requirement=requirements.lock
  locked=$(mktemp)
  python -m pip freeze >"$locked"
  python -m pip install --quiet --only-binary=:all: \\
    --constraint="$locked" '@{extra}'
run: |
  set -euo pipefail
  eval "$(conda shell.bash hook)"
  conda activate efficient_llm
  export PYTHONUNBUFFERED=1
  @{worker}
"""
_GPUS = {'a100': 'A100-80GB', 'h100': 'H100', 'h200': 'H200'}
_COORDINATES = (
  f'--coordinator="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{job_lib.PORT}" '
  '--num_processes="$SKYPILOT_NUM_NODES" --process_id="$SKYPILOT_NODE_RANK"'
)


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  machines = job.machines
  if machines.platform == 'tpu':
    # One slice is one node here, however many hosts it has.
    num_nodes, coordinates = '', ''
    accelerators = f'tpu-{tpu_vm.accelerator_type(job)}'
    version = json.dumps(tpu_vm.runtime_version(job))
    runtime = f'  accelerator_args:\n    runtime_version: {version}'
  else:
    num_nodes, coordinates = f'num_nodes: {machines.num_nodes}', _COORDINATES
    accelerators = f'{_GPUS[machines.chip]}:{machines.devices_per_node}'
    runtime = ''
  text = template.fill(
    _TASK,
    file=FILE,
    name=job.name,
    num_nodes=num_nodes,
    accelerators=accelerators,
    runtime=runtime,
    zone=f'  zone: {json.dumps(job.zone)}' if job.zone else '',
    use_spot=json.dumps(job.spot),
    max_restarts=job.max_restarts,
    mount=job_lib.MOUNT,
    bucket=json.dumps(job.bucket),
    extra=docker.EXTRAS[machines.platform],
    worker='\n'.join(job_lib.worker_lines(job, coordinates=coordinates)),
  )
  return {FILE: text}
