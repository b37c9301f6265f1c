"""Chains, groups, chords, links, stamps, maps, replaced tasks, and tasks that bodies launch."""

from collections.abc import Callable, Iterator, Mapping
from traceback import extract_tb
from typing import Any, NoReturn

from celery import Celery, Task, chain, chord, current_app, current_task, group, signature
from celery._state import get_current_worker_task
from celery.canvas import StampingVisitor
from celery.exceptions import Ignore
from celery.result import AsyncResult, GroupResult, ResultBase, allow_join_result

from contract.features import KEEPS_ORDER, LINKS_CHORDS
from contract.recorder import note
from contract.table import Row, Seen, task

#: What a canvas writes into the request of its members.
CANVAS = (
    "root_id",
    "parent_id",
    "group",
    "group_index",
    "chord",
    "chain",
    "callbacks",
    "errbacks",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
    "headers",
    "delivery_info",
)


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────


@task()
def add(x: Any, y: Any) -> Any:
    note("add", x, y)
    return x + y


@task()
def total(numbers: Any, plus: int = 0) -> int:
    note("total", numbers, plus)
    return int(sum(numbers)) + plus


@task()
def say(*args: Any, **kwargs: Any) -> Any:
    note("say", args, kwargs)
    return args[-1] if args else None


@task(ignore_result=True)
def say_and_ignore(*args: Any) -> Any:
    note("say", args)
    return args[-1]


@task(bind=True)
def show(self: Task, *args: Any) -> Any:
    note(args, {name: self.request.get(name) for name in CANVAS})
    return args[-1]


@task(bind=True)
def show_stamps(self: Task, *args: Any) -> Any:
    headers = sorted(self.request.stamped_headers or ())
    note(args, headers, [self.request.get(name) for name in headers], self.request.stamps)
    return args[-1]


@task()
def fail(*args: Any) -> NoReturn:
    note("fail", args)
    raise LookupError(*args)


@task()
def fail_because(*args: Any) -> NoReturn:
    try:
        raise LookupError(*args)
    except LookupError as cause:
        raise ValueError("because of", *args) from cause


@task()
def ignore(*args: Any) -> NoReturn:
    note("ignore", args)
    raise Ignore("no result")


@task(bind=True, max_retries=2)
def add_at_second_try(self: Task, x: Any, y: Any) -> Any:
    note("try", self.request.retries)
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return x + y


@task(bind=True, max_retries=1)
def fail_at_each_try(self: Task, *args: Any) -> NoReturn:
    note("try", self.request.retries)
    raise self.retry(countdown=0, exc=LookupError(*args))


@task()
def make_list(size: int) -> list[int]:
    return list(range(size))


# ── errbacks ────────────────────────────────────────────────────────────────────────────────────


def own_frames(exc: BaseException) -> list[str]:
    return [frame.name for frame in extract_tb(exc.__traceback__) if frame.filename == __file__]


@task()
def on_error(request: Any, exc: BaseException, traceback: Any, *more: Any) -> None:
    note("errback", type(request).__name__, request.id, request.get("task"), request.retries)
    note(exc, type(traceback).__name__, "in fail" in str(traceback), more)
    note(current_task.name, get_current_worker_task().name, current_task.request.id)


@task()
def on_error_look(request: Any, exc: BaseException, traceback: Any) -> None:
    note(exc, own_frames(exc))


@task()
def on_error_say(request: Any, exc: BaseException, traceback: Any) -> None:
    """Where several processes may call it, it notes nothing: one note would be another's."""
    say.on(current_app).apply_async(("errback", repr(exc)), parent_id=request.id)


@task(bind=True)
def on_error_bound(self: Task, task_id: str, *more: Any) -> str:
    result = self.app.AsyncResult(task_id)
    note("bound errback", task_id, result.state, result.result, more)
    note(self.request.parent_id, self.request.root_id)
    return "told"


@task()
def on_error_with_id(task_id: str) -> str:
    note("errback with an id", task_id)
    return "told"


@task()
def on_error_fail(request: Any, exc: BaseException, traceback: Any) -> NoReturn:
    note("failing errback", exc)
    raise KeyError("in the errback")


@task()
def on_error_launch(request: Any, exc: BaseException, traceback: Any) -> None:
    result = say.on(current_app).delay("launched by an errback")
    note("launched", result.id)


# ── bodies that launch tasks ────────────────────────────────────────────────────────────────────


def collecting(app: Celery) -> chord:
    return chord([add.on(app).s(1, 2), add.on(app).s(3, 4)], total.on(app).s())


LAUNCHES: Mapping[str, Callable[[Celery], Any]] = {
    "delay": lambda app: add.on(app).delay(1, y=2),
    "apply_async": lambda app: add.on(app).apply_async(
        (1,), {"y": 2}, headers={"trace": "abc"}, countdown=0
    ),
    "a signature by name": lambda app: signature("canvas.add", (1, 2), app=app).delay(),
    "a group": lambda app: group(show.on(app).s("g", n) for n in range(2)).apply_async(),
    "an empty group": lambda app: group([], app=app).apply_async(),
    "a chain": lambda app: chain(add.on(app).s(1, 2), show.on(app).s(), app=app).apply_async(),
    "a chord": lambda app: collecting(app).apply_async(),
    "a chord with a link": lambda app: collecting(app).apply_async(link=say.on(app).s("linked")),
    "a link": lambda app: add.on(app).apply_async((1, 2), link=show.on(app).s("link")),
    "an error link": lambda app: fail.on(app).apply_async(("x",), link_error=on_error.on(app).s()),
    "a map": lambda app: total.on(app).map([[1, 2], [3]]).apply_async(),
    "chunks": lambda app: add.on(app).chunks([(1, 2), (3, 4)], 1).apply_async(),
    "another's parent": lambda app: show.on(app).apply_async(("mine",), parent_id="other"),
    "no child": lambda app: show.on(app).apply_async(("mine",), add_to_parent=False),
}


