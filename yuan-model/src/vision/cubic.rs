//! Cubic convolution.

/// The kernel of cubic convolution (Keys 1981) with parameter `a`, at a distance from its middle.
pub(super) fn cubic(a: f64, distance: f64) -> f64 {
    let x = distance.abs();
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}
