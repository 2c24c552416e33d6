//! What one process writes of a checkpoint: everything, or of several ranks the part that it
//! updates.

use std::ops::Range;

use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{DType, Tensor, TensorData},
};
use yuan_model::{
    ModelError,
    named::{self, StoredParameter},
    ops::host::HostCopies,
    storage::{Dtype, OutgoingTensor, TensorBytes, stored_dtype},
};

use super::{
    index::{Piece, files_of},
    state::{MODEL, OPTIMIZER},
};
use crate::{AdamW, LanguageModel, TrainError, optim::SUFFIXES};

/// The share of this process, read tensor by tensor.
pub(super) struct Share<'a, M> {
    model: &'a M,
    optimizer: &'a AdamW,
    pub stored: Vec<StoredParameter>,
    /// Elements of each parameter that it writes.
    own: Vec<Range<usize>>,
    /// Its number among several ranks.
    rank: Option<usize>,
}

/// A file with tensors.
#[derive(Debug)]
pub(super) struct FilePlan {
    pub name: String,
    pub tensors: Vec<OutgoingTensor>,
    /// Where each of them comes from.
    sources: Vec<Source>,
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Value(usize),
    /// The first (0) or second (1) moment.
    Moment(usize, usize),
}

impl<'a, M: LanguageModel> Share<'a, M> {
    pub fn of(model: &'a M, optimizer: &'a AdamW) -> Self {
        let stored = model.stored_parameters();
        let several = model.ranks().filter(|ranks| ranks.world().size() > 1);
        let own = |parameter: &StoredParameter| match optimizer.holders() {
            Some(holders) => holders.own_elements(parameter),
            None => parameter.elements(),
        };
        let own = stored.iter().map(own).collect();
        Self { model, optimizer, stored, own, rank: several.map(|ranks| ranks.world().rank()) }
    }

    /// Which parameters have moments.
    pub fn moments(&self) -> Vec<bool> {
        let has = |stored: &StoredParameter| self.optimizer.moment(stored.id, 0).is_some();
        self.stored.iter().map(has).collect()
    }

    /// What a rank has of every parameter, with the parameter's place among the stored ones.
    pub fn pieces(&self) -> Vec<(usize, Piece)> {
        let Some(rank) = self.rank else { return Vec::new() };
        let piece = |Range { start, end }: Range<usize>| Piece { rank, start, end };
        let pieces = self.own.iter().cloned().map(piece).enumerate();
        pieces.filter(|(_, piece)| piece.end > piece.start).collect()
    }

    /// The files that it writes: parameters, then moments.
    pub fn files(&self) -> [FilePlan; 2] {
        let dtypes = named::dtypes_by_id(self.model);
        let names = self.rank.map_or([MODEL, OPTIMIZER].map(str::to_owned), files_of);
        let mut files =
            names.map(|name| FilePlan { name, tensors: Vec::new(), sources: Vec::new() });
        let has_moments = self.moments();
        for (index, stored) in self.stored.iter().enumerate() {
            if self.own[index].is_empty() {
                continue;
            }
            let shape = match self.rank {
                Some(_) => vec![self.own[index].len()],
                None => stored.shape.clone(),
            };
            let mut add = |file: usize, name: String, dtype: DType, source: Source| {
                let dtype = stored_dtype(dtype).unwrap_or(Dtype::F32);
                files[file].tensors.push(OutgoingTensor { name, dtype, shape: shape.clone() });
                files[file].sources.push(source);
            };
            let dtype = dtypes.get(&stored.id).copied().unwrap_or(DType::F32);
            add(0, stored.path.clone(), dtype, Source::Value(index));
            if has_moments[index] {
                for (which, suffix) in SUFFIXES.into_iter().enumerate() {
                    let name = format!("{}.{suffix}", stored.path);
                    add(1, name, DType::F32, Source::Moment(index, which));
                }
            }
        }
        files
    }

