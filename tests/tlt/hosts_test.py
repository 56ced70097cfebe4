"""What processes deal out among them, and how it is put together again."""

from typing import Any

import numpy as np

from efficient_llm.tlt import hosts, rewards, rollout, spot_trainer


def test_whole_groups_are_dealt_out() -> None:
  groups_N = np.repeat(np.arange(3), 2)
  assert [x.tolist() for x in hosts.deal(groups_N, 2)] == [[0, 1, 4, 5], [2, 3]]
  assert [x.tolist() for x in hosts.deal(groups_N, 4)][2:] == [[4, 5], []]


def _outcome(lengths: list[int], **values: Any) -> rollout.Outcome:
  lengths_N = np.asarray(lengths)
  return rollout.Outcome(
    tokens_NT=np.repeat(lengths_N[:, None], 2, 1),
    lengths_N=lengths_N,
    log_probs_NT=-np.repeat(lengths_N[:, None], 2, 1).astype(np.float32),
    ended_N=lengths_N > 10,
    num_tokens=sum(lengths),
    num_passes=3,
    num_decoded=5,
    rounds_by_shape={'off': 2},
    rounds_by_size={1: 2},
    saved_secs=0.5,
    **values,
  )


def test_merged_seconds_are_those_of_the_slowest() -> None:
  effort = spot_trainer.Effort
  merged = hosts.merge_outcomes(
    [
      _outcome(
        [10, 12],
        secs=4.0,
        worker_secs=(1.0,),
        compile_secs=1.0,
        training=effort(7, 2.0, 0.5, 2),
      ),
      _outcome(
        [11],
        secs=3.0,
        worker_secs=(2.5,),
        compile_secs=2.0,
        training=effort(3, 1.0, 0.9, 1),
      ),
    ],
    [np.asarray([0, 2]), np.asarray([1])],
  )
  assert merged.lengths_N.tolist() == [10, 11, 12]
  assert merged.tokens_NT[:, 0].tolist() == [10, 11, 12]
  assert merged.log_probs_NT[:, 1].tolist() == [-10, -11, -12]
  assert merged.ended_N.tolist() == [False, True, True]
  assert merged.num_tokens == 33
  assert (merged.secs, merged.compile_secs) == (3.0, 2.0)
  # The first ended a second before the second had compiled.
  assert merged.worker_secs == (0.0, 2.5)
  assert merged.idle_secs == 3.5
  assert (merged.num_passes, merged.num_decoded) == (6, 10)
  assert (merged.rounds_by_shape, merged.rounds_by_size) == ({'off': 4}, {1: 4})
  assert merged.training == effort(10, 3.0, 0.5, 3)


def test_merged_rewards_are_in_the_order_of_the_rows() -> None:
  def scores(values: list[float], secs: float) -> rewards.Scores:
    found = np.asarray(values)
    return rewards.Scores(found, found > 1, found > 2, (f'{secs}',), secs)

  merged = hosts.merge_scores(
    [scores([1, 3], 0.5), scores([2], 0.25)],
    [np.asarray([0, 2]), np.asarray([1])],
  )
  assert merged.rewards_N.tolist() == [1, 2, 3]
  assert merged.unparsable_N.tolist() == [False, True, True]
  assert merged.failed_N.tolist() == [False, False, True]
  assert merged.failures == ('0.5', '0.25')
  assert merged.secs == 0.5


def test_one_process_alone_has_ended_with_its_own_answers() -> None:
  ended = hosts.AllEnded(timeout_secs=60.0)
  assert not ended.is_set()
  ended.set()
  assert ended.wait(10.0)
