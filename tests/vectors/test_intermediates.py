"""Parity of what methods compute on the way, where it was recorded: probabilities, weights, masks and rescalers."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedmerge.merge import METHODS, emr_site, tall_mask
from fedmerge.merge.methods.della import keep_probabilities
from fedmerge.merge.methods.pcb import clip, compete
from fedmerge.merge.methods.selection import disjoint_masks
from tests.vectors.test_vectors import CASES, HERE, load_inputs


def recorded(case: str) -> dict[str, Tensor]:
    return load_file(HERE / CASES[case]["file"])


@pytest.fixture
def deltas() -> dict[str, Tensor]:
    """The four task vectors, stacked, by tensor name in sorted order."""
    models = load_inputs("inputs.safetensors")
    base = models.pop("base")
    return {name: torch.stack([models[model][name] - base[name] for model in sorted(models)]) for name in sorted(base)}


@pytest.mark.parametrize("case", ["mergekit_della_d50_e15", "mergekit_della_linear_d40_e10"])
def test_della_keeps_with_the_recorded_probabilities(case: str, deltas: dict[str, Tensor]) -> None:
    params = CASES[case]["params"]
    for name, stack in deltas.items():
        for node, delta in enumerate(stack):
            ours = keep_probabilities(
                delta.flatten(), delta.shape, density=params["density"], epsilon=params["epsilon"]
            )
            expected = recorded(case)[f"keep_prob.{name}.ft{node}"]
            torch.testing.assert_close(ours.view(delta.shape).float(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("case", "ratio"), [("pcb_authors_r10", 0.1), ("pcb_authors_r20", 0.2)])
def test_pcb_clips_and_weighs_as_recorded(case: str, ratio: float, deltas: dict[str, Tensor]) -> None:
    rows = torch.cat([stack.flatten(1) for stack in deltas.values()], dim=1)
    clipped = clip(rows)
    assert torch.equal(clipped, recorded(case)["clamped"])
    torch.testing.assert_close(compete(rows, clipped, ratio), recorded(case)["scale"], atol=1e-6, rtol=1e-5)


def test_cabs_masks_are_the_recorded_ones(deltas: dict[str, Tensor]) -> None:
    expected = recorded("cabs_authors_8_32_two")
    masks = disjoint_masks(deltas["w"][:2].reshape(2, -1, 32), 8)
    for node, mask in enumerate(masks):
        assert torch.equal(mask.view(64, 48), expected[f"mask.w.ft{node}"].bool())


@pytest.mark.parametrize(("case", "threshold"), [("consensus_authors_l02_k1", 0.2), ("consensus_authors_l04_k1", 0.4)])
def test_tall_masks_are_the_recorded_ones(case: str, threshold: float, deltas: dict[str, Tensor]) -> None:
    for name, stack in deltas.items():
        for node, delta in enumerate(stack):
            mask = tall_mask(delta, stack.sum(0), threshold)
            # The authors compare weights, in fp32, where an entry on the border may fall to the other side.
            assert (mask != recorded(case)[f"mask.{name}.ft{node}"].bool()).sum() <= 2


@pytest.mark.parametrize("node", range(4))
def test_a_site_recovers_the_recorded_emr_model(node: int, deltas: dict[str, Tensor]) -> None:
    expected = recorded("emr_authors_flat")
    unified = {name: METHODS["emr"](stack, torch.ones(4)) for name, stack in deltas.items()}
    site = emr_site({name: stack[node] for name, stack in deltas.items()}, unified)
    assert site.rescaler == pytest.approx(expected["rescalers"][node].item(), rel=1e-5)
    for name, mask in site.masks.items():
        assert torch.equal(mask, expected[f"mask.{name}.ft{node}"].bool())
        theirs = expected["rescalers"][node] * expected[f"mask.{name}.ft{node}"] * expected[f"out.{name}"]
        torch.testing.assert_close(site.recover(name, unified[name]), theirs, atol=1e-6, rtol=1e-5)
