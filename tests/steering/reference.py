"""Every method again, one activation at a time, in plain NumPy and float64. Slow on purpose, and written to be read.

``w`` is an SAE as a dict of arrays: ``encoder.weight`` [n, d], ``encoder.bias`` [n], ``W_dec`` [n, d], ``b_dec`` [d].
"""

import numpy as np


def code(w, x, k, activation="relu"):
    """The sparse code of one activation ``[d]``: ``[n]``, at most k numbers that are not 0."""
    pre = w["encoder.weight"] @ (x - w["b_dec"]) + w["encoder.bias"]
    strength = np.abs(pre) if activation == "abs" else pre
    c = np.zeros_like(pre)
    for j in sorted(range(len(pre)), key=lambda j: -strength[j])[:k]:
        c[j] = pre[j] if activation == "abs" else max(0.0, pre[j])
    return c


def decode(w, c):
    """``D(c)``."""
    return w["b_dec"] + sum(c[j] * w["W_dec"][j] for j in range(len(c)) if c[j])


def vs2(w, x, k, gamma, lam, activation="relu"):
    """``v = D(γ c) - D(c)``, ``x̂ = (x + λ v) ‖x‖ / ‖x + λ v‖``."""
    c = code(w, x, k, activation)
    v = decode(w, gamma * c) - decode(w, c)
    moved = x + lam * v
    return moved * np.linalg.norm(x) / np.linalg.norm(moved)


def rec(w, x, k, activation="relu"):
    """``x̂ = D(c)``."""
    return decode(w, code(w, x, k, activation))


def amp(w, x, k, gamma, activation="relu"):
    """``x̂ = D(γ c)``."""
    return decode(w, gamma * code(w, x, k, activation))


def fvu(w, x, k, mean, activation="relu"):
    """``‖x - x̃‖² / ‖x - μ‖²``."""
    return np.sum((x - rec(w, x, k, activation)) ** 2) / np.sum((x - mean) ** 2)


def gated(w, x, k, mean, tau, steered, activation="relu"):
    """``steered`` where FVU is at most τ, else x."""
    return steered if fvu(w, x, k, mean, activation) <= tau else x
