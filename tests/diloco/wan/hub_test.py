"""What a hub does about islands that join, leave, lag and lie.

Over 300 lines: one conversation, with everything that may happen in it.
"""

import contextlib
import dataclasses
import json
import pathlib

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_llm.data import pipeline
from efficient_llm.diloco import compression, fragments, outer, screening
from efficient_llm.diloco.wan import config as config_lib
from efficient_llm.diloco.wan import exchange as exchange_lib
from efficient_llm.diloco.wan import hub as hub_lib
from efficient_llm.diloco.wan import messages, shared_model
from efficient_llm.models import transformer
from efficient_llm.training import trained_run
from tests import tiny
from tests.diloco.wan import talk

_FLOAT32 = compression.CompressionConfig(format='float32')
_AVERAGE = outer.OuterConfig(optimizer='sgd', learning_rate=1.0)


@pytest.fixture
def chat(tmp_path: pathlib.Path) -> talk.Talk:
  """Three islands that were there from the beginning."""
  found = talk.Talk(talk.config(), tmp_path / 'hub')
  for name in 'abc':
    found.join(name)
  return found


def _verdicts(chat: talk.Talk) -> dict[str, str]:
  lines = (chat.workdir / 'rounds.jsonl').read_text().splitlines()
  rounds = [json.loads(line) for line in lines]
  last = [line for line in rounds if 'updates' in line][-1]
  return {x['island']: x['verdict'] for x in last['updates']}


def test_the_shared_parameters_are_the_mean_by_tokens(
  tmp_path: pathlib.Path,
) -> None:
  config = talk.config(
    outer=_AVERAGE, compression=_FLOAT32, down_compression=_FLOAT32
  )
  chat = talk.Talk(config, tmp_path / 'hub')
  for name in 'ab':
    chat.join(name)
  start = {k: x.copy() for k, x in chat.islands['a'].theta_P[0].items()}
  chat.send('a', steps=10, scale=0.01)
  chat.send('b', steps=30, scale=-0.02)
  assert chat.hub.tick()
  # b has three quarters of the tokens.
  for leaf, x in start.items():
    moved_a = 0.01 * talk.direction(leaf, x.shape, 'a', 10)
    moved_b = -0.02 * talk.direction(leaf, x.shape, 'b', 30)
    wanted = x - 0.25 * moved_a - 0.75 * moved_b
    # Sums of a few float32 numbers of size 1.
    np.testing.assert_allclose(
      chat.hub.shared.theta_P[0][leaf], wanted, atol=1e-6
    )


@pytest.mark.parametrize('format', ['float32', 'int8', 'int4'])
def test_hub_and_islands_have_the_same_bits_after_every_round(
  tmp_path: pathlib.Path, format: compression.Format
) -> None:
  sent = compression.CompressionConfig(format=format)
  config = talk.config(compression=sent, down_compression=sent)
  chat = talk.Talk(config, tmp_path / 'hub')
  for name in 'ab':
    chat.join(name)
  for _ in range(3):
    chat.round('a', 'b')
    for island in chat.islands.values():
      assert talk.same(island.theta_P, chat.hub.shared.theta_P)
  assert chat.hub.counts['digest_mismatches'] == 0
  assert chat.hub.shared.versions_P == [3]


def test_a_round_like_one_before_compiles_nothing(
  chat: talk.Talk, caplog: pytest.LogCaptureFixture
) -> None:
  chat.round('a', 'b', 'c')
  with jax.log_compiles():
    chat.round('a', 'b', 'c')
  assert 'Compiling' not in caplog.text


def test_an_island_that_stays_away_costs_the_grace_once(
  chat: talk.Talk,
) -> None:
  for name in 'ab':
    chat.send(name)
  chat.now = 9.9
  assert not chat.hub.tick()
  chat.now = 10.0
  assert chat.hub.tick()
  for name in 'ab':
    chat.hear(name)
  # The next round does not wait for it.
  chat.round('a', 'b')
  assert chat.hub.shared.versions_P == [chat.hub.slot] == [2]


