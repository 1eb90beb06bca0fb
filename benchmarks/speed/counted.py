"""What a video asks of a GPU in memory, kernels and waits of the host, counted without one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

from benchmarks.speed.allocations import Peak
from benchmarks.speed.fused import pretended
from benchmarks.speed.instruments import replaced
from benchmarks.speed.subject import WHOLE, Mode, Subject
from common.cache import Engine


@dataclass(frozen=True)
class Iteration:
    """One iteration.

    Attributes:
        waits: of the host for the GPU, inside the model's forwards.
        loop_waits: the same in the solver and the loop.
        kernels: operations that the GPU runs.
        moved: bytes that kernels read and write, those of matrix products and attention left out.
        copied: bytes between host and GPU, both directions.
    """

    waits: int
    loop_waits: int
    kernels: int
    moved: int
    copied: int

    def __sub__(self, other: Iteration) -> Iteration:
        """What came between two sums."""
        return Iteration(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Counted:
    """A denoising.

    Attributes:
        peak: of memory; its parts are `weights`, and what the engine holds on the GPU (see `Engine.memory`).
        iterations: in order. The first one includes what comes before the loop.
        waits, loop_waits: by place in the source, over all iterations.
    """

    peak: Peak = field(default_factory=Peak)
    iterations: list[Iteration] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)
    loop_waits: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Watched(Mode):
    """A mode that lets its engine be asked for what it holds."""

    engines: list[Engine] = field(default_factory=list)

    def prepare(self, engine: Engine) -> None:
        super().prepare(engine)
        self.engines.append(engine)

    def memory(self) -> dict[str, int]:
        """Bytes of the engine on the GPU: all but K/V that wait elsewhere."""
        held = self.engines[0].memory() if self.engines else {}
        return {name: size for name, size in held.items() if name != "kv" or self.config.state_device == "model"}


def count_session(subject: Subject, mode: Mode, iterations: slice = WHOLE) -> Counted:
    """Denoise some iterations of a video, or all, on a GPU that is not there.

    Args:
        subject: on the meta device.
        mode: whose decisions must not depend on values: stock, exact, or with a budget.
        iterations: as for `Subject.session`.

    Raises:
        RuntimeError: a decision depends on values.
    """
    counted, watched = Counted(), _Watched(**vars(mode))
    weights = [*subject.transformer.parameters(), *subject.transformer.buffers()]
    with pretended(watched.memory) as gpu:
        held = gpu.hold(weights)
        before = Iteration(0, 0, 0, 0, 0)

        def as_model(forward: Callable) -> Callable:
            def counting(*args: Any, **kwargs: Any) -> Any:
                outside = gpu.waits
                gpu.waits = counted.waits
                try:
                    return forward(*args, **kwargs)
                finally:
                    gpu.waits = outside

            return counting

        def after_iteration() -> None:
            nonlocal before
            now = Iteration(counted.waits.total(), gpu.waits.total(), gpu.kernels, gpu.moved, gpu.copied)
            counted.iterations.append(now - before)
            before = now

        with subject.session(watched, iterations) as session, replaced(*session.model, as_model):
            session.denoise(after_iteration)
    counted.loop_waits = gpu.waits
    counted.peak = Peak(gpu.peak.bytes, {"weights": held, **gpu.peak.parts}, gpu.largest())
    return counted
