//! The order of (token, expert) pairs: a stable counting sort on the device.

use std::ops::Range;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    context::Lanes,
    kernels::{Arg, Kernel, KernelFile},
    queue::{received, run, start},
    readback::MOST_SENT,
    tensors::{contiguous, dims, empty, is_ours},
};

/// Pairs of one block.
const CHUNK: usize = 256;

fn kernel(name: &'static str) -> Kernel {
    Kernel::new(KernelFile::Dispatch, name, false)
}

/// Experts whose counts fit a block's memory, and the way to the host.
const MOST_EXPERTS: usize = MOST_SENT;

/// [`sorted`] takes numbers below this: two digits of so many values.
pub(super) const MOST_SORTED: usize = MOST_EXPERTS * MOST_EXPERTS;

pub(super) fn is_fast(experts: &CubeTensor, num_experts: usize) -> bool {
    is_ours(experts) && experts.dtype == DType::I32 && num_experts <= MOST_EXPERTS
}

/// The three steps of a counting sort of `count` numbers below `buckets`; results as of [`order`].
#[derive(Debug, Clone, Copy)]
struct Sort {
    count: usize,
    buckets: usize,
}

impl Sort {
    fn chunks(self) -> usize {
        self.count.div_ceil(CHUNK)
    }

    /// Uninitialised, for what the steps note in between.
    fn histogram(self, like: &CubeTensor) -> CubeTensor {
        empty(like, [self.chunks().max(1), self.buckets], like.dtype)
    }

    fn launch(
        self,
        lanes: &mut Lanes<'_>,
        [numbers, histogram, row_of, of_row, totals]: [u64; 5],
    ) -> Result<(), String> {
        let [numbers, histogram, row_of, of_row, totals] =
            [numbers, histogram, row_of, of_row, totals].map(Arg::Pointer);
        let (count, buckets, shared) =
            (Arg::Int(self.count), Arg::Int(self.buckets), 4 * self.buckets);
        let args = [numbers, histogram, count, buckets];
        lanes.launch(kernel("count_pairs"), [self.chunks(), 1], CHUNK, shared, &args)?;
        let args = [histogram, totals, Arg::Int(self.chunks()), buckets];
        lanes.launch(kernel("scan_counts"), [1, 1], 512, shared, &args)?;
        let args = [numbers, histogram, row_of, of_row, count, buckets];
        lanes.launch(kernel("place_pairs"), [self.chunks(), 1], CHUNK, CHUNK / 32 * shared, &args)
    }
}

/// See [`ops::dispatch_order`](crate::ops::dispatch_order).
pub(super) fn order(
    experts: CubeTensor,
    num_experts: usize,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let experts = contiguous(experts);
    let [tokens, top_k] = dims(&experts);
    let sort = Sort { count: tokens * top_k, buckets: num_experts };
    let [row_of_pair, pair_of_row] = [(); 2].map(|()| empty(&experts, [sort.count], experts.dtype));
    let (histogram, counts) =
        (sort.histogram(&experts), empty(&experts, [num_experts], experts.dtype));
    run([&experts, &histogram, &row_of_pair, &pair_of_row, &counts], move |lanes, pointers| {
        sort.launch(lanes, pointers)?;
        // On its way while the rows are gathered.
        lanes.send(pointers[4], num_experts)
    });
    // The host is about to wait for them.
    start(&counts);
    (row_of_pair, pair_of_row, counts)
}

/// An order that sorts `ids`, all below `bound`, and leaves equal ones as they come: by their low
/// digit, then by the high one.
pub(super) fn sorted(ids: &CubeTensor, bound: usize) -> CubeTensor {
    let [count] = dims(ids);
    let base = (bound as f64).sqrt().ceil() as usize;
    let sort = Sort { count, buckets: base };
    let [digits, row_of, low, high, order] = [(); 5].map(|()| empty(ids, [count], ids.dtype));
    let (histogram, totals) = (sort.histogram(ids), empty(ids, [base], ids.dtype));
    let tensors = [ids, &digits, &row_of, &low, &high, &order, &histogram, &totals];
    run(tensors, move |lanes, [ids, digits, row_of, low, high, order, histogram, totals]| {
        let digit = |lanes: &mut Lanes<'_>, order: u64, unit: usize, into: u64| {
            let sizes = [count, unit, base].map(Arg::Int);
            let args = [&[ids, order, digits].map(Arg::Pointer)[..], &sizes].concat();
            lanes.launch(kernel("digits"), [sort.chunks(), 1], CHUNK, 0, &args)?;
            sort.launch(lanes, [digits, histogram, row_of, into, totals])
        };
        digit(lanes, 0, 1, low)?;
        digit(lanes, low, base, high)?;
        let args = [&[low, high, order].map(Arg::Pointer)[..], &[Arg::Int(count)]].concat();
        lanes.launch(kernel("follow"), [sort.chunks(), 1], CHUNK, 0, &args)
    });
    order
}

/// Segments of rows whose starts fit a block's memory.
const MOST_SEGMENTS: usize = 4096;

pub(super) fn takes_arrivals(
    counts: &CubeTensor,
    num_experts: usize,
    experts: &Range<usize>,
) -> bool {
    let segments = dims::<1>(counts)[0] / num_experts.max(1) * experts.len();
    is_ours(counts) && counts.dtype == DType::I32 && segments <= MOST_SEGMENTS
}

/// See [`ops::arrival_order`](crate::ops::arrival_order).
pub(super) fn arrivals(
    counts: CubeTensor,
    num_experts: usize,
    experts: Range<usize>,
    arriving: usize,
) -> (CubeTensor, CubeTensor) {
    let counts = contiguous(counts);
    let [all] = dims(&counts);
    let (ranks, own) = (all / num_experts, experts.len());
    let segments = ranks * own;
    let [place_of_row, row_at_place] = [(); 2].map(|()| empty(&counts, [arriving], counts.dtype));
    let starts = empty(&counts, [2 * segments], counts.dtype);
    let tensors = [&counts, &starts, &place_of_row, &row_at_place];
    run(tensors, move |lanes, [counts, starts, places, rows]| {
        let [counts, starts, places, rows] = [counts, starts, places, rows].map(Arg::Pointer);
        let sizes = [ranks, num_experts, experts.start, own].map(Arg::Int);
        let args = [&[counts, starts][..], &sizes].concat();
        lanes.launch(kernel("arrival_starts"), [1, 1], 256, 4 * segments, &args)?;
        let args = [starts, places, rows, Arg::Int(segments), Arg::Int(arriving)];
        lanes.launch(kernel("arrival_order"), [arriving.div_ceil(256), 1], 256, 0, &args)
    });
    (place_of_row, row_at_place)
}

/// The counts of [`order`] on the host, if they are its.
pub(super) fn counts(counts: &CubeTensor) -> Option<Vec<usize>> {
    Some(received(counts)?.into_iter().map(|count| count as usize).collect())
}