@task(bind=True)
def launch(self: Task, what: str) -> str:
    result = LAUNCHES[what](self.app)
    note(type(result).__name__, result.id, result.parent and result.parent.id)
    note([child.id for child in self.request.children])
    return what


@task(bind=True)
def launch_and_fail(self: Task, what: str) -> NoReturn:
    LAUNCHES[what](self.app)
    raise LookupError(what)


@task(bind=True, trail=False)
def launch_without_a_trail(self: Task) -> int:
    add.on(self.app).delay(1, 2)
    return len(self.request.children)


@task(bind=True)
def launch_in_turn(self: Task, depth: int) -> int:
    note(depth, self.request.parent_id, self.request.root_id)
    if depth:
        launch_in_turn.on(self.app).delay(depth - 1)
    return depth


@task(bind=True)
def call_in_place(self: Task) -> list[Any]:
    """Everything that runs in the body and sends nothing."""
    app = self.app
    with allow_join_result():
        in_turn = chain(add.on(app).s(1, 2), add.on(app).s(3), app=app).apply()
    return [
        add.on(app).s(1, 2)(),
        add.on(app).s(1)(2),
        add.on(app)(3, 4),
        add.on(app).apply((5, 6)).result,
        add.on(app).s(7, 8).apply().result,
        in_turn.result,
        [one.result for one in group(add.on(app).s(n, n) for n in range(3)).apply().results],
        fail.on(app).apply(("eager",)).state,
        get_current_worker_task().name,
        current_task.name,
        len(self.request.children),
    ]


@task(bind=True)
def describe_item(self: Task, number: int, *more: int) -> list[Any]:
    """What `celery.map` and its like call has no request of its own, and no id to note under."""
    request = self.request
    worker_task = get_current_worker_task()
    return [
        number,
        *more,
        [request.id, request.parent_id, request.root_id, request.called_directly],
        [current_task.name, worker_task.name, worker_task.request.id],
    ]


@task(bind=True)
def launch_item(self: Task, number: int) -> int:
    say.on(self.app).delay("from an item", number)
    return number


@task()
def fail_at_two(number: int) -> int:
    if number == 2:
        raise LookupError(number)
    return number


# ── bodies that change the canvas ───────────────────────────────────────────────────────────────


def replaced_once_more(app: Celery) -> Any:
    return replace.on(app).s("a task")


REPLACEMENTS: Mapping[str, Callable[[Celery], Any]] = {
    "a task": lambda app: show.on(app).s("replacement"),
    "a task that fails": lambda app: fail.on(app).s("replacement"),
    "a task with options": lambda app: (
        show.on(app).s("replacement").set(headers={"trace": "abc"}, priority=4)
    ),
    "a group": lambda app: group(add.on(app).s(n, n) for n in (1, 2)),
    "a chain": lambda app: chain(add.on(app).s(1, 2), add.on(app).s(3), app=app),
    "a chord": collecting,
    "twice": replaced_once_more,
}


@task(bind=True)
def replace(self: Task, *args: Any) -> NoReturn:
    note("replace", args, self.request.replaced_task_nesting)
    raise self.replace(REPLACEMENTS[args[-1]](self.app))


@task(bind=True)
def replace_with_stamps(self: Task) -> NoReturn:
    replacement = show_stamps.on(self.app).s("replacement")
    replacement.stamp(reason="replaced")
    raise self.replace(replacement)


@task(bind=True)
def extend_the_chord(self: Task, number: int, *, lazy: bool) -> int:
    # It gets the same place as this task; with the same result, no order is seen.
    added = self.add_to_chord(add.on(self.app).s(1, number - 1), lazy=lazy)
    note(type(added).__name__)
    if lazy:
        added.delay()
    return number


@task(bind=True)
def extend_no_chord(self: Task) -> None:
    try:
        self.add_to_chord(add.on(self.app).s(1, 2))
    except ValueError as exc:
        note(exc)


@task(bind=True)
def set_on_the_request(self: Task, name: str, value: Any, *, and_fail: bool = False) -> str:
    setattr(self.request, name, value)
    if and_fail:
        raise LookupError(name)
    return name


@task(bind=True)
def empty_on_the_request(self: Task, name: str, *, and_fail: bool = False) -> str:
    getattr(self.request, name).clear()
    if and_fail:
        raise LookupError(name)
    return name


@task(bind=True)
def append_on_the_request(self: Task, name: str, *, and_fail: bool = False) -> str:
    extra = (on_error if name == "errbacks" else show).on(self.app).s()
    getattr(self.request, name).append(dict(extra))
    if and_fail:
        raise LookupError(name)
    return name


# ── signatures made in a body ───────────────────────────────────────────────────────────────────


@task(bind=True)
def make_signatures(self: Task) -> None:
    app = self.app
    base = add.on(app).s(1)
    note(base, base.clone((5,)), base.clone(kwargs={"y": 3}, priority=2), base.replace((4, 4)))
    note(base.set(priority=3).options, base.clone().set(immutable=True).immutable)
    note(base.replace(kwargs={"y": 1}, options={"queue": "there"}))
    frozen = base.clone((2,))
    result = frozen.freeze("an id", group_id="a group", root_id="a root", parent_id="a parent")
    note(result.id, sorted(frozen.options.items()))
    note(add.on(app).si(1, 2).clone((9,)), add.on(app).subtask((1,)), add.on(app).signature((2,)))
    many = chain(base, group(base, base), total.on(app).s(), app=app)
    note(many, many.clone().tasks, list(many.flatten_links()))
    note(signature(dict(base), app=app) == base, base.name, base.type is add.on(app))


