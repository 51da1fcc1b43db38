"""Noise that belongs to a row: a function of (row number, column, seed), whatever batch or process the row is in.

A counter is mixed to 64 random bits (splitmix64: Steele, Lea & Flood 2014), from which come a uniform number or, by Box
and Muller's transform, a normal one. Slower than a generator, and needed only where a figure must not depend on how
rows were batched.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_uniform(rows: Tensor, width: int, seed: int) -> Tensor:
    """`(B, width)` float32 in (0, 1) of row numbers `(B,)` int64."""
    return _unit(_bits(rows, width, seed) >> 40)


def row_normal(rows: Tensor, width: int, seed: int) -> Tensor:
    """`(B, width)` float32 standard normal of row numbers `(B,)` int64."""
    bits = _bits(rows, width, seed)
    return (-2.0 * _unit(bits >> 40).log()).sqrt() * (2.0 * math.pi * _unit(bits)).cos()


def _unit(bits: Tensor) -> Tensor:
    """The lowest 24 bits as a number in (0, 1): as many as float32 holds."""
    return ((bits & 0xFFFFFF).float() + 0.5) / 2**24


def _bits(rows: Tensor, width: int, seed: int) -> Tensor:
    """`(B, width)` int64, every bit of which looks random; arithmetic is modulo 2^64."""
    columns = torch.arange(width, device=rows.device)
    counter = _mix(
        _mix(rows.long() + _signed(seed * 0x9E3779B97F4A7C15))[:, None] + columns * _signed(0xD1342543DE82EF95)
    )
    return _mix(counter)


def _mix(z: Tensor) -> Tensor:
    """Splitmix64's finalizer."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same lowest 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
