"""A batch run: a command, its machines, and what each of them executes."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

from experiments.launch import machines as machines_lib

# Where every machine finds the bucket, and the image the code.
MOUNT = '/bucket'
CODE = '/opt/efficient_llm'
# The user that a container runs as.
UID = 1000
# Outside of what Linux hands to programs that do not ask for a port.
PORT = 61476

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NAME = re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?')
_WORD = re.compile(r'[\w./:@-]+')
_OURS = ('platform', 'distributed', 'coordinator', 'num_processes')
_OURS += ('process_id', 'nodistributed')


@dataclasses.dataclass(frozen=True)
class Job:
  """What is run, on what, and where its files are.

  Attributes:
    command: As typed on one machine: 'python -m experiments.NAME --FLAG=...'.
    accelerator: Machines by name, see `machines.SYNTAX`.
    name: Of the run, for the scheduler.
    image: Container image that holds the code.
    bucket: Kept when the machines are not; mounted at /bucket.
    cluster: That xpk submits to.
    zone: Of the machines.
    project: Of the cloud.
    partition: Of the SLURM cluster.
    prologue: Shell line before the command, such as one that activates an
      environment; without one run.sh makes it.
    hours: After which SLURM ends the job; it is queued again.
    grace_secs: Between the signal to stop and the end, for a checkpoint.
    max_restarts: After failures; being stopped does not count.
    spot: Whether cheaper machines may be used that are taken away at times.
  """

  command: str
  accelerator: str
  name: str = 'efficient-llm'
  image: str | None = None
  bucket: str | None = None
  cluster: str | None = None
  zone: str | None = None
  project: str | None = None
  partition: str | None = None
  prologue: str | None = None
  hours: int = 24
  grace_secs: int = 120
  max_restarts: int = 3
  spot: bool = False

  @property
  def words(self) -> list[str]:
    return shlex.split(self.command)

  @property
  def module(self) -> str:
    return self.words[2]

  @property
  def workdir(self) -> str:
    """The folder of the run; '' where the command names none."""
    words = self.words
    for index, word in enumerate(words):
      if word.startswith('--workdir='):
        return word.partition('=')[2]
      if word == '--workdir' and index + 1 < len(words):
        return words[index + 1]
    return ''

  @property
  def machines(self) -> machines_lib.Machines:
    return machines_lib.parse(self.accelerator)

  def validate(self) -> None:
    _check_command(self)
    machines_lib.parse(self.accelerator)
    if not _NAME.fullmatch(self.name):
      raise ValueError(
        f'--name={self.name} must be at most 40 small letters, digits and '
        'dashes, a letter first; for example diloco-8b.'
      )
    for field in ('image', 'bucket', 'cluster', 'zone', 'project', 'partition'):
      value = getattr(self, field)
      if value is not None and not _WORD.fullmatch(value):
        raise ValueError(
          f'--{field}={value} must hold only letters, digits and ./:@_-; '
          'correct it.'
        )
    if self.prologue is not None and len(self.prologue.splitlines()) != 1:
      raise ValueError(
        f'--prologue={self.prologue!r} must be one line; join commands by &&.'
      )
    for field, least in (('hours', 1), ('grace_secs', 30), ('max_restarts', 0)):
      value = getattr(self, field)
      if value < least:
        raise ValueError(f'--{field}={value} must be at least {least}.')


def worker_lines(job: Job, *, coordinates: str = '') -> list[str]:
  """Shell commands of one machine, each of which must succeed.

  First the machine is checked, so that none trains on its CPU unnoticed. A
  TPU host sees the chips of its slice only together with the other hosts, so
  there the run itself refuses (--platform), once all have joined.

  Args:
    job: What is run.
    coordinates: The flags that tell processes of each other, in shell; used
      where there are several.
  """
  machines = job.machines
  lines = []
  if machines.platform != 'tpu' or machines.num_nodes == 1:
    doctor = [
      f'python -m experiments.doctor --want={machines.platform}',
      f'--workdir={shlex.quote(job.workdir)}',
    ]
    if machines.platform != 'cpu':
      doctor.insert(1, f'--devices={machines.devices_per_node}')
    lines.append(' '.join(doctor))
  run = f'exec {shlex.join(job.words)} --platform={machines.platform}'
  if machines.num_nodes > 1:
    # TPU hosts learn of each other from what the cloud tells them.
    run += f' {coordinates or "--distributed"}'
  return [*lines, run]


def _check_command(job: Job) -> None:
  try:
    words = job.words
  except ValueError as error:
    raise ValueError(
      f'--job={job.command} must be a shell command: {error}; mend the quotes.'
    ) from error
  if words[:2] != ['python', '-m'] or len(words) < 3:
    raise ValueError(
      f"--job={job.command} must be 'python -m experiments.NAME --FLAG=...'."
    )
  known = _training_modules()
  if words[2] not in known:
    raise ValueError(
      f'--job: {words[2]} must be a binary that trains; those are '
      f'{", ".join(known)}.'
    )
  for word in words[3:]:
    flag = word.lstrip('-').partition('=')[0]
    if word.startswith('--') and flag in _OURS:
      raise ValueError(
        f'--job: --{flag} is added for each machine; leave it out.'
      )
  if not job.workdir:
    raise ValueError(
      '--job must name the folder of the run, which it continues from; add '
      '--workdir=DIR.'
    )


def _training_modules() -> list[str]:
  """Binaries of the runner: they check --platform and continue a run."""
  found = []
  for path in sorted((_ROOT / 'experiments').glob('*.py')):
    if '\n  runner.main(' in path.read_text(encoding='utf-8'):
      name = f'experiments.{path.stem}'
      if importlib.util.find_spec(name):
        found.append(name)
  return found
