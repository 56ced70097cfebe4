"""Makes the certificate of a hub and the keys of its islands.

python -m experiments.island_keys --keys=keys --hosts=hub.example.org \
  --islands=paris,tokyo

Run again with other names, it adds their keys; the hub's certificate is made
anew, and islands need not know. An island needs its own .key and authority.pem.
"""

import pathlib

from absl import flags

from experiments import command, exits, flower_programs


def define_flags() -> None:
  """Defines the flags of this binary."""
  flags.DEFINE_string('keys', 'keys', "Folder of the hub's keys.")
  flags.DEFINE_list('hosts', [], 'Names or addresses islands call the hub by.')
  flags.DEFINE_list('islands', [], 'Names of islands.')
  flags.DEFINE_integer('days', 365, "How long the hub's certificate is good.")


def run(changes: dict[str, str]) -> int:
  """Makes what is missing and says where it is."""
  if changes:
    raise ValueError('keys have no configuration; leave --config out.')
  flower_programs.check_installed()
  from efficient_llm.diloco.wan import keys

  values = flags.FLAGS
  if values.days < 1:
    raise ValueError(f'--days={values.days} must be at least 1.')
  folder = pathlib.Path(values.keys)
  made = keys.make(
    folder, hosts=values.hosts, islands=values.islands, days=values.days
  )
  for path in made:
    print(f'Key of an island, for it alone: {path}')
  print(f'For every island: {folder / keys.AUTHORITY}')
  print(f'Let in: {", ".join(keys.allowed(folder)) or "nobody yet"}')
  return exits.DONE


if __name__ == '__main__':
  command.main(define_flags, run)
