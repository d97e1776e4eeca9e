"""MinHash in one pass, for many documents at once, and the bands that find alike ones among many.

A shingle is a run of units (words or tokens); two documents are as alike as their sets of shingles: Jaccard's
|A ∩ B| / |A ∪ B|. One hash of each shingle chooses one of BINS bins and a value; a bin keeps its least value. The share
of equal bins is an unbiased estimate of the Jaccard index (one-permutation hashing, Li, Owen and Zhang 2012), if an
empty bin borrows from a full one chosen by a hash of the bin alone (Shrivastava 2017, arXiv 1703.04664). Its standard
error is √(J (1 − J) / BINS): 0.035 at J = 0.8. Beside a hash function for each bin that costs 1/128.
"""

import numpy as np
import numpy.typing as npt

BINS = 128
ROWS = 4  # bins of a band: a pair is looked at when one of the 32 bands is equal, at J = 0.8 all but 5 of 10^8,
# at 0.5 nine of ten, at 0.2 one of twenty
BANDS = BINS // ROWS
EMPTY = np.uint32(0xFFFFFFFF)
_TRIES = 256  # bins asked by an empty one; then the first full one gives its value
Uint64 = npt.NDArray[np.uint64]
Uint32 = npt.NDArray[np.uint32]
_random = np.random.Generator(np.random.PCG64(20240520))  # constants of the hashes, the same in every process
ODD: Uint64 = _random.integers(0, 1 << 63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_LENDERS: npt.NDArray[np.int64] = _random.integers(0, BINS, (_TRIES, BINS))


def mixed(values: Uint64) -> Uint64:
    """Every bit of the result depends on every bit of the value (the finaliser of splitmix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(units: Uint64, counts: npt.NDArray[np.int64], width: int) -> tuple[Uint64, npt.NDArray[np.int64]]:
    """(the hash of every shingle, the number of its document). units: of all documents, one after another, (U,);
    counts: (D,) units of each; width: units of a shingle. A shorter document is one shingle, an empty one none."""
    padded = np.concatenate((units, np.zeros(width - 1, np.uint64)))
    sums = np.zeros(len(units), np.uint64)
    home = np.repeat(np.arange(len(counts)), counts)
    left = np.repeat(np.cumsum(counts), counts) - np.arange(len(units))  # units to the document's end, this one too
    for place in range(width):
        part = padded[place : place + len(units)] * ODD[place]
        sums += part if place == 0 else np.where(left > place, part, np.uint64(0))
    first = np.repeat(np.cumsum(counts) - counts, counts) == np.arange(len(units))
    whole = (left >= width) | first
    return mixed(sums[whole]), home[whole]


def signatures(hashes: Uint64, home: npt.NDArray[np.int64], documents: int) -> Uint32:
    """(D, BINS) uint32: what two documents are compared by; EMPTY throughout for a document without shingles."""
    found = np.full(documents * BINS, EMPTY)
    values = np.minimum((hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32), EMPTY - np.uint32(1))
    np.minimum.at(found, home * BINS + (hashes >> np.uint64(57)).astype(np.int64), values)
    return _filled(found.reshape(documents, BINS))


def estimates(left: Uint32, right: Uint32) -> npt.NDArray[np.float64]:
    """The estimated Jaccard index of pairs of signatures, both (P, BINS): (P,)."""
    return (left == right).mean(axis=1)


def _filled(found: Uint32) -> Uint32:
    """Every empty bin takes the value of a full one."""
    full = found != EMPTY
    rows, columns = np.nonzero(~full & full.any(axis=1, keepdims=True))
    filled = found.copy()
    for lenders in _LENDERS:
        if not len(rows):
            return filled
        lender = lenders[columns]
        lends = full[rows, lender]
        filled[rows[lends], columns[lends]] = found[rows[lends], lender[lends]]
        rows, columns = rows[~lends], columns[~lends]
    filled[rows, columns] = found[rows, full[rows].argmax(axis=1)]
    return filled


class Bands:
    """Signatures, looked up by equal bands. signatures: (N, BINS), none of them empty throughout."""

    def __init__(self, signatures: Uint32) -> None:
        keys = _band_keys(signatures)
        self._order = np.argsort(keys, axis=1, kind="stable")
        self._keys = np.take_along_axis(keys, self._order, axis=1)

    def pairs(self, asked: Uint32) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(rows of `asked`, rows of the kept ones): the pairs with at least one equal band, each once."""
        found = [np.zeros(0, np.int64)]
        kept = self._keys.shape[1]
        for band, keys in enumerate(_band_keys(asked)):
            first = np.searchsorted(self._keys[band], keys, side="left")
            counts = np.searchsorted(self._keys[band], keys, side="right") - first
            hits = np.flatnonzero(counts)
            if len(hits):
                rows, starts = np.repeat(hits, counts[hits]), np.repeat(first[hits], counts[hits])
                inside = np.arange(len(rows)) - np.repeat(np.cumsum(counts[hits]) - counts[hits], counts[hits])
                found.append(rows * kept + self._order[band][starts + inside])
        pairs = np.unique(np.concatenate(found))
        return pairs // kept, pairs % kept


def _band_keys(signatures: Uint32) -> Uint64:
    """(BANDS, N) uint64: a hash of the bins of each band."""
    parts = signatures.astype(np.uint64).reshape(len(signatures), BANDS, ROWS)
    return np.ascontiguousarray(mixed((parts * ODD[:ROWS]).sum(axis=2, dtype=np.uint64)).T)