    /// Reads the tensors of a file in their order, until `give` takes no more.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn read(
        &self,
        file: &FilePlan,
        mut give: impl FnMut(TensorBytes) -> bool,
    ) -> Result<(), TrainError> {
        for source in &file.sources {
            let (index, data) = match *source {
                Source::Value(index) => (index, self.value(index)?),
                Source::Moment(index, which) => (index, self.moment(index, which)?),
            };
            // Zeros fill up what ranks cut into equal parts.
            let bytes = self.own[index].len() * data.dtype().size();
            let bytes = match data.as_bytes().len() == bytes {
                true => TensorBytes::Data(data),
                false => TensorBytes::Owned(data.as_bytes()[..bytes].to_vec()),
            };
            if !give(bytes) {
                break;
            }
        }
        Ok(())
    }

    /// Room on the host for everything, moments included that are not there yet; none where the
    /// device does not copy to the host by itself.
    fn room(&self) -> Result<Option<HostCopies>, TrainError> {
        /// Of a value and two moments in f32.
        const BYTES: usize = 12;
        let Some(first) = self.own.iter().position(|own| !own.is_empty()) else { return Ok(None) };
        let elements: usize = self.own.iter().map(Range::len).sum();
        let first = self.flat_value(first)?;
        Ok(HostCopies::reserve(&first, 3 * self.own.len(), BYTES * elements))
    }

    /// Has the room for [`copies`](Self::copies) ready: otherwise the first checkpoint would wait
    /// for it.
    ///
    /// # Errors
    ///
    /// If a tensor is not there.
    pub fn reserve(&self) -> Result<(), TrainError> {
        self.room().map(drop)
    }

    /// All tensors of the files as copies on the host, which take the step little time; none where
    /// the device makes none. They are in the order in which [`read`](Self::read) hands them over.
    ///
    /// # Errors
    ///
    /// If a tensor is not there.
    pub fn copies(&self, files: &[FilePlan]) -> Result<Option<Vec<TensorBytes>>, TrainError> {
        let Some(mut copies) = self.room()? else { return Ok(None) };
        for source in files.iter().flat_map(|file| &file.sources) {
            let (index, tensor) = match *source {
                Source::Value(index) => (index, self.flat_value(index)?),
                Source::Moment(index, which) => {
                    let moment = self.optimizer.moment(self.stored[index].id, which);
                    (index, moment.cloned().ok_or_else(|| self.missing(index))?)
                }
            };
            // Zeros fill up what ranks cut into equal parts.
            let own = self.own[index].len();
            copies.push(match tensor.dims()[0] == own {
                true => tensor,
                false => tensor.slice_dim(0, 0..own),
            });
        }
        Ok(Some(copies.finish().into_iter().map(TensorBytes::Host).collect()))
    }

    /// The value of a parameter, or what this rank writes of it.
    fn flat_value(&self, index: usize) -> Result<Tensor<1>, ModelError> {
        let id = self.stored[index].id;
        let mut flat = FlatValue { id, found: None };
        self.model.visit(&mut flat);
        let flat = flat.found.ok_or_else(|| self.missing(index))?;
        Ok(match (self.optimizer.holders(), self.rank) {
            (Some(holders), Some(_)) => holders.own_part(id, flat),
            _ => flat,
        })
    }

    fn value(&self, index: usize) -> Result<TensorData, ModelError> {
        let id = self.stored[index].id;
        match (self.optimizer.holders(), self.rank) {
            (Some(_), Some(_)) => {
                self.flat_value(index)?.try_into_data().map_err(ModelError::device)
            }
            _ => named::read_by_id(self.model, id),
        }
    }

    fn moment(&self, index: usize, which: usize) -> Result<TensorData, ModelError> {
        let moment = self.optimizer.moment(self.stored[index].id, which);
        let moment = moment.ok_or_else(|| self.missing(index))?;
        moment.clone().try_into_data().map_err(ModelError::device)
    }

    fn missing(&self, index: usize) -> ModelError {
        ModelError::Tensors(vec![format!("`{}` is missing", self.stored[index].path)])
    }
}

/// The value of one parameter, flat.
struct FlatValue {
    id: ParamId,
    found: Option<Tensor<1>>,
}

impl ModuleVisitor for FlatValue {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.id == self.id {
            self.found = Some(param.val().inner().flatten(0, D - 1));
        }
    }
}
