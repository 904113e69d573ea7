"""Overhead of a channel over a plain loop that calls the same bound methods.

N hooks, each with an empty before and after, surround an empty body. The reference makes the same
2N + 1 calls from two lists, so any difference is bookkeeping. For a channel without hooks, the time
of the body is subtracted, and the reference is the same function over two empty lists.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, interleave, ns_per_call
from robo_orchard_core.utils.hook import HookContext, HookContextChannel

BAR_RATIO = 1.3
BAR_EMPTY_NS = 50.0
# BARS has the ratio for ten hooks; the other sizes show the growth.
HOOK_COUNTS = (1, 10, 100, 1000)
BAR_AT = 10

Args = dict[str, int]
Method = Callable[[Args], None]


class NoopHook:
    """Smallest possible hook: two methods of an object."""

    def before(self, args: Args) -> None:
        pass

    def after(self, args: Args) -> None:
        pass


def run(*, quick: bool) -> Report:
    rounds = 8 if quick else 75
    hook_calls = 2_000  # about 0.1 ms per block
    tables = [
        _with_hooks(count, rounds=rounds, calls=max(hook_calls // count, 2))
        for count in HOOK_COUNTS
    ]
    tables.append(_empty(rounds=rounds, calls=hook_calls))
    return Report("dispatch", tables, environment=describe(["robo-orchard-hooks"]))


def _with_hooks(count: int, *, rounds: int, calls: int) -> Table:
    hooks = [NoopHook() for _ in range(count)]
    bare = _bare_calls([hook.before for hook in hooks], [hook.after for hook in hooks])
    channel = _channel(hooks)
    args: Args = {}
    entries: dict[str, Callable[[], object]] = {
        "bare calls": partial(bare, args, _body),
        "channel.run": partial(channel.run, args, _body),
        "with channel.begin": partial(_begin, channel, args, _body),
    }
    samples = _interleave_calls(entries, reference="bare calls", rounds=rounds, calls=calls)
    bar = BAR_RATIO if count == BAR_AT else None
    return Table(
        f"{count} hook{'s' if count > 1 else ''} with before and after",
        "ns per entry",
        [
            Row.of(
                name,
                values,
                reference=samples.references.get(name),
                bar=bar if name == "channel.run" else None,
            )
            for name, values in samples.values.items()
        ],
    )


def bare_and_channel(count: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions that enter `count` hooks once: by plain calls and by a channel."""
    hooks = [NoopHook() for _ in range(count)]
    args: Args = {}
    bare = _bare_calls([hook.before for hook in hooks], [hook.after for hook in hooks])
    return partial(bare, args, _body), partial(_channel(hooks).run, args, _body)


def _empty(*, rounds: int, calls: int) -> Table:
    args: Args = {}
    channel = _channel([])
    entries: dict[str, Callable[[], object]] = {
        "body alone": partial(_body, args),
        "two empty lists": partial(_bare_calls([], []), args, _body),
        "channel.run": partial(channel.run, args, _body),
    }
    samples = _interleave_calls(entries, reference="body alone", rounds=rounds, calls=calls)
    return Table(
        "no hooks: time over the body alone",
        "ns per entry",
        [
            Row.of("two empty lists", samples.overheads("two empty lists")),
            Row.of("channel.run", samples.overheads("channel.run"), bar=BAR_EMPTY_NS),
        ],
    )


def _interleave_calls(
    entries: Mapping[str, Callable[[], object]], *, reference: str, rounds: int, calls: int
) -> Samples:
    timed = {name: partial(ns_per_call, call, calls=calls) for name, call in entries.items()}
    return interleave(timed, reference=reference, rounds=rounds)


def _body(args: Args) -> None:
    pass


def _bare_calls(
    entering: Sequence[Method], afters: Sequence[Method]
) -> Callable[[Args, Method], None]:
    """Call the hooks as one would without channels; the afters run in reverse."""
    leaving = list(reversed(afters))

    def enter(args: Args, body: Method) -> None:
        for before in entering:
            before(args)
        body(args)
        for after in leaving:
            after(args)

    return enter


def _channel(hooks: Sequence[NoopHook]) -> HookContextChannel[Args]:
    channel: HookContextChannel[Args] = HookContextChannel("on_step")
    for hook in hooks:
        channel.register(HookContext.from_callable(before=hook.before, after=hook.after))
    return channel


def _begin(channel: HookContextChannel[Args], args: Args, body: Method) -> None:
    with channel.begin(args):
        body(args)
