"""A hub and islands on this machine, to learn how they work.

python -m experiments.islands --local=4 --workdir=out/wan \
  --config=experiments/configs/islands_cpu.py

Makes keys, starts experiments.island_hub and the islands as on machines of
their own, each with its part of the data, and waits for the end.
"""

import pathlib
import subprocess
import sys
import time

from absl import flags

from experiments import command, exits, flower_programs

_START_SECS = 1.0


def define_flags() -> None:
  """Defines the flags of this binary."""
  flags.DEFINE_integer('local', 4, 'Islands on this machine.')
  flags.DEFINE_string(
    'config', 'experiments/configs/islands_cpu.py', 'Configuration file.'
  )
  flags.DEFINE_string('workdir', 'out/wan', 'Folder of the run.')
  flags.DEFINE_string(
    'page', '127.0.0.1:8088', 'HOST:PORT of the status page; empty for none.'
  )


def run(changes: dict[str, str]) -> int:
  """Runs them all and says where to look."""
  flower_programs.check_installed()
  from efficient_llm.diloco.wan import keys

  values = flags.FLAGS
  if not 1 <= values.local <= 64:
    raise ValueError(f'--local={values.local} must be in [1, 64].')
  workdir = pathlib.Path(values.workdir).absolute()
  names = [f'island-{i}' for i in range(values.local)]
  keys.make(workdir / 'keys', hosts=[], islands=names)
  port = flower_programs.free_port()
  shared = [f'--config={values.config}']
  shared += [f'--config.{name}={text}' for name, text in changes.items()]
  hub = subprocess.Popen(
    [
      *_python('island_hub'),
      *shared,
      f'--config.islands={values.local}',
      f'--workdir={workdir / "hub"}',
      f'--keys={workdir / "keys"}',
      '--listen=127.0.0.1',
      f'--port={port}',
      f'--page={values.page}',
    ]
  )
  islands: list[subprocess.Popen[bytes]] = []
  try:
    for i, name in enumerate(names):
      folder = workdir / name
      folder.mkdir(parents=True, exist_ok=True)
      with (folder / 'log.txt').open('ab') as log:
        islands.append(
          subprocess.Popen(
            [
              *_python('island'),
              *shared,
              f'--config.islands={values.local}',
              f'--workdir={folder}',
              f'--hub=127.0.0.1:{port}',
              f'--key={workdir / "keys" / "islands" / name}.key',
              f'--share={i}/{values.local}',
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
          )
        )
    return _watch(hub, dict(zip(names, islands, strict=True)), workdir)
  finally:
    for process in (*islands, hub):
      flower_programs.stop(process)


def _watch(
  hub: subprocess.Popen[bytes],
  islands: dict[str, subprocess.Popen[bytes]],
  workdir: pathlib.Path,
) -> int:
  """Waits for the hub, and tells of islands that end before it."""
  ended: set[str] = set()
  while hub.poll() is None:
    for name, process in islands.items():
      if process.poll() not in (None, 0) and name not in ended:
        ended.add(name)
        print(f'{name} has ended: see {workdir / name / "log.txt"}')
    if len(ended) == len(islands):
      print('error: no island is left', file=sys.stderr)
      return exits.FAILED
    time.sleep(_START_SECS)
  for process in islands.values():
    if hub.returncode == exits.DONE:
      try:
        process.wait(30)
      except subprocess.TimeoutExpired:
        continue
  return hub.returncode


def _python(module: str) -> list[str]:
  return [sys.executable, '-m', f'experiments.{module}']


if __name__ == '__main__':
  command.main(define_flags, run)
