"""Writes docs/errors.md: the messages that tests and notebooks provoke, each with its cause and its remedy.

    make errors                      # .venv/bin/python docs/errors.py

The messages are those of the `raise` statements of grpo_engage/ whose text a test expects (`pytest.raises(…, match=…)`
and the strings of that test; `test_fail(…, contains=…)` in notebooks). Cause and remedy are in docs/errors.yaml, by a
piece of the message or by its module. A message without them, and a piece of no message, end the command by name.
"""

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

REPO_ROOT = Path(__file__).resolve().parents[1]
PAGE, ENTRIES = REPO_ROOT / "docs" / "errors.md", REPO_ROOT / "docs" / "errors.yaml"
GAP = "\0"  # what a message fills in, while it is compared
SHORTEST = 12  # characters in a row that a test's string and a message must share


@dataclass
class Message:
    """A `raise` statement: its text with GAP for what is filled in, and the same to be read; who expects it."""

    kind: str
    text: str
    shown: str
    module: str
    tests: set[str] = field(default_factory=set)


def text_of(node: ast.AST) -> tuple[str, str]:
    """A message's expression as (text with GAPs, text to be read)."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, node.value
    if isinstance(node, ast.JoinedStr):
        parts = [text_of(part) for part in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [text_of(node.left), text_of(node.right)]
    elif isinstance(node, ast.FormattedValue):
        inner = node.value
        return GAP, f"⟨{inner.id if isinstance(inner, ast.Name) else '…'}⟩"
    else:
        return GAP, "⟨…⟩"
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def messages() -> list[Message]:
    """Every message that grpo_engage raises with a text of its own, in the order of rooms and modules."""
    found = []
    for path in sorted((REPO_ROOT / "grpo_engage").rglob("*.py")):
        module = ".".join(path.relative_to(REPO_ROOT / "grpo_engage").with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                kind = ast.unparse(node.exc.func)
                text, shown = text_of(node.exc.args[0])
                if len(text.replace(GAP, "")) >= SHORTEST and not kind.startswith("_"):
                    found.append(Message(kind, text, shown, module))
    return found


def strings(node: ast.AST) -> set[str]:
    """The strings in `node`, those with placeholders as their pieces."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def expectations() -> Iterator[tuple[str, str]]:
    """(a string that a test or a notebook expects in an error, where)."""
    for path in sorted((REPO_ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            source = ast.unparse(node)
            if isinstance(node, ast.FunctionDef) and "raises(" in source:
                yield from ((text, f"tests/{path.name}") for text in strings(node))
    for path in sorted((REPO_ROOT / "nbs").rglob("[0-9][0-9]_*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "test_fail(" in source and not source.startswith("#|"):
                yield from ((text, path.relative_to(REPO_ROOT).as_posix()) for text in strings(ast.parse(source)))


def pieces(text: str) -> set[str]:
    """Every run of SHORTEST characters of `text` that has no GAP in it."""
    runs = re.split(f"{GAP}|\\.\\*\\??", text.replace("\\", ""))
    return {run[place : place + SHORTEST] for run in runs for place in range(len(run) - SHORTEST + 1)}


def provoked() -> list[Message]:
    """The messages that somebody expects, with their `tests`."""
    found, holders = messages(), defaultdict(set)
    for place, message in enumerate(found):
        for piece in pieces(message.text):
            holders[piece].add(place)
    for text, where in expectations():
        for place in set().union(*(holders.get(piece, ()) for piece in pieces(text))):
            found[place].tests.add(where)
    return [message for message in found if message.tests]


def topic_of(message: Message, topics: list[dict]) -> dict | None:
    """The topic with the longest piece of the message, else the one that has its module or room; None without."""
    found = [(len(piece), topic) for topic in topics for piece in topic.get("messages", ()) if piece in message.shown]
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    places = (message.module, message.module.split(".")[0])
    return next((topic for place in places for topic in topics if place in topic.get("modules", ())), None)


def line_of(shown: str, those: list[Message]) -> str:
    """A message, kinds, modules and the tests that expect it, as an item of a list."""
    kinds, modules = (" / ".join(sorted({getattr(one, name) for one in those})) for name in ("kind", "module"))
    tests = sorted(set().union(*(one.tests for one in those)))
    text = " ".join(shown.split())
    return f"- `` {text} ``  \n  {kinds} · {modules} · " + ", ".join(f"[{test}](../{test})" for test in tests[:3])


def page(found: list[Message], topics: list[dict]) -> tuple[str, list[str]]:
    """The page, and what is wrong: messages without a topic, topics and pieces of messages without a message."""
    held, wrong = defaultdict(lambda: defaultdict(list)), []
    for message in found:
        topic = topic_of(message, topics)
        if topic is None:
            wrong.append(f"no topic for {message.shown!r} of {message.module}: add a piece of it, or the module")
        else:
            held[topic["topic"]][message.shown].append(message)
    shown = [message.shown for message in messages()]
    wrong += [f"topic {topic['topic']!r}: no message is left of it" for topic in topics if topic["topic"] not in held]
    wrong += [f"topic {topic['topic']!r}: no message holds {piece!r}" for topic in topics
              for piece in topic.get("messages", ()) if not any(piece in text for text in shown)]
    parts = ["# Errors\n\nWhat the tests provoke on purpose, by topic; ⟨…⟩ is filled in. Search it for words of your "
             "message.\nWritten by `make errors` from the tests and `errors.yaml`; a test fails where it is stale."]
    for topic in topics:
        lines = [line_of(text, those) for text, those in held[topic["topic"]].items()]
        parts.append(f"## {topic['topic']}\n\n**Cause.** {topic['cause']}\n\n**Remedy.** {topic['remedy']}\n")
        parts[-1] += "\n" + "\n".join(lines)
    return "\n\n".join(parts) + "\n", wrong


def main() -> int:
    """Writes the page; returns the exit code."""
    topics = yaml.safe_load(ENTRIES.read_text(encoding="utf-8"))
    text, wrong = page(found := provoked(), topics)
    PAGE.write_text(text, encoding="utf-8")
    for line in wrong:
        print(f"docs/errors.yaml: {line}", file=sys.stderr)
    print(f"docs/errors.md: {len(found)} messages, {len(topics)} topics, {len(wrong)} to mend")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