def test_a_late_update_counts_in_the_next_round(chat: talk.Talk) -> None:
  for name in 'ab':
    chat.send(name)
  chat.now = 10.0
  assert chat.hub.tick()
  for name in 'ab':
    chat.hear(name)
  chat.send('c')
  chat.hear('c')
  chat.round('a', 'b')
  assert _verdicts(chat) == dict.fromkeys('abc', 'accepted')
  assert chat.hub.counts['late'] == 1
  assert chat.hub.members['c'].tokens == 640.0


def test_a_late_update_is_dropped_where_the_rule_says_so(
  tmp_path: pathlib.Path,
) -> None:
  config = talk.with_rounds(talk.config(), late='drop')
  chat = talk.Talk(config, tmp_path / 'hub')
  for name in 'abc':
    chat.join(name)
  for name in 'ab':
    chat.send(name)
  chat.now = 10.0
  assert chat.hub.tick()
  chat.send('c')
  assert chat.hub.members['c'].note == 'late by 1 rounds'
  assert chat.hub.members['c'].tokens == 0.0


def test_a_newcomer_counts_from_its_first_full_period_on(
  tmp_path: pathlib.Path,
) -> None:
  config = talk.config(
    model=dataclasses.replace(talk.config().model, num_layers=2),
    fragments=fragments.FragmentConfig(count=2),
  )
  chat = talk.Talk(config, tmp_path / 'hub')
  chat.join('a')
  for fragment in (0, 1):
    chat.round('a', steps=5, fragment=fragment)
  orders = chat.join('new')
  assert talk.same(chat.islands['new'].theta_P, chat.hub.shared.theta_P)
  assert (orders.fragment, orders.steps, orders.step) == (0, 5, 10)
  for fragment, tokens in ((0, 0.0), (1, 320.0)):
    chat.round('a', 'new', steps=5, fragment=fragment)
    assert chat.hub.members['new'].tokens == tokens


def test_tokens_count_once_however_often_an_update_is_sent(
  chat: talk.Talk,
) -> None:
  frame = chat.send('a')
  chat.round('b', 'c')
  chat.hear('a')
  before = chat.hub.members['a'].tokens
  chat.hub.receive('a', frame)
  assert 'replayed' in chat.hub.members['a'].note
  chat.hear('a')
  chat.round('a', 'b', 'c')
  assert before == 640.0
  assert chat.hub.members['a'].tokens == 1280.0


def test_a_replay_in_the_place_of_an_update_costs_nothing(
  chat: talk.Talk,
) -> None:
  old = chat.send('a')
  chat.round('b', 'c')
  chat.hear('a')
  chat.train('a')
  chat.update('a')
  chat.hub.receive('a', old)
  orders = chat.hear('a')
  assert (orders.kind, orders.adopts_all) == ('go', False)
  # It has made the steps that it is told to make: it sends at once.
  assert chat.islands['a'].since_sent == orders.steps == 10
  chat.hub.receive('a', chat.update('a'))
  chat.round('b', 'c')
  assert chat.hub.members['a'].tokens == 1280.0


@pytest.mark.parametrize('restarts', [False, True])
def test_an_answer_that_was_lost_is_given_again(
  chat: talk.Talk, restarts: bool
) -> None:
  for name in 'abc':
    chat.send(name)
  assert chat.hub.tick()
  # It trains on, and the answer never comes.
  assert chat.hub.next_message('a') is not None
  chat.train('a', steps=7)
  if restarts:
    chat.restart()
  else:
    chat.hub.vanished('a')
  orders = chat.join('a')
  assert (orders.kind, orders.adopts_all) == ('go', False)
  assert [p for p, _ in orders.parts] == [0]
  assert talk.same(chat.islands['a'].theta_P, chat.hub.shared.theta_P)
  for name in 'bc':
    if restarts:
      chat.join(name)
    else:
      chat.hear(name)
  chat.round('a', 'b', 'c')
  assert chat.hub.members['a'].tokens == 64 * (10 + 7 + 10)


