"""The schedulers and clouds, and what each of them must be told."""

import dataclasses
import re
from collections.abc import Callable

from experiments.launch import docker, gke, skypilot, slurm, tpu_vm, xpk
from experiments.launch import job as job_lib

_OPTIONAL = (
  'image', 'bucket', 'cluster', 'zone', 'project', 'partition', 'prologue',
  'hours', 'grace_secs', 'max_restarts', 'spot',
)  # fmt: skip
_BUCKET = re.compile(r'(gs|s3)://[a-z0-9][a-z0-9._-]+')


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a job can run.

  Attributes:
    render: Gives the files by name.
    platforms: That it has.
    submit: The command; the last word names the file.
    needs: Fields of the job without which it cannot run.
    takes: Fields that it may have besides.
    tool: Program that must be installed, if not the command's first word.
    at_root: Whether it runs in the project's folder, not in the files'.
    buckets: Kinds of buckets that can be mounted; none for plain folders.
  """

  render: Callable[[job_lib.Job], dict[str, str]]
  platforms: tuple[str, ...]
  submit: tuple[str, ...]
  needs: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()
  tool: str | None = None
  at_root: bool = False
  buckets: tuple[str, ...] = ('gs',)


TARGETS = {
  'tpu_vm': Target(
    tpu_vm.render,
    ('tpu',),
    ('bash', tpu_vm.FILE),
    needs=('image', 'bucket', 'zone'),
    takes=('project', 'grace_secs', 'max_restarts', 'spot'),
    tool='gcloud',
  ),
  'gke': Target(
    gke.render,
    ('tpu', 'gpu'),
    ('kubectl', 'apply', f'--filename={gke.FILE}'),
    needs=('image', 'bucket'),
    takes=('grace_secs', 'max_restarts', 'spot'),
  ),
  'xpk': Target(
    xpk.render,
    ('tpu',),
    ('bash', xpk.FILE),
    needs=('image', 'bucket', 'cluster', 'zone'),
    # What its machines cost was settled when the cluster was made.
    takes=('project', 'grace_secs', 'max_restarts'),
    tool='xpk',
  ),
  'slurm': Target(
    slurm.render,
    ('gpu', 'cpu'),
    ('sbatch', slurm.FILE),
    takes=('partition', 'prologue', 'hours', 'grace_secs'),
    at_root=True,
  ),
  'skypilot': Target(
    skypilot.render,
    ('tpu', 'gpu'),
    ('sky', 'jobs', 'launch', '--yes', skypilot.FILE),
    needs=('bucket',),
    takes=('zone', 'max_restarts', 'spot'),
    at_root=True,
    buckets=('gs', 's3'),
  ),
  'docker': Target(
    docker.render,
    ('tpu', 'gpu', 'cpu'),
    ('bash', docker.SCRIPT),
    needs=('bucket',),
    takes=('image', 'grace_secs'),
    tool='docker',
    at_root=True,
    buckets=(),
  ),
}


def render(name: str, job: job_lib.Job) -> dict[str, str]:
  """Gives the files that run a job there.

  Raises:
    ValueError: If the job is not one that can run there; says what to change.
  """
  job.validate()
  check(name, job)
  return TARGETS[name].render(job)


def check(name: str, job: job_lib.Job) -> None:
  """Refuses what the target lacks, or does not look at.

  Raises:
    ValueError: With the remedy.
  """
  target = TARGETS[name]
  machines = job.machines
  if machines.platform not in target.platforms:
    others = [n for n, t in TARGETS.items() if machines.platform in t.platforms]
    raise ValueError(
      f'--accelerator={job.accelerator} is not to be had by --target={name}; '
      f'use one of {", ".join(others)}.'
    )
  for field in target.needs:
    if not getattr(job, field):
      raise ValueError(f'--target={name} needs --{field}; give it.')
  for field in _OPTIONAL:
    is_given = getattr(job, field) != getattr(job_lib.Job, field)
    if is_given and field not in (*target.needs, *target.takes):
      raise ValueError(f'--target={name} takes no --{field}; leave it out.')
  if 'bucket' in target.needs:
    _check_bucket(name, job)
  if name in ('gke', 'skypilot') and machines.chip == 'gpu':
    raise ValueError(
      f'--accelerator={job.accelerator} must name the GPU for --target={name}; '
      'use a100, h100 or h200.'
    )
  if name == 'docker' and machines.num_nodes > 1:
    raise ValueError(
      f'--accelerator={job.accelerator} is {machines.num_nodes} machines and '
      '--target=docker is one; take fewer or another target.'
    )
  if name == 'skypilot' and machines.num_slices > 1:
    raise ValueError(
      f'--accelerator={job.accelerator}: SkyPilot has no several slices; use '
      '--target=tpu_vm or gke.'
    )


def _check_bucket(name: str, job: job_lib.Job) -> None:
  bucket = job.bucket or ''
  kinds = TARGETS[name].buckets
  found = _BUCKET.fullmatch(bucket)
  if kinds and (found is None or found[1] not in kinds):
    shown = ' or '.join(f'{kind}://NAME' for kind in kinds)
    raise ValueError(f'--bucket={bucket} must be {shown}; correct it.')
  if not kinds and '://' in bucket:
    raise ValueError(
      f'--bucket={bucket} must be a folder of this machine for '
      f'--target={name}; for example out/bucket.'
    )
  if not job.workdir.startswith(f'{job_lib.MOUNT}/'):
    raise ValueError(
      f'--workdir={job.workdir} would be lost with the machine; begin it with '
      f'{job_lib.MOUNT}/, where --bucket is mounted.'
    )
