"""Hand-overs of a coordinator's key: what a site follows, and by which name it refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmerge.errors import Equivocation, InvalidHandover
from fedmerge.statements import Handover
from fedmerge.statements.handover import Pin, follow_line, read_handover, sign_handover
from fedmerge.trust.sign import SigningKey

KEYS = [SigningKey.generate("p256" if number == 1 else "ed25519") for number in range(4)]
PUBLIC = [key.public for key in KEYS]


def step(old: int, new: int) -> str:
    return sign_handover("f", "r", KEYS[old], KEYS[new])


def test_a_pin_follows_from_any_key_of_the_line_and_remembers_it(tmp_path: Path) -> None:
    for given in range(3):
        folder = tmp_path / str(given)
        pin = Pin(PUBLIC[given], folder)
        pin.follow([])
        assert (pin.current, pin.line) == (PUBLIC[given], [PUBLIC[given]])
        pin.follow([step(0, 1), step(1, 2)])
        assert (pin.current, pin.line) == (PUBLIC[2], PUBLIC[:3])
        assert list(pin.now) == [PUBLIC[2].key_id]
        assert list(pin.ever) == [key.key_id for key in PUBLIC[:3]]
        again = Pin(PUBLIC[given], folder)
        assert again.line == PUBLIC[:3]
        # From here on the keys before have no say, whoever has them.
        with pytest.raises(Equivocation, match=f"key {PUBLIC[0].short} handed over to {PUBLIC[1].short} before"):
            again.follow([step(0, 3)])
        assert len(list(folder.glob("fork-*.json"))) == 1
        assert again.current == PUBLIC[2]
        assert Pin(PUBLIC[given], folder).line == PUBLIC[:3]


def test_what_has_nothing_to_do_with_the_pinned_key_changes_nothing(tmp_path: Path) -> None:
    pin = Pin(PUBLIC[3], tmp_path)
    pin.follow([step(0, 1)])
    assert pin.line == [PUBLIC[3]]
    assert list(tmp_path.iterdir()) == []


def forgeries() -> dict[str, str]:
    honest, other = json.loads(step(0, 1)), json.loads(step(0, 2))
    said = Handover(federation="f", run="r", old_key=PUBLIC[0].key_id, new_key=PUBLIC[1].key_id)
    elsewhere = said.model_copy(update={"federation": "g"})
    return {
        name: json.dumps(parts)
        for name, parts in {
            "signed by a stranger for the old key": {**honest, "envelope": said.sign(KEYS[3]).decode()},
            "a stranger as the old key": {
                **honest,
                "old_key": PUBLIC[3].pem(),
                "envelope": said.sign(KEYS[3]).decode(),
            },
            "without the new key's consent": {**honest, "proof": said.sign(KEYS[3]).decode()},
            "the consent to another": {**honest, "proof": other["proof"]},
            "another new key": {**honest, "new_key": PUBLIC[2].pem()},
            "two federations": {**honest, "proof": elsewhere.sign(KEYS[1]).decode()},
            "half of it": {name: honest[name] for name in ("old_key", "new_key", "envelope")},
            "a key that is none": {**honest, "new_key": "-----BEGIN PUBLIC KEY-----"},
            "to itself": json.loads(step(0, 0)),
        }.items()
    } | {"nothing": "[]", "no JSON": "{"}


@pytest.mark.parametrize("name", forgeries())
def test_a_forged_hand_over_is_refused_by_name(name: str) -> None:
    text = forgeries()[name]
    with pytest.raises(InvalidHandover):
        read_handover(text, where="here")
    pin = Pin(PUBLIC[0])
    with pytest.raises(InvalidHandover):
        pin.follow([text])
    assert pin.current == PUBLIC[0]


def test_a_ledgers_line_has_no_gaps_and_no_way_back() -> None:
    assert follow_line(PUBLIC[0], []) == (PUBLIC[0],)
    assert follow_line(PUBLIC[0], [("1", step(0, 1)), ("2", step(1, 2))]) == tuple(PUBLIC[:3])
    assert follow_line(None, [("1", step(1, 2))]) == tuple(PUBLIC[1:3])
    with pytest.raises(InvalidHandover, match="2: hands over key"):
        follow_line(PUBLIC[0], [("1", step(0, 1)), ("2", step(0, 2))])
    with pytest.raises(InvalidHandover, match="given up before"):
        follow_line(PUBLIC[0], [("1", step(0, 1)), ("2", step(1, 0))])