@task(bind=True)
def run_signature(self: Task, canvas: Any) -> str:
    """A signature may be an argument."""
    note(canvas)
    result = signature(canvas, app=self.app).delay()
    note(result.id)
    return "run"


# ── stamps ──────────────────────────────────────────────────────────────────────────────────────


class Audit(StampingVisitor):  # type: ignore[misc]
    """Writes on each signature what it is."""

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"audit": f"{sig.name}{tuple(sig.args)}", "stamped_headers": ["audit"]}

    def on_callback(self, callback: Any, **headers: Any) -> dict[str, Any]:
        return {"on_callback": True}

    def on_errback(self, errback: Any, **headers: Any) -> dict[str, Any]:
        return {"on_errback": True}


def stamped(canvas: Any, **stamps: Any) -> Any:
    canvas.stamp(**stamps)
    return canvas.apply_async()


# ── what a client sees in the end ───────────────────────────────────────────────────────────────


def value(app: Celery, result: Any) -> Any:
    return result.get(timeout=5)


def collected(app: Celery, result: Any) -> Any:
    return [(one.id, found) for one, found in result.collect(timeout=5)]


def nodes(app: Celery, result: Any) -> Any:
    graph = result.graph
    return [(node.id, [edge.id for edge in edges]) for node, edges in graph.items()]


def leaf(app: Celery, result: Any) -> Any:
    return result.get_leaf()


def parents(app: Celery, result: Any) -> Any:
    """The states and values of a result and of all before it."""
    seen = []
    while result is not None:
        seen.append(outcome(result))
        result = result.parent
    return seen


def outcome(result: Any) -> Any:
    if isinstance(result, GroupResult):
        return [outcome(member) for member in result.results]
    assert isinstance(result, AsyncResult)
    return result.id, result.state, repr(result.result)


def group_facts(app: Celery, result: GroupResult) -> Any:
    return (
        [result.completed_count(), result.successful(), result.failed(), result.ready()],
        result.join(timeout=5, propagate=False),
        outcome(result),
    )


def leaves(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from leaves(branch)
    else:
        yield str(tree)


def mentions(text: str) -> Callable[[Seen], bool]:
    """Whether anything that was seen of the row's tasks has this text in it."""
    return lambda seen: any(text in leaf for leaf in leaves(seen["tasks"]))


def any_of(*tasks: str) -> tuple[tuple[str, str], ...]:
    """Scrub which of the header's tasks has ended last: it is the parent of the chord's body."""
    return ((rf"<canvas\.(?:{'|'.join(tasks)})\([^<>]*>", "<one of the header>"),)


def launched(what: str, scrub: tuple[tuple[str, str], ...] = (), **expects: Any) -> Row:
    return Row(
        f"canvas: a body launches {what}",
        lambda app: launch.on(app).delay(what),
        expects={"state": "SUCCESS", "result": what, "children": 1, **expects},
        look=collected if "FAILURE" not in expects.get("states", ()) else None,
        scrub=scrub,
        trap=7,
    )


def group_with_errback(app: Celery, errback: Any) -> Any:
    members = group(add.on(app).s(1, 2), fail.on(app).s("x"))
    members.link_error(errback)
    return members.delay()


def sends(canvas: Callable[[Celery], Any]) -> Callable[[Celery], Any]:
    return lambda app: canvas(app).apply_async()


def rolled(*members: Callable[[Celery], Any]) -> Callable[[Celery], Any]:
    return lambda app: chain(*(member(app) for member in members), app=app).apply_async()


SUCCESS = "SUCCESS"
FAILURE = "FAILURE"

CHAINS = [
    Row(
        "chain: a result is the first argument of the next",
        lambda app: chain(add.on(app).s(1, 2), add.on(app).s(3), add.on(app).s(y=4)).delay(),
        expects={
            "tasks": 3,
            "states": [SUCCESS] * 3,
            "notes": sorted(["'add'"] * 3 + ["1", "2", "3", "3", "6", "4"]),
            "looked": r"'SUCCESS', '10'.*'SUCCESS', '6'.*'SUCCESS', '3'",
            "children": 1,
        },
        look=parents,
    ),
    Row(
        "chain: what its members see of it",
        rolled(
            lambda app: show.on(app).s(1),
            lambda app: show.on(app).s(2),
            lambda app: show.on(app).s(3),
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "check": mentions("<canvas.show(1,)>")},
        look=nodes,
    ),
    Row(
        "chain: immutable signatures get no result",
        rolled(lambda app: add.on(app).si(1, 2), lambda app: add.on(app).si(3, 4)),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "looked": "^7$"},
        look=value,
    ),
    Row(
        "chain: after a failure the rest is not run",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: fail.on(app).s("here"),
            lambda app: say.on(app).s("never"),
            lambda app: say.on(app).s("never either"),
        ),
        expects={
            "tasks": 2,
            "states": [FAILURE, SUCCESS],
            "looked": r"(?s)FAILURE.*FAILURE.*FAILURE.*SUCCESS', '3'",
        },
        look=parents,
    ),
    Row(
        "chain: Ignore ends it",
        rolled(lambda app: ignore.on(app).s(1), lambda app: say.on(app).s("never")),
        expects={"tasks": 1, "states": ["STARTED"], "looked": "PENDING.*STARTED"},
        look=parents,
    ),
    Row(
        "chain: a member retries and the rest goes on",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: add_at_second_try.on(app).s(3),
            lambda app: add.on(app).s(4),
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": "^10$"},
        look=value,
    ),
    Row(
        "chain: a member fails at its last try",
        rolled(lambda app: fail_at_each_try.on(app).s("x"), lambda app: say.on(app).s("never")),
        expects={
            "tasks": 1,
            "error": "LookupError",
            "runs": 2,
            "notes": ["'try'"] * 2 + ["0", "1"],
        },
    ),
    Row(
        "chain: in a chain",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: chain(add.on(app).s(3), show.on(app).s("inner"), app=app),
            lambda app: show.on(app).s("outer"),
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": "outer"},
        look=collected,
    ),
    Row(
        "chain: with options for all",
        lambda app: chain(show.on(app).s(1), show.on(app).s(2)).apply_async(
            priority=4, headers={"trace": "abc"}, countdown=0
        ),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("'trace': 'abc'")},
    ),
    Row(
        "chain: a link and an errback on it",
        lambda app: chain(add.on(app).s(1, 2), add.on(app).s(3)).apply_async(
            link=show.on(app).s("link"), link_error=on_error.on(app).s()
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "check": mentions("'link'")},
    ),
    Row(
        "chain: an errback on it is called by the member that fails",
        lambda app: chain(add.on(app).s(1, 2), fail.on(app).s("x"), say.on(app).s()).apply_async(
            link_error=on_error.on(app).s()
        ),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS], "check": mentions("'errback'")},
    ),
    Row(
        "chain: each member has an errback of its own",
        rolled(
            lambda app: add.on(app).s(1, 2).on_error(on_error.on(app).s("first")),
            lambda app: fail.on(app).s("x").on_error(on_error_bound.on(app).s("second")),
            lambda app: say.on(app).s("never").on_error(on_error.on(app).s("third")),
        ),
        expects={"tasks": 3, "check": mentions("('second',)")},
    ),
    Row(
        "chain: a member's results are ignored",
        rolled(lambda app: say_and_ignore.on(app).s(1), lambda app: add.on(app).s(2)),
        expects={"tasks": 2, "states": ["PENDING", SUCCESS], "looked": "^3$"},
        look=value,
    ),
    Row(
        "chain: a member has expired",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: show.on(app).s("late").set(expires=-10),
            lambda app: say.on(app).s("never"),
        ),
        expects={"tasks": 2, "states": ["REVOKED", SUCCESS], "log": "expir"},
        scrub=((r"\([\d.]+s ago\)", "(<time> ago)"),),
    ),
]

