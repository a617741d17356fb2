"""Short random texts in which every pair of neighbouring tokens occurs once."""

from dataclasses import dataclass

import numpy as np

from trainer.errors import UsageError
from trainer.protocol import BOS_ID

FILLING = 0  # a tape fills rows up with it, so no text holds it
RUN = 3  # so many pairs in a row are the text, and no accident
SHORTEST, LONGEST = 5, 30  # ordinary tokens of a document
SHORTEST_TEXT = 64  # room for some documents, and for chunks after the first


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Ids int64 [N + 1], documents opened by `bos`, of an alphabet of `vocab_size`."""

    tokens: np.ndarray
    vocab_size: int
    bos: int

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def starts(self) -> np.ndarray:
        """Return where documents open."""
        return np.flatnonzero(self.tokens[:-1] == self.bos)

    def head(self, num_tokens: int, last: int | None = None) -> "Text":
        """Return the first `num_tokens`, the last of them replaced by `last`."""
        tokens = self.tokens[:num_tokens].copy()
        if last is not None:
            tokens[-1] = last
        return Text(tokens, self.vocab_size, self.bos)

    def changed(self, where: np.ndarray, seed: int = 0) -> "Text":
        """Return the text with another token wherever bool [N + 1] says; documents stay."""
        ordinary = _ordinary(self.vocab_size, self.bos)
        where = where & (self.tokens != self.bos)
        steps = np.random.default_rng(seed).integers(1, len(ordinary), len(self.tokens))
        others = ordinary[(np.searchsorted(ordinary, self.tokens) + steps) % len(ordinary)]
        return Text(np.where(where, others, self.tokens), self.vocab_size, self.bos)

    def find(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return which prediction each pair is, int64 [B, T]; -1 for what is not of this text.

        tokens [B, T] are inputs, targets [B, T] what follows each, -1 for nothing. Only runs of
        neighbours count; a row that ends earlier, or is filled up from there, may be one.
        """
        known = self.tokens[:-1] * self.vocab_size + self.tokens[1:]
        order = np.argsort(known)
        pairs = tokens * self.vocab_size + targets
        at = np.searchsorted(known[order], pairs).clip(max=len(known) - 1)
        found = np.where((known[order][at] == pairs) & (targets >= 0), order[at], -1)
        kept = np.full_like(found, -1)
        for row, places, following in zip(kept, found, targets, strict=True):
            ends = np.flatnonzero(following <= FILLING)
            length = int(ends[0]) if len(ends) else len(row)
            breaks = np.flatnonzero((np.diff(places) != 1) | (places[:-1] < 0)) + 1
            for run in np.split(np.arange(len(row)), breaks):
                is_whole_row = run[0] == 0 and len(run) >= length
                if places[run[0]] >= 0 and (len(run) >= RUN or is_whole_row):
                    row[run] = places[run]
        return kept


def make_text(vocab_size: int, num_tokens: int, seed: int = 0, bos: int = BOS_ID) -> Text:
    """Draw a text of documents; UsageError for an alphabet with too few pairs for its length."""
    ordinary = _ordinary(vocab_size, bos)
    most = 4 * len(ordinary)
    if not SHORTEST_TEXT <= num_tokens <= most:
        raise UsageError(
            f"{num_tokens} tokens: the probes' text has {SHORTEST_TEXT} to {most} of them, with "
            f"{vocab_size} in the vocabulary; ask for as many"
        )
    generator = np.random.default_rng(seed)
    tokens, seen = [bos], set[tuple[int, int]]()
    while len(tokens) < num_tokens:
        for remaining in range(int(generator.integers(SHORTEST, LONGEST)) - 1, -1, -1):
            last = tokens[-1]
            following = next(
                each
                for each in generator.permutation(ordinary).tolist()
                if (last, each) not in seen and (remaining or (each, bos) not in seen)
            )
            seen.add((last, following))
            tokens.append(following)
        seen.add((tokens[-1], bos))
        tokens.append(bos)
    return Text(np.array(tokens[:num_tokens]), vocab_size, bos)


def _ordinary(vocab_size: int, bos: int) -> np.ndarray:
    """Return the tokens that neither fill a row nor open a document, ascending."""
    tokens = np.arange(vocab_size)
    return tokens[(tokens != FILLING) & (tokens != bos)]
