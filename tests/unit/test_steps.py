"""Steps of tuning: how far they go, and that they go on where they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from roundel.tuning.steps import LARGEST, LEAST, SCALE_STEP, Steps, code_step


class Linear:
    """What steps need of a trained linear."""

    def __init__(self, codes: torch.Tensor, scale: float) -> None:
        self.codes, self.scales = [nn.Parameter(codes)], [nn.Parameter(torch.tensor([scale]))]

    def confine(self) -> None:
        self.codes[0].data.clamp_(-3.49, 3.49)


def pulled(linears: list[Linear], gradients: list[list[float]]) -> None:
    for linear, gradient in zip(linears, gradients, strict=True):
        linear.codes[0].grad = torch.tensor(gradient)
        linear.scales[0].grad = torch.tensor([7.0])


def test_codes_that_matter_less_go_further() -> None:
    """Gradients of one sign: all distances are `1 / gradient`, in all linears, their mean is the first step, and none is beyond `LEAST`."""
    linears = [Linear(torch.zeros(2), 1.0), Linear(torch.zeros(2), 1.0)]
    gradients = [[1.0, -2.0], [4.0, 1e-9]]
    steps = Steps(linears, [], 100, tokens=1000)
    pulled(linears, gradients)
    steps.take()
    moved = torch.cat([-linear.codes[0].detach() for linear in linears])
    assert torch.allclose(moved[:3] / moved[0], torch.tensor([1.0, -0.5, 0.25]), rtol=1e-5)
    least = LEAST * 7 / 4
    inverse = (1 + 1 / 2 + 1 / 4 + 1 / least) / 4
    assert moved[0].item() == pytest.approx(LARGEST / inverse, rel=1e-4)
    assert moved[3].item() == pytest.approx(LARGEST * 1e-9 / least**2 / inverse, rel=1e-2)
    assert [1 - linear.scales[0].item() for linear in linears] == pytest.approx([SCALE_STEP] * 2, rel=1e-3)


def test_steps_fall_to_nothing_and_stay_inside() -> None:
    linear = Linear(torch.tensor([3.48, 0.0]), 1.0)
    steps = Steps([linear], [], 20, tokens=1000)
    distances = []
    for _ in range(20):
        before = linear.codes[0].detach().clone()
        pulled([linear], [[-1.0, 1.0]])
        steps.take()
        distances.append((linear.codes[0].detach() - before).abs()[1].item())
    assert linear.codes[0].max().item() == pytest.approx(3.49)
    assert distances == pytest.approx([LARGEST * (1 - step / 20) ** 3 for step in range(20)], rel=1e-2)


def test_gone_on_from_its_tensors_it_ends_in_the_same_place() -> None:
    def made() -> tuple[list[Linear], Steps]:
        linears = [Linear(torch.linspace(-1, 1, 5), 2.0)]
        return linears, Steps(linears, [], 8, tokens=1000)

    random = torch.Generator().manual_seed(0)
    gradients = torch.randn(8, 5, generator=random).tolist()
    once, whole = made()
    for gradient in gradients:
        pulled(once, [gradient])
        whole.take()
    first, begun = made()
    for gradient in gradients[:3]:
        pulled(first, [gradient])
        begun.take()
    kept = {name: tensor.clone() for name, tensor in begun.tensors().items()}
    second, resumed = made()
    resumed.restore(kept, 3)
    for gradient in gradients[3:]:
        pulled(second, [gradient])
        resumed.take()
    assert torch.equal(once[0].codes[0], second[0].codes[0])
    assert torch.equal(once[0].scales[0], second[0].scales[0])


def test_a_code_that_goes_back_and_forth_is_stopped_where_it_is_most_of_the_time() -> None:
    """Above the boundary it is pulled down three times as hard as it is pushed up below it: three of four steps are below."""
    linear = Linear(torch.tensor([0.499, -1.0]), 1.0)
    steps = Steps([linear], [], 400, tokens=1000)
    seen = []
    for _ in range(400):
        above = linear.codes[0][0].round().item() == 1
        pulled([linear], [[3.0 if above else -1.0, 0.1]])
        steps.take()
        seen.append(linear.codes[0].detach().round().tolist())
    first = [codes[0] for codes in seen]
    assert {0.0, 1.0} == set(first[:200])
    assert set(first[250:]) == {0.0}
    assert linear.codes[0][0].item() == 0
    assert steps.frozen[0].tolist() == [True, False]
    assert linear.codes[0][1].item() < -1.1


def test_without_gradients_nothing_moves() -> None:
    linear = Linear(torch.zeros(3), 1.0)
    steps = Steps([linear], [], 4, tokens=1000)
    steps.take()
    assert linear.codes[0].abs().max().item() == 0
    assert linear.scales[0].item() == 1


@pytest.mark.parametrize(("weights", "new_text", "step"), [(200_000, False, 1e-2), (3_400_000, False, 1e-3), (3_400_000, True, 2e-3)])
def test_the_first_step_by_tokens_and_weights(weights: int, new_text: bool, step: float) -> None:
    assert code_step(115_000, weights, new_text) == pytest.approx(step, rel=0.02)


def test_steps_add_up_in_parameters_of_16_bits() -> None:
    """Each is less than half of the distance of two numbers in bfloat16, and a second optimiser goes on from what has added up."""
    norm = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    steps = Steps([], [norm], 100, tokens=1000)
    total = 0.0
    for taken in range(8):
        norm.grad = torch.full_like(norm, -3.0)
        steps.take()
        total += SCALE_STEP * (1 - taken / 100) ** 3
        if taken == 0:
            assert torch.equal(norm.detach(), torch.ones_like(norm))
    expected = torch.full((4,), 1 + total).bfloat16()
    assert expected[0] > 1.01
    assert torch.equal(norm.detach(), expected)
    other = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    resumed = Steps([], [other], 100, tokens=1000)
    resumed.restore({name: tensor.clone() for name, tensor in steps.tensors().items()}, 8)
    assert torch.equal(other, norm)
