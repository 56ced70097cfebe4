"""Tests of the files of batch runs: what they hold, and what is refused."""

import ast
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from experiments.launch import docker, gke, machines, skypilot, slurm
from experiments.launch import job as job_lib
from tests import launch_jobs, launch_schemas

_ROOT = pathlib.Path(__file__).parents[2]


def _script(text: str, name: str, folder: pathlib.Path) -> pathlib.Path:
  path = folder / name
  path.write_text(text)
  return path


def _run(*command: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command, cwd=_ROOT, capture_output=True, text=True, check=False
  )


def _shell_parts(case: str) -> dict[str, str]:
  """Everything that a shell reads."""
  parts = {}
  for name, text in launch_jobs.files(case).items():
    if text.startswith('#!'):
      parts[name] = text
    elif name == gke.FILE:
      parts[name] = '#!/usr/bin/env bash\n' + _container(text)['args'][0]
    elif name == skypilot.FILE:
      tree = yaml.safe_load(text)
      for field in ('setup', 'run'):
        parts[field] = '#!/usr/bin/env bash\n' + tree[field]
    elif name == docker.FILE:
      parts[name] = '#!/usr/bin/env bash\n' + _cmd(text)[2]
  return parts


def _cmd(dockerfile: str) -> list[str]:
  return json.loads(dockerfile.rpartition('\nCMD ')[2])


def _container(text: str) -> dict[str, Any]:
  jobs = yaml.safe_load(text)['spec']['replicatedJobs']
  pod = jobs[0]['template']['spec']['template']['spec']
  return pod['containers'][0]


@pytest.mark.parametrize('case', launch_jobs.JOBS)
def test_bash_reads_every_script(case: str, tmp_path: pathlib.Path) -> None:
  parts = _shell_parts(case)
  assert parts
  for name, text in parts.items():
    run = _run('bash', '-n', _script(text, name, tmp_path))
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(
  shutil.which('shellcheck') is None, reason='shellcheck is not installed'
)
@pytest.mark.parametrize('case', launch_jobs.JOBS)
def test_shellcheck_finds_nothing(case: str, tmp_path: pathlib.Path) -> None:
  for name, text in _shell_parts(case).items():
    # SC1090, SC1091: conda and the user's prologue are not here to be read.
    run = _run(
      'shellcheck', '--exclude=SC1090,SC1091', _script(text, name, tmp_path)
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize('case', launch_jobs.JOBS)
def test_no_job_falls_back_to_the_cpu_unnoticed(case: str) -> None:
  platform = machines.parse(launch_jobs.JOBS[case][1]['accelerator']).platform
  for name, text in _shell_parts(case).items():
    if 'experiments.diloco' not in text:
      assert name != docker.FILE
      continue
    assert f'--platform={platform}' in text
    if platform != 'tpu' or 'one host' in case:
      doctor = f'python -m experiments.doctor --want={platform}'
      assert 0 < text.index(doctor) < text.index('experiments.diloco')


def test_a_gpu_job_on_a_machine_without_one_trains_nothing(
  tmp_path: pathlib.Path,
) -> None:
  command = f'python -m experiments.pretrain --workdir={tmp_path / "run"}'
  job = job_lib.Job(command=command, accelerator='gpu:1')
  lines = job_lib.worker_lines(job)
  words = [line.replace('exec ', '', 1).split()[1:] for line in lines]
  assert len(words) == 2
  doctor, run = (_run(sys.executable, *each) for each in words)
  assert doctor.returncode == 1
  assert re.search(r'FAIL  devices .* not gpu', doctor.stdout)
  assert run.returncode == 2
  assert '--platform=gpu was asked for but JAX found only cpu' in run.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('case', launch_jobs.JOBS)
def test_the_arguments_arrive_as_they_were_given(case: str) -> None:
  for name, text in _shell_parts(case).items():
    if 'experiments.diloco' not in text:
      continue
    # A script quotes the command once more.
    words = shlex.split(text, comments=True)
    inner = [word for word in words if 'experiments.diloco' in word]
    if inner and inner[0] != 'experiments.diloco':
      words = shlex.split(inner[0].partition('worker=')[2] or inner[0])
    at = words.index('experiments.diloco')
    assert words[at - 2 : at + 3] == [
      'python', '-m', 'experiments.diloco', '--workdir=/bucket/one',
      '--config.data.path=/bucket/my text',
    ], name  # fmt: skip


@pytest.mark.parametrize(
  'case', [c for c in launch_jobs.JOBS if c.startswith(('gke', 'skypilot'))]
)
def test_yaml_has_the_fields_that_the_scheduler_knows(case: str) -> None:
  files = launch_jobs.files(case)
  name = gke.FILE if case.startswith('gke') else skypilot.FILE
  schema = launch_schemas.JOBSET if name == gke.FILE else launch_schemas.TASK
  assert not launch_schemas.errors(yaml.safe_load(files[name]), schema)


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    (('spec', 'failurePolicy', 'maxRestart'), 3),
    (('spec', 'failurePolicy', 'maxRestarts'), '3'),
    (('spec', 'failurePolicy', 'restartStrategy'), 'Again'),
    (('kind',), 'Job'),
  ],
)
def test_a_wrong_field_is_found(path: tuple[str, ...], value: Any) -> None:
  tree = yaml.safe_load(launch_jobs.files('gke TPU')[gke.FILE])
  place = tree
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  found = launch_schemas.errors(tree, launch_schemas.JOBSET)
  assert [error.partition(':')[0] for error in found] == ['.'.join(path)]


