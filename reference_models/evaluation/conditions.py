"""Which attributes the network receives for each case: the true ones, and others as a test.

Shapes: N cases, A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.cases import UNKNOWN, Case
from ..data.splits import absent_values
from ..errors import shown
from .trained_run import Member, TrainedRun

AS_GIVEN = "as given"


def given_attributes(cases: Sequence[Case]) -> np.ndarray:
    """Gives the attributes that the data state for each case: int64 (N, A)."""
    return np.array([case.attributes for case in cases], dtype=np.int64).reshape(len(cases), -1)


def left_out_note(cases: Sequence[Case]) -> str:
    """Says which cases are left out, and why; an empty text if there are none."""
    ids = [case.case_id for case in cases]
    return (
        f"These cases were left out, because an attribute is not known: {shown(ids)}."
        if ids
        else ""
    )


def attributes_told(run: TrainedRun, seed: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Gives the attributes that the network receives under each condition that can be run.

    Args:
        run: the run, whose cases are predicted.
        seed: the seed that draws the shuffled and the wrong attributes.

    Returns:
        For each condition the attributes (N, A), and for every condition, run or not, a note.
    """
    given_NA = given_attributes(run.cases)
    told, left_out = {AS_GIVEN: given_NA}, left_out_note(run.left_out)
    if run.unknown is None:
        why = "This network does not receive the attributes."
        notes = dict.fromkeys(("shuffled", "wrong", "unknown"), f"not run: {why}")
        return told, {AS_GIVEN: joined(why, left_out)} | notes
    given = f"Each case had its true attribute{'s' if given_NA.shape[1] > 1 else ''}."
    if (given_NA == UNKNOWN).any():
        given += " A value that the data do not state was given as unknown."
    notes = {AS_GIVEN: joined(given, left_out)}
    rng = np.random.default_rng(seed)
    told["shuffled"] = given_NA[rng.permutation(len(given_NA))]
    told["wrong"] = given_NA.copy()
    for place, attribute in enumerate(run.dataset.attributes):
        n_values = len(attribute.values)
        others_N = rng.integers(1, max(n_values, 2), len(given_NA))
        known_N = given_NA[:, place] != UNKNOWN
        told["wrong"][known_N, place] = ((given_NA[:, place] + others_N) % n_values)[known_N]
    told["unknown"] = np.full_like(given_NA, UNKNOWN)
    for condition, how in (
        ("shuffled", "The attributes were permuted among the cases"),
        ("wrong", "Each case whose value is known got one of the other values, drawn evenly"),
        ("unknown", "Every attribute was given as unknown"),
    ):
        right = int((told[condition] == given_NA).all(axis=1).sum())
        notes[condition] = f"{how}. {right} of {len(given_NA)} cases got their true values."
    if run.unknown == "error" and run.twin:
        del told["unknown"]
        notes["unknown"] = "not run: The exported file refuses an attribute that is not known."
    elif run.unknown == "error":
        notes["unknown"] += (
            " The network was not trained for unknown values; here it averages over all values."
        )
    if run.unknown == "learned" and not all(_trained_on_unknown(run, m) for m in run.members):
        notes["unknown"] += (
            " No training case was unknown, so the router for unknown values was never trained."
        )
    if untrained := _untrained(run):
        lacking = f"No training case had this value, so it was never learned: {untrained}."
        notes[AS_GIVEN] = joined(notes[AS_GIVEN], lacking)
    return told, notes


def joined(*sentences: str) -> str:
    """Joins sentences of a note, some of which may be empty."""
    return " ".join(filter(None, sentences))


def _trained_on_unknown(run: TrainedRun, member: Member) -> bool:
    cases = run.dataset.cases
    return any(UNKNOWN in case.attributes for case in cases if case.case_id in member.trained)


def _untrained(run: TrainedRun) -> str:
    """Lists the attribute values that no training case had; of several networks, which lacks it."""
    members, parts = run.members, []
    for member in members:
        if values := ", ".join(absent_values(run.dataset, member.trained)):
            parts.append(f"{values} ({member.folder.name})" if len(members) > 1 else values)
    return "; ".join(parts)
