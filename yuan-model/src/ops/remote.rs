//! Our operations on devices that other processes serve: each is one message, and its fast form
//! runs there.
//!
//! The client names an operation, its arguments, and what the results will look like; the server,
//! which has to be [`device::serve`](crate::device::serve), looks the name up and calls its
//! backend. Both sides come from one table. Whether fast versions are used is up to the process
//! that computes ([`set_fast_paths`](super::set_fast_paths)).

use std::slice::Iter;

use burn::{
    backend::{
        Backend, Remote, TensorMetadata,
        tensor::{FloatTensor, IntTensor},
    },
    remote::CustomOpClient,
    server::{CustomOpIr, CustomOpRegistry, HandleContainer},
    tensor::{DType, FloatDType, Shape},
};
use burn_ir::{BackendIr, ScalarIr, TensorIr};

use super::{AdamWStep, YuanOps};

/// `name(argument: kind, …) -> (result: kind[shape, type], …)`.
macro_rules! operations {
    ($($name:ident($first:ident: $first_kind:ident $(, $arg:ident: $kind:ident)*)
        -> ($($result:ident: $result_kind:ident[$shape:expr, $dtype:expr]),+);)*) => {
        #[allow(unused_parens, reason = "one result or several")]
        impl YuanOps for Remote {
            $(fn $name($first: Of<$first_kind, Self> $(, $arg: Of<$kind, Self>)*) -> ($(Of<$result_kind, Self>),+) {
                let results = [$((Shape::from($shape), DType::from($dtype))),+];
                let client = CustomOpClient::new(&$first.device());
                let mut call = Call::default();
                $first_kind::send($first, &mut call);
                $($kind::send($arg, &mut call);)*
                let [$($result),+] = call.register(&client, id!($name), results);
                ($($result),+)
            })*
        }

        /// The table, by which client and server tell whether they mean the same.
        pub const OPERATIONS: &str = concat!($(
            stringify!($name), stringify!(($first_kind $(, $kind)*)), stringify!(-> ($($result_kind[$shape, $dtype]),+)), "\n"
        ),*);

        /// What a server answers to.
        #[allow(unused_parens, reason = "one result or several")]
        pub fn served_operations<B: YuanOps + BackendIr>() -> CustomOpRegistry<B> {
            let mut served = CustomOpRegistry::new();
            $(served.register(id!($name), |handles, call, _| {
                let mut call = Incoming::<B>::new(handles, call);
                let $first = $first_kind::receive(&mut call);
                $(let $arg = $kind::receive(&mut call);)*
                let ($($result),+) = B::$name($first $(, $arg)*);
                $($result_kind::answer($result, &mut call);)+
            });)*
            served
        }
    };
}

macro_rules! id {
    ($name:ident) => {
        concat!("yuan.", stringify!($name))
    };
}

