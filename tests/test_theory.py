"""The three theoretical exercises of the sheet, as statements that run."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.transforms import CompositeTransform, InverseTransform
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from adapters.layers.packed import PackedAffineCouplingLayer
from adapters.masks import checkerboard_mask
from adapters.networks import MLP
from tests.laws import batch, randomise


@settings(deadline=None)
@given(D=st.integers(1, 12), seed=st.integers(0, 999))
def test_exercise_2_1_reflection_preserves_volume(D, seed):
    """f(x) = −x + a preserves volume: J_f = −I everywhere, so |det J_f| = |(−1)^D| = 1."""
    a, x = batch(D, seed=seed), batch(D, seed=seed + 1)
    J = jacobian(lambda x: -x + a, x)
    assert_close(J, -torch.eye(D, dtype=x.dtype))
    assert_close(torch.linalg.det(J).abs(), torch.ones((), dtype=x.dtype))


def layers(K, D):
    masks = [checkerboard_mask(D), 1 - checkerboard_mask(D)]
    return [
        randomise(PackedAffineCouplingLayer(MLP(int(m.sum()), 2 * int((1 - m).sum()), (6,)), m), seed=k)
        for k, m in ((k, masks[k % 2]) for k in range(K))
    ]


@settings(deadline=None, max_examples=20)
@given(K=st.integers(1, 6), D=st.integers(2, 9))
def test_exercise_2_2_inverse_of_a_composition(K, D):
    """(f_K ∘ … ∘ f_1)⁻¹ = f_1⁻¹ ∘ … ∘ f_K⁻¹.

    In F⁻¹ ∘ F = f_1⁻¹ ∘ … ∘ f_K⁻¹ ∘ f_K ∘ … ∘ f_1 the innermost pair f_K⁻¹ ∘ f_K is the identity, then the next, and so
    on to f_1⁻¹ ∘ f_1; F ∘ F⁻¹ likewise from f_1 ∘ f_1⁻¹.
    """
    f = layers(K, D)
    F = CompositeTransform(f)
    x = batch(4, D)

    def inverse_by_hand(z):
        for f_k in reversed(f):
            z, _ = f_k.inverse(z)
        return z

    assert_close(inverse_by_hand(F(x)[0]), x)
    assert_close(F(inverse_by_hand(x))[0], x)
    assert_close(InverseTransform(F)(x)[0], inverse_by_hand(x))


def test_exercise_2_3_determinants_multiply():
    """h = g ∘ f has J_h(x) = J_g(f(x)) J_f(x), hence |det J_h| = |det J_g| |det J_f|.

    Chain rule: ∂h_i/∂x_j = Σ_k (∂g_i/∂f_k)(∂f_k/∂x_j), which is entry (i, j) of the matrix product; the determinant of
    a product is the product of the determinants. Hence a composition adds its layers' log-determinants.
    """
    f, g = layers(2, 5)
    x = batch(1, 5)
    y, f_log_det = f(x)
    _, g_log_det = g(y)

    def J(function, at):
        return jacobian(lambda row: function(row.unsqueeze(0))[0].squeeze(0), at.squeeze(0))

    J_f, J_g, J_h = J(f, x), J(g, y), J(CompositeTransform([f, g]), x)
    assert_close(J_h, J_g @ J_f)
    assert_close(torch.linalg.det(J_h).abs(), torch.linalg.det(J_g).abs() * torch.linalg.det(J_f).abs())
    assert_close(CompositeTransform([f, g])(x)[1], f_log_det + g_log_det)
