"""Step 3 of duplicates.py for all pairs, as defined: every shift of every image against every other image."""

import numpy as np

from mgcc_dist.data.duplicates import INNER, SHIFT, SIDE, THRESHOLD


def correlation_matrix(first, second):
    """The correlation of each thumbnail of `first` [N,48,48] with each of `second` [M,48,48], over both directions."""
    return np.maximum(_one_direction(first, second), _one_direction(second, first).T)


def all_similar_pairs(thumbnails):
    """All (i, j, correlation) with i < j and a correlation above the threshold."""
    matrix = correlation_matrix(np.stack(thumbnails), np.stack(thumbnails))
    return [(i, j, float(matrix[i, j])) for i, j in np.argwhere(np.triu(matrix, 1) > THRESHOLD).tolist()]


def components(keys, pairs):
    """The group of each key: its connected component, named after the first key."""
    joined = {key: {key} for key in keys}
    for i, j, _ in pairs:
        both = joined[keys[i]] | joined[keys[j]]
        joined |= dict.fromkeys(both, both)
    return {key: min(group) for key, group in joined.items()}


def _one_direction(first, second):
    centre = _unit_rows(first[:, SHIFT:-SHIFT, SHIFT:-SHIFT])
    best = np.full((len(first), len(second)), -1.0)
    for y in range(SIDE - INNER + 1):
        for x in range(SIDE - INNER + 1):
            np.maximum(best, centre @ _unit_rows(second[:, y : y + INNER, x : x + INNER]).T, out=best)
    return best


def _unit_rows(windows):
    rows = windows.reshape(len(windows), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
