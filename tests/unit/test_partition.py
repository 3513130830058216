"""One data set shared out among nodes: nothing lost, nobody without, and as uneven as was asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.errors import ConfigError, InputError
from fedmerge.sim import with_virtual_nodes
from fedmerge.sim.partition import PARTITIONS, partition
from tests.conftest import make_config

GROUPS = [f"label-{row % 10}" for row in range(5000)]


@given(
    scheme=st.sampled_from(sorted(PARTITIONS)),
    groups=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60),
    alpha=st.sampled_from([0.05, 1.0, 100.0]),
    data=st.data(),
)
def test_every_row_is_somebodys_and_nobody_has_none(
    scheme: str, groups: list[str], alpha: float, data: st.DataObject
) -> None:
    num_nodes = data.draw(st.integers(1, len(groups)))
    shares = partition(groups, num_nodes, scheme, alpha=alpha, seed=3)
    assert len(shares) == num_nodes
    assert min(map(len, shares)) > 0
    assert sorted(row for share in shares for row in share) == list(range(len(groups)))
    assert shares == partition(groups, num_nodes, scheme, alpha=alpha, seed=3)


def label_skew(alpha: float) -> float:
    """Mean over nodes of the share of their most frequent label."""
    shares = partition(GROUPS, 20, "dirichlet", alpha=alpha, seed=0)
    tops = [Counter(GROUPS[row] for row in share).most_common(1)[0][1] / len(share) for share in shares]
    return sum(tops) / len(tops)


def test_a_small_alpha_gives_nodes_few_labels_and_a_large_one_all() -> None:
    assert label_skew(1000.0) < 0.15 < label_skew(1.0) < 0.45 < label_skew(0.1)


def test_groups_and_sizes() -> None:
    by_group = partition(GROUPS, 30, "group", alpha=1.0, seed=0)
    assert all(len({GROUPS[row] for row in share}) == 1 for share in by_group)
    few = partition(GROUPS, 5, "group", alpha=1.0, seed=0)
    assert all(len({GROUPS[row] for row in share}) == 2 for share in few)
    sizes = sorted(map(len, partition(GROUPS, 20, "size", alpha=0.5, seed=0)))
    assert sizes[-1] > 5 * sizes[len(sizes) // 2]
    assert {len(share) for share in partition(GROUPS, 20, "iid", alpha=0.5, seed=0)} == {250}


def test_more_nodes_than_rows() -> None:
    with pytest.raises(InputError, match="2 rows can't be shared out among 3 nodes"):
        partition(["a", "b"], 3, "iid", alpha=1.0, seed=0)


def virtual(folder: Path, **settings: object) -> tuple[Path, str]:
    folder.mkdir(exist_ok=True)
    source = folder / "all.jsonl"
    if not source.exists():
        rows = [{"text": f"text {number}", "label": "even" if number % 2 == 0 else "odd"} for number in range(100)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {"nodes": 4, "data": str(source), **settings}
    return source, "[simulate]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())


def test_virtual_nodes_have_their_data_in_files_that_stay_the_same(tmp_path: Path) -> None:
    source, extra = virtual(tmp_path, partition="group", test_share=0.2)
    config = with_virtual_nodes(make_config(tmp_path, extra=extra)[0])
    assert [node.name for node in config.nodes] == ["node-1", "node-2", "node-3", "node-4"]
    seen = []
    for node in config.nodes:
        assert node.data is not None
        assert node.test is not None
        train, test = ([json.loads(line) for line in path.read_text().splitlines()] for path in (node.data, node.test))
        assert (len(train), len(test)) == (20, 5)
        assert len({row["label"] for row in train + test}) == 1
        seen += train + test
    assert sorted(row["text"] for row in seen) == sorted(f"text {number}" for number in range(100))
    source.write_text("")  # not read again
    assert with_virtual_nodes(make_config(tmp_path, extra=extra)[0]) == config
    _, other = virtual(tmp_path, partition="iid", test_share=0.2)
    with pytest.raises(ConfigError, match="shared out by other settings"):
        with_virtual_nodes(make_config(tmp_path, extra=other)[0])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ('{"text": "a"}\nno\n', {}, "all.jsonl:2: not JSON"),
        ('{"text": "a"}\n[1]\n', {}, "all.jsonl:2: not a JSON object"),
        ('{"text": "a", "lable": "b"}\n' * 9, {"partition": "dirichlet"}, "no.* column 'label'; did you mean 'lable'"),
        ('{"text": "a"}\n', {}, "1 rows can't be shared out among 4 nodes"),
    ],
)
def test_data_that_cannot_be_shared_out(tmp_path: Path, text: str, settings: dict[str, str], message: str) -> None:
    source, extra = virtual(tmp_path, **settings)
    source.write_text(text)
    with pytest.raises(InputError, match=message.replace("no.* column", "not every row has a column")):
        with_virtual_nodes(make_config(tmp_path, extra=extra)[0])