GROUPS = [
    Row(
        "group: of several",
        lambda app: group(add.on(app).s(number, number) for number in range(4)).delay(),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": r"\[0, 2, 4, 6\]"},
        look=group_facts,
    ),
    Row(
        "group: of one",
        lambda app: group([show.on(app).s("alone")]).delay(),
        expects={"tasks": 1, "states": [SUCCESS], "looked": r"\['alone'\]"},
        look=group_facts,
    ),
    Row(
        "group: of none",
        lambda app: group([], app=app).apply_async(),
        expects={"tasks": 0, "looked": r"\[0, True, False, True\]"},
        look=group_facts,
    ),
    Row(
        "group: one fails",
        lambda app: group(add.on(app).s(1, 2), fail.on(app).s("x"), add.on(app).s(3, 4)).delay(),
        expects={
            "tasks": 3,
            "states": [FAILURE, SUCCESS, SUCCESS],
            "looked": r"\[2, False, True, True\].*\[3, LookupError\('x'\), 7\]",
        },
        look=group_facts,
    ),
    Row(
        "group: an errback on it",
        lambda app: group_with_errback(app, on_error.on(app).s()),
        expects={"tasks": 2, "check": mentions("'errback'")},
    ),
    Row(
        "group: of chains",
        lambda app: group(
            chain(add.on(app).s(number, 1), show.on(app).s("then")) for number in range(2)
        ).delay(),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": r"\['then', 'then'\]"},
        look=group_facts,
    ),
    Row(
        "group: in a group",
        lambda app: group(
            add.on(app).s(1, 2), group(show.on(app).s("inner", number) for number in range(2))
        ).delay(),
        expects={"tasks": 3, "states": [SUCCESS] * 3},
    ),
    Row(
        "group: at the end of a chain",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: group(show.on(app).s("member", number) for number in range(2)),
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": "SUCCESS.*SUCCESS.*SUCCESS"},
        look=parents,
    ),
]

