//! The gradient of an exchange: the exchange back.
//!
//! Burn's steps have one output and a fixed number of parents. A chain of steps takes in the
//! sources, one after the other, and a step for every result hangs on its end. Backwards, the
//! results' steps only put their gradients aside; the first step of the chain, which runs when all
//! have, sends them all back at once.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use burn::backend::{
    Autodiff, Backend, TensorMetadata,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::FloatTensor,
};
use burn::tensor::{DType, Shape};

use super::{Target, TensorList, YuanOps};

/// A tensor with a graph.
type Recorded<B, C> = FloatTensor<Autodiff<B, C>>;

/// [`exchange`](super::exchange) on tensors with graphs.
pub(in crate::ops) fn recorded<B: YuanOps, C: CheckpointStrategy>(
    sources: TensorList<Autodiff<B, C>>,
    targets: Vec<Target>,
) -> TensorList<Autodiff<B, C>> {
    let nodes: Vec<_> = sources.0.iter().map(Recorded::<B, C>::node).collect();
    let tracked = sources.0.iter().any(Recorded::<B, C>::is_tracked);
    let sources: Vec<FloatTensor<B>> =
        sources.0.into_iter().map(Recorded::<B, C>::into_primitive).collect();
    let back = tracked.then(|| Back::new(&sources, &targets));
    let results = B::exchange(TensorList(sources), targets).0;
    let Some(back) = back else {
        return TensorList(results.into_iter().map(Recorded::<B, C>::new).collect());
    };
    let token = back.token();
    let back: Shared<B> = Arc::new(Mutex::new(back));
    let mut chain = Recorded::<B, C>::new(token.clone());
    for (index, node) in nodes.into_iter().enumerate() {
        chain = match (SourceNode { index })
            .prepare::<C>([node, chain.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(step) => step.finish(back.clone(), token.clone()),
            OpsKind::UnTracked(step) => step.finish(token.clone()),
        };
    }
    let result = |(index, result)| match (ReceivedRows { index })
        .prepare::<C>([chain.node()])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(step) => step.finish(back.clone(), result),
        OpsKind::UnTracked(step) => step.finish(result),
    };
    TensorList(results.into_iter().enumerate().map(result).collect())
}

/// What a tensor was.
#[derive(Debug, Clone)]
struct Like<B: Backend> {
    rows: usize,
    width: usize,
    dtype: DType,
    device: B::Device,
}

impl<B: Backend> Like<B> {
    fn new(tensor: &FloatTensor<B>) -> Self {
        let shape = tensor.shape();
        Self { rows: shape[0], width: shape[1], dtype: tensor.dtype(), device: tensor.device() }
    }

    fn zeros(&self) -> FloatTensor<B> {
        B::float_zeros(Shape::from([self.rows, self.width]), &self.device, self.dtype.into())
    }

    /// A row that stands for the device.
    fn row(&self) -> FloatTensor<B> {
        B::float_empty(Shape::from([1, self.width]), &self.device, self.dtype.into())
    }
}

/// The way back: results' gradients to sources.
#[derive(Debug)]
struct Back<B: Backend> {
    sources: Vec<Like<B>>,
    results: Vec<Like<B>>,
    /// Sources from results; behind the results there is a row on the device of every source.
    targets: Vec<Target>,
    received: Vec<Option<FloatTensor<B>>>,
    /// Whether the chain has a gradient, which says only that its steps are to run.
    announced: bool,
    gradients: Option<Vec<FloatTensor<B>>>,
}

impl<B: YuanOps> Back<B> {
    fn new(sources: &[FloatTensor<B>], targets: &[Target]) -> Self {
        let sources: Vec<Like<B>> = sources.iter().map(Like::new).collect();
        let rows: Vec<usize> = sources.iter().map(|source| source.rows).collect();
        let results = targets
            .iter()
            .map(|target| Like { rows: target.rows().max(1), ..sources[target.at].clone() });
        Self {
            results: results.collect(),
            targets: inverse(&rows, targets),
            received: vec![None; targets.len()],
            announced: false,
            gradients: None,
            sources,
        }
    }

    /// A tensor without meaning that links the steps of the chain.
    fn token(&self) -> FloatTensor<B> {
        B::float_empty(Shape::from([1]), &self.sources[0].device, self.sources[0].dtype.into())
    }