// Gradients of weights are in f32, unrounded where the server's backend has them so. The logarithms
// of the sums are whatever the backend keeps: they only go back to it.
operations! {
    dense(rows: Float, weight: Float) -> (y: Float[[rows.shape()[0], weight.shape()[1]], rows.dtype()]);
    dense_weight_backward(rows: Float, grad: Float)
        -> (d_weight: Float[[rows.shape()[1], grad.shape()[1]], DType::F32]);
    embed(weight: Float, ids: Int, dtype: Type) -> (y: Float[[ids.shape()[0], weight.shape()[1]], dtype]);
    embed_backward(grad: Float, ids: Int, vocab: Count) -> (d_weight: Float[[vocab, grad.shape()[1]], DType::F32]);
    grouped_matmul(rows: Float, weight: Float, rows_per_group: CountList)
        -> (y: Float[[rows.shape()[0], weight.shape()[2]], rows.dtype()]);
    grouped_matmul_weight_backward(rows: Float, grad: Float, rows_per_group: CountList)
        -> (d_weight: Float[[rows_per_group.len(), rows.shape()[1], grad.shape()[1]], DType::F32]);
    swiglu(gate_up: Float) -> (y: Float[[gate_up.shape()[0], gate_up.shape()[1] / 2], gate_up.dtype()]);
    swiglu_backward(gate_up: Float, grad: Float) -> (d_gate_up: Float[gate_up.shape(), gate_up.dtype()]);
    gather_rows(source: Float, rows: Int, inverse: Int, copies: Count)
        -> (y: Float[[rows.shape()[0], source.shape()[1]], source.dtype()]);
    gather_rows_backward(grad: Float, inverse: Int, copies: Count)
        -> (d_source: Float[[grad.shape()[0] / copies, grad.shape()[1]], grad.dtype()]);
    combine_rows(rows: Float, weights: Float, row_of_pair: Int, pair_of_row: Int)
        -> (y: Float[[weights.shape()[0], rows.shape()[1]], rows.dtype()]);
    combine_rows_backward(rows: Float, weights: Float, row_of_pair: Int, pair_of_row: Int, grad: Float)
        -> (d_rows: Float[rows.shape(), rows.dtype()], d_weights: Float[weights.shape(), weights.dtype()]);
    rms_norm(x: Float, weight: Float, epsilon: Number) -> (y: Float[x.shape(), x.dtype()]);
    rms_norm_backward(x: Float, weight: Float, grad: Float, epsilon: Number)
        -> (d_x: Float[x.shape(), x.dtype()], d_weight: Float[weight.shape(), weight.dtype()]);
    add_previous(taps: Float) -> (y: Float[half_as_wide(taps.shape()), taps.dtype()]);
    add_previous_backward(grad: Float) -> (d_taps: Float[twice_as_wide(grad.shape()), grad.dtype()]);
    rotate(x: Float, cos: Float, sin: Float) -> (y: Float[x.shape(), x.dtype()]);
    rotate_pair(first: Float, second: Float, cos: Float, sin: Float)
        -> (y: Float[twice_as_wide(first.shape()), first.dtype()]);
    rotary_attention(query_key: Float, value: Float, cos: Float, sin: Float, first_keys: Int)
        -> (y: Float[value.shape(), value.dtype()]);
    causal_attention(query: Float, key: Float, value: Float, first_keys: Int)
        -> (y: Float[value.shape(), value.dtype()], log_sums: Float[rows_of_heads(&query.shape()), DType::F32]);
    cached_attention(query: Float, key: Float, value: Float, length: Count, first_keys: CountList)
        -> (y: Float[query.shape(), value.dtype()]);
    causal_attention_backward(
        query: Float, key: Float, value: Float, first_keys: Int, output: Float, log_sums: Float, grad: Float
    ) -> (
        d_query: Float[query.shape(), query.dtype()],
        d_key: Float[key.shape(), key.dtype()],
        d_value: Float[value.shape(), value.dtype()]
    );
    cross_entropy(logits: Float, labels: Int) -> (loss: Float[labels.shape(), logits.dtype()]);
    cross_entropy_backward(logits: Float, labels: Int, grad: Float)
        -> (d_logits: Float[logits.shape(), logits.dtype()]);
    linear_cross_entropy(rows: Float, weight: Float, labels: Int, scale: Number, rows_at_once: Count)
        -> (loss: Float[labels.shape(), DType::F32]);
    linear_cross_entropy_backward(
        rows: Float, weight: Float, labels: Int, scale: Number, rows_at_once: Count, grad: Float
    ) -> (d_rows: Float[rows.shape(), rows.dtype()], d_weight: Float[weight.shape(), DType::F32]);
    dispatch_order(experts: Int, num_experts: Count) -> (
        row_of_pair: Int[[experts.shape().num_elements()], experts.dtype()],
        pair_of_row: Int[[experts.shape().num_elements()], experts.dtype()],
        counts: Int[[num_experts], experts.dtype()]
    );
    sum_of_squares(x: Float) -> (sum: Float[[1], x.dtype()]);
    adamw_update(param: Float, grad: Float, moment_1: Float, moment_2: Float, step: Step) -> (
        new_param: Float[param.shape(), param.dtype()],
        new_moment_1: Float[moment_1.shape(), moment_1.dtype()],
        new_moment_2: Float[moment_2.shape(), moment_2.dtype()]
    );
}

fn half_as_wide(mut shape: Shape) -> Shape {
    let last = shape.num_dims() - 1;
    shape[last] /= 2;
    shape
}

fn twice_as_wide(mut shape: Shape) -> Shape {
    let last = shape.num_dims() - 1;
    shape[last] *= 2;
    shape
}

/// `[batch, heads, seq, d]` → `[batch, heads, seq]`.
fn rows_of_heads(shape: &Shape) -> [usize; 3] {
    [shape[0], shape[1], shape[2]]
}

/// A message that is being written.
#[derive(Default)]
pub struct Call {
    inputs: Vec<TensorIr>,
    scalars: Vec<ScalarIr>,
}

impl Call {
    fn register<const N: usize>(
        self,
        client: &CustomOpClient,
        id: &'static str,
        results: [(Shape, DType); N],
    ) -> [FloatTensor<Remote>; N] {
        let results = results
            .map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype));
        let op = CustomOpIr::with_scalars(id, &self.inputs, &results, self.scalars);
        let made = client.register(op);
        made.try_into().unwrap_or_else(|made: Vec<_>| panic!("{id}: {} of {N} results", made.len()))
    }
}

/// A message that is being read, in the order in which it was written.
pub struct Incoming<'a, B: BackendIr> {
    handles: &'a mut HandleContainer<B::Handle>,
    inputs: Iter<'a, TensorIr>,
    scalars: Iter<'a, ScalarIr>,
    results: Iter<'a, TensorIr>,
}