CHORDS = [
    Row(
        "chord: the header's results go into the body, in their order",
        sends(
            lambda app: chord(
                [add.on(app).s(number, number) for number in range(3)], say.on(app).s("body")
            )
        ),
        expects={
            "tasks": 4,
            "states": [SUCCESS] * 4,
            "check": mentions("[0, 2, 4]"),
        },
        look=nodes,
        scrub=any_of("add"),
    ),
    Row(
        "chord: what header and body see of it",
        sends(
            lambda app: chord(
                [show.on(app).s(number) for number in range(2)], show.on(app).s("body")
            )
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": "^'body'$"},
        look=value,
        scrub=any_of("show"),
    ),
    Row(
        "chord: of one",
        sends(lambda app: chord([add.on(app).s(1, 2)], say.on(app).s("body"))),
        expects={"tasks": 2, "states": [SUCCESS] * 2},
        look=parents,
    ),
    Row(
        "chord: of none",
        sends(lambda app: chord([], say.on(app).s("body"), app=app)),
        expects={"tasks": 1, "states": [SUCCESS], "check": mentions("([], 'body')")},
    ),
    Row(
        "chord: one of the header fails",
        sends(lambda app: chord([add.on(app).s(1, 2), fail.on(app).s("x")], say.on(app).s())),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS], "looked": "ChordError"},
        look=parents,
        scrub=any_of("add", "fail"),
    ),
    Row(
        "chord: an errback of the body is called for the header",
        sends(
            lambda app: chord(
                [add.on(app).s(1, 2), fail.on(app).s("x")],
                total.on(app).s().on_error(on_error_say.on(app).s()),
            )
        ),
        expects={"tasks": 3, "states": [FAILURE, SUCCESS, SUCCESS], "check": mentions("'errback'")},
        scrub=any_of("add", "fail"),
    ),
    Row(
        "chord: a bound errback of the body is called for the header",
        sends(
            lambda app: chord(
                [add.on(app).s(1, 2), fail.on(app).s("x")],
                total.on(app).s().on_error(on_error_bound.on(app).s("of the body")),
            )
        ),
        # Its root is the body, which is never sent; so it is seen among the results only.
        expects={"check": lambda seen: "canvas.on_error_bound" in str(seen["results"])},
        scrub=any_of("add", "fail"),
    ),
    Row(
        "chord: its body fails",
        sends(
            lambda app: chord(
                [add.on(app).s(1, 2), add.on(app).s(3, 4)],
                fail.on(app).s("body").on_error(on_error.on(app).s("of the body")),
            )
        ),
        expects={"tasks": 3, "states": [FAILURE, SUCCESS, SUCCESS], "check": mentions("'errback'")},
        scrub=any_of("add"),
    ),
    Row(
        "chord: a member retries",
        sends(
            lambda app: chord(
                [add.on(app).s(1, 2), add_at_second_try.on(app).s(3, 4)], total.on(app).s()
            )
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": "^10$"},
        look=value,
        scrub=any_of("add", "add_at_second_try"),
    ),
    Row(
        "chord: of groups and chains",
        sends(
            lambda app: chord(
                [
                    chain(add.on(app).s(1, 2), add.on(app).s(7)),
                    # With the same result, for they have the same place.
                    group(add.on(app).s(number, 10 - number) for number in range(2)),
                ],
                say.on(app).s("body"),
            )
        ),
        expects={"tasks": 5, "states": [SUCCESS] * 5, "check": mentions("[10, 10, 10]")},
        scrub=any_of("add"),
    ),
    Row(
        "chord: in a chain",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: chord([add.on(app).s(3), add.on(app).s(4)], total.on(app).s()),
            lambda app: add.on(app).s(100),
        ),
        expects={"tasks": 5, "states": [SUCCESS] * 5, "looked": "'113'"},
        look=parents,
        scrub=any_of("add"),
    ),
    Row(
        "chord: a group in a chain becomes one",
        rolled(
            lambda app: make_list.on(app).s(3),
            lambda app: group(total.on(app).s(plus) for plus in (0, 10)),
            lambda app: total.on(app).s(),
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": "^16$"},
        look=value,
        scrub=any_of("total"),
    ),
    Row(
        "chord: in a chord",
        sends(
            lambda app: chord(
                [
                    chord([add.on(app).s(1, 2), add.on(app).s(3, 4)], total.on(app).s()),
                    add.on(app).s(10, 20),
                ],
                total.on(app).s(100),
            )
        ),
        expects={"tasks": 5, "states": [SUCCESS] * 5, "looked": "^140$"},
        look=value,
        scrub=any_of("add", "total"),
    ),
    Row(
        "chord: as the body of a chord",
        sends(
            lambda app: chord(
                [add.on(app).s(1, 2), add.on(app).s(3, 4)],
                chord([total.on(app).s(10), total.on(app).s(20)], total.on(app).s(100)),
            )
        ),
        expects={"tasks": 5, "states": [SUCCESS] * 5, "looked": "150"},
        look=value,
        scrub=any_of("add", "total"),
    ),
    Row(
        "chord: a failure in a chain of the header",
        sends(
            lambda app: chord(
                [
                    chain(fail.on(app).s("x"), say.on(app).s("never")),
                    add.on(app).s(1, 2),
                ],
                total.on(app).s(),
            )
        ),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS]},
        look=parents,
        scrub=any_of("add", "fail"),
    ),
]

LINKS = [
    Row(
        "link: several, with arguments and without",
        lambda app: add.on(app).apply_async(
            (1, 2),
            link=[
                show.on(app).s("first"),
                show.on(app).si("second"),
                say.on(app).s("third", key="word"),
            ],
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "children": 1},
        look=collected,
    ),
    Row(
        "link: a link has a link",
        lambda app: (
            add.on(app)
            .s(1, 2)
            .apply_async(link=add.on(app).s(10).set(link=[add.on(app).s(100).set(priority=2)]))
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": "^113$"},
        look=leaf,
    ),
    Row(
        "link: a chain",
        lambda app: add.on(app).apply_async(
            (1, 2), link=chain(add.on(app).s(10), add.on(app).s(100))
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3},
        look=nodes,
    ),
    Row(
        "link: a group",
        lambda app: add.on(app).apply_async(
            (1, 2), link=group(add.on(app).s(10), add.on(app).s(100))
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3},
        look=nodes,
    ),
    Row(
        "link: a chord",
        lambda app: add.on(app).apply_async(
            (1, 2), link=chord([add.on(app).s(10), add.on(app).s(100)], total.on(app).s())
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4},
        look=nodes,
        scrub=any_of("add"),
    ),
    Row(
        "link: not after a failure",
        lambda app: fail.on(app).apply_async(("x",), link=say.on(app).s("never")),
        expects={"tasks": 1, "state": FAILURE},
    ),
    Row(
        "link: not after Ignore",
        lambda app: ignore.on(app).apply_async(link=say.on(app).s("never")),
        expects={"tasks": 1, "state": "STARTED"},
    ),
    Row(
        "link: once, after a retry",
        lambda app: add_at_second_try.on(app).apply_async((1, 2), link=show.on(app).s("once")),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "runs": 2},
    ),
]

