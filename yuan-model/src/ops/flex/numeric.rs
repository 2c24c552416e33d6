//! Inner loops that the compiler turns into vector instructions of any processor.

/// Runs loops in a version that is compiled for the widest vectors that this processor has. Every
/// operation rounds as it does elsewhere, and none are fused, so the results are the same.
///
/// What is to be compiled so has to be inlined: closures and functions need `#[inline(always)]`.
#[inline(always)]
pub(super) fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// `eˣ` to within two units in the last place, without a branch or a call: unlike the library's, a
/// loop over it is vectorised. Beyond −87.3 and 88.3 it stays where it is; NaN stays NaN.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding this pushes a small number's fraction out of the mantissa: what is left is its nearest
    // integer.
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.3, 88.3);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    // Minimax polynomial of (eʳ − 1 − r) / r² on [−ln 2 / 2, ln 2 / 2] (Cephes).
    let p = 1.987_569_2e-4_f32;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5.0e-1;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(power)
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Replaces every `x` by `e^((x − max) · scale)` and returns their sum.
pub(super) fn exponentials(row: &mut [f32], max: f32, scale: f32) -> f32 {
    vectorised(
        #[inline(always)]
        || {
            row.iter_mut().for_each(|x| *x = exp((*x - max) * scale));
            sum(row)
        },
    )
}

/// Makes the gradient of a row's scores of that of its probabilities `p`: `scale · p ⊙ (d − Σ d ⊙ p)`.
pub(super) fn to_scores(d: &mut [f32], p: &[f32], scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            let along = dot_of(d, p);
            for (d, p) in d.iter_mut().zip(p) {
                *d = p * (*d - along) * scale;
            }
        },
    );
}

pub(super) fn maximum(row: &[f32]) -> f32 {
    vectorised(
        #[inline(always)]
        || maximum_of(row),
    )
}

#[inline(always)]
fn maximum_of(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [f32::NEG_INFINITY; 8];
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let (chunks, rest) = row.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += chunk[i];
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    vectorised(
        #[inline(always)]
        || dot_of(a, b),
    )
}

/// Eight running sums, which the compiler keeps in one vector register.
#[inline(always)]
pub(super) fn dot_of(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_exact_to_two_units_in_the_last_place() {
        for i in -873_000..=883_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) / exact - 1.0).abs();
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_are_those_of_a_plain_loop() {
        for length in [0, 1, 7, 8, 9, 31] {
            let row: Vec<f32> = (0..length).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
            assert_eq!(sum(&row), row.iter().sum::<f32>());
            assert_eq!(maximum(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            assert_eq!(dot(&row, &row), row.iter().map(|x| x * x).sum::<f32>());
        }
    }
}
