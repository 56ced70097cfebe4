"""Pictures of a law: in the report as drawings, in the folder as PNG.

Over 300 lines: one function for each picture.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import axes as mpl_axes
from matplotlib import figure as mpl_figure
from matplotlib import ticker

from efficient_llm.scaling import allocation, auto, data, fit, sweep
from efficient_llm.training import chart, sections

_COLOURS = ('#0b66b0', '#c2480a', '#00805c', '#a8457f', '#7a6200', '#5b51b8')
_MOST_SIZES = 6
_MOST_POINTS = 1000


@dataclasses.dataclass(frozen=True)
class Picture:
  """A drawing that a page shows and a folder keeps.

  Attributes:
    title: Heading.
    name: Of the file, without its ending.
    paint: Draws on axes, in the given colours.
    alt: What it shows, for those who cannot see it.
    note: A sentence below.
  """

  title: str
  name: str
  paint: Callable[[mpl_axes.Axes, Sequence[str]], None]
  alt: str
  note: str = ''

  def render(self) -> str:
    """Returns the section as an HTML fragment."""
    drawing = chart.draw(
      lambda axes: self.paint(axes, chart.SERIES), alt=self.alt
    )
    note = f'<p class="note">{sections.escape(self.note)}</p>'
    return sections.frame(self.title, drawing + note, kind='chart')

  def save(self, folder: pathlib.Path) -> pathlib.Path:
    """Writes a PNG; gives its path.

    Args:
      folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({'text.parse_math': False}):
      figure = mpl_figure.Figure(figsize=(6.2, 3.8), layout='constrained')
      axes = figure.add_subplot()
      self.paint(axes, _COLOURS)
      axes.set_title(self.title)
      path = folder / f'{self.name}.png'
      figure.savefig(path, dpi=150)
    return path


def loss_by_compute(
  seen: data.Runs, target: data.Runs, prediction: auto.Prediction
) -> Picture:
  """Rows seen, and the target with its interval, over compute.

  Args:
    seen: Rows.
    target: What was predicted.
    prediction: Of it.
  """
  count = len(seen)
  seen = _fewer(seen)

  def paint(axes: mpl_axes.Axes, colours: Sequence[str]) -> None:
    sizes = seen.sizes
    shown = sizes[
      np.linspace(0, len(sizes) - 1, min(len(sizes), 40)).astype(int)
    ]
    for size in shown:
      mine = seen.where(seen.num_params == size)
      order = np.argsort(mine.flops)
      axes.plot(
        mine.flops[order],
        mine.loss[order],
        '.',
        color=colours[0],
        markersize=3,
        alpha=0.6,
      )
    order = np.argsort(target.flops)
    flops = target.flops[order]
    low, high = prediction.low[order], prediction.high[order]
    middle = prediction.loss[order]
    if len(flops) > 1:
      axes.fill_between(flops, low, high, color=colours[1], alpha=0.25)
      axes.plot(flops, middle, color=colours[1])
    else:
      axes.errorbar(
        flops,
        middle,
        yerr=[middle - low, high - middle],
        fmt='o',
        color=colours[1],
        capsize=4,
      )
    if np.isfinite(target.loss).all():
      axes.plot(flops, target.loss[order], 'x', color=colours[2], markersize=4)
    _log_x(axes)
    axes.set_xlabel('training FLOPs')
    axes.set_ylabel('nats per token')

  last = int(np.argmax(target.flops))
  return Picture(
    'Loss over compute',
    'loss_by_compute',
    paint,
    f'Loss of {count} rows over compute; predicted '
    f'{prediction.loss[last]:.3f}, from {prediction.low[last]:.3f} to '
    f'{prediction.high[last]:.3f}, at {target.flops[last]:.2g} FLOPs.',
    f'The band holds {prediction.level:.0%} of such targets; crosses are what '
    'was measured, where it was.',
  )


def heat_map(errors: sweep.HeatMap, *, title: str) -> Picture:
  """ARE over numbers of models and shares of their training.

  Args:
    errors: The map.
    title: Heading.
  """

  def paint(axes: mpl_axes.Axes, colours: Sequence[str]) -> None:
    del colours
    shape = errors.errors.shape
    axes.imshow(
      np.log10(np.clip(errors.errors, 0.1, 100)),
      aspect='auto',
      cmap='RdYlGn_r',
      vmin=-0.5,
      vmax=1.5,
      origin='lower',
    )
    for i in range(shape[0]):
      for j in range(shape[1]):
        if np.isfinite(value := errors.errors[i, j]):
          text = f'{value:.1f}' if value < 100 else '>99'
          axes.text(j, i, text, ha='center', va='center', fontsize=8)
    axes.set_xticks(range(shape[1]), [f'{p:.0%}' for p in errors.shares])
    axes.set_yticks(range(shape[0]), [str(k) for k in errors.num_models])
    axes.set_xlabel('share of the training that is fitted')
    axes.set_ylabel('models')

  finite = errors.errors[np.isfinite(errors.errors)]
  return Picture(
    title,
    'heat_map',
    paint,
    f'Absolute relative error by models and share of training; median '
    f'{np.median(finite):.2f} %.'
    if len(finite)
    else 'No square has a law.',
    'Percent, on the end of the largest model, which was held out; white '
    'squares have too few rows. 4 % is what the guide takes for good.',
  )


