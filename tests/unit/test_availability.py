"""When nodes are there: against a search second by second, and files with what is wrong in them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import ConfigError, InputError
from fedmerge.sim.availability import availabilities, read_availability
from tests.conftest import make_config

SPANS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: (pair[0], min(sum(pair), 48))), min_size=1
)


@given(SPANS, st.sampled_from([0, 48, 60]), st.integers(0, 150))
def test_it_is_as_long_as_counting_says(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]], period_s: int, now_s: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "spans.csv"
    path.write_text("node,from_s,to_s\n" + "".join(f"a,{start},{end}\n" for start, end in spans))
    found = read_availability(path, period_s)["a"]

    def is_there(second: int) -> bool:
        second = second % period_s if period_s else second
        return any(start <= second < end for start, end in spans)

    expected = next((later - now_s for later in range(now_s, now_s + 200) if is_there(later)), math.inf)
    assert found.away_s(now_s) == expected


def test_made_up_nodes_follow_one_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"text": ""}\n' * 50)
    (tmp_path / "there.csv").write_text("node,from_s,to_s\n" + "".join(f"phone {n},{n},{n + 1}\n" for n in range(5)))
    simulated = "nodes = 50\ndata = 'all.jsonl'\navailability = 'there.csv'\n"
    config, _ = make_config(tmp_path, extra=f"[simulate]\n{simulated}")
    names = [f"node-{number}" for number in range(50)]
    found = availabilities(config, names)
    assert {found[name].away_s(0.0) for name in names} == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert availabilities(config, names[:7]) == {name: found[name] for name in names[:7]}
    with (tmp_path / "there.csv").open("a") as file:
        file.write("node-3,77,78\n")
    assert availabilities(config, names)["node-3"].away_s(0.0) == 77.0


@pytest.mark.parametrize(("text", "said"), [
    ("node,from_s\na,1\n", "there.csv: has no column to_s"),
    ("", "there.csv: has no column from_s"),
    ("node,from_s,to_s\n", "there.csv: has no rows"),
    ("node,from_s,to_s\na,0,1\na,0,x\n", "there.csv:3: from_s and to_s have to be numbers"),
    ("node,from_s,to_s\na,0\n", "there.csv:2: from_s and to_s have to be numbers"),
    ("node,from_s,to_s\na,nan,1\n", "there.csv:2: from_s = nan is not from 0 to below"),
    ("node,from_s,to_s\na,-1,1\n", "there.csv:2: from_s = -1 is not from 0 to below"),
    ("node,from_s,to_s\na,2,2\n", "there.csv:2: from_s = 2 is not from 0 to below to_s = 2"),
    ("node,from_s,to_s\na,2,11\n", "there.csv:2: to_s = 11 is after simulate.availability_period_s = 10"),
    ("node,from_s,to_s\nnoth,2,3\n", "there.csv: no node is called 'noth'; did you mean 'north'?"),
    ("node,from_s,to_s\n\0,2,3\n", "there.csv: no node is called"),
])  # fmt: skip
def test_a_file_that_says_nothing_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "there.csv").write_text(text)
    simulated = "[simulate]\navailability = 'there.csv'\navailability_period_s = 10\n"
    config, _ = make_config(tmp_path, extra=simulated)
    with pytest.raises(InputError, match=re.escape(said)):
        availabilities(config, ["north", "south"])


def test_there_is_one_way_to_be_away(tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("node,from_s,to_s\nnorth,0,1\n")
    with pytest.raises(ConfigError, match="both say when nodes are there"):
        make_config(tmp_path, extra="[simulate]\navailability = 'there.csv'\nonline = 0.5\n")
    for content in (b"\xff\xfe", None):
        if content is None:
            (tmp_path / "there.csv").unlink()
        else:
            (tmp_path / "there.csv").write_bytes(content)
        with pytest.raises(InputError, match="can't be read"):
            read_availability(tmp_path / "there.csv", 0.0)
