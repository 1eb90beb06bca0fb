"""What an iteration costs by the model's sizes alone, and the time that this takes at given rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.speed.subject import Subject


@dataclass(frozen=True)
class Cost:
    """FLOPs of one iteration, a multiply-add counted as two.

    Attributes:
        attention: scores and weighted values of self-attention.
        products: all else: linear layers, with cross-attention, which is a small part.
    """

    attention: float
    products: float

    def seconds(self, attention_rate: float, product_rate: float) -> float:
        """At rates in FLOP/s, with nothing else to do."""
        return self.attention / attention_rate + self.products / product_rate


def iteration_cost(subject: Subject, share: float = 1.0) -> Cost:
    """One of the steady iterations, in which all chunks of the window are being denoised.

    Args:
        subject: the model.
        share: of each chunk's tokens that is computed; 1 is exact.
    """
    last = subject.steady(2).stop - 1
    records = [
        replace(record, tokens=max(1, round(share * record.tokens_total)))
        for record in subject.plan()
        if record.iteration == last
    ]
    products = subject.flops([replace(record, kv_tokens=0) for record in records])
    return Cost(subject.flops(records) - products, products)
