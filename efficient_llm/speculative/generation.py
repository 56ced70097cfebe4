"""What a generation is given midway, and what it gives back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from efficient_llm.models import sampling as sampling_lib
from efficient_llm.speculative import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class Refreshed:
  """What a drafter reads from now on; None goes on with the old.

  Attributes:
    draft_params: Of a draft model, which then reads all rows again.
    texts: For drafters that copy, as keywords of `ngram.draft`, always of the
      same shapes.
  """

  draft_params: Any | None = None
  texts: Any | None = None


# Called between stretches.
Refresh = Callable[[], Refreshed | None]
# Called with a row and its completion as soon as it has ended.
Finished = Callable[[int, np.ndarray], None]
# Asked between stretches whether to leave what is unfinished.
Stop = Callable[[], bool]


@dataclasses.dataclass
class Stats:
  """What a generation took.

  Attributes:
    num_tokens: New tokens.
    num_decoded: Those that did not come with the prompt.
    num_passes: Target passes, counted for every live row.
    secs: Of wall time, without compilation.
    compile_secs: Of compilation.
    prefill_secs: Part of `secs` that read prompts and drew first tokens.
    num_prompts_read: Fewer than the rows where these shared prompts.
    saved_secs: Estimated: what the tokens of speculative rounds would have
      taken at the speed that rounds without speculation had.
    rounds_by_shape: Rounds that each draft shape ran.
    rounds_by_size: Rounds of batches of each size, empty places included.
    num_programs: Compiled programs the engine holds.
  """

  num_tokens: int = 0
  num_decoded: int = 0
  num_passes: int = 0
  secs: float = 0.0
  compile_secs: float = 0.0
  prefill_secs: float = 0.0
  num_prompts_read: int = 0
  saved_secs: float = 0.0
  rounds_by_shape: dict[tree_lib.DraftShape, int] = dataclasses.field(
    default_factory=dict
  )
  rounds_by_size: dict[int, int] = dataclasses.field(default_factory=dict)
  num_programs: int = 0

  @property
  def acceptance_length(self) -> float:
    """New tokens per target pass and row; 1 without speculation.

    The first token of a row came with its prompt and does not count.
    """
    return self.num_decoded / max(1, self.num_passes)

  @property
  def tokens_per_sec(self) -> float:
    return self.num_tokens / max(1e-9, self.secs)


@dataclasses.dataclass(frozen=True)
class Generation:
  """Completions in the order of the prompts, and what they took.

  Attributes:
    completion: The tokens of this call, at their places: what was begun before
      is 0, as are rows that others completed.
    stats: What they took.
    ended_N: Rows that are complete.
  """

  completion: sampling_lib.Completion
  stats: Stats
  ended_N: np.ndarray
