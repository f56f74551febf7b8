"""Events in time: what was predicted beside what is true."""

from crab.report.texts import clean
from crab.report.views import Lane, Span, Timeline
from crab.tasks.ave import AveEvent
from crab.tasks.avvp import AvvpEvents
from crab.tasks.spans import grid, runs


def timeline(parsed: object | None, truth: object | None, has_truth: bool) -> Timeline | None:
    """When each event was predicted and when it is true; None where the answers are not made of events."""
    predicted, true = _events(parsed), _events(truth)
    streams = list(dict.fromkeys([*(true or {}), *(predicted or {})]))
    if not streams:
        return None
    lanes = {}
    for stream in streams:
        said, right = (predicted or {}).get(stream, {}), (true or {}).get(stream, {})
        lanes[stream] = tuple(
            Lane(
                name=clean(name),
                predicted=said.get(name, ()),
                true=right.get(name, ()) if has_truth else None,
            )
            for name in dict.fromkeys([*right, *said])
        )
    return Timeline(lanes=lanes)


def _events(answer: object | None) -> dict[str, dict[str, tuple[Span, ...]]] | None:
    """Stream -> event -> spans, of an answer that is made of events; None for any other."""
    if isinstance(answer, AveEvent):
        spans = runs(grid([(answer.start_s, answer.end_s)]))
        return {"Seen and heard": {answer.event: spans}}
    if isinstance(answer, AvvpEvents):
        streams = (("Seen", answer.visual), ("Heard", answer.audio))
        return {stream: {n: runs(bits) for n, bits in grids.items()} for stream, grids in streams}
    return None
