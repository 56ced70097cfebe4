"""A script that orders TPU VMs, runs the job on all of them and gives them up.

Slices that are taken away are ordered again; the run continues from its
checkpoint in the bucket.
"""

import shlex

from experiments.launch import docker, template
from experiments.launch import job as job_lib

FILE, WORKER = 'tpu_vm.sh', 'tpu_worker.sh'

_SCRIPT = """\
#!/usr/bin/env bash
# Runs the job on TPU VMs; the same command continues. Ctrl-C saves and stops.
#   ./@{file}          orders the slices, runs, orders again what was taken away
#   ./@{file} delete   gives the slices up
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=@{name}
place=(@{place})
max_restarts=@{max_restarts}

queue() {
  gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"
}

on_all() {
  queue ssh --node=all --worker=all --command="$1"
}

state() {
  queue describe --format='value(state.state)' 2>/dev/null || true
}

delete() {
  queue delete --force --quiet
}

order() {
  # What has failed or was taken away stays in the queue until it is deleted.
  case $(state) in
    FAILED | SUSPENDED | SUSPENDING) delete ;;
  esac
  if [[ -z $(state) ]]; then
    queue create --accelerator-type=@{type} \\
      --runtime-version=@{runtime} \\
      @{order}
  fi
  while :; do
    case $(state) in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "@{file}: the order failed; see its state." >&2
        return 1
        ;;
    esac
    sleep 30
  done
}

# Prints the exit code of the first process; nothing if the slice is gone.
run() {
  gcloud compute tpus queued-resources scp "$here/@{worker}" "$name:" \\
    "${place[@]}" --node=all --worker=all >&2 || return 0
  on_all "bash @{worker} start" >&2 || return 0
  queue ssh --node=0 --worker=0 --command="bash @{worker} follow" >&2 || true
  queue ssh --node=0 --worker=0 --command="bash @{worker} code" |
    tail -n 1 || true
}

stop() {
  trap '' INT
  on_all "bash @{worker} stop" || true
  exit 3
}

if [[ ${1-} == delete ]]; then
  delete
  exit
fi
trap stop INT
failures=0
while :; do
  order
  code=$(run | tr -d '[:space:]')
  case $code in
    0)
      delete
      exit 0
      ;;
    2)
      echo "@{file}: the job refused its input; see above." >&2
      exit 2
      ;;
    3) echo "@{file}: stopped; continuing." >&2 ;;
    *)
      if [[ $(state) != ACTIVE ]]; then
        echo "@{file}: the slices were taken away; ordering again." >&2
        continue
      fi
      failures=$((failures + 1))
      if ((failures > max_restarts)); then
        echo "@{file}: failed with code ${code:-none}; slices kept." >&2
        exit 1
      fi
      ;;
  esac
done
"""
_WORKER = """\
#!/usr/bin/env bash
# What @{file} runs on every host.
set -euo pipefail

name=@{name}
image=@{image}
bucket=@{bucket}

mount_bucket() {
  if mountpoint --quiet @{mount}; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local source=https://packages.cloud.google.com/apt
    local key=/usr/share/keyrings/gcsfuse.asc
    curl --fail --silent --show-error "$source/doc/apt-key.gpg" |
      sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update --quiet && sudo apt-get install --yes --quiet gcsfuse
  fi
  sudo mkdir -p @{mount}
  sudo gcsfuse -o allow_other --uid=@{uid} --gid=@{uid} --implicit-dirs \\
    --rename-dir-limit=200000 "$bucket" @{mount}
}

start() {
  # Still running after a lost connection: go on with it.
  if [[ $(sudo docker ps --quiet --filter="name=^$name\\$") ]]; then return; fi
  mount_bucket
  case $image in
    *.pkg.dev/* | gcr.io/* | *.gcr.io/*)
      sudo gcloud auth configure-docker "${image%%/*}" --quiet
      ;;
  esac
  sudo docker rm --force "$name" 2>/dev/null || true
  # Detached, so that a lost connection does not end it.
  sudo docker run --detach --init --name="$name" --stop-timeout=@{grace_secs} \\
    @{devices} \\
    --volume=@{mount}:@{mount} "$image" bash -c @{command}
}

case $1 in
  start) start ;;
  follow) sudo docker logs --follow "$name" ;;
  code) sudo docker wait "$name" ;;
  stop) sudo docker stop --time=@{grace_secs} "$name" ;;
esac
"""
# Software of the host, and whether the type counts chips or their cores.
_TYPES = {
  'v5e': ('v5litepod', 1, 'v2-alpha-tpuv5-lite'),
  'v5p': ('v5p', 2, 'v2-alpha-tpuv5'),
  'v6e': ('v6e', 1, 'v2-alpha-tpuv6e'),
}


def accelerator_type(job: job_lib.Job) -> str:
  """A slice by the name that Google Cloud gives it."""
  machines = job.machines
  prefix, per_chip, _ = _TYPES[machines.chip]
  return f'{prefix}-{machines.chips_per_slice * per_chip}'


def runtime_version(job: job_lib.Job) -> str:
  """The software of the TPU hosts."""
  return _TYPES[job.machines.chip][2]


def render(job: job_lib.Job) -> dict[str, str]:
  """Gives the files by name."""
  place = [f'--zone={job.zone}']
  if job.project:
    place.append(f'--project={job.project}')
  machines = job.machines
  order = [f'--node-id={job.name}']
  if machines.num_slices > 1:
    order = [f'--node-count={machines.num_slices}', f'--node-prefix={job.name}']
  if job.spot:
    order.append('--spot')
  script = template.fill(
    _SCRIPT,
    file=FILE,
    worker=WORKER,
    name=job.name,
    place=shlex.join(place),
    max_restarts=job.max_restarts,
    type=accelerator_type(job),
    runtime=runtime_version(job),
    order=' '.join(order),
  )
  worker = template.fill(
    _WORKER,
    file=FILE,
    name=job.name,
    image=shlex.quote(job.image or ''),
    bucket=shlex.quote((job.bucket or '').removeprefix('gs://')),
    mount=job_lib.MOUNT,
    uid=job_lib.UID,
    grace_secs=job.grace_secs,
    devices=docker.DEVICES['tpu'],
    command=shlex.quote(' && '.join(job_lib.worker_lines(job))),
  )
  return {**docker.dockerfile(job), FILE: script, WORKER: worker}
