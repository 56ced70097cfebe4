"""What other families say about the constants of a new one.

Three models do not identify five constants; families do agree on them, though,
once they are counted without units: as the shares of the loss that E, A/N^alpha
and B/D^beta have at the largest model seen, and the two exponents. The guide
borrows two constants of one family (its section 6); here a family's posterior
is one draw from a normal distribution over families (empirical Bayes, one step
of expectation-maximisation from a wide prior; Efron 2010, chapter 1).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

NAMES = ('log E share', 'log A share', 'log B share', 'log alpha', 'log beta')


@dataclasses.dataclass(frozen=True)
class Prior:
  """A normal distribution of six numbers.

  Attributes:
    mean: [6]: logarithms of the shares of E, A, B, of alpha and beta; gamma.
    covariance: [6, 6].
  """

  mean: np.ndarray
  covariance: np.ndarray


# Wide: a factor of 1.5 for E, of 3 for A and B, of 1.8 for exponents.
WIDE = Prior(
  np.array([*np.log([0.72, 0.12, 0.12, 0.35, 0.35]), 0.0]),
  np.diag(np.square([0.4, 1.2, 1.2, 0.6, 0.6, 0.05])),
)


def learn(
  posteriors: Mapping[str, tuple[np.ndarray, np.ndarray]],
  groups: Mapping[str, str],
  *,
  without: Sequence[str] = (),
) -> Prior:
  """Makes a prior of families' posteriors under the wide one.

  Families of one group (the same models, counted differently) have together
  the weight of one.

  Args:
    posteriors: Mean and covariance by family.
    groups: Group of each family.
    without: Groups to leave out, so that they can be judged.
  Raises:
    ValueError: If fewer than two families are left.
  """
  names = [name for name in posteriors if groups[name] not in without]
  if len(names) < 2:
    raise ValueError('A prior must be learned from two families or more.')
  sizes = {
    group: sum(groups[name] == group for name in names)
    for group in {groups[name] for name in names}
  }
  weight = np.array([1 / sizes[groups[name]] for name in names])
  weight /= weight.sum()
  means = np.stack([posteriors[name][0] for name in names])
  spreads = np.stack([posteriors[name][1] for name in names])
  mean = weight @ means
  apart = means - mean
  covariance = np.einsum(
    'f,fij->ij', weight, spreads + apart[:, :, None] * apart[:, None]
  )
  return Prior(mean, covariance)


# What `python -m benchmarks.scaling_accuracy --constants` printed.
_MEAN = (-0.30002, -2.25498, -2.36449, -1.07174, -1.02083, 0.00621)
_COVARIANCE = (
  (0.0395627, -0.113709, -0.113919, 0.0232155, 0.0423763, 0.0015036),
  (-0.113709, 0.860230, 0.166338, -0.229529, -0.0293719, -0.0028332),
  (-0.113919, 0.166338, 0.725079, -0.0040975, -0.275881, -0.0057260),
  (0.0232155, -0.229529, -0.0040975, 0.218624, 0.0151349, 0.00040168),
  (0.0423763, -0.0293719, -0.275881, 0.0151349, 0.175366, 0.00070086),
  (0.0015036, -0.0028332, -0.0057260, 0.00040168, 0.00070086, 0.0015909),
)


def published() -> Prior:
  """What the published families say together."""
  return Prior(np.array(_MEAN), np.array(_COVARIANCE))
