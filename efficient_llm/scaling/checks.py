"""When not to believe a law, in plain words.

A fit always gives constants. Whether the data carry them is asked here: of the
rows before a fit, and of the law after it.
"""

import numpy as np

from efficient_llm.scaling import allocation, auto, data, fit, sweep

# Constants trade against each other from here on (Open-Athena's range for
# fits that are known to be sound is 10 to 1e3).
_MOST_CONDITION = 1e4
_FAR = 100.0
# An exponent with which a third of the size costs 60,000 times the part: from
# here to the bound all fit alike, and a search stops anywhere.
_RUN_OFF = 10.0
# What equal runs differ by: the median of published repeats.
_SEEDS = 0.002


def refusal(seen: data.Runs) -> str | None:
  """Why no law at all can be fitted, if so.

  Args:
    seen: Rows of one family.
  """
  if len(seen) < 3:
    return (
      f'{len(seen)} rows must be at least 3 for any law; add evaluations, '
      'several for each run.'
    )
  spread = seen.num_tokens.max() / seen.num_tokens.min()
  if len(seen.sizes) == 1 and spread < 2:
    return (
      'One size, whose tokens differ by less than a factor of 2, says nothing '
      'about other sizes or lengths; add checkpoints from earlier.'
    )
  return None


def warnings(
  seen: data.Runs,
  target: data.Runs,
  prediction: auto.Prediction,
  plain: fit.Fits,
) -> list[str]:
  """What a reader must know before using a prediction.

  Args:
    seen: Rows of one family.
    target: What was predicted.
    prediction: Of it.
    plain: The law of sizes and tokens without a prior, by squares, one entry.
  """
  found = []
  sizes = seen.sizes
  if len(sizes) == 1:
    found.append(
      'There is one size: how the loss falls with size is borrowed from other '
      'families. Train two more, each a third of the next.'
    )
  elif len(sizes) == 2:
    found.append(
      'There are two sizes, which cannot tell alpha from E: what is missing is '
      'borrowed from other families, and nothing could be tested. Train a '
      'third, smaller one.'
    )
  found += _of_law(plain.constants[0], seen, len(sizes))
  if plain.agreeing[0] < 2:
    found.append(
      'Only one start found the best fit without a prior: other constants may '
      'fit nearly as well.'
    )
  best = sweep.best_seen(seen)
  if prediction.loss.min() >= best * (1 - _SEEDS):
    found.append(
      f'The prediction is no better than the best loss already seen, '
      f'{best:.4f}: more tokens for what you have may be the better use.'
    )
  elif prediction.high.max() >= best:
    found.append(
      'The interval reaches the best loss already seen: the gain is not '
      'certain.'
    )
  times = target.num_params.max() / sizes[-1]
  if times > _FAR:
    found.append(
      f'The target is {times:.0f} times the largest model: published checks '
      'go to about 30 times.'
    )
  if prediction.is_repeated:
    found.append(
      'Data are repeated more than four times: tokens and parameters count at '
      'what Muennighoff et al. 2023 found them to be worth.'
    )
  return [*found, *_of_budgets(seen)]


def condition(constants: np.ndarray, seen: data.Runs) -> float:
  """Condition of the law's Jacobian in its logarithms, with unit columns.

  Args:
    constants: E, A, B, alpha, beta.
    seen: Rows.
  """
  e, a, b, alpha, beta = constants
  n, d = np.log(seen.num_params), np.log(seen.num_tokens)
  with np.errstate(all='ignore'):
    u = np.exp(np.log(a) - alpha * n)
    v = np.exp(np.log(b) - beta * d)
  columns = np.stack([np.full_like(n, e), u, v, alpha * n * u, beta * d * v])
  columns = np.nan_to_num(columns)
  length = np.linalg.norm(columns, axis=1, keepdims=True)
  if (length == 0).any():
    return np.inf
  return float(np.linalg.cond((columns / length).T))


def _of_law(
  constants: np.ndarray, seen: data.Runs, num_sizes: int
) -> list[str]:
  found = []
  e, a, b, alpha, beta = constants
  if e <= 1e-6 * seen.loss.min():
    found.append(
      'Without a prior the best E is 0: the data do not show a floor, and '
      'extrapolation without the prior falls too fast.'
    )
  bottom = 1.01 * fit.SMALLEST_EXPONENT
  for name, value, part in (('alpha', alpha, a), ('beta', beta, b)):
    if part <= 0:
      found.append(
        f'Without a prior the part of {name} is 0: the data do not say what '
        f'{"size" if name == "alpha" else "more tokens"} is good for.'
      )
    elif value >= _RUN_OFF or value <= bottom:
      found.append(
        f'Without a prior {name} runs off to its bound ({value:.3g}): rows do '
        'not spread enough to determine it.'
      )
  found_condition = condition(constants, seen)
  if num_sizes > 2 and _MOST_CONDITION < found_condition < np.inf:
    found.append(
      f'The fit is ill-conditioned ({found_condition:.1e}): constants trade '
      'against each other, so do not read meaning into single ones.'
    )
  return found


def _of_budgets(seen: data.Runs) -> list[str]:
  """Whether budgets that look like IsoFLOPs bracket their minima."""
  final = seen.where(seen.is_final)
  minima = allocation.isoflop_minima(
    final.flops, final.num_params, final.num_tokens, final.loss
  )
  if len(minima) < 2:
    return []
  outside = [one for one in minima if not one.brackets]
  if not outside:
    return []
  budgets = ', '.join(f'{one.flops:.1e}' for one in outside[:5])
  return [
    f'{len(outside)} of {len(minima)} budgets ({budgets}) do not bracket a '
    'minimum: train sizes on its other side before trusting their optimum.'
  ]