ERRBACKS = [
    Row(
        "errback: called as a function",
        lambda app: fail.on(app).apply_async(("x",), link_error=on_error.on(app).s()),
        expects={
            "tasks": 1,
            "state": FAILURE,
            "check": mentions("<builtins.LookupError> LookupError('x')"),
        },
    ),
    Row(
        "errback: called as a function, with arguments of its own",
        lambda app: fail.on(app).apply_async(("x",), link_error=on_error.on(app).s("more", 1)),
        expects={"tasks": 1, "state": FAILURE, "check": mentions("('more', 1)")},
    ),
    Row(
        "errback: what it sees of an exception with a cause",
        lambda app: fail_because.on(app).apply_async(("x",), link_error=on_error_look.on(app).s()),
        expects={"tasks": 1, "state": FAILURE, "check": mentions("['fail_because']")},
    ),
    Row(
        "errback: bound, called as a task",
        lambda app: fail.on(app).apply_async(("x",), link_error=on_error_bound.on(app).s("more")),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS], "check": mentions("'bound errback'")},
    ),
    Row(
        "errback: immutable",
        lambda app: fail.on(app).apply_async(("x",), link_error=show.on(app).si("immutable")),
        expects={"tasks": 2, "check": mentions("('immutable',)")},
    ),
    Row(
        "errback: several, of all kinds",
        lambda app: fail.on(app).apply_async(
            ("x",),
            link_error=[
                on_error.on(app).s("first"),
                on_error_bound.on(app).s("second"),
                on_error.on(app).s("third"),
                on_error_with_id.on(app).s(),
            ],
        ),
        expects={"tasks": 3, "states": [FAILURE, SUCCESS, SUCCESS]},
    ),
    Row(
        "errback: one fails, and the next is called",
        lambda app: fail.on(app).apply_async(
            ("x",), link_error=[on_error_fail.on(app).s(), on_error.on(app).s("next")]
        ),
        expects={"tasks": 1, "state": FAILURE, "check": mentions("'failing errback'")},
    ),
    Row(
        "errback: launches a task",
        lambda app: fail.on(app).apply_async(("x",), link_error=on_error_launch.on(app).s()),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS], "check": mentions("'launched'")},
        look=lambda app, result: [child.id for child in result.children or ()],
    ),
    Row(
        "errback: only after the last try",
        lambda app: fail_at_each_try.on(app).apply_async(("x",), link_error=on_error.on(app).s()),
        expects={"state": FAILURE, "runs": 2, "check": mentions("'errback'")},
    ),
    Row(
        "errback: of an errback",
        lambda app: fail.on(app).apply_async(
            ("x",),
            link_error=fail.on(app).si("errback").on_error(on_error.on(app).s("of the errback")),
        ),
        expects={"states": [FAILURE], "check": mentions("'errback'")},
    ),
    Row(
        "errback: nobody knows it",
        lambda app: fail.on(app).apply_async(
            ("x",), link_error=signature("canvas.unknown", app=app)
        ),
        expects={"tasks": 2, "states": [FAILURE] * 2},
        # Elsewhere two threads log at the same time.
        pools=("prefork", "solo"),
    ),
]

STAMPS = [
    Row(
        "stamps: of a task, and its link",
        lambda app: stamped(
            show_stamps.on(app).s("x").set(link=[show_stamps.on(app).s("link")]), reason="audit"
        ),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("'reason': 'audit'")},
    ),
    Row(
        "stamps: by a visitor, of a chain",
        lambda app: stamped(
            chain(show_stamps.on(app).s(1), show_stamps.on(app).s(2)), visitor=Audit()
        ),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("canvas.show_stamps(2,)")},
    ),
    Row(
        "stamps: by a visitor, of a group",
        lambda app: stamped(
            group(show_stamps.on(app).s(number) for number in range(2)), visitor=Audit()
        ),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("canvas.show_stamps(1,)")},
    ),
    Row(
        "stamps: by a visitor, of a chord",
        lambda app: stamped(
            chord(
                [show_stamps.on(app).s(number) for number in range(2)],
                show_stamps.on(app).s("body"),
            ),
            visitor=Audit(),
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "check": mentions("('body',)")},
        scrub=any_of("show_stamps"),
    ),
    Row(
        "stamps: by a visitor, of link and errback",
        lambda app: stamped(
            fail.on(app).s("x").on_error(show_stamps.on(app).s("errback")), visitor=Audit()
        ),
        expects={"tasks": 2, "states": [FAILURE, SUCCESS], "check": mentions("on_errback")},
    ),
    Row(
        "stamps: of a task that is replaced",
        lambda app: stamped(replace_with_stamps.on(app).s(), reason="audit"),
        expects={"tasks": 1, "states": [SUCCESS], "runs": 2, "check": mentions("replacement")},
    ),
]

MAPS = [
    Row(
        "map: what its items see",
        lambda app: describe_item.on(app).map([1, 2]).delay(),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("'celery.map'")},
        trap=10,
    ),
    Row(
        "starmap: what its items see",
        lambda app: describe_item.on(app).starmap([(1, 2), (3, 4)]).delay(),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("'celery.starmap'")},
        trap=10,
    ),
    Row(
        "chunks",
        lambda app: add.on(app).chunks([(n, n) for n in range(5)], 2).apply_async(),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "looked": r"\[\[0, 2\], \[4, 6\], \[8\]\]"},
        look=value,
        trap=10,
    ),
    Row(
        "map: its items launch tasks",
        lambda app: launch_item.on(app).map([1, 2]).delay(),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "children": 2, "result": [1, 2]},
        look=nodes,
    ),
    Row(
        "map: an item fails",
        lambda app: (
            fail_at_two.on(app)
            .map([1, 2, 3])
            .apply_async(link_error=on_error.on(app).s("of the map"))
        ),
        expects={
            "tasks": 1,
            "error": "LookupError",
            "trace": r"in fail_at_two",
            "check": mentions("'of the map'"),
        },
    ),
    Row(
        "map: with options, and results ignored",
        lambda app: describe_item.on(app).map([1]).apply_async(priority=3, ignore_result=True),
        # Older versions of Celery store its result all the same.
        expects={"tasks": 1, "log": "succeeded in"},
    ),
    Row(
        "map: in a chain",
        rolled(lambda app: add.on(app).map([]), lambda app: show.on(app).s("then")),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("([], 'then')")},
    ),
    Row(
        "map: retries",
        lambda app: add_at_second_try.on(app).starmap([(1, 2)]).delay(),
        expects={"tasks": 1, "runs": 1},
    ),
]