def test_a_greeting_is_answered_once(chat: talk.Talk) -> None:
  hello = chat.islands['a'].hello(talk.SIGNS)
  chat.hub.receive('a', hello)
  assert not chat.hub.members['a'].note
  chat.hub.receive('a', hello)
  assert 'replayed' in chat.hub.members['a'].note


@pytest.mark.parametrize(
  ('scale', 'reason'),
  [
    (float('nan'), 'not finite'),
    (1.0, 'too large'),
    (-0.01, 'against the rest'),
  ],
)
def test_a_bad_update_is_refused_and_its_sender_takes_the_shared_ones(
  tmp_path: pathlib.Path, scale: float, reason: str
) -> None:
  config = talk.config(screening=screening.ScreeningConfig(min_cosine=-0.2))
  chat = talk.Talk(config, tmp_path / 'hub')
  for name in 'abcd':
    chat.join(name)
  chat.send('d', scale=scale)
  for name in 'abc':
    chat.send(name)
  assert chat.hub.tick()
  assert _verdicts(chat) == {**dict.fromkeys('abc', 'accepted'), 'd': reason}
  orders = chat.hear('d')
  assert orders.adopts_all
  assert reason in orders.reason
  assert talk.same(chat.islands['d'].theta_P, chat.hub.shared.theta_P)
  assert chat.hub.members['d'].tokens == 0.0
  # It may do better.
  for name in 'abc':
    chat.hear(name)
  chat.round('a', 'b', 'c', 'd')
  assert _verdicts(chat)['d'] == 'accepted'


def test_a_round_in_which_nothing_counts_stays_open(chat: talk.Talk) -> None:
  for name in 'abc':
    chat.send(name, scale=float('nan'))
  assert not chat.hub.tick()
  assert chat.hub.shared.versions_P == [chat.hub.slot] == [0]
  assert chat.hub.counts['reopened'] == 1
  for name in 'abc':
    assert chat.hear(name).adopts_all
  chat.round('a', 'b', 'c')
  assert _verdicts(chat) == dict.fromkeys('abc', 'accepted')
  assert chat.hub.shared.versions_P == [1]


def test_an_island_that_is_refused_too_often_has_to_go(
  tmp_path: pathlib.Path,
) -> None:
  config = talk.with_rounds(talk.config(), expel_after=2)
  chat = talk.Talk(config, tmp_path / 'hub')
  for name in 'abc':
    chat.join(name)
  chat.round('a', 'b', 'c')
  for _ in range(2):
    chat.hub.receive('c', b'noise')
  orders = chat.hear('c')
  assert orders.kind == 'refuse'
  assert 'refused 2 times in a row' in orders.reason
  chat.round('a', 'b')


def test_the_hub_goes_on_from_its_checkpoint(chat: talk.Talk) -> None:
  chat.round('a', 'b', 'c')
  before = chat.hub.shared.theta_P
  lost = chat.send('a')
  chat.restart()
  assert talk.same(chat.hub.shared.theta_P, before)
  for name in 'abc':
    # Islands train on meanwhile, and hold all they have done.
    chat.train(name, steps=3)
    chat.join(name)
    assert chat.islands[name].session == chat.hub.members[name].session
  chat.round('a', 'b', 'c')
  assert chat.hub.counts['rounds'] == 2
  # a had made 10 steps that the dead hub never counted; then 3, then 10.
  assert chat.hub.members['a'].tokens == 64 * (10 + 23)
  assert chat.hub.members['b'].tokens == 64 * (10 + 13)
  chat.hub.receive('a', lost)
  assert 'replayed' in chat.hub.members['a'].note


