"""Counts the work of the memory system: 32-byte sectors and shared-memory wavefronts."""

import numpy as np

LANES = 32
_ABSENT = -1


def sectors(addresses: np.ndarray, mask: np.ndarray | bool) -> int:
    """32-byte sectors that the warps access; the lanes of a warp share theirs.

    An access is aligned to its size, which is at most a sector, so it is in a single one.
    """
    rows = addresses >> 5
    if mask is not True:
        rows = np.where(mask, rows, _ABSENT)
    rows = rows.reshape(-1, LANES)
    changes = rows[:, 1:] - rows[:, :-1]
    if changes.size and changes.min() < 0:
        rows = np.sort(rows, axis=1)
        changes = rows[:, 1:] - rows[:, :-1]
    found = int(np.count_nonzero(changes)) + len(rows)
    return found if mask is True else found - int(np.count_nonzero(rows[:, 0] == _ABSENT))


def wavefronts(offsets: np.ndarray, size: int, mask: np.ndarray | bool) -> tuple[int, int]:
    """Passes through the 32 banks of 4 bytes, and their number without conflicts.

    Wide accesses are split into halves or quarters of a warp: always groups of 32 words.
    """
    words = offsets >> 2
    if mask is not True:
        words = np.where(mask, words, _ABSENT)
    if size > 4:
        several = np.arange(size // 4)
        words = words[:, None] + several
        if mask is not True:
            words[~mask] = _ABSENT
    words = words.reshape(-1, LANES)
    groups = ideal = len(words)
    if mask is True:
        banks = np.bitwise_or.reduce(np.left_shift(1, words & 31), axis=1)
        words = words[banks != 0xFFFFFFFF]  # 32 words in 32 banks take one pass
        groups -= len(words)
    else:
        words = words[words.max(axis=1) != _ABSENT]
        ideal, groups = len(words), 0
    if not len(words):
        return groups, ideal
    # Sort by bank and word: equal words share a pass, different words of a bank do not.
    keys = np.sort(np.where(words == _ABSENT, _ABSENT, (words & 31) << 40 | words), axis=1)
    fresh = keys != _ABSENT
    fresh[:, 1:] &= keys[:, 1:] != keys[:, :-1]
    row, column = np.nonzero(fresh)
    turns = np.bincount(row * 32 + (keys[row, column] >> 40), minlength=32 * len(words))
    return groups + int(turns.reshape(-1, 32).max(axis=1).sum()), ideal