    /// The gradient of a source.
    fn gradient(&mut self, source: usize) -> FloatTensor<B> {
        let gradients = self.gradients.get_or_insert_with(|| {
            let received = self.received.iter_mut().zip(&self.results);
            let mut all: Vec<_> =
                received.map(|(grad, like)| grad.take().unwrap_or_else(|| like.zeros())).collect();
            all.extend(self.sources.iter().map(Like::row));
            let gradients = B::exchange(TensorList(all), self.targets.clone()).0;
            let unused = gradients.into_iter().zip(&self.targets).zip(&self.sources);
            unused
                .map(
                    |((grad, target), like)| {
                        if target.parts.is_empty() { like.zeros() } else { grad }
                    },
                )
                .collect()
        });
        gradients[source].clone()
    }
}

/// What undoes an exchange.
///
/// # Panics
///
/// If rows of a source go to several places, or some do and some do not.
fn inverse(rows_of_sources: &[usize], targets: &[Target]) -> Vec<Target> {
    let mut parts = vec![Vec::new(); rows_of_sources.len()];
    for (index, target) in targets.iter().enumerate() {
        let mut start = 0;
        for (source, rows) in target.merged() {
            let end = start + rows.len();
            parts[source].push((rows, index, start..end));
            start = end;
        }
    }
    let undo = |(source, mut parts): (usize, Vec<(Range<usize>, usize, Range<usize>)>)| {
        parts.sort_unstable_by_key(|(rows, ..)| rows.start);
        let end = parts.iter().fold(0, |end, (rows, ..)| {
            assert_eq!(
                rows.start, end,
                "source {source}: a gradient needs every row in exactly one place"
            );
            rows.end
        });
        assert!(
            parts.is_empty() || end == rows_of_sources[source],
            "source {source}: a gradient needs every row in exactly one place"
        );
        let parts = parts.into_iter().map(|(_, target, rows)| (target, rows)).collect();
        Target { at: targets.len() + source, parts }
    };
    parts.into_iter().enumerate().map(undo).collect()
}

type Shared<B> = Arc<Mutex<Back<B>>>;

/// A step of the chain.
#[derive(Debug)]
struct SourceNode {
    index: usize,
}

impl<B: YuanOps> Backward<B, 2> for SourceNode {
    type State = Shared<B>;

    fn backward(self, ops: Ops<Shared<B>, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let token = grads.consume::<B>(&ops.node);
        let [source, chain] = ops.parents;
        if let Some(source) = source {
            let gradient =
                ops.state.lock().unwrap_or_else(PoisonError::into_inner).gradient(self.index);
            grads.register::<B>(source.id, gradient);
        }
        if let Some(chain) = chain {
            grads.register::<B>(chain.id, token);
        }
    }
}

/// A result's step.
#[derive(Debug)]
struct ReceivedRows {
    index: usize,
}

impl<B: YuanOps> Backward<B, 1> for ReceivedRows {
    type State = Shared<B>;

    fn backward(self, ops: Ops<Shared<B>, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let mut back = ops.state.lock().unwrap_or_else(PoisonError::into_inner);
        back.received[self.index] = Some(gradient);
        let [chain] = ops.parents;
        if let (Some(chain), false) = (chain, std::mem::replace(&mut back.announced, true)) {
            grads.register::<B>(chain.id, back.token());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Target, inverse};

    #[test]
    fn an_inverse_brings_every_row_back() {
        let targets = [
            Target { at: 0, parts: vec![(0, 0..2), (1, 0..1), (0, 4..5)] },
            Target { at: 1, parts: vec![(1, 1..3), (0, 2..4)] },
        ];
        let back = inverse(&[5, 3, 1], &targets);
        assert_eq!(back[0], Target { at: 2, parts: vec![(0, 0..2), (1, 2..4), (0, 3..4)] });
        assert_eq!(back[1], Target { at: 3, parts: vec![(0, 2..3), (1, 0..2)] });
        assert_eq!(back[2], Target { at: 4, parts: vec![] });
    }

    #[test]
    #[should_panic(expected = "source 0: a gradient needs every row in exactly one place")]
    fn rows_in_two_places_have_no_inverse() {
        inverse(&[2], &[Target { at: 0, parts: vec![(0, 0..2), (0, 1..2)] }]);
    }

    #[test]
    #[should_panic(expected = "source 0: a gradient needs every row in exactly one place")]
    fn rows_left_behind_have_no_inverse() {
        inverse(&[3], &[Target { at: 0, parts: vec![(0, 0..2)] }]);
    }
}
