//! What fails on a device's thread, and how whoever comes next is told.

use std::sync::{Mutex, PoisonError};

/// The latest failure, until somebody is told.
static FAILURE: Mutex<Option<String>> = Mutex::new(None);

/// Keeps a failure for the next one to ask.
pub(super) fn remember(message: &str) {
    *FAILURE.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.to_owned());
}

/// Panics with what failed since the last call.
pub(super) fn raise() {
    let failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(message) = failure {
        panic!("CUDA: {message}");
    }
}

/// An error of one of CUDA's libraries as text.
pub(super) fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}
