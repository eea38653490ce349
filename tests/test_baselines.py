"""baselines.py: PPO's and NTHR's pure functions against values worked by hand (in the comments)."""

import math

import pytest
import torch

from baselines import generalised_advantage, nthr_weights, value_loss, whiten


def tensor(*values):
    return torch.tensor(values)


def assert_close(actual, expected, tolerance=1e-6):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=tolerance, atol=tolerance)


def test_generalised_advantage_by_hand():
    # sample 5: delta .9*.25-.5 = -.275, .9*.5-.25 = .2, 1-.5 = .5; A = -.275+.72*.56, .2+.72*.5, .5.  sample 2: 3-1
    reward, value = tensor(0.0, 3.0, 0.0, 1.0), tensor(0.5, 1.0, 0.25, 0.5)
    advantage, returns = generalised_advantage(reward, value, 0.9, 0.8, tensor(5, 2, 5, 5))
    assert_close(advantage, [0.1282, 2.0, 0.56, 0.5])
    assert_close(returns, [0.6282, 3.0, 0.81, 1.0])
    advantage, returns = generalised_advantage(reward, value, 1.0, 1.0)  # one sequence: what is left to earn, minus V
    assert_close(advantage, [3.5, 3.0, 0.75, 0.5])
    assert_close(returns, [4.0, 4.0, 1.0, 1.0])
    assert [len(part) for part in generalised_advantage(reward[:0], value[:0], 1, 1)] == [0, 0]
    with pytest.raises(ValueError, match="value_T"):
        generalised_advantage(reward, value[:1], 1, 1)


def test_whiten_by_hand():
    assert_close(whiten(tensor(1.0, 3.0, 5.0)), [-1.0, 0.0, 1.0])  # mean 3, unbiased variance 4
    assert whiten(tensor(9.9).repeat(7)).eq(0).all() and whiten(tensor(4.0)).eq(0).all()


def test_value_loss_clips_the_change_of_a_value():
    # V, V_old, R, clip .5: (1-2)^2 = 1 against (.5-2)^2 = 2.25; (1-0)^2 = 1 against (.5-0)^2; inside: equal
    value = tensor(1.0, 1.0, 0.25).requires_grad_()
    loss, metrics = value_loss(value, tensor(0.0, 0.0, 0.0), tensor(2.0, 0.0, 1.0), 0.5)
    assert_close(loss.detach(), [1.125, 0.5, 0.28125])
    assert float(metrics["value_clip_fraction"]) == pytest.approx(1 / 3)
    loss.sum().backward()
    assert_close(value.grad, [0.0, 1.0, -0.75])


def test_nthr_by_hand():
    """One won token h = (1, 0), g = (1/2, -1/2): M = g h^T and its own s = 1/2 = tau. Lost: s = 1/2, 0, 1."""
    hidden, grad = tensor([1.0, 0], [1, 0], [0, 1], [2, 0]), tensor([0.5, -0.5]).repeat(4, 1)
    sample, won = tensor(0, 1, 1, 2), tensor(True, False, False, False)
    factor, found = nthr_weights(hidden, grad.__getitem__, sample, won, beta=1.0, eta=0.3)
    assert_close(factor, [1.0, 1.0, 1.0, 0.3])
    assert found == {"tau": 0.5, "selected": 1}
    assert_close(nthr_weights(hidden, grad.__getitem__, sample, won, beta=0.5, eta=0.3)[0], [1.0, 0.3, 1.0, 0.3])
    assert_close(nthr_weights(hidden, grad.__getitem__, sample, won, beta=-math.inf, eta=0.0)[0], [1.0, 0.0, 0.0, 0.0])
    # a second won sample, h = (0, 3), g = (.1, -.1): its own mean is .18 = tau; the token at (0, 1) has s = .3
    hidden, grad = torch.cat([hidden, tensor([0.0, 3])]), torch.cat([grad, tensor([0.1, -0.1])])
    sample, won = tensor(0, 1, 1, 2, 3), tensor(True, False, False, False, True)
    factor, found = nthr_weights(hidden, grad.__getitem__, sample, won, beta=1.0, eta=0.3)
    assert_close(factor, [1.0, 0.3, 0.3, 0.3, 1.0])
    assert found["tau"] == pytest.approx(0.18)
    for alike in (won | True, won & False):
        factor, found = nthr_weights(hidden, grad.__getitem__, sample, alike, beta=1.0, eta=0.3)
        assert factor.eq(1).all() and found["selected"] == 0
