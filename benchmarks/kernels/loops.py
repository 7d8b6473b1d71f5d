"""Finds the loops in a kernel's disassembly, and counts the instructions in and out of them."""

from __future__ import annotations

import re
from collections import Counter

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_GUARDED = re.compile(r"/\*[0-9a-f]{4,}\*/\s+@")


def instructions_by_depth(code: str) -> tuple[int, ...]:
    """How many instructions stand outside of loops, in one, in one inside of another, ...

    What fills the space behind a program's end does not count. A branch is counted as taken: the
    number is the most that a warp runs when it passes each loop once.

    Args:
        code: as cuobjdump prints it.

    Example:
        >>> code = '''
        ...     /*0000*/  MOV R1, c[0x0][0x28] ;
        ...     /*0010*/  IADD3 R0, R0, 0x1, RZ ;
        ...     /*0020*/  @P0 BRA 0x10 ;
        ...     /*0030*/  EXIT ;
        ...     /*0040*/  BRA 0x40 ;
        ...     /*0050*/  NOP ;
        ... '''
        >>> instructions_by_depth(code)
        (2, 2)
    """
    instructions, loops = find_loops(code)
    depths = Counter(sum(i in loop for loop in loops) for i in range(len(instructions)))
    return tuple(depths[depth] for depth in range(1 + max(depths, default=0)))


def find_loops(code: str) -> tuple[list[str], list[set[int]]]:
    """The names of all instructions, and of each loop the numbers of those in it."""
    at: list[int] = []
    names: list[str] = []
    target: dict[int, int] = {}
    ends: set[int] = set()
    for line in code.splitlines():
        if not (found := _LINE.search(line)):
            continue
        address, name, operands = int(found[1], 16), found[2], found[3]
        to = re.findall(r"\b0x[0-9a-f]+\b", operands) if name.startswith("BRA") else []
        if name == "NOP" or (to and int(to[-1], 16) == address):
            continue
        if to:
            target[len(at)] = int(to[-1], 16)
        if name.split(".")[0] in ("BRA", "EXIT", "RET") and not _GUARDED.search(line):
            ends.add(len(at))
        at.append(address)
        names.append(name)
    place = {address: i for i, address in enumerate(at)}
    follows = [
        ([] if i in ends or i + 1 == len(at) else [i + 1])
        + ([place[target[i]]] if target.get(i) in place else [])
        for i in range(len(at))
    ]
    bodies: dict[int, set[int]] = {}
    for last, address in target.items():
        first = place.get(address, last + 1)
        if first <= last and last in (body := _loop(first, last, follows)):
            bodies.setdefault(first, set()).update(body)
    return names, list(bodies.values())


def _loop(first: int, last: int, follows: list[list[int]]) -> set[int]:
    """The blocks on paths from ``first`` to ``last`` that do not go back before ``first``.

    Empty if there is none: then the branch back is that of a block that was moved behind.
    """
    before: dict[int, list[int]] = {}
    seen, waiting = {first}, [first]
    while waiting:
        i = waiting.pop()
        for next_ in follows[i]:
            if next_ >= first:
                before.setdefault(next_, []).append(i)
                if next_ not in seen:
                    seen.add(next_)
                    waiting.append(next_)
    if last not in seen:
        return set()
    body, waiting = {first, last}, [last]
    while waiting:
        i = waiting.pop()
        for previous in before.get(i, []) if i != first else []:
            if previous not in body:
                body.add(previous)
                waiting.append(previous)
    return body
