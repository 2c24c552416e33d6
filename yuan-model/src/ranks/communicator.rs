//! A group of ranks that exchange data.

use std::{fmt, sync::Arc};

/// Carries data between the ranks of a run.
///
/// What one rank sends to another arrives in the order in which it was sent. The ranks of a
/// [`Communicator`] call it in the same order.
pub trait Engine: fmt::Debug + Send + Sync {
    /// The number of this rank among all ranks.
    fn rank(&self) -> usize;

    /// All ranks.
    fn size(&self) -> usize;

    /// Hands `parts[i]` to the rank `members[i]` and returns what each of them handed to this one;
    /// this rank is one of them, and gets its own part back.
    ///
    /// # Errors
    ///
    /// If a rank is gone, says nothing for too long, or is at another collective.
    fn exchange(&self, members: &[usize], parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, RankError>;

    /// What is known of a rank that is gone or shows no life, without waiting for it; for whoever
    /// watches a rank that may be stuck in its device.
    fn lost(&self) -> Option<RankError> {
        None
    }
}

/// Why ranks could not exchange data; the run cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RankError {
    /// A rank ended while others waited for it.
    #[error("rank {rank} is gone: look at what it said last")]
    Gone {
        /// The rank.
        rank: usize,
    },
    /// A rank that is there did not answer.
    #[error("rank {rank} said nothing for {seconds} s: it hangs, or needs more patience")]
    Silent {
        /// The rank.
        rank: usize,
        /// How long.
        seconds: u64,
    },
    /// What a rank sent is not what this one waits for.
    #[error("rank {rank} is at another collective ({found} bytes instead of {expected})")]
    OutOfStep {
        /// The rank.
        rank: usize,
        /// Bytes that it sent.
        found: usize,
        /// Bytes that were expected.
        expected: usize,
    },
    /// Ranks that do the same must agree, and do not.
    #[error("rank {rank} has another {what} than rank 0: they were not started alike")]
    Disagreement {
        /// The rank.
        rank: usize,
        /// What they should have in common.
        what: &'static str,
    },
    /// So many ranks cannot be arranged as wanted.
    #[error("{0}")]
    Layout(String),
    /// The engine itself failed.
    #[error("the ranks cannot exchange data: {0}")]
    Engine(String),
}

/// A group of ranks, of which this is one.
///
/// ```
/// use yuan_model::ranks::on_threads;
///
/// // Every thread is a rank with a communicator of its own.
/// let sums = on_threads(3, |ranks| ranks.sum(&[ranks.rank() as f64, 1.0]).unwrap());
/// assert_eq!(sums, vec![vec![3.0, 3.0]; 3]);
/// ```
#[derive(Clone)]
pub struct Communicator {
    engine: Arc<dyn Engine>,
    /// Ranks of the group, by their numbers among all.
    members: Arc<[usize]>,
    /// The place of this rank in the group.
    place: usize,
}

/// The same place in the same group.
impl PartialEq for Communicator {
    fn eq(&self, other: &Self) -> bool {
        (self.place, &self.members) == (other.place, &other.members)
    }
}

impl Eq for Communicator {}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {:?}", self.place, self.members)
    }
}

impl Communicator {
    /// All ranks of an engine.
    pub fn new(engine: Arc<dyn Engine>) -> Self {
        Self { members: (0..engine.size()).collect(), place: engine.rank(), engine }
    }

    /// Some ranks of this group, by their places in it.
    ///
    /// # Panics
    ///
    /// If this rank is not one of them.
    #[must_use]
    pub fn group(&self, places: &[usize]) -> Self {
        let place = places.iter().position(|&place| place == self.place);
        Self {
            engine: self.engine.clone(),
            members: places.iter().map(|&place| self.members[place]).collect(),
            place: place.expect("a rank is in its own group"),
        }
    }

    /// The place of this rank in the group.
    pub fn rank(&self) -> usize {
        self.place
    }

