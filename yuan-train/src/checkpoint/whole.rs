//! The tensors of a whole model and of its optimizer, whichever ranks hold them.

use burn::{module::ParamId, tensor::TensorData};
use yuan_model::{
    ModelError,
    named::{self, StoredParameter, StoredPart},
    ranks::{Communicator, Ranks},
};

use crate::{AdamW, LanguageModel, TrainError};

/// Reads one tensor after the other; over ranks, each of them reads the same ones in the same
/// order, and the first one gets them.
pub(super) struct Whole<'a, M> {
    model: &'a M,
    optimizer: &'a AdamW,
    pub stored: Vec<StoredParameter>,
    ranks: Option<&'a Ranks>,
}

impl<'a, M: LanguageModel> Whole<'a, M> {
    pub fn of(model: &'a M, optimizer: &'a AdamW) -> Self {
        Self { model, optimizer, stored: model.stored_parameters(), ranks: model.ranks() }
    }

    /// Whether this rank gets what is read.
    pub fn is_first_rank(&self) -> bool {
        self.ranks.is_none_or(|ranks| ranks.world().is_first())
    }

    /// A parameter of the whole model; empty on other ranks than the first.
    pub fn parameter(&self, index: usize) -> Result<TensorData, TrainError> {
        let stored = &self.stored[index];
        let Some(ranks) = self.ranks else { return Ok(named::read_stored(self.model, stored)?) };
        let is_spread = stored.parts.len() > 1;
        // The ranks of the first row hold everything.
        let holds = ranks.column().is_first() && (is_spread || ranks.row().is_first());
        if !holds {
            return Ok(nothing());
        }
        let own = held(stored);
        let data = named::read_stored(self.model, &own)?;
        if !is_spread {
            return Ok(data);
        }
        let parts = to_first(ranks.row(), data.as_bytes())?;
        if !self.is_first_rank() {
            return Ok(nothing());
        }
        Ok(TensorData::from_bytes_vec(parts.concat(), stored.shape.clone(), data.dtype()))
    }

    /// Parameters that have moments, by their places in [`stored`](Self::stored), with the type of
    /// these.
    pub fn with_moments(&self) -> Vec<usize> {
        let has = |index: &usize| self.optimizer.moment(self.id(*index), 0).is_some();
        (0..self.stored.len()).filter(has).collect()
    }

    /// The first (0) or second (1) moment of a parameter of the whole model; empty on other ranks
    /// than the first.
    pub fn moment(&self, index: usize, which: usize) -> Result<TensorData, TrainError> {
        let stored = &self.stored[index];
        let read = |id: ParamId| {
            let missing = || ModelError::Tensors(vec![format!("{} is missing", stored.path)]);
            let moment = self.optimizer.moment(id, which).ok_or_else(missing)?;
            moment.clone().try_into_data().map_err(ModelError::device)
        };
        let Some(ranks) = self.ranks else {
            let parts = stored.parts.iter().map(|part| read(part.copies[0]));
            let parts: Vec<TensorData> = parts.collect::<Result<_, ModelError>>()?;
            let (dtype, bytes) = (parts[0].dtype(), parts.iter().flat_map(TensorData::as_bytes));
            let bytes = bytes.copied().collect();
            return Ok(TensorData::from_bytes_vec(bytes, stored.shape.clone(), dtype));
        };
        let own = read(self.id(index))?;
        let of_ranks = to_first(ranks.world(), own.as_bytes())?;
        if !self.is_first_rank() {
            return Ok(nothing());
        }
        let is_spread = stored.parts.len() > 1;
        let (size, slice) = (own.dtype().size(), stored.slice_len());
        let mut bytes = Vec::new();
        for (place, part) in stored.parts.iter().enumerate() {
            // The ranks that hold copies of a part cut it among them; zeros fill the last cut up.
            let holders = (0..ranks.world().size())
                .filter(|rank| !is_spread || rank % ranks.expert() == place);
            let mut of_part: Vec<u8> = holders.flat_map(|rank| &of_ranks[rank]).copied().collect();
            of_part.truncate(part.slices * slice * size);
            bytes.extend(of_part);
        }
        Ok(TensorData::from_bytes_vec(bytes, stored.shape.clone(), own.dtype()))
    }

    /// The part of a parameter that this rank holds, or the first one's copy.
    fn id(&self, index: usize) -> ParamId {
        held(&self.stored[index]).parts[0].copies[0]
    }

    /// Takes part in reading everything, for the first rank to write.
    pub fn serve(&self) -> Result<(), TrainError> {
        for index in 0..self.stored.len() {
            self.parameter(index)?;
        }
        for index in self.with_moments() {
            self.moment(index, 0)?;
            self.moment(index, 1)?;
        }
        Ok(())
    }
}

/// A parameter with the parts alone that are held here.
fn held(stored: &StoredParameter) -> StoredParameter {
    let parts: Vec<StoredPart> =
        stored.parts.iter().filter(|part| !part.copies.is_empty()).cloned().collect();
    let mut shape = stored.shape.clone();
    if let Some(first) = shape.first_mut() {
        *first = parts.iter().map(|part| part.slices).sum();
    }
    StoredParameter { path: stored.path.clone(), shape, parts }
}

fn to_first(group: &Communicator, own: &[u8]) -> Result<Vec<Vec<u8>>, TrainError> {
    let mut parts = vec![Vec::new(); group.size()];
    parts[0] = own.to_vec();
    Ok(group.exchange(parts)?)
}

fn nothing() -> TensorData {
    TensorData::new(Vec::<f32>::new(), [0])
}
