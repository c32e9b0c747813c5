"""The theorem behind certified radii: a dense Bayesian first layer as randomised smoothing, after Cohen et al. (2019).

Setting. The first layer is dense, h = W y + b, with independent Gaussian weights, W_ij ~ N(M_ij, σ_ij²), b_i ~ N(μ_i,
τ_i²); y is the network's input; the rest of the network sees the input only through h. (In the units of the input space y =
x − mean, and M and σ are divided by std.) Given y, h has independent Gaussian entries with the means m = M y + μ and the
variances v_i = Σ_j σ_ij² y_j² + τ_i², and all that is random is in h. Let q(y) = P(A | y) for any event A about h: "the
drawn network's label is not c". Unlike in Cohen et al. a change δ of the input moves the variances as well as the means.

Theorem. Let ‖δ‖₂ ≤ r, κ_i = max_j σ_ij, g_i = (Σ_j σ_ij⁴ y_j²)^½, and q(y) ≤ q₀ < ½. With

    l_i = max{v_i − 2 r g_i, (√v_i − r κ_i)₊², τ_i²} > 0,      u_i = min{v_i + 2 r g_i + r² κ_i², (√v_i + r κ_i)²},
    a² = r² ‖V^{-½} M‖₂² max_i v_i/l_i,   b² = ½ Σ_i max{ln(u_i/v_i), ln(v_i/l_i)}²,   c = max_i ½ ln(u_i/v_i),
    Λ = ln((1−q)/q),   E(q; s) = s q(1−q) √(2Λ/(1−2q)) + 2c q(1−q) Λ,
    R(q) = min{a φ(Φ⁻¹(q)) + E(q; b), E(q; √(a² + b²))},   V = diag(v),   φ, Φ the standard normal density and distribution,

q(y + δ) < ½ whenever ∫_{q₀}^{½} dq / R(q) > 1.

Proof. (1) The variances. v_i(y + δ) = v_i + 2 Σ_j σ_ij² y_j δ_j + Σ_j σ_ij² δ_j², whose middle term is at most 2 r g_i in
size and whose last one lies in [0, r² κ_i²]; and √v_i is the Euclidean norm of (σ_i ∘ y, τ_i), which δ moves by at most r
κ_i. Hence l_i ≤ v_i(y + δ) ≤ u_i.

(2) A path from the law P₀ of h at y to P₁ at y + δ: for 0 ≤ t ≤ 1 the means m + t M δ and the variances v_i ρ_i^t, where
ρ_i = v_i(y + δ)/v_i. At t the score (the derivative of the log-density in t) is S = Σ_i k_i ε_i + e_i (ε_i² − 1), with
independent standard normal ε_i, k_i = (M δ)_i/√(v_i ρ_i^t) and e_i = ½ ln ρ_i. Densities are smooth in t with dominated
derivatives, so q_t = P_t(A) is continuously differentiable and q_t' = E_t[1_A S]; and E_t[S] = 0. As ρ_i^t ≥ min(1, ρ_i) ≥
l_i/v_i: Σ k_i² ≤ a²; also 2 Σ e_i² ≤ b² and e_i ≤ c.

(3) The Gaussian part G = Σ k_i ε_i: E[1_A G] ≤ a φ(Φ⁻¹(q)) where P(A) = q, as the upper tail of G maximises it (Neyman and
Pearson).

(4) Let X have mean 0 and ln E e^{λX} ≤ λ² s²/(2(1 − 2cλ)) for 0 < λ < 1/(2c). Then E[1_A X] ≤ E(q; s) where P(A) = q < ½:
let Q weigh A by (1−q)/q and its complement by q/(1−q), so that Q(A) = 1 − q and E_Q X = E[1_A X] (1−2q)/(q(1−q)). By
Donsker and Varadhan λ E_Q X ≤ ln E e^{λX} + KL(Q‖P), KL(Q‖P) = (1−2q) Λ =: K, and the least over λ of λ s²/(2(1 − 2cλ)) +
K/λ is s √(2K) + 2cK.

(5) S and its part Σ e_i (ε_i² − 1) are such X, with s² = a² + b² and s² = b². For one term, with x = 2λe < 1, ln E exp(λkε
+ λe(ε² − 1)) = λ²k²/(2(1−x)) − ½ ln(1−x) − x/2, and −½ ln(1−x) − x/2 = Σ_{n≥2} xⁿ/(2n) is at most (x²/4)/(1−x) for x ≥ 0
and at most x²/4 for x < 0, where x²/4 = λ²e². So the whole is at most λ²(k² + 2e²)/(2(1 − 2cλ)), as e ≤ c and c ≥ 0.

(6) So q_t' ≤ R(q_t) while q_t < ½: by (3) and (4) for the two parts, and by (4) for the whole. Were q₁ ≥ ½, then from the
last t with q_t = q₀ before the first with q_t = ½ the integral of q_t'/R(q_t), which is ∫_{q₀}^{½} dq/R(q), would be at
most 1. ∎

With σ = 0 (noise in the biases alone) b = c = 0 and the radius is that of Cohen et al., Φ⁻¹(1 − q₀)/‖V^{-½} M‖₂, which is
exact.

The integral is bounded from below on a grid of u = Φ⁻¹(q), as ∫ φ(u) du/R. There φ rises up to u = 0; the coefficient of s
in E rises with q, for with z = 1 − 2q it is ½ (1−z²) (artanh(z)/z)^½, and (1−z²) artanh(z)/z = 1 − Σ_{n≥1} z^{2n} (1/(2n−1)
− 1/(2n+1)) falls; and q(1−q)Λ has one maximum, 0.2239 at q = 0.176.

What is not covered: the outputs of a convolution at P positions have, for each channel, a covariance of rank at most the
size of a patch. Where P is larger it is singular, a change of the input moves its support, and the bound says nothing. Nor
are other posteriors, layers before the first one, or ways around it. `stfbnn.robustness.smoothing` refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import erf, ndtr, ndtri

Floats = NDArray[np.float64]

_STEPS = 2000
# Far more than what rounding may add to a spectral norm and to the integral.
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class DenseNoise:
    """The law of a dense layer's outputs with independent Gaussian weights, as far as certificates need it.

    Attributes:
        weight: Means M, (H, d).
        weight_std: σ, (H, d), not negative.
        bias_std: τ, (H,), not negative.
    """

    weight: Floats
    weight_std: Floats
    bias_std: Floats

    def variances(self, point: Floats) -> Floats:
        """v, (H,), at the layer's input y (d,)."""
        found: Floats = self.weight_std**2 @ point**2 + self.bias_std**2
        return found

    def radius(self, point: Floats, wrong: float, limit: float) -> float:
        """A radius r such that P(A | y + δ) < ½ for all ‖δ‖₂ < r, for every event A of which P(A | y) ≤ ``wrong``.

        Args:
            point: y, (d,).
            wrong: In (0, 1); no radius is certified from ½ on.
            limit: No larger radius is looked for.

        Returns:
            The largest that the theorem of this module gives, to a millionth; 0 where there is none, or where an output of the
            layer is not random at y.
        """
        variances = self.variances(point)
        if wrong >= 0.5 or not (variances > 0).all():
            return 0.0
        slope = self._slope(variances)
        strength = self._widest**2
        lean = np.sqrt(self.weight_std**4 @ point**2)
        # No bound can be better than that for variances that do not change.
        low, high = 0.0, limit if slope == 0 else min(limit, -float(ndtri(wrong)) / slope)
        if self._holds(high, wrong, slope, variances, lean, strength):
            return high
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            if middle in (low, high):
                break
            if self._holds(middle, wrong, slope, variances, lean, strength):
                low = middle
            else:
                high = middle
        return low

    def _holds(
        self, radius: float, wrong: float, slope: float, variances: Floats, lean: Floats, strength: Floats
    ) -> bool:
        """Whether the theorem's condition holds at a radius."""
        deviations, widest = np.sqrt(variances), np.sqrt(strength)
        lowest = np.maximum(variances - 2 * radius * lean, np.maximum(deviations - radius * widest, 0) ** 2)
        lowest = np.maximum(lowest, self.bias_std**2)
        if not (lowest > 0).all():
            return False
        highest = np.minimum(variances + 2 * radius * lean + radius**2 * strength, (deviations + radius * widest) ** 2)
        # Rounding may put either on the wrong side of v by a little.
        down, up = np.log(np.maximum(variances / lowest, 1)), np.log(np.maximum(highest / variances, 1))
        a = radius * slope * np.sqrt((variances / lowest).max(initial=1.0))
        b = np.sqrt(0.5 * (np.maximum(down, up) ** 2).sum())
        return time_to_half(wrong, float(a), float(b), 0.5 * float(up.max())) > 1 + _ROUNDING

    @cached_property
    def _widest(self) -> Floats:
        """κ, (H,)."""
        found: Floats = self.weight_std.max(axis=1)
        return found

    @cached_property
    def _gram(self) -> Floats:
        product: Floats = self.weight @ self.weight.T
        return product

    def _slope(self, variances: Floats) -> float:
        """‖V^{-½} M‖₂, from above."""
        units, inputs = self.weight.shape
        if units <= inputs:
            scale = 1 / np.sqrt(variances)
            gram = self._gram * scale[:, None] * scale
        else:
            gram = self.weight.T @ (self.weight / variances[:, None])
        last = len(gram) - 1
        largest = scipy.linalg.eigvalsh(gram, subset_by_index=[last, last])[0]
        return float(np.sqrt(max(largest, 0.0) + _ROUNDING * np.trace(gram)))


