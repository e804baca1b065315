"""`llamory search` passes its options on and prints the hits."""

import json


def test_search_lists_rank_score_place_title_and_first_lines(llamory, calls: list[tuple]) -> None:
    ran = llamory("search", "light", "--library", "lib")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        " 1. 0.812  docs/lamp.md:12  Lamps",
        "    A lamp gives light.",
        "    It needs oil.",
        "    And a wick.",
        " 2. 0.500  docs/wick.md:1",
        "    Wicks are cotton [31m.",
    ]
    assert calls[1] == ("search", "light", 10, {"source": None, "mode": "fused"})


def test_search_prints_one_json_document_and_nothing_else(llamory, calls: list[tuple]) -> None:
    options = ["--source", "docs/*.md", "--source", "a", "--mode", "bm25"]
    ran = llamory("search", "light", "--library", "lib", "--top", "1", *options, "--json")
    assert json.loads(ran.out) == {
        "query": "light",
        "library": "lib",
        "mode": "bm25",
        "hits": [
            {
                "rank": 1,
                "location": "docs/lamp.md:12",
                "text": "A lamp gives light.\n\nIt needs oil.\nAnd a wick.\nAnd a match.",
                "source": "docs/lamp.md",
                "title": "Lamps",
                "line": 12,
                "score": 0.8125,
                "page": None,
                "cosine": 0.8125,
                "bm25": None,
            }
        ],
    }
    assert "searching" in ran.err
    assert calls == [
        ("library", "lib", {"model": None, "device": None}),
        ("search", "light", 1, {"source": ["docs/*.md", "a"], "mode": "bm25"}),
    ]


def test_search_that_finds_nothing_is_no_error(llamory, calls: list[tuple]) -> None:
    ran = llamory("search", "nothing", "--library", "lib")
    assert (ran.code, ran.out) == (0, "")
    assert "No passage was found." in ran.err
    assert json.loads(llamory("search", "nothing", "--library", "lib", "--json").out)["hits"] == []


def test_search_needs_at_least_one_place(llamory, calls: list[tuple]) -> None:
    assert llamory("search", "light", "--library", "lib", "--top", "0").code == 2
    assert calls == []


def test_search_can_be_told_where_the_model_went(llamory, calls: list[tuple]) -> None:
    assert llamory("search", "light", "--library", "lib", "--model", "moved").code == 0
    assert calls[0] == ("library", "lib", {"model": "moved", "device": None})