def isoflops(seen: data.Runs) -> Picture | None:
  """Parabolas over budgets, if there are budgets.

  Args:
    seen: Rows.
  """
  final = seen.where(seen.is_final)
  minima = allocation.isoflop_minima(
    final.flops, final.num_params, final.num_tokens, final.loss
  )
  if not minima:
    return None

  def paint(axes: mpl_axes.Axes, colours: Sequence[str]) -> None:
    step = -(-len(minima) // _MOST_SIZES)
    for i, one in enumerate(minima[::step]):
      colour = colours[i % len(colours)]
      mine = final.where(np.abs(np.log(final.flops / one.flops)) < 0.02)
      axes.plot(mine.num_params, mine.loss, '.', color=colour)
      if not np.isfinite(one.num_params):
        continue
      x = np.linspace(*np.log([mine.num_params.min(), mine.num_params.max()]))
      bent = one.curvature * (x - np.log(one.num_params)) ** 2
      axes.plot(np.exp(x), one.loss + bent, color=colour)
      marker = 'o' if one.brackets else 'x'
      axes.plot(one.num_params, one.loss, marker, color=colour)
    _log_x(axes)
    axes.set_xlabel('parameters')
    axes.set_ylabel('nats per token')

  inside = sum(one.brackets for one in minima)
  return Picture(
    'IsoFLOP parabolas',
    'isoflops',
    paint,
    f'{len(minima)} budgets, {inside} of which bracket a minimum.',
    'Circles are minima between sizes that were trained, crosses guesses.',
  )


def residuals(seen: data.Runs, constants: np.ndarray) -> Picture:
  """What the law leaves, over tokens.

  Args:
    seen: Rows.
    constants: E, A, B, alpha, beta.
  """
  seen = _fewer(seen)
  predicted = fit.predict(constants, seen.num_params, seen.num_tokens)
  left = 100 * (seen.loss / predicted - 1)

  def paint(axes: mpl_axes.Axes, colours: Sequence[str]) -> None:
    parts = np.array_split(seen.sizes, min(_MOST_SIZES, len(seen.sizes)))
    for i, part in enumerate(parts):
      mine = np.isin(seen.num_params, part)
      axes.plot(
        seen.num_tokens[mine],
        left[mine],
        '.',
        color=colours[i],
        markersize=3,
        label=f'{part[0]:.2g} to {part[-1]:.2g} parameters',
      )
    axes.axhline(0, linewidth=0.8, color=colours[0])
    _log_x(axes)
    low, high = np.clip(1.5 * np.percentile(left, [1, 99]), -20, 20)
    axes.set_ylim(low - 1, high + 1)
    axes.set_xlabel('tokens')
    axes.set_ylabel('loss above the law, %')
    axes.legend(fontsize=7)

  middle = float(np.median(np.abs(left)))
  return Picture(
    'Residuals',
    'residuals',
    paint,
    f'What the law leaves of the loss, in percent, over tokens; median '
    f'{middle:.2f}.',
    'A slope or a bend that sizes share is what this law cannot say.',
  )


def exponents(constants: np.ndarray) -> Picture:
  """Draws alpha and beta of bootstrapped fits.

  Args:
    constants: [R, 5] of resampled runs.
  """
  alpha, beta = constants[:, 3], constants[:, 4]

  def paint(axes: mpl_axes.Axes, colours: Sequence[str]) -> None:
    axes.plot(alpha, beta, '.', color=colours[0], markersize=3, alpha=0.6)
    axes.set_xlim(0, min(2.0, 1.1 * np.percentile(alpha, 98)))
    axes.set_ylim(0, min(2.0, 1.1 * np.percentile(beta, 98)))
    axes.set_xlabel('alpha')
    axes.set_ylabel('beta')

  low, high = np.percentile(constants[:, 3:], [5, 95], axis=0)
  return Picture(
    'Exponents by bootstrap',
    'exponents',
    paint,
    f'{len(alpha)} fits to resampled runs: alpha from {low[0]:.2f} to '
    f'{high[0]:.2f}, beta from {low[1]:.2f} to {high[1]:.2f}.',
    'By squares, without a prior: a wide cloud says that these data alone do '
    'not determine the exponents.',
  )


def bootstrap(seen: data.Runs, *, num_samples: int, seed: int = 0) -> fit.Fits:
  """Fits resampled runs, all in one program.

  Runs are drawn, not rows: checkpoints of a run share its luck.

  Args:
    seen: Rows.
    num_samples: How often.
    seed: Of the draws.
  """
  rng = np.random.default_rng(seed)
  keys = [f'{r}|{n}' for r, n in zip(seen.run, seen.num_params, strict=True)]
  names, place = np.unique(keys, return_inverse=True)
  problems: list[Any] = []
  for _ in range(num_samples):
    drawn = rng.multinomial(len(names), [1 / len(names)] * len(names))
    weight = drawn[place].astype(float)
    problems.append(sweep.problem_of(seen, weight))
  return fit.solve(problems)


def _log_x(axes: mpl_axes.Axes) -> None:
  """Makes x logarithmic, its ticks plain text as all of a report is."""
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(
    ticker.FuncFormatter(
      lambda value, _: f'{value:.0e}'.replace('e+0', 'e+').replace('e+', 'e')
    )
  )
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _fewer(seen: data.Runs) -> data.Runs:
  """Rows at even distances, as thousands of dots make a page heavy."""
  return seen.where(np.arange(0, len(seen), -(-len(seen) // _MOST_POINTS)))
