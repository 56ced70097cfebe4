"""A SLURM batch script that saves when told to stop and queues itself again."""

import shlex

from experiments.launch import job as job_lib
from experiments.launch import template

FILE = 'slurm.sbatch'

_SCRIPT = """\
#!/usr/bin/env bash
# Submit with sbatch, from the project's folder, which all nodes must share.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{num_nodes}
#SBATCH --ntasks-per-node=1
@{resources}
#SBATCH --time=@{hours}:00:00
#SBATCH --signal=@{signal}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

export PYTHONUNBUFFERED=1
@{local_devices}
# A port for each job, as jobs may share a node.
port=$((61440 + SLURM_JOB_ID % 4096))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export port first

# Each node's variables are filled in there, not here.
# shellcheck disable=SC2016
worker=@{worker}

# A process that has saved must not end those that are still saving; JAX ends
# the others when one dies.
srun --kill-on-bad-exit=0 @{environment}bash -c "$worker" &
step=$!
# srun passes the signal on to the processes of all nodes.
trap 'kill -TERM "$step" 2>/dev/null || true' TERM
# A signal ends `wait`, not what is waited for.
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
code=0
wait "$step" || code=$?

# 3 says that the run was stopped and saved, 143 that it had not begun.
if ((code == 3 || code == 143)); then
  # A job that its owner cancels is not running any more, and stays away.
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)
  if [[ $state == RUNNING ]]; then
    echo "Stopped; job $SLURM_JOB_ID is queued again and will continue."
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
fi
exit "$code"
"""
_COORDINATES = (
  '--coordinator="$first:$port" --num_processes="$SLURM_NTASKS" '
  '--process_id="$SLURM_PROCID"'
)
# A node that is ordered whole comes with its cores and memory.
_WHOLE_NODE = 8


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  machines = job.machines
  lines = job_lib.worker_lines(job, coordinates=_COORDINATES)
  if job.prologue:
    lines.insert(0, job.prologue)
  script = template.fill(
    _SCRIPT,
    name=job.name,
    num_nodes=machines.num_nodes,
    resources='\n'.join(f'#SBATCH --{option}' for option in _resources(job)),
    hours=job.hours,
    signal=f'B:TERM@{job.grace_secs}',
    local_devices=_local_devices(job),
    worker=shlex.quote(' && '.join(lines)),
    environment='' if job.prologue else './run.sh ',
  )
  return {FILE: script}


def _resources(job: job_lib.Job) -> list[str]:
  machines = job.machines
  options = []
  if machines.platform == 'gpu':
    kind = '' if machines.chip == 'gpu' else f'{machines.chip}:'
    options.append(f'gpus-per-node={kind}{machines.devices_per_node}')
    if machines.devices_per_node >= _WHOLE_NODE:
      options += ['exclusive', 'mem=0']
    else:
      options.append('cpus-per-gpu=8')
  if job.partition:
    options.append(f'partition={job.partition}')
  return options


def _local_devices(job: job_lib.Job) -> str:
  if job.machines.platform != 'gpu':
    return ''
  numbers = ','.join(str(i) for i in range(job.machines.devices_per_node))
  return (
    '# In a SLURM task JAX takes one GPU only, unless told otherwise.\n'
    f'export JAX_LOCAL_DEVICE_IDS={numbers}'
  )
