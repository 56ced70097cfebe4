"""A command script for xpk, which submits to a GKE cluster of TPUs."""

import shlex

from experiments.launch import docker, template, tpu_vm
from experiments.launch import job as job_lib

FILE = 'xpk.sh'

_SCRIPT = """\
#!/usr/bin/env bash
# Submits the job to the cluster with xpk.
set -euo pipefail

place=(@{place})
storage=@{name}-bucket

# Attached once; every workload of the cluster then finds it.
storages=$(xpk storage list "${place[@]}")
if ! grep --quiet --fixed-strings "$storage" <<<"$storages"; then
  xpk storage attach "$storage" "${place[@]}" --type=gcsfuse \\
    --bucket=@{bucket} --mount-point=@{mount} --readonly=false --size=1 \\
    --auto-mount=true
fi
# A run that was stopped ends with 3, which xpk counts as a restart.
xpk workload create "${place[@]}" \\
  --workload=@{name} \\
  --tpu-type=@{type} \\
  --num-slices=@{num_slices} \\
  --docker-image=@{image} \\
  --max-restarts=@{max_restarts} \\
  --restart-on-user-code-failure \\
  --termination-grace-period-seconds=@{grace_secs} \\
  --command=@{command}
"""


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  place = [f'--cluster={job.cluster}', f'--zone={job.zone}']
  if job.project:
    place.append(f'--project={job.project}')
  script = template.fill(
    _SCRIPT,
    place=shlex.join(place),
    name=job.name,
    bucket=shlex.quote((job.bucket or '').removeprefix('gs://')),
    mount=job_lib.MOUNT,
    type=tpu_vm.accelerator_type(job),
    num_slices=job.machines.num_slices,
    image=shlex.quote(job.image or ''),
    max_restarts=job.max_restarts,
    grace_secs=job.grace_secs,
    command=shlex.quote(' && '.join(job_lib.worker_lines(job))),
  )
  return {**docker.dockerfile(job), FILE: script}
