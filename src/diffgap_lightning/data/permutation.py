"""A random order of any length without storing it: a keyed permutation of 0..n-1, computed where it is asked for.

A Feistel network over the pairs (l, r) of a x b numbers just above n: each round adds a hash of one half to the other,
which the same hash could take away again, so whatever the hash is, the whole is a bijection (Luby and Rackoff 1988; for
lengths that are no power of two, Black and Rogaway 2002). The few numbers of a x b that are not below n are
permuted again until they are ("cycle walking").

So the position in an epoch is all the state a shuffled stream has: any worker or rank computes any part of the order,
and a billion pairs need no memory.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 6


def permuted(positions: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """The elements at some positions of a random permutation of `0..size-1`.

    Args:
        positions: `(N,)` integers in `[0, size)`.
        size: Length of the permutation.
        key: Chooses the permutation, e.g. `(seed, epoch)`.

    Returns:
        `(N,)` int64, distinct where the positions are.

    Example:
        >>> sorted(permuted(np.arange(5), 5, key=(0, 0)).tolist())
        [0, 1, 2, 3, 4]
    """
    a = max(1, math.isqrt(size - 1) + 1)
    b = -(-size // a)
    round_keys = np.random.SeedSequence([k & 0xFFFFFFFFFFFFFFFF for k in key]).generate_state(ROUNDS, np.uint64)
    result = _network(positions.astype(np.int64), a, b, round_keys)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _network(result[outside], a, b, round_keys)
    return result


def _network(x: np.ndarray, a: int, b: int, round_keys: np.ndarray) -> np.ndarray:
    """One pass over numbers x = left * b + right, with left below a and right below b."""
    left, right = np.divmod(x, b)
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            left = (left + _hash(right, key, a)) % a
        else:
            right = (right + _hash(left, key, b)) % b
    return left * b + right


def _hash(x: np.ndarray, key: np.uint64, bound: int) -> np.ndarray:
    """Mix 64 bits (the finaliser of SplitMix64), below `bound`."""
    z = x.astype(np.uint64) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(bound)).astype(np.int64)
