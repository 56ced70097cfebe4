"""Tests of the TPU VM script, with a stand-in for the cloud's tool."""

import os
import pathlib
import subprocess
from collections.abc import Sequence

import pytest

from experiments.launch import tpu_vm
from tests import launch_jobs

# Orders are granted at once; each run ends as the next line of `ends` says,
# and 'gone' takes the slices away.
_GCLOUD = """\
#!/usr/bin/env bash
cd {folder}
echo "$4 ${{!#}}" >>calls
case $4 in
  create) echo ACTIVE >state ;;
  describe) cat state 2>/dev/null ;;
  delete) rm state ;;
  ssh)
    if [[ ${{!#}} != *' code' ]]; then exit; fi
    end=$(head -n 1 ends)
    sed -i 1d ends
    if [[ $end == gone ]]; then
      echo SUSPENDED >state
      exit 1
    fi
    echo "$end"
    ;;
esac
"""


def _run(
  folder: pathlib.Path, ends: Sequence[str], *, max_restarts: int = 2
) -> tuple[int, list[str], str]:
  """Gives exit code, the calls that change something, and what was said."""
  files = launch_jobs.files('tpu_vm', max_restarts=max_restarts)
  tools = {
    tpu_vm.FILE: files[tpu_vm.FILE],
    'gcloud': _GCLOUD.format(folder=folder),
    # Nobody waits for a stand-in.
    'sleep': '#!/bin/sh\n',
  }
  for name, text in tools.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  (folder / 'ends').write_text(''.join(f'{end}\n' for end in ends))
  run = subprocess.run(
    [folder / tpu_vm.FILE],
    env={**os.environ, 'PATH': f'{folder}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  calls = (folder / 'calls').read_text().splitlines()
  changes = [
    'run' if call.endswith('tpu_worker.sh start') else call.split()[0]
    for call in calls
    if call.startswith(('create', 'delete')) or call.endswith(' start')
  ]
  return run.returncode, changes, run.stderr


def test_slices_that_are_taken_away_are_ordered_again(
  tmp_path: pathlib.Path,
) -> None:
  code, changes, said = _run(tmp_path, ['gone', '0'])
  assert code == 0
  assert changes == ['create', 'run', 'delete', 'create', 'run', 'delete']
  assert 'taken away; ordering again' in said


def test_a_stopped_run_continues_on_the_same_slices(
  tmp_path: pathlib.Path,
) -> None:
  # More often than a failure would be let pass.
  code, changes, _ = _run(tmp_path, ['3', '3', '3', '0'])
  assert code == 0
  assert changes == ['create', 'run', 'run', 'run', 'run', 'delete']


@pytest.mark.parametrize(
  ('end', 'num_runs', 'expected'), [('1', 3, 1), ('137', 3, 1), ('2', 1, 2)]
)
def test_a_failing_run_is_not_repeated_for_ever(
  tmp_path: pathlib.Path, end: str, num_runs: int, expected: int
) -> None:
  code, changes, _ = _run(tmp_path, [end] * 9)
  assert (code, changes) == (expected, ['create', *['run'] * num_runs])
