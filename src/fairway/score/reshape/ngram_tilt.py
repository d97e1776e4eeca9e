"""Token-only n-gram tilt: what followed the same words before is made a little likelier.

Every context of n tokens, n in `orders`, keeps how often each token has followed it. Before a token is coded the
longest context with

    total >= count,   best / total >= confidence

gives a hint h, its most frequent follower (of equals the one seen last), and

    z'_h = z_h + beta,   so that   p'(y) = p(y) e^(beta [y = h]) / (1 + p(h) (e^beta - 1)):

-ln p' = -ln p + ln(1 + p(h) (e^beta - 1)) - beta [y = h], a sum of 1 over the vocabulary whatever the hint is. (Where
score.temperature divides, it divides beta too.) Only then is the token told and counted, under every order.

Source: #1514 (beta = 2 · confidence, the levels below) and #2135 (orders 16 alone, 0.8, beta = 2.625 for every hint);
-0.0005 to -0.001 bits per byte at 8,192 tokens of vocabulary. The forms whose hint was switched by the token that is
coded (within a word, at its start) were excluded: #1420, #1967, #2140. Here a hint cannot know it.

Pocket's text, a language's reference, says much again, and short contexts find it: #1514's levels give sliding 1.7513
-> 1.7454 and adapted 1.7334 -> 1.7277; orders 8, 6, 5, 4, 3 from the first sight on and 2 from the second, beta =
4 · confidence (chosen on dev), 1.6364 and 1.6223.

About 45 µs a token and 400 bytes a context in this pure Python, on every rank: for texts of some millions of tokens,
not for the challenge's 62 million within its 600 s; a proven chunk tells its whole lane again.

Contexts are compared token by token: no hash, no collision. Two generations bound the memory: once `most` / 2 contexts
are young they become the old ones, and what was old is forgotten; an old context that is seen again is young again.
"""

from dataclasses import dataclass, field

from torch import Tensor

from fairway.score.reshaping import NOTHING, Hint, Hints

LEARNS = True
_LONGEST, _MOST = 32, 1 << 26  # tokens; contexts: what a compressed file may ask for


@dataclass(frozen=True)
class Level:
    """Contexts of some lengths, and when they give a hint."""

    orders: tuple[int, ...]  # tokens of context, longest first
    confidence: float  # share of the most frequent follower, at least
    count: int  # how often the context was seen, at least

    def __post_init__(self) -> None:
        if not self.orders or not all(1 <= order <= _LONGEST for order in self.orders):
            raise ValueError(f"orders = {self.orders}: contexts of 1 to {_LONGEST} tokens are expected")
        if not 0 < self.confidence <= 1 or self.count < 1:
            raise ValueError(
                f"confidence = {self.confidence}, count = {self.count}: a share, and at least 1 are needed"
            )


@dataclass(frozen=True)
class Spec:
    """The values of #1514."""

    levels: tuple[Level, ...] = (
        Level((16, 15, 14), 0.5, 2),
        Level((13, 12, 11), 0.6, 2),
        Level((10, 9, 8), 0.7, 3),
    )
    beta: float = 2.0  # added to the hint's logit
    scaled: bool = True  # times the confidence; false: the same for every hint
    most: int = 1 << 21  # contexts that a lane keeps

    def __post_init__(self) -> None:
        orders = self.orders
        if not orders or list(orders) != sorted(set(orders), reverse=True):
            raise ValueError(f"levels: orders {', '.join(map(str, orders)) or 'none'}; each once, longest first")
        if not 0 <= self.beta <= 50:
            raise ValueError(f"beta = {self.beta}: 0 to 50 is expected")
        if not 2 <= self.most <= _MOST:
            raise ValueError(f"most = {self.most}: 2 to {_MOST:,} contexts are expected")

    @property
    def orders(self) -> tuple[int, ...]:
        """Of all levels, longest first."""
        return tuple(order for level in self.levels for order in level.orders)


STILL = Spec(beta=0.0)  # changes nothing, to the last bit


def reshape(logits: Tensor, hints: Hints, spec: Spec) -> Tensor:
    """logits: (n, V) -> (n, V), with the addend of each row at its hint."""
    return logits.scatter_add(1, hints.tokens[:, None], hints.addends[:, None])


@dataclass(slots=True)
class Followers:
    """What has followed one context. best: the most frequent token; times: how often it has; total: how often any."""

    best: int = 0
    times: int = 0
    total: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def count(self, token: int) -> None:
        times = self.counts[token] = self.counts.get(token, 0) + 1
        self.total += 1
        if times >= self.times:
            self.best, self.times = token, times


class Lane:
    """The contexts of one lane."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.recent = b""  # the last tokens, as many as the longest context has, two bytes each
        self.young: dict[bytes, Followers] = {}
        self.old: dict[bytes, Followers] = {}

    def hint(self) -> Hint:
        """The hint of the longest context that gives one."""
        for level in self.spec.levels:
            for order in level.orders:
                context = self._context(order)
                found = self.young.get(context) or self.old.get(context)
                if found is not None and found.total >= level.count and found.times / found.total >= level.confidence:
                    share = found.times / found.total if self.spec.scaled else 1.0
                    return Hint(found.best, self.spec.beta * share)
        return NOTHING

    def perceive_token(self, token: int) -> None:
        """Counts a token under every context before it."""
        for order in self.spec.orders:
            if context := self._context(order):
                self._followers(context).count(token)
        self.recent = (self.recent + token.to_bytes(2, "little"))[-2 * self.spec.orders[0] :]

    def _context(self, order: int) -> bytes:
        """The last `order` tokens; nothing where there are not so many."""
        return self.recent[-2 * order :] if len(self.recent) >= 2 * order else b""

    def _followers(self, context: bytes) -> Followers:
        found = self.young.get(context)
        if found is None:
            found = self.young[context] = self.old.pop(context) if context in self.old else Followers()
            if 2 * len(self.young) >= self.spec.most:
                self.old, self.young = self.young, {}
        return found
