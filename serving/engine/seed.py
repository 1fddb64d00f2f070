"""Random numbers of a request: a function of its seed and the token's place, so nothing has to be carried along."""

import secrets
from hashlib import blake2b

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def spread(seed: int | None) -> int:
    """64 bits; neighbouring seeds far apart, so that their streams are not shifts of each other. None: fresh ones."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest())


def uniform(state: int, place: int) -> float:
    """A number in [0, 1): SplitMix64's output number `place`, its upper 53 bits.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z = (state + (place + 1) * _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of one of several answers to one request; the first answer is that of a request for one."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()) >> 1
