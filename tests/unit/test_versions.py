"""The way to a model version that is fewest bytes, against every way there is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmerge.models.versions import cheapest_route
from fedmerge.statements import ModelRef, StepRef, UpdateRef


def digest(number: int) -> str:
    return f"{number:064x}"


@st.composite
def federations(draw: st.DrawFn) -> ModelRef:
    """A history of some rounds: an update each, and steps from the version before, the base, or none."""
    num_rounds = draw(st.integers(0, 6))
    sizes = st.integers(1, 100)
    updates, steps = [], []
    for number in range(1, num_rounds + 1):
        updates.append(UpdateRef(round=number, root=digest(1000 + number), num_bytes=draw(sizes), codec={}, seed="0"))
        for before in sorted({0, number - 1}):
            if draw(st.booleans()):
                steps.append(
                    StepRef(
                        round=number,
                        before=digest(before),
                        after=digest(number),
                        root=digest(2000 + 10 * number + before),
                        num_bytes=draw(sizes),
                    )
                )
    return ModelRef(digest=digest(num_rounds), base_digest=digest(0), updates=updates, steps=steps)


def every_route(ref: ModelRef, start: str) -> list[list[StepRef]]:
    if start == ref.digest:
        return [[]]
    found = [step for step in ref.steps if step.before == start]
    return [[step, *rest] for step in found for rest in every_route(ref, step.after)]


@given(ref=federations(), held=st.sets(st.integers(1, 6), max_size=2), data=st.data())
def test_no_other_route_is_fewer_bytes(ref: ModelRef, held: set[int], data: st.DataObject) -> None:
    everything = [file.root for file in (*ref.updates, *ref.steps)]
    files = set(data.draw(st.lists(st.sampled_from(everything)))) if everything else set()

    def cost(route: list[StepRef] | list[UpdateRef]) -> int:
        return sum(file.num_bytes for file in route if file.root not in files)

    versions = {digest(number) for number in held}
    route = cheapest_route(ref, versions, files)
    starts = [ref.base_digest, *sorted(versions)]
    if route:
        assert any(route in every_route(ref, start) for start in starts)
    taken = cost(route) if route else cost(ref.updates)
    if ref.digest not in versions:
        assert taken <= min([cost(ref.updates)] + [cost(way) for start in starts for way in every_route(ref, start)])
    else:
        assert route == []
