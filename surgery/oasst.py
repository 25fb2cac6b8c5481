"""Open Assistant's trees of messages to conversations.

Two shapes of rows are read: whole trees (`prompt` with nested `replies`, the published *.trees.jsonl), and the hub's
table of messages (`message_id`, `parent_id`, `text`, `role`), of which the messages of a tree stand together.

By default a tree gives one conversation: from the first message on, at each level the best-ranked reply, as QLoRA did
(arXiv 2305.14314, appendix B.2: "the top reply at each level"). Rank 0 is the best; replies without a rank come after
those that have one, in their own order. Left out with all that follows them are deleted messages, those that reviewers
did not accept (`review_result` false or null), and a last message that nobody answered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import DataError
from surgery.examples import Cells, Conversation

ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Message:
    """One message in the table's terms, and the replies to it."""

    values: Mapping[str, Any]
    replies: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Tree:
    place: str
    root: Message | None


def best_conversations(rows: Iterable[Cells]) -> Iterator[Conversation]:
    """One conversation a tree, or none."""
    for tree in _trees(rows):
        path: list[Message] = []
        level = _kept([tree.root] if tree.root else [], tree.place)
        while level:
            path.append(min(level, key=_rank))
            level = _kept(path[-1].replies, tree.place)
        yield from _conversations(tree.place, [path])


def all_conversations(rows: Iterable[Cells]) -> Iterator[Conversation]:
    """Every way from the first message to a last one, each once: ways that differ in what is cut off are one."""
    for tree in _trees(rows):
        yield from _conversations(tree.place, _paths(_kept([tree.root] if tree.root else [], tree.place), tree.place))


def _paths(level: Sequence[Message], place: str) -> Iterator[list[Message]]:
    pending = [[message] for message in reversed(level)]
    while pending:
        path = pending.pop()
        replies = _kept(path[-1].replies, place)
        pending += [[*path, reply] for reply in reversed(replies)]
        if not replies:
            yield path


def _conversations(place: str, paths: Iterable[list[Message]]) -> Iterator[Conversation]:
    seen: set[tuple[int, ...]] = set()
    for path in paths:
        last = next((n for n in range(len(path), 0, -1) if path[n - 1].values["role"] == "assistant"), 0)
        key = tuple(id(message) for message in path[:last])
        if last and key not in seen:
            seen.add(key)
            yield Conversation(place, tuple(_turn(message.values) for message in path[:last]))


def _turn(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"role": ROLES[values["role"]], "content": values["text"]}


def _rank(message: Message) -> float:
    rank = message.values.get("rank")
    return math.inf if rank is None else float(rank)


def _kept(level: Sequence[Message], place: str) -> list[Message]:
    """Those that were neither deleted nor turned down. Raises: DataError: a message of no known shape."""
    kept = [m for m in level if not m.values.get("deleted") and m.values.get("review_result", True) is True]
    for message in kept:
        if message.values.get("role") not in ROLES or not isinstance(message.values.get("text"), str):
            found = f"found the message {message.values!r:.60}"
            raise DataError(place, found, expected=f"a text and a role, one of {', '.join(ROLES)}")
    return kept


# --- rows to trees


def _trees(rows: Iterable[Cells]) -> Iterator[Tree]:
    """Trees as they stand, or put together from messages. Raises: DataError."""
    table: list[Cells] = []
    begun: set[object] = set()
    for cells in rows:
        if "prompt" in cells.row.values:
            yield Tree(cells.row.place, _nested(cells.row.values["prompt"], cells.row.place))
            continue
        tree = cells.value("tree")
        if not table or table[0].value("tree") != tree:
            yield from _assembled(table)
            if tree in begun:
                found = f"found messages of the tree {tree!r:.60} in two places"
                fix = "Sort the rows by message_tree_id"
                raise DataError(cells.row.place, found, expected="the messages of a tree one after the other", fix=fix)
            begun.add(tree)
            table = []
        table.append(cells)
    yield from _assembled(table)


def _nested(values: object, place: str) -> Message:
    if not isinstance(values, dict) or not isinstance(values.get("replies") or [], list):
        raise DataError(place, f"found the message {values!r:.60}", expected="an object with a list of replies")
    return Message(values, [_nested(reply, place) for reply in values.get("replies") or []])


def _assembled(table: Sequence[Cells]) -> Iterator[Tree]:
    """One tree of the table's messages; a message whose parent is not there is left out with what follows it."""
    if not table:
        return
    missing = [name for name in ("message_id", "parent_id", "text", "role") if name not in table[0].row.values]
    if missing:
        expected = "trees (prompt with replies) or messages (message_id, parent_id, text, role)"
        raise DataError(table[0].row.place, f"found neither prompt nor {missing[0]}", expected=expected)
    messages = {cells.row.values["message_id"]: Message(cells.row.values) for cells in table}
    root = None
    for message in messages.values():
        parent = message.values["parent_id"]
        if parent is None:
            root = message
        elif parent in messages:
            messages[parent].replies.append(message)
    yield Tree(table[0].row.place, root)
