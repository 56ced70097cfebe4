"""The step of a run: answer, reward, update, and what belongs to it.

Over 300 lines: one class, in which all parts of a step meet.
"""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from efficient_llm import sharding, typing
from efficient_llm.tlt import (
  backlog,
  collection,
  finish,
  hosts,
  plain_decoding,
  problems,
  rewards,
  rollout,
  spot_trainer,
  update,
)
from efficient_llm.tlt import start as start_lib
from efficient_llm.tlt import state as state_lib
from efficient_llm.tlt.config import TltConfig


class Trainer(contextlib.AbstractContextManager):
  """The parts of a run of reinforcement learning, and its step.

  It is the loop's source of batches too, as what a checkpoint must know of
  problems, drafter data and bandits is here.
  """

  def __init__(self, config: TltConfig, start: start_lib.Start):
    """Starts reward workers and compiles the drafter's step.

    Args:
      config: The run.
      start: From `start.prepare`.
    """
    if config.rollout.is_partial and jax.process_count() > 1:
      raise ValueError(
        f'rollout.finish_share={config.rollout.finish_share} must be 1 where '
        'several processes run, as none knows what the others have complete.'
      )
    self._config, self._start = config, start
    self._tokenizer = start.target.load_tokenizer()
    eos, pad = self._tokenizer.eos_id, self._tokenizer.pad_id
    if eos is None:
      raise ValueError(
        'Answers end with the end-of-text token, which this tokenizer lacks; '
        'use another --config.checkpoint.'
      )
    self._next_step = 0
    self._backlog = backlog.Backlog(
      group_size=config.rollout.group_size,
      num_tokens=config.rollout.sampling.max_new_tokens,
      defers=config.rollout.unfinished == 'wait',
    )
    self.problems = problems.Source(
      start.task,
      self._tokenizer,
      group_size=config.rollout.group_size,
      num_examples=config.num_examples,
      max_prompt_tokens=config.max_prompt_tokens,
    )
    self._mesh = sharding.make_mesh(config.mesh)
    self._hosts = hosts.Hosts(
      self._mesh, timeout_secs=config.process_timeout_secs
    )
    self._devices = list(self._mesh.local_devices)
    make_workers = functools.partial(
      rollout.Workers,
      model=start.target.model,
      stop_tokens=(eos,),
      devices=self._devices,
    )
    self.workers = make_workers(config.rollout)
    self._plain: rollout.Workers | None = None
    if config.plain_every:
      self._plain = make_workers(
        dataclasses.replace(config.rollout, speculation='off')
      )
    self._updater = update.Updater(
      config.update,
      start.target.model,
      self._mesh,
      sampling=config.rollout.sampling,
      num_answers=config.rollout.num_prompts * config.rollout.group_size,
      num_steps=config.loop.num_steps,
      pad_id=pad or 0,
    )
    self.spot: spot_trainer.SpotTrainer | None = None
    if config.needs_model:
      self.spot = spot_trainer.SpotTrainer(
        config.drafter,
        start.target.model,
        sequence_length=config.update.sequence_length,
        pad_id=pad or 0,
        seed=config.seed,
      )
    self._reference = None
    self._compared: dict[str, float] = {}
    # A process that cannot start its workers must not leave the others waiting.
    self._hosts.on_all(self._start_rewards)

  def _start_rewards(self) -> None:
    reward = self._config.reward
    if reward.function is None:
      reward = dataclasses.replace(reward, function=self._start.task.reward)
    self._rewards = rewards.RewardPool(reward)

  def __exit__(self, *error: object) -> None:
    self._rewards.close()

  def init_state(self) -> state_lib.TltState:
    """The state before the first step."""
    key = jax.random.key(self._config.seed)
    policy = self._updater.init_state(self._start_params(), key)
    drafter = None
    if self.spot is not None:
      assert self._start.drafter_params is not None
      drafter = self.spot.init_state(self._start.drafter_params)
    # A copy, as the update uses the policy's buffers again.
    return state_lib.TltState.of(jnp.copy(policy.step), policy, drafter)

  @property
  def abstract_state(self) -> state_lib.TltState:
    policy = self._updater.abstract_state
    drafter = None
    if self.spot is not None:
      drafter = jax.eval_shape(self.spot.init_state, self._start.drafter_params)
    return state_lib.TltState.of(policy.step, policy, drafter)

  def __next__(self) -> Mapping[str, Any]:
    self._next_step += 1
    return {'step': self._next_step - 1}

  def get_state(self) -> dict[str, Any]:
    """Where problems, drafter data and bandits stand, as JSON can hold it."""
    bandits = self._hosts.on_all(self.workers.get_state)
    return {
      'next_step': self._next_step,
      'next_example': self._backlog.next_problem,
      'backlog': self._backlog.get_state(),
      'bandits': [bandit for found in bandits for bandit in found],
      'drafter': None if self.spot is None else self.spot.get_state(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back there; bandits of another configuration begin anew."""
    self._next_step = state['next_step']
    self._backlog.set_state(state['backlog'])
    first = jax.process_index() * len(self._devices)
    try:
      self.workers.set_state(state['bandits'][first:])
    except ValueError as error:
      logging.warning('%s', error)
    if self.spot is not None and state['drafter'] is not None:
      self.spot.set_state(state['drafter'])

  def step(
    self, state: state_lib.TltState, batch: Mapping[str, Any]
  ) -> tuple[state_lib.TltState, dict[str, Any]]:
    """One step of the run; gives the new state and metrics."""
    config, step = self._config, batch['step']
    if self.spot is not None:
      self._begin_drafter(state)
    collected = collection.collect(
      functools.partial(self._round, state, step),
      num_wanted=config.rollout.num_prompts,
      max_rounds=config.rollout.max_rounds,
    )
    answered = collected.answered.outcome
    if self.spot is not None:
      prompts = collected.answered.prompts
      self._hosts.share_answers(self.spot.data, prompts, answered)
    start = time.perf_counter()
    policy, found = self._updater.update(
      state.policy,
      collected.rollouts(step=step),
      reference_params=self._reference_params(),
    )
    jax.block_until_ready(policy.params)
    update_secs = time.perf_counter() - start
    drafter, separate_secs = None, 0.0
    if self.spot is not None:
      start = time.perf_counter()
      effort = self._finish_drafter(self.spot, policy.params)
      answered = dataclasses.replace(answered, training=effort)
      if config.drafter.mode == 'separate':
        separate_secs = time.perf_counter() - start
      drafter = self.spot.state
    self.last_outcome = answered
    metrics = self._compared | finish.step_metrics(
      answered,
      collected.answered.scores,
      found | collected.metrics(found['used'], step=step),
      spot=self.spot,
      update_secs=update_secs,
      separate_secs=separate_secs,
    )
    metrics |= self._backlog.metrics()
    if 'plain_rollout_secs' in metrics:
      # All else takes as long without speculation.
      metrics['plain_step_secs'] = (
        metrics['plain_rollout_secs']
        + metrics['reward_secs']
        + metrics['update_secs']
      )
    finish.show(step + 1, metrics)
    return state.after(policy, drafter), metrics

  def _round(
    self, state: state_lib.TltState, step: int, num_wanted: int
  ) -> collection.Answered:
    """Answers until so many problems are complete, and keeps the others."""
    config = self._config.rollout
    answers = self._backlog.fill(
      config.num_in_flight(num_wanted), num_wanted=num_wanted, step=step
    )
    prompts = self.problems.training(answers.groups)
    plainly = functools.partial(
      self._answer_plainly, state, prompts, answers.coins_NC
    )
    every = self._config.plain_every
    is_measured = every > 0 and (step + 1) % every == 0
    is_first = is_measured and step // every % 2 == 1
    plain = plainly() if is_first else None
    answered = self._answer(
      state,
      prompts,
      answers.coins_NC,
      trainer=self.spot,
      begun=answers,
      num_whole=num_wanted if config.is_partial else None,
    )
    if is_measured and not is_first:
      plain = plainly()
    self._compared = (
      {} if plain is None else plain_decoding.compared(plain, answered)
    )
    answers = answered.continued(answers, step=step)
    used_N = self._backlog.use(answers, most_groups=num_wanted)
    prompts, answered = prompts.take(used_N), answered.take(used_N)
    scores = self._score(prompts, answered)
    return collection.Answered(
      prompts, answered, scores, answers.drawn_NT[used_N]
    )

  def answer(
    self, state: state_lib.TltState, prompts: problems.Prompts, step: int
  ) -> rollout.Outcome:
    """Answers problems with the coins of a step."""
    if self.spot is not None:
      self._begin_drafter(state)
    coins_NC = backlog.coins(step, len(prompts.texts))
    return self._answer(state, prompts, coins_NC, trainer=self.spot)

  def evaluate(self, state: state_lib.TltState) -> dict[str, float]:
    """The mean reward of one answer to each of some held-out problems."""
    prompts = self.problems.validation(self._config.eval_problems)
    if self.spot is not None and not self.spot.is_ready:
      self._begin_drafter(state)
    # No step has this number.
    coins_NC = backlog.coins(2**31, len(prompts.texts))
    answered = self._answer(state, prompts, coins_NC, trainer=None)
    scores = self._score(prompts, answered)
    return {
      'reward': finish.mean_reward(scores),
      'unparsable': float(scores.unparsable_N.mean()),
    }

  def _answer_plainly(
    self,
    state: state_lib.TltState,
    prompts: problems.Prompts,
    coins_NC: np.ndarray,
  ) -> rollout.Outcome:
    """The same answers without speculation."""
    return self._answer(
      state, prompts, coins_NC, trainer=None, workers=self._plain
    )

  def _answer(
    self,
    state: state_lib.TltState,
    prompts: problems.Prompts,
    coins_NC: np.ndarray,
    *,
    trainer: spot_trainer.SpotTrainer | None,
    workers: rollout.Workers | None = None,
    **partial: Any,
  ) -> rollout.Outcome:
    params = self._hosts.whole(state.params)
    spot = self.spot if workers is None else None

    def run(rows: np.ndarray, ended: threading.Event) -> rollout.Outcome:
      return (workers or self.workers).run(
        params,
        prompts.tokens_NP,
        prompts.lengths_N,
        prompts.groups_N,
        backlog.keys(self._config.seed, coins_NC),
        draft_params=None if spot is None else spot.published()[1],
        use_model=spot is None or spot.is_healthy,
        trainer=trainer,
        rows=rows,
        ended=ended,
        **partial,
      )

    return self._hosts.answer(run, prompts.groups_N)

  def _score(
    self, prompts: problems.Prompts, answered: rollout.Outcome
  ) -> rewards.Scores:
    def score(rows: np.ndarray) -> rewards.Scores:
      completions = [
        answered.tokens_NT[n, : answered.lengths_N[n]].tolist() for n in rows
      ]
      return self._rewards.score(
        [prompts.texts[n] for n in rows],
        [self._tokenizer.decode(tokens) for tokens in completions],
        {'answer': [prompts.answers[n] for n in rows]},
      )

    return self._hosts.score(score, prompts.groups_N)

  def _begin_drafter(self, state: state_lib.TltState) -> None:
    """Hands the state's drafter over where a run begins or goes on."""
    spot, params = self.spot, self._hosts.whole(state.params)

    def begin() -> None:
      assert spot is not None
      assert state.drafter is not None
      if not spot.is_ready:
        spot.restore(state.drafter)
        for device in self._devices:
          spot.compile(params, device)
      spot.begin(params)

    # In all before the clock runs in any, as it compiles.
    self._hosts.on_all(begin)

  def _finish_drafter(
    self, spot: spot_trainer.SpotTrainer, params: typing.Params
  ) -> spot_trainer.Effort:
    """Trains it apart where it is not trained in idle time."""
    if self._config.drafter.mode == 'separate':
      params = self._hosts.whole(params)
    return self._hosts.finish_drafter(
      spot, lambda: spot.train_separately(params, self._devices[0])
    )

  def _start_params(self) -> typing.Params:
    return self._start.target.restore_params(
      self._updater.abstract_state.params
    )

  def _reference_params(self) -> typing.Params | None:
    if not self._config.update.policy.kl_weight:
      return None
    if self._reference is None:
      self._reference = self._start_params()
    return self._reference