def test_an_island_that_was_killed_goes_on_where_its_data_counts_to(
  chat: talk.Talk,
) -> None:
  chat.round('a', 'b', 'c')
  chat.train('a', steps=4)
  del chat.islands['a'], chat.position['a']
  chat.hub.vanished('a')
  orders = chat.join('a')
  assert orders.position == 10
  assert chat.hub.members['a'].is_new_P == [True]
  assert talk.same(chat.islands['a'].theta_P, chat.hub.shared.theta_P)


def test_an_update_that_got_lost_is_in_the_next_one(chat: talk.Talk) -> None:
  chat.train('a')
  chat.update('a')
  chat.join('a')
  chat.train('a', steps=2)
  for name in 'bc':
    chat.send(name)
  chat.hub.receive('a', chat.update('a'))
  assert chat.hub.tick()
  assert chat.hub.members['a'].tokens == 64 * 12


def test_another_configuration_is_turned_away_in_one_line(
  chat: talk.Talk,
) -> None:
  other = talk.Talk(talk.config(seed=1), chat.workdir.parent / 'other')
  other.join('x')
  chat.islands['x'] = other.islands['x']
  orders = chat.join('x')
  assert orders.kind == 'refuse'
  assert 'configuration' in orders.reason
  assert not chat.hub.members['x'].is_present


def test_what_is_an_islands_own_may_differ() -> None:
  config = talk.config()
  data = dataclasses.replace(config.data, path='mine', batch_size=64)
  own = dataclasses.replace(config, data=data)
  assert config_lib.fingerprint(own) == config_lib.fingerprint(config)


def test_other_shared_parameters_stop_the_run_and_are_named(
  chat: talk.Talk,
) -> None:
  chat.round('a', 'b', 'c')
  island = chat.islands['b']
  island._digests_P[0] = 'f' * 64
  with pytest.raises(hub_lib.StoppedError, match='fragment 0 of island b'):
    chat.send('b')


@pytest.fixture(scope='module')
def steady(tmp_path_factory: pytest.TempPathFactory) -> talk.Talk:
  found = talk.Talk(talk.config(), tmp_path_factory.mktemp('steady') / 'hub')
  for name in 'ab':
    found.join(name)
  return found


_VALUES = st.one_of(
  st.none(),
  st.integers(-2, 2**60),
  st.sampled_from([10**400, -(10**400), [['compute', 10**400, 1]]]),
  st.floats(),
  st.text(max_size=4),
  st.lists(st.integers(-1, 3) | st.text(max_size=3), max_size=3),
)
_FIELDS = (
  *('fragment', 'base', 'tokens', 'steps', 'first', 'last', 'step', 'clock'),
  *('spans', 'versions', 'digests', 'loss', 'speed', 'session', 'params'),
  *('number', 'rounds', 'firsts', 'sent', 'config'),
)


