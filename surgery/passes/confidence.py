"""Upper confidence limits of means over samples: what a promise says of samples that no one has seen.

The output error is that of held-out samples. Its promise is for samples that no one has seen, so what counts is an
upper confidence limit of 95 %: of the ratio of two sums over samples (squared error, squared output), by its standard
error in large samples (Cochran 1977, Sampling Techniques, section 2.11). Errors are skewed: most samples have little,
and a few that may not have been seen have much; the limit is corrected for that (Johnson 1978, Modified t Tests and
Confidence Intervals for Asymmetrical Populations). Of a metric the same holds where it is given as the score of each
sample: their differences are paired, and what counts is the limit of their mean. A metric that is one number is taken
as it is. Since the best of several trials is taken, each the best of several fits, and the luckiest look best, the
limits hold for all of them at once: each for 1 - 0.05 / their number (Dunn 1961, Multiple Comparisons Among Means).
"""

from __future__ import annotations

import math

from scipy import stats
from torch import Tensor

__all__ = ["TRIALS", "beyond"]

TRIALS = 8  # at most, of one search
_FITS = 4  # of a trial, of which the best on held-out samples is taken
_RISK = 0.05 / (TRIALS * _FITS)  # one-sided


def beyond(differences: Tensor) -> float:
    """Return by how much the upper confidence limit of a mean of samples (n,) is above it; 0 for one sample."""
    count = len(differences)
    if count == 1:
        return 0.0
    centred = differences - differences.mean()
    variance, third = float(centred.square().sum()) / (count - 1), float(centred.pow(3).mean())
    if not variance > 0:
        return 0.0 if variance == 0 else math.nan
    quantile = float(stats.t.ppf(1 - _RISK, count - 1))
    skewed = max(0.0, third) / (6 * variance * count) * (1 + 2 * quantile**2)
    return quantile * math.sqrt(variance / count) + skewed
