"""Random numbers that depend on a seed and a position alone, in integer tensor operations.

This is the specification that native/philox.h and the Triton kernels (`tl.philox`) follow bit for
bit. Philox 4x32-10 turns a key of two 32-bit words and a counter of four into four random words:

    key = (seed mod 2^32, seed div 2^32),    counter = (block mod 2^32, block div 2^32, stream, 0)

A sample of n elements is cut into four quarters of q = ⌈n/4⌉ (the last may be shorter), so that each
word of a block goes to contiguous memory: element j of sample i takes word ⌊j/q⌋ of the block
i·q + j mod q of stream 0.

    uniform  u = (word >> 8) · 2^-24, in [0, 1)
    normals  from words 0 and 1, and from 2 and 3:  √(-2 ln(1 - u₀)) · (cos 2πu₁, sin 2πu₁)
    integer  ⌊word · n / 2^32⌋, in [0, n)

Source: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011; Box and Muller 1958.
"""

import math

import torch
from torch import Tensor

from ._operator import check

__all__ = ["below", "choose_seed", "normals", "philox", "uniforms"]

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def choose_seed(seed: Tensor | None, x: Tensor) -> Tensor:
    """The given seed, checked, or one from torch's default generator: a scalar on the device of x,
    so that replays of a CUDA graph draw anew."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    check("seed", seed, (), x, torch.int64)
    return seed


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a·b, by halves of a: no product exceeds 48 bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: Tensor, block: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each block, as int64 in [0, 2^32)."""
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    a, b = block & _MASK, (block >> 32) & _MASK
    c, d = torch.full_like(a, stream), torch.zeros_like(a)
    for _ in range(10):
        high_a, low_a = _multiply(a, _ROUND_A)
        high_b, low_b = _multiply(c, _ROUND_B)
        a, b, c, d = high_b ^ b ^ key_a, low_b, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return a, b, c, d


def below(word: Tensor, n: int) -> Tensor:
    """Integers in [0, n), for n up to 2^31."""
    return _multiply(word, n)[0]


def _uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    return (word >> 8).to(dtype) * 2.0**-24


def _blocks(seed: Tensor, samples: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quarter = (columns + 3) // 4
    block = torch.arange(samples * quarter, device=seed.device).view(samples, quarter)
    return philox(seed, block, 0)


def uniforms(seed: Tensor, samples: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(samples, columns) numbers in [0, 1), exact in float32 and wider."""
    words = torch.cat(_blocks(seed, samples, columns), dim=1)
    return _uniform(words, dtype)[:, :columns]


def normals(seed: Tensor, samples: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(samples, columns) numbers from N(0, 1)."""
    a, b, c, d = (_uniform(word, dtype) for word in _blocks(seed, samples, columns))
    quarters = []
    for first, second in ((a, b), (c, d)):
        radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * math.pi * second
        quarters += [radius * angle.cos(), radius * angle.sin()]
    return torch.cat(quarters, dim=1)[:, :columns]
