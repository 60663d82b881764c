"""The split follows from content alone, and one that is too small names one that does."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.holdout import MIN_HELDOUT, HoldoutCheck, fraction_of, group_fraction
from fmcore.data.normalize import content_id
from fmcore.errors import DataError


@pytest.mark.parametrize(
    ("document_id", "place"), [("00000000", 0.0), ("80000000", 0.5), ("ffffffff", 1 - 2**-32), ("40000000", 0.25)]
)
def test_a_place_is_the_ids_first_32_bits(document_id: str, place: float) -> None:
    assert fraction_of(document_id + "f" * 24) == place


def test_places_are_uniform() -> None:
    places = sorted(fraction_of(content_id(str(number))) for number in range(2000))
    largest_gap = max(abs(place - number / 2000) for number, place in enumerate(places))
    assert largest_gap < 1.63 / 2000**0.5  # Kolmogorov-Smirnov at 1 %


def test_a_group_has_one_place() -> None:
    assert group_fraction("a") == fraction_of(content_id("a")) != group_fraction("b")


PLACES = st.lists(st.floats(0, 1, exclude_max=True), max_size=60)


def heldout(places: list[float], holdout: float) -> tuple[HoldoutCheck, int]:
    check = HoldoutCheck("source x", holdout)
    return check, sum([check.is_heldout(place) for place in places])


@settings(deadline=None)
@given(places=PLACES, holdout=st.floats(0.001, 0.999))
def test_what_lies_below_holdout_is_held_out(places: list[float], holdout: float) -> None:
    assert heldout(places, holdout)[1] == sum(place < holdout for place in places)


@settings(deadline=None)
@given(places=st.lists(st.floats(0, 0.99), min_size=20, max_size=60), share=st.floats(0, 1))
def test_the_holdout_that_is_named_works(places: list[float], share: float) -> None:
    check, num = heldout(places, share * sorted(places)[MIN_HELDOUT - 1])  # too little, by less or more
    assert num < MIN_HELDOUT
    with pytest.raises(DataError) as refused:
        check.check(num, setting="data.holdout")
    message = str(refused.value)
    assert message.startswith(f"source x: only {num} of {len(places)} documents are held out for evaluation")
    named = float(re.search(r"set data\.holdout to ([\d.]+)$", message)[1])
    assert 0 < named < 1
    again, num_again = heldout(places, named)
    assert num_again >= MIN_HELDOUT
    again.check(num_again, setting="data.holdout")
    assert heldout(places, named - 0.002)[1] < MIN_HELDOUT  # and is no larger than it must be


def test_with_too_few_documents_no_holdout_would_do() -> None:
    check, num = heldout([number / 19 for number in range(19)], 0.1)
    with pytest.raises(DataError, match=r"only 2 of 19 .* give it more documents, or cut them smaller with split_on"):
        check.check(num, setting="data.holdout")


@pytest.mark.parametrize("places", [[], [0.01] * 10, [0.01] * 10 + [0.5] * 90])
def test_enough_or_nothing_at_all_passes(places: list[float]) -> None:
    check, num = heldout(places, 0.1)
    check.check(num, setting="data.holdout")