def test_gke_counts_a_saved_stop_as_no_failure() -> None:
  tree = yaml.safe_load(launch_jobs.files('gke TPU', max_restarts=7)[gke.FILE])
  policy = tree['spec']['failurePolicy']
  job = tree['spec']['replicatedJobs'][0]['template']['spec']
  first = job['podFailurePolicy']['rules'][0]
  assert first['onExitCodes']['values'] == [3]
  assert first['action'] == 'FailJob'
  assert first['onExitCodes']['containerName'] == 'worker'
  assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  assert policy['rules'][0]['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  assert policy['maxRestarts'] == 7
  # A pod failure policy is only taken with this.
  assert job['template']['spec']['restartPolicy'] == 'Never'


def test_every_slice_is_a_job_of_as_many_pods_as_it_has_hosts() -> None:
  tree = yaml.safe_load(
    launch_jobs.files('gke slices', grace_secs=300)[gke.FILE]
  )
  replicated = tree['spec']['replicatedJobs'][0]
  job = replicated['template']['spec']
  pod = job['template']['spec']
  assert replicated['replicas'] == 2
  assert (job['completions'], job['parallelism']) == (4, 4)
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4}
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  assert pod['terminationGracePeriodSeconds'] == 300


def test_gpu_pods_find_the_first_by_its_name_in_the_jobset() -> None:
  text = launch_jobs.files('gke GPU', name='run-1')[gke.FILE]
  tree = yaml.safe_load(text)
  first = f'run-1-{tree["spec"]["replicatedJobs"][0]["name"]}-0-0.run-1'
  command = _container(text)['args'][0]
  assert f'--coordinator={first}:{job_lib.PORT} --num_processes=2' in command
  assert command.endswith('--process_id="$JOB_COMPLETION_INDEX"')


def test_skypilot_continues_a_saved_stop() -> None:
  recovery = yaml.safe_load(launch_jobs.files('skypilot')[skypilot.FILE])[
    'resources'
  ]
  assert recovery['job_recovery']['recover_on_exit_codes'] == [3]
  assert recovery['use_spot'] is True


@pytest.mark.parametrize(
  'case', [c for c in launch_jobs.JOBS if c.startswith('slurm')]
)
def test_sbatch_knows_every_directive(case: str) -> None:
  text = launch_jobs.files(case)[slurm.FILE]
  found = re.findall(r'^#SBATCH --([a-z-]+)(?:=(\S+))?$', text, re.MULTILINE)
  assert len(found) == text.count('#SBATCH')
  # sbatch stops reading at the first command.
  assert '#SBATCH' not in text.partition('set -euo')[2]
  for name, value in found:
    assert re.fullmatch(launch_schemas.SBATCH[name], value), (name, value)


def test_a_slurm_process_uses_all_gpus_of_its_node() -> None:
  text = launch_jobs.files('slurm')[slurm.FILE]
  assert 'export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n' in text
  assert '#SBATCH --ntasks-per-node=1\n' in text
  assert '#SBATCH --gpus-per-node=h100:8\n' in text
  assert '#SBATCH --signal=B:TERM@120\n' in text


@pytest.mark.parametrize('case', ['tpu_vm', 'tpu_vm of one host', 'xpk'])
def test_command_line_tools_know_every_option(case: str) -> None:
  for name, text in launch_jobs.files(case).items():
    if name not in launch_schemas.OPTIONS:
      continue
    lines = text.replace('\\\n', ' ')
    for start, options in launch_schemas.OPTIONS[name].items():
      (line,) = (x for x in lines.splitlines() if start in x)
      mine = line.partition(start)[2].partition('--command=')[0]
      used = set(re.findall(r'(?<!\S)--([a-z-]+)', mine))
      assert used <= options, start


def test_dockerfile_installs_by_hash_and_runs_as_nobody_special() -> None:
  text = launch_jobs.files('docker')[docker.FILE].replace('\\\n', ' ')
  steps = [line for line in text.splitlines() if line and line[0] != '#']
  names = [step.split()[0] for step in steps]
  assert set(names) <= {
    'FROM', 'RUN', 'WORKDIR', 'COPY', 'ENV', 'USER', 'STOPSIGNAL', 'CMD'
  }  # fmt: skip
  installs = [step for step in steps if ' pip install ' in step]
  assert '--require-hashes' in installs[0]
  assert '--requirement=requirements.lock' in installs[0]
  assert '--constraint="$locked" \'jax[cuda13]\'' in installs[1]
  assert names.index('USER') < names.index('CMD')
  assert steps[names.index('USER')] == 'USER trainer'
  assert f'useradd --create-home --uid={job_lib.UID} trainer' in text
  assert 'NVIDIA_VISIBLE_DEVICES=all' in text
  assert _cmd(text)[:2] == ['bash', '-c']


def test_the_image_installs_what_the_extras_of_setup_name() -> None:
  tree = ast.parse((_ROOT / 'setup.py').read_text())
  values = {
    ast.unparse(node.targets[0]): node.value
    for node in tree.body
    if isinstance(node, ast.Assign)
  }
  extras = ast.literal_eval(values['_EXTRAS'])
  for name, requirement in docker.EXTRAS.items():
    assert extras[name][0].startswith(f'{requirement}>=')