impl<'a, B: BackendIr> Incoming<'a, B> {
    fn new(handles: &'a mut HandleContainer<B::Handle>, call: &'a CustomOpIr) -> Self {
        let (inputs, results) = (call.inputs.iter(), call.outputs.iter());
        Self { handles, inputs, scalars: call.scalars.iter(), results }
    }

    // A message that does not fit ends its session with this reason; it comes from a client of
    // another version.

    fn input(&mut self) -> &'a TensorIr {
        self.inputs.next().expect("a tensor is missing")
    }

    fn result(&mut self) -> &'a TensorIr {
        self.results.next().expect("a result is missing")
    }

    fn number(&mut self) -> f64 {
        match self.scalars.next() {
            Some(ScalarIr::Float(number)) => *number,
            other => panic!("expected a number, got {other:?}"),
        }
    }

    fn count(&mut self) -> usize {
        match self.scalars.next() {
            Some(ScalarIr::UInt(count)) => *count as usize,
            other => panic!("expected a count, got {other:?}"),
        }
    }
}

/// A kind of argument, and how it travels.
pub trait Argument {
    type Of<B: Backend>;

    fn send(value: Self::Of<Remote>, call: &mut Call);

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> Self::Of<B>;
}

type Of<K, B> = <K as Argument>::Of<B>;

/// A kind of result.
pub trait Answer: Argument {
    fn answer<B: BackendIr>(value: Self::Of<B>, call: &mut Incoming<'_, B>);
}

pub enum Float {}

impl Argument for Float {
    type Of<B: Backend> = FloatTensor<B>;

    fn send(value: FloatTensor<Remote>, call: &mut Call) {
        call.inputs.push(value.into_ir());
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> FloatTensor<B> {
        let input = call.input();
        call.handles.get_float_tensor::<B>(input)
    }
}

impl Answer for Float {
    fn answer<B: BackendIr>(value: FloatTensor<B>, call: &mut Incoming<'_, B>) {
        let result = call.result();
        let same = value.dtype() == result.dtype;
        let value = if same { value } else { B::float_cast(value, result.dtype.into()) };
        call.handles.register_float_tensor::<B>(&result.id, value);
    }
}

pub enum Int {}

impl Argument for Int {
    type Of<B: Backend> = IntTensor<B>;

    fn send(value: IntTensor<Remote>, call: &mut Call) {
        call.inputs.push(value.into_ir());
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> IntTensor<B> {
        let input = call.input();
        call.handles.get_int_tensor::<B>(input)
    }
}

impl Answer for Int {
    fn answer<B: BackendIr>(value: IntTensor<B>, call: &mut Incoming<'_, B>) {
        let result = call.result();
        let same = value.dtype() == result.dtype;
        let value = if same { value } else { B::int_cast(value, result.dtype.into()) };
        call.handles.register_int_tensor::<B>(&result.id, value);
    }
}

pub enum Count {}

impl Argument for Count {
    type Of<B: Backend> = usize;

    fn send(value: usize, call: &mut Call) {
        call.scalars.push(ScalarIr::UInt(value as u64));
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> usize {
        call.count()
    }
}

pub enum CountList {}

impl Argument for CountList {
    type Of<B: Backend> = Vec<usize>;

    fn send(value: Vec<usize>, call: &mut Call) {
        let all = std::iter::once(value.len()).chain(value);
        call.scalars.extend(all.map(|count| ScalarIr::UInt(count as u64)));
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> Vec<usize> {
        (0..call.count()).map(|_| call.count()).collect()
    }
}

pub enum Number {}

impl Argument for Number {
    type Of<B: Backend> = f64;

    fn send(value: f64, call: &mut Call) {
        call.scalars.push(ScalarIr::Float(value));
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> f64 {
        call.number()
    }
}

/// The type of the first result, which says it already.
pub enum Type {}

impl Argument for Type {
    type Of<B: Backend> = FloatDType;

    fn send(_: FloatDType, _: &mut Call) {}

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> FloatDType {
        call.results.as_slice()[0].dtype.into()
    }
}

pub enum Step {}

impl Argument for Step {
    type Of<B: Backend> = AdamWStep;

    fn send(step: AdamWStep, call: &mut Call) {
        let AdamWStep {
            learning_rate,
            beta_1,
            beta_2,
            epsilon,
            weight_decay,
            step,
            gradient_scale,
        } = step;
        let numbers = [learning_rate, beta_1, beta_2, epsilon, weight_decay, gradient_scale];
        call.scalars.extend(numbers.map(ScalarIr::Float));
        call.scalars.push(ScalarIr::UInt(step));
    }

    fn receive<B: BackendIr>(call: &mut Incoming<'_, B>) -> AdamWStep {
        let [learning_rate, beta_1, beta_2, epsilon, weight_decay, gradient_scale] =
            std::array::from_fn(|_| call.number());
        let step = call.count() as u64;
        AdamWStep { learning_rate, beta_1, beta_2, epsilon, weight_decay, step, gradient_scale }
    }
}