def time_to_half(start: float, a: float, b: float, c: float) -> float:
    """∫ dq / R(q) from ``start`` to ½, from below: how long a probability that grows at rate R at most stays under ½.

    Args:
        start: q₀, in (0, ½).
        a: Bound of the mean's part of the score, as of the theorem; not negative.
        b: Of the variances' part.
        c: The largest coefficient of a square.
    """
    grid = np.linspace(float(ndtri(start)), 0.0, _STEPS + 1)
    q, density = ndtr(grid), np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    gap, log_odds = erf(-grid / np.sqrt(2)), np.log1p(-q) - np.log(q)
    # Λ/(1 − 2q) is 2 + O((1 − 2q)²) near ½.
    ratio = np.where(gap > 1e-6, log_odds / np.maximum(gap, 1e-6), 2.0)
    per_spread = (q * (1 - q) * np.sqrt(2 * ratio))[1:]
    product = q * (1 - q) * log_odds
    largest = np.maximum(product[1:], product[:-1])
    largest[(q[:-1] < 0.18) & (q[1:] > 0.17)] = 0.224
    apart = a + (b * per_spread + 2 * c * largest) / density[:-1]
    whole = (np.hypot(a, b) * per_spread + 2 * c * largest) / density[:-1]
    with np.errstate(divide="ignore"):
        return float((np.diff(grid) / np.minimum(apart, whole)).sum())
