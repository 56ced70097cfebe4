"""The hub of islands that train one model, each on its own machine.

python -m experiments.island_hub --keys=keys --port=9092 --workdir=out/hub \
  --config=experiments/configs/islands_cpu.py

Islands call it over TLS and are let in by their keys (experiments.island_keys).
The same command continues from the last checkpoint. It trains nothing itself
and needs no accelerator.
"""

import pathlib
import pickle
import tempfile
import time

from absl import flags

from efficient_llm.diloco.wan import status_page
from efficient_llm.diloco.wan.config import IslandsConfig
from experiments import exits, flower_programs, runner, saved_ending

_PAUSE_SECS = 0.3


def define_flags() -> None:
  """Defines the flags of this binary."""
  flags.DEFINE_string('keys', 'keys', 'Folder made by experiments.island_keys.')
  flags.DEFINE_string('listen', '0.0.0.0', 'Address that islands call.')
  flags.DEFINE_integer('port', 9092, 'Port that islands call.')
  flags.DEFINE_string(
    'page', '127.0.0.1:8088', 'HOST:PORT of the status page; empty for none.'
  )
  flags.DEFINE_bool(
    'page_for_all', False, 'Let the page be served beyond this machine.'
  )


def run(config: IslandsConfig, workdir: pathlib.Path) -> int:
  """Runs the hub until all rounds are done."""
  flower_programs.check_installed()
  from efficient_llm.diloco.wan import hub_app, keys

  values = flags.FLAGS
  folder = pathlib.Path(values.keys).absolute()
  keys.check_hub(folder)
  if not 0 < values.port < 1 << 16:
    raise ValueError(f'--port={values.port} must be in [1, 65535].')
  page = values.page or None
  if page is not None:
    host, _ = status_page.parse_address(page)
    if not (status_page.is_loopback(host) or values.page_for_all):
      raise ValueError(
        f'--page={page} is for other machines too, and anybody could read it; '
        'add --page_for_all if that is meant.'
      )
  with tempfile.TemporaryDirectory(prefix='hub-') as launch:
    task = hub_app.Task(config, workdir, page, pathlib.Path(launch))
    return _run(task, folder, values.listen, values.port)


def _run(task, folder: pathlib.Path, address: str, port: int) -> int:
  """Runs Flower and the hub of a task."""
  from efficient_llm.diloco.wan import keys

  path = task.launch / 'task.pickle'
  path.write_bytes(pickle.dumps(task))
  workdir = task.workdir
  log = workdir / 'flower.log'
  home = workdir / 'flower'
  link = flower_programs.start(
    [
      'superlink',
      f'--ssl-ca-certfile={folder / keys.AUTHORITY}',
      f'--ssl-certfile={folder / keys.CERTIFICATE}',
      f'--ssl-keyfile={folder / keys.HUB_KEY}',
      '--enable-supernode-auth',
      '--disable-runtime-dependency-installation',
      f'--host={address}',
      f'--port={port}',
    ],
    home=home,
    log=log,
  )
  begin = flower_programs.start(
    ['start', str(folder), str(port), str(path)], home=home, log=log
  )
  runner.say(f'Hub: port {port}, {len(keys.allowed(folder))} keys')
  try:
    return _watch(task, link, begin, log)
  finally:
    flower_programs.stop(begin)
    flower_programs.stop(link)


def _watch(task, link, begin, log: pathlib.Path) -> int:
  """Repeats what the hub says until it has ended."""
  workdir = task.workdir
  lines = saved_ending.Tail(workdir / 'hub.log')
  while True:
    ending = saved_ending.read(task.launch)
    for line in lines.new():
      runner.say(line)
    if ending is not None:
      break
    if link.poll() is not None or begin.poll() not in (None, 0):
      raise ValueError(
        f'the hub could not be started; see the end of {log}: another program '
        'may have its port.'
      )
    if saved_ending.is_dead(task.launch):
      ending = {'state': 'failed', 'reason': 'the hub was killed'}
      break
    time.sleep(_PAUSE_SECS)
  if ending['state'] == 'done':
    runner.say(
      f'Done: {workdir / "status.json"}; the model: experiments.generate '
      f'--checkpoint={workdir}'
    )
    return exits.DONE
  if ending['state'] == 'refused':
    raise ValueError(ending['reason'])
  reason = ending['reason'].rstrip('.')
  runner.say(f'Failed: {reason}; the same command continues.')
  return exits.FAILED


if __name__ == '__main__':
  define_flags()
  runner.main(
    run,
    default_config='experiments/configs/islands_cpu.py',
    config_type=IslandsConfig,
    workdir='out/hub',
  )
