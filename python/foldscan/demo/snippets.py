"""Judging generated Python: the first whole block of a continuation, and whether it parses."""

from __future__ import annotations

import ast
import warnings


def first_block(text: str) -> str:
    """The text up to where its first function, class or statement block ends.

    A block ends before the next unindented line that does not continue it. A text that ends within its block is cut
    after its last whole line, so that running out of tokens alone is no syntax error.
    """
    lines = text.split("\n")
    whole = lines[:-1] if len(lines) > 1 else lines
    opened = False
    for index, line in enumerate(whole):
        unindented = bool(line) and not line[0].isspace()
        continues = (
            line.startswith(("@", ")", "]", "}", "#", '"', "'")) or line.split(":")[0].split(" ")[0] in _CONTINUATIONS
        )
        if opened and unindented and not continues:
            return "\n".join(whole[:index]).rstrip() + "\n"
        opened = opened or line.startswith(("def ", "class ", "async def ")) or line.rstrip().endswith(":")
    return "\n".join(whole).rstrip() + "\n"


_CONTINUATIONS = frozenset({"else", "elif", "except", "finally"})


def parses(code: str) -> bool:
    """Whether ``ast.parse`` takes it as Python. Nothing is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in strings
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
