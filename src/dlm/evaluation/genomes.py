"""Whether generated DNA looks like a genome, without labels: k-mer spectra, the rhythm of codons, and lengths of reading frames.

Bases are numbers in the order A, C, G, T. Shapes: R rows, T positions.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import jensenshannon

from dlm.evaluation.counts import grams

BASES = 4
STOPS = (3 * 16 + 0 * 4 + 0, 3 * 16 + 0 * 4 + 2, 3 * 16 + 2 * 4 + 0)  # TAA, TAG, TGA as `grams` numbers them


def spectrum(rows_RT: np.ndarray, k: int) -> np.ndarray:
    """The share of every k-mer within rows, float64 (4^k,)."""
    codes = np.concatenate([grams(row, k, BASES) for row in rows_RT])
    return np.asarray(np.bincount(codes, minlength=BASES**k) / len(codes))


def divergence(a_RT: np.ndarray, b_RT: np.ndarray, k: int) -> float:
    """Jensen-Shannon divergence of their k-mer spectra in bits, from 0 to 1. It is above 0 for two samples of one source, the more so the
    smaller they are: compare samples of one size."""
    return float(jensenshannon(spectrum(a_RT, k), spectrum(b_RT, k), base=2) ** 2)


def powers(rows_RT: np.ndarray) -> np.ndarray:
    """Power at every frequency i / T, summed over the four bases and divided by its mean, float64 (R, T // 2); the first is 1 / T."""
    power_RF = np.sum([np.abs(np.fft.rfft(rows_RT == base)) ** 2 for base in range(BASES)], 0)[:, 1:]
    return np.asarray(power_RF / power_RF.mean(1, keepdims=True))


def rhythm(rows_RT: np.ndarray) -> np.ndarray:
    """Power at period 3 over the mean power, float64 (R,): about 1 without codons. Rows are cut to a multiple of 3."""
    length = rows_RT.shape[1] // 3 * 3
    return powers(rows_RT[:, :length])[:, length // 3 - 1]


def frame_lengths(row_T: np.ndarray) -> np.ndarray:
    """Codons from stop to stop, without the stops, in the three frames of this strand; stretches that the ends of the row cut count too,
    with the codons that are there."""
    stops = np.isin(grams(row_T, 3, BASES), STOPS)
    found = []
    for frame in range(3):
        at = np.flatnonzero(stops[frame::3])
        found.append(np.diff(np.concatenate([[-1], at, [len(stops[frame::3])]])) - 1)
    return np.concatenate(found)
