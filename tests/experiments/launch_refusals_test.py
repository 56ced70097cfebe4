"""Tests of what a batch run may ask for, and of what is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from experiments.launch import machines
from tests import launch_jobs


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('v5e:1x1', ('tpu', 1, 1, 1)),
    ('v5e:2x4', ('tpu', 1, 1, 8)),
    ('v5e:4x4,slices=4', ('tpu', 4, 4, 4)),
    ('v6e:16x16', ('tpu', 1, 64, 4)),
    ('v5p:2x2x1', ('tpu', 1, 1, 4)),
    ('v5p:4x4x4', ('tpu', 1, 16, 4)),
    ('h100:8x2', ('gpu', 1, 2, 8)),
    ('gpu:4', ('gpu', 1, 1, 4)),
    ('cpu:1x3', ('cpu', 1, 3, 1)),
  ],
)
def test_machines_are_read(
  name: str, expected: tuple[str, int, int, int]
) -> None:
  found = machines.parse(name)
  assert expected == (
    found.platform,
    found.num_slices,
    found.nodes_per_slice,
    found.devices_per_node,
  )


@pytest.mark.parametrize(
  ('case', 'changes', 'message'),
  [
    ('slurm', {'accelerator': 'h800:8'}, 'is not known; use v5e:4x4'),
    ('slurm', {'accelerator': 'h100:0'}, 'for example h100:8x2'),
    ('slurm', {'accelerator': 'cpu:4'}, 'write cpu:1x4'),
    ('slurm', {'accelerator': 'v5e:4x4'}, 'use one of tpu_vm, gke, xpk'),
    ('tpu_vm', {'accelerator': 'v5e:3x3'}, 'cannot be ordered: 3x3'),
    ('tpu_vm', {'accelerator': 'v5p:3x3x3'}, 'cannot be ordered: 3x3x3'),
    ('tpu_vm', {'accelerator': 'v5e:4x4x4'}, 'must name 2 positive size'),
    ('tpu_vm', {'image': None}, '--target=tpu_vm needs --image'),
    ('slurm', {'bucket': 'gs://b-b'}, '--target=slurm takes no --bucket'),
    ('slurm', {'spot': True}, '--target=slurm takes no --spot'),
    ('xpk', {'spot': True}, '--target=xpk takes no --spot'),
    ('docker', {'hours': 3}, '--target=docker takes no --hours'),
    ('skypilot', {'grace_secs': 60}, '--target=skypilot takes no --grace_secs'),
    ('gke GPU', {'accelerator': 'gpu:8'}, 'must name the GPU'),
    ('gke GPU', {'bucket': 's3://some-bucket'}, 'must be gs://NAME;'),
    ('docker', {'bucket': 'gs://some-bucket'}, 'must be a folder'),
    ('docker', {'accelerator': 'gpu:8x2'}, 'is 2 machines'),
    ('skypilot', {'accelerator': 'v5e:4x4,slices=2'}, 'no several slices'),
    ('slurm', {'name': 'Run 1'}, '--name=Run 1 must be'),
    ('slurm', {'partition': 'a;b'}, '--partition=a;b must hold only'),
    ('slurm', {'prologue': 'a\nb'}, 'must be one line'),
    ('slurm', {'grace_secs': 5}, '--grace_secs=5 must be at least 30'),
    ('slurm', {'command': "python -m 'x"}, 'mend the quotes'),
    ('slurm', {'command': 'bash train.sh'}, "must be 'python -m"),
    (
      'slurm',
      {'command': 'python -m experiments.plan --workdir=x'},
      'experiments.plan must be a binary that trains; those are experiments.c',
    ),
    (
      'slurm',
      {'command': 'python -m experiments.diloco'},
      'add --workdir=DIR',
    ),
    (
      'slurm',
      {'command': 'python -m experiments.diloco --workdir=x --platform=gpu'},
      '--platform is added for each machine',
    ),
    (
      'gke GPU',
      {'command': 'python -m experiments.diloco --workdir=out/x'},
      'would be lost with the machine; begin it with /bucket/',
    ),
  ],
)
def test_what_cannot_run_is_refused_in_one_line(
  case: str,
  changes: dict[str, Any],
  message: str,
  refusal: Callable[[Callable[[], Any]], str],
) -> None:
  assert message in refusal(lambda: launch_jobs.files(case, **changes))
