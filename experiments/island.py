"""One island: trains on its own data and talks to the hub now and then.

python -m experiments.island --hub=hub.example.org:9092 --key=paris.key \
  --authority=authority.pem --data=my_texts/ --workdir=out/paris \
  --config=experiments/configs/islands_cpu.py

It calls the hub, so it may stand behind a router. --config is the hub's, but
for mesh, data.path and data.batch_size, which are its own. Killed and started
again, it takes the shared parameters and goes on in its data where the hub has
counted it to.
"""

import dataclasses
import pathlib
import tempfile

from absl import flags

from efficient_llm.data import pipeline
from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import island as island_lib
from efficient_llm.diloco.wan import local_link
from efficient_llm.diloco.wan import trainer as trainer_lib
from efficient_llm.diloco.wan.config import IslandsConfig
from efficient_llm.training import datasets, strict_json
from experiments import exits, flower_programs, hub_link, runner


def define_flags() -> None:
  """Defines the flags of this binary."""
  flags.DEFINE_string('hub', None, 'HOST:PORT of the hub.')
  flags.DEFINE_string('key', None, "The island's private key.")
  flags.DEFINE_string(
    'authority', None, "The hub's authority.pem; by default beside the key."
  )
  flags.DEFINE_string('data', None, 'Its own text; as --config.data.path.')
  flags.DEFINE_string(
    'share', '0/1', 'I/N: it takes part I of N of the data, counted from 0.'
  )


def run(config: IslandsConfig, workdir: pathlib.Path) -> int:
  """Trains until the hub says stop."""
  flower_programs.check_installed()
  values = flags.FLAGS
  if values.data:
    data = dataclasses.replace(config.data, path=values.data)
    config = dataclasses.replace(config, data=data)
  target = hub_link.Target.from_flags(
    hub=values.hub, key=values.key, authority=values.authority
  )
  target.check()
  dataset = pipeline.open_dataset(
    config.data, split='train', cache_dir=workdir / 'cache'
  )
  datasets.check_vocabulary(config.model, dataset)
  batches = dataset.iterate(island=_share(values.share))
  outcome = train(
    config, trainer_lib.Trainer(config, batches), target, workdir=workdir
  )
  text = strict_json.to_json(outcome, indent=2)
  strict_json.write_atomically(workdir / 'result.json', text + '\n')
  runner.say(f'Done after {outcome.steps} steps: {workdir / "result.json"}')
  return exits.DONE


def train(
  config: IslandsConfig,
  trainer: island_lib.Trainer,
  target: hub_link.Target,
  *,
  workdir: pathlib.Path,
  exchange: exchange_lib.Exchange | None = None,
) -> island_lib.Outcome:
  """Keeps up a link to the hub and trains until it says stop.

  Args:
    config: The run.
    trainer: Makes the steps.
    target: The hub.
    workdir: For the link's log and files.
    exchange: Its side of the conversation, if not the usual one.
  """
  island = island_lib.Island(config, trainer, exchange=exchange)
  with (
    tempfile.TemporaryDirectory(prefix='island-') as folder,
    local_link.LocalLink(
      pathlib.Path(folder) / 'trainer',
      poll_secs=config.rounds.poll_secs,
      idle=island.idle,
    ) as link,
    hub_link.Keeper(target, link, workdir=workdir, rounds=config.rounds),
  ):
    return island.run(link)


def _share(text: str) -> tuple[int, int]:
  index, _, count = text.partition('/')
  if not (index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
    raise ValueError(f'--share={text} must be I/N with I below N, such as 0/4.')
  return int(index), int(count)


if __name__ == '__main__':
  define_flags()
  runner.main(
    run,
    default_config='experiments/configs/islands_cpu.py',
    config_type=IslandsConfig,
    workdir='out/island',
  )
