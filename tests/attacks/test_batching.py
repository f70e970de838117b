"""Runs that share a batch, and Square's proposals tried ahead, change nothing but the time."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.evaluation.test_battery import EPS, fitted
from torch import Tensor, nn

from rnas.attacks import APGD, FAB, Attack, Square
from rnas.attacks.batching import survivors_only
from rnas.attacks.losses import correct, margin
from rnas.attacks.norms import distance
from rnas.compute.freezing import Model


def in_double() -> tuple[nn.Module, Tensor, Tensor]:
    """In float64 the size of a batch does not decide what is an improvement."""
    net, x, y = fitted()
    return copy.deepcopy(net).double(), x.double(), y


def fill_batches_to(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on batches are filled up to so many rows."""
    for module in ("batching", "square"):
        monkeypatch.setattr(f"rnas.attacks.{module}.row_limit", lambda x, most: rows)


def counting(net: Model, batches: list[int]) -> Model:
    def answer(x: Tensor) -> Tensor:
        batches.append(len(x))
        return net(x)

    return answer


ATTACKS: list[Attack] = [
    APGD(eps=EPS, loss="dlr-targeted", steps=15, restarts=2, seed=0),
    APGD(eps=EPS, steps=15, restarts=3, seed=0),
    APGD(eps=0.2, norm="l2", loss="dlr-targeted", steps=15, seed=0),
    FAB(eps=EPS, steps=8, restarts=2, seed=0),
    FAB(eps=0.2, norm="l2", steps=8, restarts=2, seed=0),
    Square(eps=EPS, queries=200, restarts=2, seed=0),
    Square(eps=0.2, norm="l2", queries=200, restarts=2, seed=0),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_verdicts_do_not_depend_on_how_far_batches_are_filled(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = in_double()
    found, batches = {}, {}
    for rows in (1, 50, 1000):
        fill_batches_to(rows, monkeypatch)
        batches[rows] = []
        found[rows] = attack.perturb(counting(net, batches[rows]), x, y)
    holds = {rows: correct(net(x_adv), y) for rows, x_adv in found.items()}
    assert 0 < int(holds[1].sum()) < len(x)
    assert max(batches[1]) == len(x)  # the row limit splits no batch: the caller's size is the caller's choice
    assert len(batches[1000]) <= len(batches[50]) < len(batches[1])
    for rows in (50, 1000):
        assert torch.equal(holds[rows], holds[1])
        assert float(distance(found[rows], x, attack.norm).max()) <= attack.eps * (1 + 1e-5)
        # The image is no promise: where two steps are equally good, rounding chooses, and with it all that follow.
        moved = (found[rows] - found[1])[holds[1]].flatten(1).abs().amax(1)
        assert float(moved.median()) < 1e-9


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.2)])
def test_square_accepts_as_good_proposals_ahead_as_one_by_one(
    norm: str, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = in_double()
    attack = Square(eps=eps, norm=norm, queries=100, seed=3)  # type: ignore[arg-type]
    fill_batches_to(300, monkeypatch)
    same = []
    with torch.no_grad():
        found = attack.perturb(net, x, y)
        for i in range(len(x)):
            image, label, proposals = x[i : i + 1], y[i : i + 1], attack._proposals(x[i : i + 1], 0)
            best = attack._start(image, "0")
            loss = margin(net(best), label)
            for query in range(1, attack.queries):
                if loss > 0:
                    break
                at, number = torch.tensor([0]), torch.tensor([query])
                proposal = attack._proposed(image, at, best.clone(), proposals.take(at, number))
                if (proposed := margin(net(proposal), label)) > loss:
                    best, loss = proposal, proposed
            assert bool(margin(net(found[i : i + 1]), label) > 0) == bool(loss > 0)
            same.append(torch.allclose(found[i : i + 1], best, rtol=0, atol=1e-12))
    assert sum(same) > 0.9 * len(x)  # of two proposals that are equally good, rounding chooses


def test_a_proposal_of_l_inf_is_a_square_of_one_sign_for_each_channel() -> None:
    x = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attack = Square(eps=0.1, queries=600, seed=0)
    proposals = attack._proposals(x, 0)
    for query in (1, 60, 599):
        at = torch.tensor([0, 1])
        rows = proposals.take(at, torch.tensor([query, query]))
        proposal = attack._proposed(x, at, x.clone(), rows)
        side, (top, left) = attack.side(query, 16, 16), rows.corners[0, :2].tolist()
        expected = x.clone()
        for channel, sign in enumerate(rows.signs[0].tolist()):
            square = (slice(None), channel, slice(top, top + side), slice(left, left + side))
            expected[square] = (x[square] + 0.1 * sign).clamp(0, 1)
        torch.testing.assert_close(proposal, expected, rtol=0, atol=1e-15)
        assert torch.equal(rows.signs[0], rows.signs[1])


def test_the_signs_of_square_in_l2_are_each_images_own() -> None:
    x = torch.rand((6, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    attack = Square(eps=0.5, norm="l2", queries=2000, seed=0)
    signs = attack._proposals(x, 0).signs.float()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float(signs.mean(1).abs().max()) < 0.1  # as often +1 as −1
    agreement = torch.einsum("aqc,bqc->ab", signs, signs) / (2000 * 3)
    assert float((agreement - torch.eye(6)).abs().max()) < 0.1  # no image's signs tell of another's
    order = torch.tensor([4, 1])
    assert torch.equal(attack._proposals(x[order], 0).signs.float(), signs[order])


def test_as_many_jobs_go_together_as_fill_a_batch() -> None:
    x = torch.zeros((40, 1, 1, 1))
    seen: list[tuple[int, list[int]]] = []

    def run(alive: Tensor, jobs: list[int]) -> tuple[Tensor, Tensor]:
        """Job j breaks the images j, j + 10, ... and marks what it made with 1 + j."""
        seen.append((len(alive), list(jobs)))
        rows = torch.tensor(jobs).repeat_interleave(len(alive))
        return (1.0 + rows).view(-1, 1, 1, 1), alive.repeat(len(jobs)) % 10 != rows

    result = survivors_only(x, torch.arange(40), range(9), run).flatten()
    assert [jobs for _, jobs in seen] == [[0], [1], [2, 3], [4, 5], [6, 7, 8]]
    assert [n for n, _ in seen] == [40, 36, 32, 24, 16]
    assert torch.equal(result, (torch.arange(40) % 10 + 1).clamp(max=9).float())
