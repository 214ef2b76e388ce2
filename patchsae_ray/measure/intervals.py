"""95 % intervals in closed form, from sums that merge: nothing is drawn, so a thousand classes cost no time.

Images are a sample within each of c classes (strata). A mean's variance is that of a stratified sample (Cochran 1977,
Sampling Techniques, 5.3), with n - 1 in each class, and its interval Student's t. A share's interval is Wilson's (1927) with
t in place of z and the effective sample size share (1 - share) / variance (Dean and Pagano 2015, J. Survey Stat. Methodol. 3),
which stays within 0 and 1 and keeps its coverage near them. A change's, of a share on the same images, is Tango's (1998) score
interval in the same way, which keeps a width where no image changes. README.md beside this file has the formulas, and what was
found when they were tried on drawn data.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
_ADDED = 4
"""Images that change, of which a change's variance takes account besides those that were seen to."""
_HALVINGS = 50
"""Of the distance in which an interval's end is sought; what is left is rounding."""


@dataclass(frozen=True)
class Spread:
    """The variance of some means, and how well it is known. NaN where no class has two images: nothing is known of it."""

    variance: np.ndarray
    """[…]."""
    degrees: np.ndarray
    """[…] degrees of freedom of the variance."""


def class_variances(n: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """[…, c] variance of one image's value within its class; of a class with one image the mean of the others'.

    Args:
        n: [c] images, none of them 0.
        sums: […, c] of the images' values.
        squares: […, c] of their squares.
    """
    several = n > 1
    found = np.where(several, squares - sums**2 / n, 0.0).clip(min=0) / np.where(several, n - 1, 1)
    others = found.sum(axis=-1, keepdims=True) / several.sum() if several.any() else np.nan
    return np.where(several, found, others)


def spread_of_images(weights: np.ndarray, n: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> Spread:
    """That of the mean sum_c weights[c] sums[c] / n[c] over other images of the same classes.

    Args:
        weights: [c], 1 together.
        n: [c] images, none of them 0.
        sums: […, c] of the images' values.
        squares: […, c] of their squares.
    """
    variance = (weights**2 / n * class_variances(n, sums, squares)).sum(axis=-1)
    return Spread(variance, np.full(variance.shape, (n - 1).sum()))


def mean_interval(value: np.ndarray, spread: Spread) -> np.ndarray:
    """[…, 3] value, low and high of a mean: value ± t sqrt(variance)."""
    half = _t(spread.degrees) * np.sqrt(spread.variance)
    return np.stack([value, value - half, value + half], axis=-1)


def share_interval(share: np.ndarray, spread: Spread, images: float) -> np.ndarray:
    """[…, 3] value, low and high of a share, within 0 and 1.

    Args:
        share: […] from 0 to 1.
        spread: its.
        images: to how many images of equal weight the sample comes; that is the effective size where nothing varies within
            a class, so that 20 right ones of 20 do not make certain.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(spread.variance == 0, images, share * (1 - share) / spread.variance)
    term = _t(spread.degrees) ** 2 / effective
    centre = (share + term / 2) / (1 + term)
    half = np.sqrt(term * (share * (1 - share) + term / 4)) / (1 + term)
    return np.stack([share, np.minimum(centre - half, share), np.maximum(centre + half, share)], axis=-1)


def spread_of_changes(
    weights: np.ndarray, n: np.ndarray, gained: np.ndarray, lost: np.ndarray, squares: np.ndarray
) -> tuple[Spread, np.ndarray]:
    """That of a mean change over other images of the same classes, and the share of changing images that it has added.

    Where few images change, their variance says little of itself, and is 0 where none does. So both it and the share of
    images that change are taken with four more images of equal weight that change, two each way (as Agresti and Coull 1998,
    American Statistician 52, add two successes and two failures); each by as much as one that was seen to change.

    Args:
        weights: [c], 1 together.
        n: [c] images, none of them 0.
        gained: […, c] sum of how far each image is right only after the change, 0 to 1.
        lost: […, c] of how far only before it.
        squares: […, c] of the squares of the images' changes.
    """
    images, each = equal_weight_images(weights, n), weights / n
    squared, changing = squares @ each, (gained + lost) @ each
    by_one = np.divide(squared, changing, out=np.ones_like(changing), where=changing > 0)
    added = _ADDED * by_one / images
    spread = spread_of_images(weights, n, gained - lost, squares)
    return Spread(spread.variance + by_one * added / images, spread.degrees), added


def change_interval(gained: np.ndarray, lost: np.ndarray, spread: Spread, added: np.ndarray) -> np.ndarray:
    """[…, 3] value, low and high of gained - lost, what becomes of a share on the same images; within -1 and 1.

    Tango's (1998, Statistics in Medicine 17) score interval: the changes whose distance from gained - lost is within t standard
    errors, these taken as they would be if that were the true change. So it has a width where nothing was gained or lost: of m
    images, t² / (m + t²) to either side. In place of m is the effective sample size, the variance of one image over that of
    the mean, as in `share_interval`.

    Args:
        gained: […] share of the images that are right only after the change.
        lost: […] of those right only before it.
        spread: that of gained - lost, and
        added: […] what it has added, of `spread_of_changes`.
    """
    value = gained - lost
    effective = (gained + lost - value**2 + added) / spread.variance
    most = _t(spread.degrees) ** 2 / effective
    inside = np.stack([value, value])
    outside = np.stack([np.full_like(value, -1), np.full_like(value, 1)])
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        holds = (value - middle) ** 2 <= most * _variance_if(middle, gained, lost)
        inside, outside = np.where(holds, middle, inside), np.where(holds, outside, middle)
    return np.stack([value, *np.where(np.isnan(most), np.nan, inside)], axis=-1)


def _variance_if(change: np.ndarray, gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """[…] of one image, if `change` were the true one: the true share of lost ones is then its maximum-likelihood estimate.

    Given the change, that share is the larger root x of 2 x² + b x - lost change (1 - change) = 0 (Tango 1998).
    """
    b = (2 - gained + lost) * change - gained - lost
    truly_lost = (np.sqrt((b**2 + 8 * lost * change * (1 - change)).clip(min=0)) - b) / 4
    return (2 * truly_lost + change * (1 - change)).clip(min=0)


def equal_weight_images(weights: np.ndarray, n: np.ndarray) -> float:
    """Kish's (1965) size of a sample whose images count weights[c] / n[c] each: 1 over the sum of the squares of these."""
    return float(1 / (weights**2 / n).sum())


def _t(degrees: np.ndarray) -> np.ndarray:
    """Student's quantile of LEVEL; NaN without degrees of freedom."""
    return np.asarray(stdtrit(np.where(degrees > 0, degrees, np.nan), (1 + LEVEL) / 2))
