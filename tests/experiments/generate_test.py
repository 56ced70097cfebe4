"""Generation as a user runs it: a run's checkpoint, a file of prompts."""

import json
import pathlib
import subprocess
import sys

import pytest

from efficient_llm.training import pretrain
from experiments import generate
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder with a target and prompts."""
  folder = tmp_path_factory.mktemp('generate')
  text = tiny.write_text(folder / 'text')
  pretrain.train(tiny.config(text, eval_every=None), workdir=folder / 'target')
  records = ({'prompt': 'the '}, {'prompt': 'and so on'})
  (folder / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, records)))
  return folder


def _run(*arguments: str) -> tuple[int, str, str]:
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.generate', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_answers_are_those_of_plain_decoding(base: pathlib.Path) -> None:
  output = base / 'answers.jsonl'
  code, out, err = _run(
    f'--checkpoint={base / "target"}',
    f'--prompts={base / "prompts.jsonl"}',
    f'--output={output}',
    '--answers=3',
    '--max_new_tokens=20',
    '--temperature=0.5',
    '--arms=3_1_4',
    '--json',
  )
  assert code == 0, err
  # Lines of libraries are nothing to a user.
  assert 'Restoring checkpoint' not in err
  gain = json.loads(out.splitlines()[-1])
  assert (gain['same_answers'], gain['num_answers']) == (6, 6)
  assert '6 of 6 answers are the same' in out
  rows = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row['prompt'] for row in rows] == ['the '] * 3 + ['and so on'] * 3
  assert sum(row['num_tokens'] for row in rows) == gain['num_tokens']


def test_a_missing_checkpoint_is_one_line_and_code_2(
  base: pathlib.Path,
) -> None:
  code, out, err = _run(
    f'--checkpoint={base}', f'--prompts={base / "prompts.jsonl"}'
  )
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert 'must be the folder of a pre-training run' in err


@pytest.mark.parametrize(
  ('name', 'content', 'rule'),
  [
    ('none.txt', None, 'No such file'),
    ('empty.txt', ' \n', 'must hold a prompt'),
    ('binary.txt', b'\xff\xfe\x00', 'it is not UTF-8'),
    ('broken.jsonl', '{"prompt": "a"}\n{', 'record 2 must be a JSON object'),
    ('other.jsonl', '{"text": "a"}', "record 1 must be a JSON object with a '"),
    ('number.jsonl', '{"prompt": 3}', "record 1: 'prompt' must be a text"),
  ],
)
def test_prompts_that_cannot_be_read_are_refused(
  tmp_path: pathlib.Path, name: str, content: str | bytes | None, rule: str
) -> None:
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=rule):
    generate.read_prompts(path)