@hypothesis.settings(
  max_examples=60,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  st.sampled_from(['hello', 'update', 'alive', 'other']),
  st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=4),
  st.booleans(),
)
def test_nothing_an_island_says_stops_the_hub(
  steady: talk.Talk, kind: str, changes: dict, cut: bool
) -> None:
  hub = steady.hub
  if hub.members['a'].phase != 'asked' or not hub.members['a'].session:
    hub.members['a'].phase = 'new'
    steady.join('a')
  island = steady.islands['a']
  if kind == 'hello':
    said = island.hello(talk.SIGNS)
  elif kind == 'update':
    steady.train('a')
    said = steady.update('a')
  else:
    said = island.alive(talk.SIGNS)
  good = messages.decode(said, max_bytes=1 << 20)
  frame = messages.encode(
    messages.Message(kind, {**good.fields, **changes}, good.arrays)
  )
  if cut:
    frame = frame[: len(frame) // 2]
  rounds = hub.counts['rounds']
  # Digests that are not the hub's end the run by its rule.
  with contextlib.suppress(hub_lib.StoppedError):
    hub.receive('a', frame)
  hub.tick()
  assert hub.counts['rounds'] == rounds
  assert '\n' not in hub.members['a'].note
  hub.members['a'].phase = 'new'
  steady.join('a')


def test_a_round_of_newcomers_alone_waits_until_they_count(
  chat: talk.Talk,
) -> None:
  chat.round('a', 'b', 'c')
  for name in 'abc':
    chat.hub.vanished(name)
  chat.join('new')
  chat.send('new', steps=3)
  assert not chat.hub.tick()
  assert chat.hub.shared.versions_P == [chat.hub.slot] == [1]
  orders = chat.hear('new')
  assert (orders.kind, orders.steps) == ('go', 10)
  chat.send('new', steps=10)
  assert chat.hub.tick()
  assert chat.hub.shared.versions_P == [chat.hub.slot] == [2]
  assert chat.hub.members['new'].tokens == 10 * 64.0


def test_a_newcomer_whose_update_is_lost_is_still_new(chat: talk.Talk) -> None:
  chat.round('a', 'b', 'c')
  chat.join('new')
  chat.send('new', steps=3)
  chat.hub.vanished('new')
  assert chat.join('new').kind == 'go'
  chat.train('new', steps=2)
  chat.hub.receive('new', chat.update('new'))
  chat.round('a', 'b', 'c')
  assert chat.hub.members['new'].tokens == 0.0


def test_an_update_that_waits_outlives_the_link(chat: talk.Talk) -> None:
  for name in 'ab':
    chat.send(name)
  chat.now += 10
  assert chat.hub.tick()
  chat.send('c')
  # Late: it has its answer, and what it sent waits for the next round.
  chat.hear('c')
  chat.hub.vanished('c')
  chat.join('c')
  for name in 'ab':
    chat.hear(name)
  chat.round('a', 'b', 'c')
  assert chat.hub.members['c'].tokens == 2 * 640.0


def test_one_that_was_thought_to_be_dead_counts_once(chat: talk.Talk) -> None:
  first = chat.islands['c']
  chat.send('c')
  chat.hub.vanished('c')
  # Another process with the same key comes, and goes.
  del chat.islands['c']
  chat.join('c')
  chat.hub.vanished('c')
  chat.islands['c'], chat.position['c'] = first, 10
  chat.join('c')
  chat.train('c', steps=3)
  chat.hub.receive('c', chat.update('c'))
  chat.round('a', 'b')
  assert chat.hub.members['c'].tokens == 13 * 64.0


def test_work_that_was_thrown_away_is_not_counted(chat: talk.Talk) -> None:
  for name in 'ab':
    chat.send(name)
  chat.send('c', scale=float('nan'))
  chat.train('c', steps=6)
  assert chat.hub.tick()
  assert chat.hear('c').adopts_all
  assert chat.islands['c'].since_sent == 0
  for name in 'ab':
    chat.hear(name)
  chat.round('a', 'b', 'c', steps=4)
  assert chat.hub.members['c'].tokens == 4 * 64.0


def test_a_newcomer_that_loses_its_link_is_still_new(chat: talk.Talk) -> None:
  chat.round('a', 'b', 'c')
  chat.join('new')
  chat.train('new', steps=3)
  chat.hub.vanished('new')
  assert chat.join('new').kind == 'go'
  chat.round('a', 'b', 'c', 'new', steps=3)
  assert chat.hub.members['new'].tokens == 0.0


def test_a_checkpoint_of_the_hub_is_read_as_that_of_any_run(
  tmp_path: pathlib.Path,
) -> None:
  config = talk.config(
    model=dataclasses.replace(tiny.SMALL_VOCAB, num_layers=2),
    fragments=fragments.FragmentConfig(count=2),
  )
  chat = talk.Talk(config, tmp_path / 'hub')
  chat.join('a')
  chat.send('a', steps=10, scale=0.01)
  assert chat.hub.tick()
  run = trained_run.find(chat.workdir, name='--checkpoint')
  assert run.model == config.model
  assert run.load_tokenizer().fingerprint == run.tokenizer['fingerprint']
  params = run.restore_params(transformer.abstract_params(config.model))
  for shared, saved in zip(
    chat.hub.shared.theta_P, shared_model.cut(config, params), strict=True
  ):
    assert {name: x.tobytes() for name, x in shared.items()} == {
      name: x.tobytes() for name, x in saved.items()
    }


def test_a_tokenizer_that_each_island_would_train_is_refused() -> None:
  config = talk.config(
    data=pipeline.DataConfig(tokenizer='bpe:512', sequence_length=32)
  )
  with pytest.raises(ValueError, match='would be trained by each island on'):
    config.validate()


def test_one_that_was_refused_is_in_step_at_once(chat: talk.Talk) -> None:
  chat.hub.members['c'].speed = 2.0
  for name in 'ab':
    chat.send(name)
  chat.send('c', scale=float('nan'))
  assert chat.hub.tick()
  chat.now += 3
  # The others have made 6 steps since they sent, which it has to make again.
  assert chat.hear('a').steps == 10
  assert chat.hear('c').steps == 4


def test_one_that_is_late_is_back_in_step_after_its_next_update(
  chat: talk.Talk,
) -> None:
  for name in 'abc':
    chat.hub.members[name].speed = 2.0
  chat.round('a', 'b', 'c')
  for name in 'ab':
    chat.send(name)
  chat.now += 11.0
  assert chat.hub.tick()
  assert [chat.hear(name).steps for name in 'ab'] == [10, 10]
  # Three seconds after the others have begun, with two steps a second.
  chat.now += 3.0
  chat.send('c')
  chat.hub.members['c'].speed = 2.0
  assert chat.hear('c').steps == 10 - 6
  # Who only says that there is nothing yet is told the same again.
  chat.now += 1.0
  chat.hub.receive('c', chat.islands['c'].alive(talk.SIGNS))
  assert chat.hear('c').steps == 10 - 6
  chat.round('a', 'b', 'c')
  chat.send('c')
  assert chat.hub.members['c'].phase == 'sent'


def test_what_was_said_to_an_earlier_process_is_not_obeyed(
  chat: talk.Talk,
) -> None:
  chat.send('a')
  chat.send('b')
  chat.send('c')
  assert chat.hub.tick()
  frame = chat.hub.next_message('a')
  assert frame is not None
  # Killed and started again before it came.
  del chat.islands['a'], chat.position['a']
  params = shared_model.initial_params(chat.config)
  new = exchange_lib.Exchange(
    chat.config, shared_model.cut(chat.config, params)
  )
  orders = new.take(frame, position=0)
  assert (orders.kind, orders.parts) == ('greet', ())
  chat.hub.receive('a', new.hello(talk.SIGNS))
  frame = chat.hub.next_message('a')
  assert frame is not None
  orders = new.take(frame, position=0)
  assert (orders.kind, orders.position) == ('welcome', 10)


def test_one_that_lost_its_link_goes_on_with_what_it_has(
  chat: talk.Talk,
) -> None:
  chat.round('a', 'b', 'c')
  chat.train('c', steps=10)
  chat.hub.vanished('c')
  chat.round('a', 'b')
  # A hub that begins anew knows earlier versions as well.
  chat.restart()
  for name in 'abc':
    orders = chat.join(name)
    assert (orders.kind, orders.parts) == ('go', ())
  tokens = chat.hub.members['c'].tokens
  chat.send('c', steps=5)
  chat.send('a')
  chat.send('b')
  assert chat.hub.tick()
  assert chat.hub.members['c'].tokens == tokens + 15 * 64.0
  assert _verdicts(chat) == dict.fromkeys('abc', 'accepted')
