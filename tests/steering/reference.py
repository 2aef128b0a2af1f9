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


# ---- with a gallery
#
# ``gallery`` holds one row per image: activations [d], codes [n] or embeddings [e], as the method needs. ``nearest`` is
# what ``neighbours`` gives: (row, similarity) pairs. ``labels`` are the labels of the gallery, by row.


def unit(v):
    """``v`` at norm 1."""
    return v / np.linalg.norm(v)


def neighbours(query, embeddings, n, left_out=()):
    """The n images of largest cosine, best first, as (row, similarity); those ``left_out`` are never among them."""
    found = []
    for row in range(len(embeddings)):
        if row not in left_out:
            found.append((row, float(unit(query) @ unit(embeddings[row]))))
    return sorted(found, key=lambda pair: -pair[1])[:n]


def zero_shot(embedding, classifier):
    """The class whose embedding (a column of ``classifier`` [e, classes]) is nearest, and the log of its odds against
    all others at CLIP's logit scale of 100: the order of the probabilities, without their rounding to 1."""
    logits = [100 * float(unit(embedding) @ unit(classifier[:, j])) for j in range(classifier.shape[1])]
    best = max(range(len(logits)), key=lambda j: logits[j])
    others = [logit for j, logit in enumerate(logits) if j != best]
    return best, logits[best] - max(others) - np.log(sum(np.exp(logit - max(others)) for logit in others))


def majority(nearest, labels):
    """The neighbours' most frequent label; of equally frequent ones that with the greater sum of similarities."""
    count, total = {}, {}
    for row, similarity in nearest:
        count[labels[row]] = count.get(labels[row], 0) + 1
        total[labels[row]] = total.get(labels[row], 0.0) + similarity
    return max(count, key=lambda label: (count[label], total[label]))


def split(nearest, labels, rule, query_class=None):
    """The rows of S⁺, the neighbours of the chosen label, and of S⁻, the others."""
    chosen = majority(nearest, labels) if rule == "majority" else query_class
    positive = [row for row, _ in nearest if labels[row] == chosen]
    return positive, [row for row, _ in nearest if labels[row] != chosen]


def mean_of(rows, vectors):
    """The mean of some vectors; of none, zero."""
    total = np.zeros_like(vectors[0])
    for row in rows:
        total = total + vectors[row]
    return total / max(1, len(rows))


def contrast_of_codes(w, codes, positive, negative, gamma):
    """``(γ - 1) W_decᵀ (mean of c over S⁺ - mean of c over S⁻)``."""
    difference = mean_of(positive, codes) - mean_of(negative, codes)
    return (gamma - 1) * sum(difference[j] * w["W_dec"][j] for j in range(len(difference)) if difference[j])


def contrast_of_directions(w, codes, positive, negative, gamma):
    """The mean of the VS2 directions ``D(γ c) - D(c)`` of S⁺, less that of S⁻."""
    directions = {row: decode(w, gamma * codes[row]) - decode(w, codes[row]) for row in (*positive, *negative)}
    nothing = np.zeros_like(w["b_dec"])
    toward = sum((directions[row] for row in positive), nothing) / max(1, len(positive))
    away = sum((directions[row] for row in negative), nothing) / max(1, len(negative))
    return toward - away


def vs2pp(w, x, codes, positive, negative, gamma, lam, form=contrast_of_codes):
    """``x̂ = (x + λ v̄) ‖x‖ / ‖x + λ v̄‖``, with ``v̄`` in either form."""
    moved = x + lam * form(w, codes, positive, negative, gamma)
    return moved * np.linalg.norm(x) / np.linalg.norm(moved)


def clipsteer(x, activations, positive, negative, gamma, lam):
    """``x + λ (γ - 1) (mean over S⁺ - mean over S⁻)`` of CLIP activations."""
    return x + lam * (gamma - 1) * (mean_of(positive, activations) - mean_of(negative, activations))


def rag(q, embeddings, nearest, mix, labels=None):
    """``mix q + (1 - mix) Σ w_j r_j``, of unit vectors and at the norm of q; w_j are the similarities, those below 0
    left out, normalised to sum 1. With labels, only the neighbours of the majority label take part."""
    chosen = None if labels is None else majority(nearest, labels)
    members = [(row, s) for row, s in nearest if s > 0 and (labels is None or labels[row] == chosen)]
    total = sum(similarity for _, similarity in members)
    if not members:
        return q
    retrieved = sum(similarity / total * unit(embeddings[row]) for row, similarity in members)
    return np.linalg.norm(q) * (mix * unit(q) + (1 - mix) * retrieved)


def knn(nearest, pseudo, classifier):
    """The embedding of the class that most neighbours are put into."""
    return unit(classifier[:, majority(nearest, pseudo)])


def prototype(label, codes, pseudo, confidence):
    """The mean code of the ten images that are put into a class with the highest confidence; None if there are none."""
    mine = [row for row in range(len(codes)) if pseudo[row] == label]
    best = sorted(mine, key=lambda row: -confidence[row])[:10]
    return mean_of(best, codes) if best else None


def proto(w, x, code_of_class, gamma, lam):
    """``x + λ (γ - 1) W_decᵀ c̄`` at the norm of x, with the prototype ``c̄`` of the true class; x without one."""
    if code_of_class is None:
        return x
    moved = x + lam * (gamma - 1) * sum(code_of_class[j] * w["W_dec"][j] for j in range(len(code_of_class)))
    return moved * np.linalg.norm(x) / np.linalg.norm(moved)
