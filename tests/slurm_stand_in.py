"""A scheduler of one machine: runs a batch script as SLURM would.

`srun` starts the tasks and passes SIGTERM on to them, `scontrol requeue` has
the script run again once it has ended, `squeue` tells the job's state.
"""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

from tests import binary

_ROOT = pathlib.Path(__file__).parents[1]
_SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=0 SLURM_STEP_NODELIST=$SLURM_JOB_NODELIST \\
    JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR/$task "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; done
  wait "$task"
  code=$?
  if ((code > worst)); then worst=$code; fi
done
exit "$worst"
"""
_SCONTROL = """\
#!/usr/bin/env bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >>{folder}/requeued ;;
  *) exit 1 ;;
esac
"""


class Slurm:
  """The stand-in; `launches` counts how often the script was started."""

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    num_tasks: int = 1,
    state: str = 'RUNNING',
    python: str | None = None,
    cache: pathlib.Path | None = None,
  ) -> None:
    """Writes the tools.

    Args:
      folder: Where they go.
      num_tasks: Processes of the job, all on this machine.
      state: What squeue says of it.
      python: Script that stands for Python; the real one by default.
      cache: Folder of compiled programs, one for each task below it.
    """
    self.launches = 0
    self._folder = folder
    self._cache = cache or folder
    tools = {
      'srun': _SRUN,
      'scontrol': _SCONTROL.format(folder=folder),
      'squeue': f'#!/usr/bin/env bash\necho {state}\n',
      'python': python or f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }
    for name, text in tools.items():
      tool = folder / name
      tool.write_text(text)
      tool.chmod(0o755)
    self._environment = {
      **os.environ,
      'PATH': f'{folder}:{os.environ["PATH"]}',
      'PYTHONPATH': str(_ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(self._cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.05',
      'SLURM_JOB_ID': str(binary.free_port()),
      'SLURM_JOB_NODELIST': '127.0.0.1',
      'SLURM_NTASKS': str(num_tasks),
    }

  def run(
    self, script: pathlib.Path, *, stop_when: Callable[[], bool] | None = None
  ) -> tuple[int, str, str]:
    """Runs the job until it ends without having been queued again.

    Args:
      script: The batch script.
      stop_when: When the first launch gets SIGTERM, as its shell alone does
        at the end of its time.
    Returns:
      Exit code of the last launch, and the output of all.
    """
    out, err = '', ''
    while True:
      process = subprocess.Popen(
        ['bash', str(script)],
        cwd=_ROOT,
        env=self._environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      self.launches += 1
      if stop_when and self.launches == 1:
        binary.wait_until(stop_when, process)
        process.terminate()
      code, more_out, more_err = binary.finish(process)
      out, err = out + more_out, err + more_err
      requeued = self._folder / 'requeued'
      if not requeued.exists():
        return code, out, err
      requeued.unlink()
