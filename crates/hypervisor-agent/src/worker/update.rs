//! What becomes of an instance whose driver could not make it what it is to be.

use hv_driver::{DriverError, Observed};
use hv_telemetry::error_chain;

use super::Worker;
use crate::entry::Told;

impl Worker {
    /// Where the driver cannot change it, or not after many attempts, what runs goes on as it was, and people are told.
    /// False: it is to be tried again.
    pub(super) fn refused_update(&mut self, error: &DriverError) -> bool {
        let why = error_chain(error);
        let may_pass =
            error.retryable() || matches!(error, DriverError::WrongState { .. } | DriverError::NotFound(_));
        let attempts = self.context.tuning.attempts;
        if may_pass && self.failures < attempts {
            return false;
        }
        let note = if may_pass {
            format!("not done after {attempts} attempts: {why}")
        } else {
            format!("not done: {why}")
        };
        tracing::warn!(instance = %self.entry.id(), error = why, "the instance could not be changed");
        let runs = matches!(self.seen, Some(Observed::Running(_) | Observed::Paused(_)));
        let told = Told::of(&self.entry.config);
        let rescue = &self.entry.config.spec.rescue;
        let turns = self.entry.told.as_ref().is_some_and(|told| told.spec.rescue != *rescue);
        self.entry.updated(told, note.clone(), runs);
        if turns {
            // It is not started from a disk that nobody asked for.
            self.entry.restart_pending = false;
            self.entry.fail(note);
        }
        (self.unsaved, self.failures, self.trouble) = (true, 0, None);
        true
    }
}
