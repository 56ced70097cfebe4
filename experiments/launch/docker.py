"""The container image of a run, and a script that builds and starts it."""

import json
import pathlib
import shlex

from experiments.launch import job as job_lib
from experiments.launch import template

# What JAX calls its builds; those of setup.py's extras tpu and gpu.
EXTRAS = {'tpu': 'jax[tpu]', 'gpu': 'jax[cuda13]'}
FILE, SCRIPT = 'Dockerfile', 'docker.sh'

_DOCKERFILE = """\
# Build from the project's folder: docker build --file=THIS --tag=NAME .
FROM python:3.12-slim-bookworm

RUN useradd --create-home --uid=@{uid} trainer
WORKDIR @{code}
COPY requirements.lock ./
RUN python -m pip install --no-cache-dir --require-hashes \\
      --only-binary=:all: --requirement=requirements.lock
@{accelerator}
COPY . .

ENV PYTHONPATH=@{code} PYTHONUNBUFFERED=1
@{variables}
USER trainer
STOPSIGNAL SIGTERM
CMD @{command}
"""
# The plug-in's version follows from that of the locked jax, and nothing that
# is locked may move for it; its hash is not in the lock, which serves the CPU.
_ACCELERATOR = """\
RUN locked=$(mktemp) && python -m pip freeze >"$locked" \\
    && python -m pip install --no-cache-dir --only-binary=:all: \\
      --constraint="$locked" '@{extra}' \\
    && rm "$locked"
"""
_IGNORED = """\
.cache
.git
.hypothesis
.pytest_cache
.ruff_cache
.venv
**/__pycache__
build
out
"""
_RUN = """\
#!/usr/bin/env bash
# Builds the image and starts the run on this machine, as you: what it writes
# into the folder is yours. Ctrl-C or docker stop saves; the same command
# continues.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bucket=@{bucket}
image=@{image}

docker build --file="$here/@{file}" --tag="$image" @{project}
mkdir -p "$bucket"
exec docker run --rm --init --name=@{name} --stop-timeout=@{grace_secs} \\
  @{devices} \\
  --user="$(id -u):$(id -g)" --env=HOME=/tmp \\
  --volume="$(cd "$bucket" && pwd):@{mount}" "$image"
"""
DEVICES = {
  'tpu': '--privileged --network=host --ulimit=memlock=-1',
  'gpu': '--gpus=all --ipc=host --ulimit=memlock=-1',
  'cpu': '--ipc=host',
}


def dockerfile(job: job_lib.Job) -> dict[str, str]:
  """Gives the image's files by name."""
  platform = job.machines.platform
  accelerator = ''
  if platform in EXTRAS:
    accelerator = template.fill(_ACCELERATOR, extra=EXTRAS[platform]).rstrip()
  variables = ''
  if platform == 'gpu':
    variables = (
      'ENV NVIDIA_VISIBLE_DEVICES=all '
      'NVIDIA_DRIVER_CAPABILITIES=compute,utility'
    )
  text = template.fill(
    _DOCKERFILE,
    uid=job_lib.UID,
    code=job_lib.CODE,
    accelerator=accelerator,
    variables=variables,
    command=json.dumps(['bash', '-c', ' && '.join(job_lib.worker_lines(job))]),
  )
  return {FILE: text, f'{FILE}.dockerignore': _IGNORED}


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  script = template.fill(
    _RUN,
    bucket=shlex.quote(job.bucket or ''),
    image=shlex.quote(job.image or f'{job.name}:latest'),
    file=FILE,
    project=shlex.quote(str(pathlib.Path(__file__).resolve().parents[2])),
    name=job.name,
    grace_secs=job.grace_secs,
    devices=DEVICES[job.machines.platform],
    mount=job_lib.MOUNT,
  )
  return {**dockerfile(job), SCRIPT: script}