REPLACED = [
    Row(
        "replace: by a task",
        lambda app: replace.on(app).apply_async(("a task",), link=say.on(app).s("link")),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "check": mentions("('replacement',)")},
        look=nodes,
    ),
    Row(
        "replace: by a task that fails",
        lambda app: replace.on(app).apply_async(
            ("a task that fails",), link_error=on_error.on(app).s()
        ),
        expects={"tasks": 1, "state": FAILURE, "check": mentions("'errback'")},
    ),
    Row(
        "replace: by a task with options",
        lambda app: replace.on(app).delay("a task with options"),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("'trace': 'abc'")},
    ),
    Row(
        "replace: by a group",
        lambda app: replace.on(app).delay("a group"),
        expects={"state": SUCCESS, "result": [2, 4]},
        look=nodes,
        scrub=any_of("add"),
    ),
    Row(
        "replace: by a chain",
        lambda app: replace.on(app).delay("a chain"),
        expects={"state": SUCCESS, "result": 6},
        look=nodes,
    ),
    Row(
        "replace: by a chord",
        lambda app: replace.on(app).delay("a chord"),
        expects={"state": SUCCESS, "result": 10},
        look=nodes,
        scrub=any_of("add"),
    ),
    Row(
        "replace: by a task that is replaced",
        lambda app: replace.on(app).delay("twice"),
        expects={"state": SUCCESS, "runs": 3, "tasks": 1},
    ),
    Row(
        "replace: in a chain",
        rolled(
            lambda app: add.on(app).s(1, 2),
            lambda app: replace.on(app).s("a chain"),
            lambda app: add.on(app).s(100),
        ),
        expects={"looked": "^106$"},
        look=value,
    ),
    Row(
        "replace: by a group, in a chain",
        rolled(lambda app: replace.on(app).s("a group"), lambda app: total.on(app).s()),
        expects={"looked": "^6$"},
        look=value,
        scrub=any_of("add"),
    ),
    Row(
        "replace: in a chord",
        sends(
            lambda app: chord(
                [replace.on(app).s("a chain"), add.on(app).s(1, 2)], total.on(app).s()
            )
        ),
        expects={"looked": "^9$"},
        look=value,
        scrub=any_of("add", "replace"),
    ),
    Row(
        "add_to_chord",
        sends(
            lambda app: chord(
                [extend_the_chord.on(app).s(5, lazy=False), add.on(app).s(2, 3)], total.on(app).s()
            )
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": "^15$"},
        look=value,
        scrub=any_of("add", "extend_the_chord"),
    ),
    Row(
        "add_to_chord: called later",
        sends(
            lambda app: chord(
                [extend_the_chord.on(app).s(5, lazy=True), add.on(app).s(2, 3)], total.on(app).s()
            )
        ),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": "^15$"},
        look=value,
        scrub=any_of("add", "extend_the_chord"),
    ),
    Row(
        "add_to_chord: outside of a chord",
        lambda app: extend_no_chord.on(app).delay(),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("not member of any chord")},
    ),
]

CHANGED = [
    Row(
        "canvas: a body empties its callbacks in place",
        lambda app: empty_on_the_request.on(app).apply_async(
            ("callbacks",), link=say.on(app).s("never")
        ),
        expects={"tasks": 1, "state": SUCCESS},
    ),
    Row(
        "canvas: a body empties its chain in place",
        rolled(
            lambda app: empty_on_the_request.on(app).s("chain"), lambda app: say.on(app).s("never")
        ),
        expects={"tasks": 1, "state": SUCCESS},
    ),
    Row(
        "canvas: a body empties its errbacks in place",
        lambda app: empty_on_the_request.on(app).apply_async(
            ("errbacks",), {"and_fail": True}, link_error=on_error.on(app).s("never")
        ),
        expects={"tasks": 1, "state": FAILURE, "notes": []},
    ),
    Row(
        "canvas: a body takes its errbacks away",
        lambda app: set_on_the_request.on(app).apply_async(
            ("errbacks", None), {"and_fail": True}, link_error=on_error.on(app).s("never")
        ),
        expects={"tasks": 1, "state": FAILURE, "notes": []},
    ),
    Row(
        "canvas: a body takes its chain away and fails",
        lambda app: chain(
            set_on_the_request.on(app).s("chain", None, and_fail=True), say.on(app).s("never")
        ).apply_async(),
        expects={"tasks": 1, "state": FAILURE, "looked": "PENDING.*FAILURE"},
        look=parents,
    ),
    Row(
        "canvas: a body leaves its chord",
        sends(
            lambda app: chord(
                [set_on_the_request.on(app).s("chord", None), add.on(app).s(1, 2)],
                total.on(app).s(),
            )
        ),
        expects={"tasks": 2, "states": [SUCCESS] * 2, "looked": "PENDING"},
        look=parents,
    ),
    Row(
        "canvas: a body adds a callback",
        lambda app: append_on_the_request.on(app).apply_async(
            ("callbacks",), link=say.on(app).s("link")
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3, "children": 1},
    ),
    Row(
        "canvas: a body adds an errback",
        lambda app: append_on_the_request.on(app).apply_async(
            ("errbacks",), {"and_fail": True}, link_error=on_error_bound.on(app).s()
        ),
        expects={"tasks": 2, "state": FAILURE, "check": mentions("'errback'")},
    ),
    Row(
        "canvas: a body adds to its chain what runs next",
        rolled(
            lambda app: append_on_the_request.on(app).s("chain"), lambda app: show.on(app).s("last")
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3},
    ),
]

