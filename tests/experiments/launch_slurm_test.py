"""Tests that a stopped SLURM job saves and continues, on a stand-in."""

import json
import pathlib
import shlex

import pytest

from efficient_llm.training import metrics
from experiments.launch import job as job_lib
from experiments.launch import slurm, targets
from tests import binary, slurm_stand_in, tiny

_CLOCK = ('time', 'step_secs', 'tokens_per_sec', 'mfu')
_NUM_STEPS = 60
# Stands for Python: what becomes of the machine's check, of a run that is told
# to stop, and of one that is not.
_PYTHON = """\
#!/usr/bin/env bash
if [[ $2 == experiments.doctor ]]; then exit {doctor}; fi
trap 'exit {stopped}' TERM
if [[ -e {started} ]]; then exit {code}; fi
touch {started}
for _ in {{1..{tenths}}}; do sleep 0.1; done
exit {code}
"""


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('slurm')
  text = tiny.write_text(folder / 'text')
  binary.write_config(
    folder,
    f'tiny.config(pathlib.Path({str(text)!r}), num_steps={_NUM_STEPS}, '
    'log_every=1, eval_every=30, every_steps=25)',
  )
  return folder


def _script(
  folder: pathlib.Path, command: str, *, accelerator: str = 'cpu:1'
) -> pathlib.Path:
  job = job_lib.Job(
    command=command,
    accelerator=accelerator,
    prologue='export JAX_NUM_CPU_DEVICES=1',
  )
  folder.mkdir(exist_ok=True)
  path = folder / slurm.FILE
  path.write_text(targets.render('slurm', job)[slurm.FILE])
  return path


def _command(base: pathlib.Path, workdir: pathlib.Path) -> str:
  return shlex.join(
    [
      *('python', '-m', 'experiments.pretrain'),
      *(f'--config={base / "run.py"}', f'--workdir={workdir}'),
    ]
  )


def _lines(workdir: pathlib.Path) -> list[dict[str, object]]:
  return [
    {name: value for name, value in line.items() if name not in _CLOCK}
    for line in metrics.read_metrics(workdir)
  ]


def _leaves(workdir: pathlib.Path) -> object:
  manifest = workdir / 'checkpoints' / str(_NUM_STEPS) / 'MANIFEST.json'
  return json.loads(manifest.read_text())['leaves']


@pytest.mark.slow
def test_a_stopped_job_is_queued_again_and_ends_as_one_that_was_not_stopped(
  base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  whole, stopped = base / 'whole', base / 'stopped'
  arguments = [f'--config={base / "run.py"}', f'--workdir={whole}']
  cache = base / 'cache'
  code, _, err = binary.finish(binary.start(arguments, cache=cache / '0'))
  assert code == 0, err
  cluster = slurm_stand_in.Slurm(tmp_path, cache=cache)
  code, out, err = cluster.run(
    _script(base / 'one', _command(base, stopped)),
    stop_when=lambda: binary.num_lines(stopped) >= 10,
  )
  assert (code, cluster.launches) == (0, 2), err
  assert 'Stopped by SIGTERM; the same command continues.' in out
  assert 'is queued again and will continue.' in out
  assert 'Resumed at step ' in err
  assert _lines(stopped) == _lines(whole)
  assert _leaves(stopped) == _leaves(whole)


def _run_shortly(
  folder: pathlib.Path,
  *,
  stop: bool,
  state: str = 'RUNNING',
  doctor: int = 0,
  stopped: int = 3,
  code: int = 0,
) -> tuple[int, int, str]:
  """Gives exit code, launches and output of a job that trains nothing."""
  started = folder / 'started'
  python = _PYTHON.format(
    doctor=doctor,
    stopped=stopped,
    started=started,
    code=code,
    tenths=600 if stop else 1,
  )
  cluster = slurm_stand_in.Slurm(folder, state=state, python=python)
  script = _script(folder, 'python -m experiments.pretrain --workdir=out/x')
  end, out, _ = cluster.run(script, stop_when=started.exists if stop else None)
  return end, cluster.launches, out


@pytest.mark.parametrize('stopped', [3, 143])
def test_a_job_that_was_told_to_stop_is_queued_again(
  tmp_path: pathlib.Path, stopped: int
) -> None:
  end, launches, _ = _run_shortly(tmp_path, stop=True, stopped=stopped)
  assert (end, launches) == (0, 2)


@pytest.mark.parametrize('state', ['COMPLETING', 'CANCELLED'])
def test_a_job_that_its_owner_cancels_stays_away(
  tmp_path: pathlib.Path, state: str
) -> None:
  end, launches, out = _run_shortly(tmp_path, stop=True, state=state)
  assert (end, launches) == (3, 1)
  assert 'queued again' not in out


@pytest.mark.parametrize('code', [0, 1, 2])
def test_a_job_that_ends_by_itself_is_not_queued_again(
  tmp_path: pathlib.Path, code: int
) -> None:
  assert _run_shortly(tmp_path, stop=False, code=code)[:2] == (code, 1)


def test_a_machine_that_fails_its_check_runs_nothing(
  tmp_path: pathlib.Path,
) -> None:
  assert _run_shortly(tmp_path, stop=False, doctor=1)[:2] == (1, 1)
  assert not (tmp_path / 'started').exists()


def test_every_process_is_told_of_the_others_and_to_stop(
  tmp_path: pathlib.Path,
) -> None:
  python = f"""\
#!/usr/bin/env bash
cd {tmp_path}
if [[ $2 == experiments.doctor || -e told.$SLURM_PROCID ]]; then exit 0; fi
trap 'touch told.$SLURM_PROCID; exit 3' TERM
echo "$@" >given.$SLURM_PROCID
for _ in {{1..600}}; do sleep 0.1; done
"""
  cluster = slurm_stand_in.Slurm(tmp_path, num_tasks=2, python=python)
  command = 'python -m experiments.pretrain --workdir=out/x'
  script = _script(tmp_path, command, accelerator='cpu:1x2')
  given = [tmp_path / f'given.{index}' for index in range(2)]
  code, _, err = cluster.run(
    script, stop_when=lambda: all(path.exists() for path in given)
  )
  assert (code, cluster.launches) == (0, 2), err
  assert all((tmp_path / f'told.{index}').exists() for index in range(2))
  words = [path.read_text().split() for path in given]
  assert [w[-1] for w in words] == ['--process_id=0', '--process_id=1']
  assert words[0][-3].startswith('--coordinator=127.0.0.1:')
  assert words[0][:-1] == words[1][:-1]
  assert '--num_processes=2' in words[0]
