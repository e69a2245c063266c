"""Best-fit-decreasing bin packing of documents into sequences of one length."""

from __future__ import annotations

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs items, longest first, each into the pack with the least room that still takes it.

    lengths: int [n], 1 ≤ length ≤ capacity. Returns (offsets int64 [packs + 1], items int64 [n]): pack p holds
    items[offsets[p]:offsets[p + 1]]. Deterministic. Equal lengths are placed together: once the best-fitting pack is
    found, it stays the best-fitting one for that length until it is full, so a pack takes as many as fit at once.
    """
    order = np.argsort(-lengths, kind="stable")
    values, firsts = np.unique(-lengths[order], return_index=True)  # ascending -length: descending length
    ends = np.append(firsts, len(order))[1:]
    packs_by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set while some pack has room r: the lowest bit ≥ length is the best fit
    num_packs = 0
    pack_of = np.empty(len(lengths), dtype=np.int64)
    for length, first, end in zip((-values).tolist(), firsts.tolist(), ends.tolist(), strict=True):
        while first < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pack = packs_by_room[room].pop()
                if not packs_by_room[room]:
                    rooms ^= 1 << room
            else:
                room, pack, num_packs = capacity, num_packs, num_packs + 1
            count = min(room // length, end - first)
            pack_of[order[first : first + count]] = pack
            first += count
            if room := room - count * length:
                packs_by_room.setdefault(room, []).append(pack)
                rooms |= 1 << room
    # order is by falling length, and a stable sort keeps it inside each pack.
    items = order[np.argsort(pack_of[order], kind="stable")]
    counts = np.bincount(pack_of, minlength=num_packs)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), items