LAUNCHED = [
    launched("delay", tasks=2),
    launched("apply_async", tasks=2, check=mentions("'abc'")),
    launched("a signature by name", tasks=2),
    launched("a group", tasks=3),
    launched("an empty group", tasks=1, children=0),
    launched("a chain", tasks=3),
    launched("a chord", tasks=4, scrub=any_of("add")),
    launched("a link", tasks=3),
    launched("an error link", tasks=2, states=[FAILURE, SUCCESS]),
    launched("a map", tasks=2),
    launched("chunks", tasks=3),
    launched("another's parent", tasks=2, check=mentions("'other'")),
    launched("no child", tasks=2, children=0),
    Row(
        "canvas: a body launches a chord and fails",
        lambda app: launch_and_fail.on(app).delay("a chord"),
        expects={"tasks": 4, "state": FAILURE, "children": 1},
        look=nodes,
        trap=7,
        scrub=any_of("add"),
    ),
    Row(
        "canvas: a body launches a task and leaves no trail",
        lambda app: launch_without_a_trail.on(app).delay(),
        expects={"tasks": 2, "state": SUCCESS, "result": 0, "children": 0},
    ),
    Row(
        "canvas: bodies launch each other",
        lambda app: launch_in_turn.on(app).delay(3),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": r"3\).*2\).*1\).*0\)"},
        look=collected,
        trap=7,
    ),
    Row(
        "canvas: a body calls others in place",
        lambda app: call_in_place.on(app).delay(),
        expects={
            "result": [
                *(3, 3, 7, 11, 15, 6),
                [0, 2, 4],
                FAILURE,
                "canvas.call_in_place",
                "canvas.call_in_place",
                0,
            ],
        },
        trap=9,
    ),
    Row(
        "canvas: a body makes signatures",
        lambda app: make_signatures.on(app).delay(),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("canvas.add(1, y=3)")},
    ),
    Row(
        "canvas: a body runs a signature that it was given",
        lambda app: run_signature.on(app).delay(
            chain(add.on(app).s(1, 2), show.on(app).s("given"), app=app)
        ),
        expects={"tasks": 3, "states": [SUCCESS] * 3},
        look=collected,
    ),
]

SIGNATURES = [
    Row(
        "signature: set",
        lambda app: (
            show.on(app)
            .s("set")
            .set(queue=f"{app.conf.task_default_queue}-other", priority=6)
            .set(headers={"trace": "abc"}, expires=3600, shadow="an alias")
            .delay()
        ),
        expects={"tasks": 1, "state": SUCCESS, "check": mentions("'trace': 'abc'")},
    ),
    Row(
        "signature: clone and replace",
        lambda app: group(
            add.on(app).s(1).clone((2,)),
            add.on(app).s(1).replace((3, 4)),
            add.on(app).s(1).clone(kwargs={"y": 5}, priority=2),
            add.on(app).si(6, 7).clone((8,)),
        ).delay(),
        expects={"tasks": 4, "states": [SUCCESS] * 4, "looked": r"\[3, 7, 6, 13\]"},
        look=group_facts,
    ),
    Row(
        "signature: frozen, then sent",
        lambda app: frozen(app, show.on(app).s("frozen")),
        expects={"tasks": 1, "state": SUCCESS, "sent": r"\[True"},
    ),
    Row(
        "signature: has expired",
        lambda app: show.on(app).s("late").set(expires=-5).delay(),
        expects={"tasks": 1, "state": "REVOKED", "runs": 0},
    ),
    Row(
        "signature: called with more arguments and keywords",
        lambda app: say.on(app).s("last", key="a", other="b").delay("first", key="c"),
        expects={
            "tasks": 1,
            "result": "last",
            "notes": ["'say'", "('first', 'last')", "{'key': 'c', 'other': 'b'}"],
        },
    ),
]


def frozen(app: Celery, canvas: Any) -> list[Any]:
    before = canvas.freeze()
    after = canvas.apply_async()
    assert isinstance(before, ResultBase)
    return [before.id == after.id, canvas.options["task_id"] == after.id]


ROWS = [
    *CHAINS,
    *GROUPS,
    *CHORDS,
    *LINKS,
    *ERRBACKS,
    *STAMPS,
    *MAPS,
    *REPLACED,
    *CHANGED,
    *LAUNCHED,
    *SIGNATURES,
]

if KEEPS_ORDER:
    ROWS.append(
        Row(
            "replace: by a group, in a chord",
            sends(
                lambda app: chord(
                    [replace.on(app).s("a group"), add.on(app).s(1, 2)], say.on(app).s()
                )
            ),
            expects={"check": mentions("[[2, 4], 3]")},
            look=value,
            scrub=any_of("add", "replace"),
        )
    )

if LINKS_CHORDS:
    ROWS += [
        Row(
            "chord: a link and an errback on it",
            lambda app: collecting(app).apply_async(
                link=show.on(app).s("link"), link_error=on_error.on(app).s()
            ),
            # Which tasks are linked to differs between versions of Celery.
            expects={"check": lambda seen: len(seen["tasks"]) > 2},
            scrub=any_of("add"),
        ),
        launched("a chord with a link", tasks=5, scrub=any_of("add")),
    ]