    /// The ranks of the group, by their numbers among all.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// Ranks of the group.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// Whether this rank is the first of the group.
    pub fn is_first(&self) -> bool {
        self.place == 0
    }

    /// What is known of a rank that is gone or shows no life, whichever group it is in.
    pub fn lost(&self) -> Option<RankError> {
        self.engine.lost()
    }

    /// Hands `parts[rank]` to each rank; returns what each handed to this one.
    ///
    /// # Errors
    ///
    /// As [`Engine::exchange`].
    ///
    /// # Panics
    ///
    /// If there is not one part for each rank.
    pub fn exchange(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, RankError> {
        assert_eq!(parts.len(), self.size(), "a part for every rank");
        match self.size() {
            1 => Ok(parts),
            _ => self.engine.exchange(&self.members, parts),
        }
    }

    /// What every rank has, in the order of the ranks.
    ///
    /// # Errors
    ///
    /// As [`Engine::exchange`].
    pub fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, RankError> {
        self.exchange(vec![own.to_vec(); self.size()])
    }

    /// The numbers of every rank, `[rank][number]`; all have as many.
    ///
    /// # Errors
    ///
    /// As [`Engine::exchange`], and if a rank has another number of them.
    pub fn gather_counts(&self, own: &[u64]) -> Result<Vec<Vec<u64>>, RankError> {
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let of_rank = |bytes: Vec<u8>| {
            bytes.as_chunks().0.iter().map(|&number| u64::from_le_bytes(number)).collect()
        };
        Ok(self.gather_alike(&bytes)?.into_iter().map(of_rank).collect())
    }

    /// The sum of every number over the ranks, added in their order: the same on all of them.
    ///
    /// # Errors
    ///
    /// As [`gather_counts`](Self::gather_counts).
    pub fn sum(&self, own: &[f64]) -> Result<Vec<f64>, RankError> {
        let bytes: Vec<u8> = own.iter().flat_map(|number| number.to_le_bytes()).collect();
        let mut sums = vec![0.0; own.len()];
        for bytes in self.gather_alike(&bytes)? {
            for (sum, &number) in sums.iter_mut().zip(bytes.as_chunks().0) {
                *sum += f64::from_le_bytes(number);
            }
        }
        Ok(sums)
    }

    /// The sum of every count over the ranks.
    ///
    /// # Errors
    ///
    /// As [`gather_counts`](Self::gather_counts).
    pub fn sum_counts(&self, own: &[u64]) -> Result<Vec<u64>, RankError> {
        let mut sums = vec![0; own.len()];
        for counts in self.gather_counts(own)? {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        Ok(sums)
    }

    /// What the first rank has; the others' is not looked at.
    ///
    /// # Errors
    ///
    /// As [`Engine::exchange`].
    pub fn broadcast(&self, own: Vec<u8>) -> Result<Vec<u8>, RankError> {
        let parts = match self.is_first() {
            true => vec![own; self.size()],
            false => vec![Vec::new(); self.size()],
        };
        Ok(self.exchange(parts)?.swap_remove(0))
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    ///
    /// As [`Engine::exchange`].
    pub fn barrier(&self) -> Result<(), RankError> {
        self.gather(&[]).map(drop)
    }

    /// Checks that every rank has the same bytes.
    ///
    /// # Errors
    ///
    /// Names the first rank whose bytes are not those of rank 0.
    pub fn agree(&self, what: &'static str, own: &[u8]) -> Result<(), RankError> {
        let all = self.gather(own)?;
        match all.iter().position(|other| other != &all[0]) {
            None => Ok(()),
            Some(rank) => Err(RankError::Disagreement { rank: self.members[rank], what }),
        }
    }

    /// What every rank has, as many bytes on each.
    fn gather_alike(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, RankError> {
        let all = self.gather(own)?;
        match all.iter().position(|other| other.len() != own.len()) {
            None => Ok(all),
            Some(rank) => Err(RankError::OutOfStep {
                rank: self.members[rank],
                found: all[rank].len(),
                expected: own.len(),
            }),
        }
    }
}
