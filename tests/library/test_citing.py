"""Citations are the passages with the largest shares, largest first."""

import pytest
import torch

from llamory.documents import Chunk
from llamory.library.citations import cite, sum_mass_by_chunk

PASSAGES = [Chunk(text, "a.md", text.title(), line) for line, text in enumerate("one two three".split(), start=1)]


def test_a_passages_mass_is_the_sum_over_its_tokens_and_a_mark_in_front_is_nobodys() -> None:
    mass = torch.tensor([[9.0, 1, 2, 3, 4], [0.0, 1, 1, 1, 1]])
    assert sum_mass_by_chunk(mass, [1, 2, 2]).tolist() == [[1, 1], [0, 0], [9, 3]]


def test_those_that_drew_most_come_first_and_shares_are_of_all() -> None:
    cited = cite(PASSAGES, torch.tensor([[6.0, 1.0], [3.0, 3.0], [1.0, 0.0]]), 9)
    assert [(each.location, each.share, each.attention) for each in cited] == [
        ("a.md:2", 0.75, pytest.approx(0.3)),
        ("a.md:1", 0.25, pytest.approx(0.6)),
    ]
    assert (cited[0].text, cited[0].title, cited[0].line, cited[0].source) == ("two", "Two", 2, "a.md")
    assert len(cite(PASSAGES, torch.ones(3, 2), 2)) == 2


def test_where_nothing_was_drawn_the_plain_sums_count() -> None:
    cited = cite(PASSAGES, torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]), 9)
    assert [(each.line, each.share) for each in cited] == [(2, 0.75), (1, 0.25)]
    assert cite(PASSAGES, torch.zeros(3, 2), 9) == []
