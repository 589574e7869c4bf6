//! Creates on their way to the placer: what one call asks for, and the bounded queue that it waits in.

use std::sync::Arc;

use hv_proto::v1;
use hv_types::{ErrorCode, InstanceRecord, Revision, ServiceError};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::error::{Error, Result};
use crate::requests::{Done, Mutation};

/// How many instances may wait to be recorded: a few seconds' worth. Beyond that callers are told to come back.
const ROOM: usize = 16_384;
/// How many calls may wait. Each is for at least one instance.
const CALLS: usize = ROOM;

/// The answer to a create.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    /// To one that asks for one instance.
    One(Box<v1::Instance>),
    /// To one that asks for a set.
    Set(v1::CreateInstancesResponse),
}

/// What one call asks for.
pub(crate) struct Wish {
    pub(crate) mutation: Mutation,
    /// One instance, or the members of a set.
    pub(crate) records: Vec<InstanceRecord>,
    /// Whether it is a set, also one of a single member.
    pub(crate) is_set: bool,
    /// About how many bytes its records take in the store.
    pub(crate) bytes: usize,
    /// How often it was tried.
    pub(crate) attempts: u32,
    /// Of the set in its way: when its key was written. The set has no members any more.
    pub(crate) empty_set: Option<Revision>,
    answer: oneshot::Sender<Result<Done<Reply>>>,
    _room: OwnedSemaphorePermit,
}

impl Wish {
    /// Whether nobody waits for the answer any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }

    /// Tells the caller. One that went away is no error.
    pub(crate) fn answer(self, answer: Result<Done<Reply>>) {
        let _ = self.answer.send(answer);
    }

    /// The highest priority of what it asks for: all have the same.
    pub(crate) fn priority(&self) -> i32 {
        self.records.first().map_or(0, |record| record.placement.priority)
    }
}

/// Where an answer comes.
pub(crate) type Answer = oneshot::Receiver<Result<Done<Reply>>>;

/// Where creates wait for the placer.
pub(crate) struct Queue {
    sender: Mutex<Option<mpsc::Sender<Wish>>>,
    room: Arc<Semaphore>,
}

impl Default for Queue {
    fn default() -> Self {
        Self { sender: Mutex::new(None), room: Arc::new(Semaphore::new(ROOM)) }
    }
}

impl Queue {
    /// The receiving end. Nobody serves the queue once it is dropped.
    pub(crate) fn serve(&self) -> mpsc::Receiver<Wish> {
        let (sender, receiver) = mpsc::channel(CALLS);
        *self.sender.lock() = Some(sender);
        receiver
    }

    /// A wish and where its answer will come.
    ///
    /// # Errors
    /// There is no room for more.
    pub(crate) fn admit(
        &self,
        mutation: &Mutation,
        records: Vec<InstanceRecord>,
        is_set: bool,
        bytes: usize,
    ) -> Result<(Wish, Answer)> {
        let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
        let room = self.room.clone().try_acquire_many_owned(count).map_err(|_| exhausted())?;
        let (answer, answered) = oneshot::channel();
        let mutation = mutation.clone();
        let wish =
            Wish { mutation, records, is_set, bytes, attempts: 0, empty_set: None, answer, _room: room };
        Ok((wish, answered))
    }

    /// Hands a wish to the placer, or gives it back if none serves the queue.
    ///
    /// # Errors
    /// There is no room for more.
    pub(crate) fn submit(&self, wish: Wish) -> Result<Option<Wish>> {
        let Some(sender) = self.sender.lock().clone() else { return Ok(Some(wish)) };
        match sender.try_send(wish) {
            Ok(()) => Ok(None),
            Err(mpsc::error::TrySendError::Closed(wish)) => Ok(Some(wish)),
            Err(mpsc::error::TrySendError::Full(_)) => Err(exhausted()),
        }
    }
}

fn exhausted() -> Error {
    metrics::counter!("hypervisor_creates_refused_total").increment(1);
    let message =
        format!("{ROOM} instances wait to be recorded already; nothing was created: try again in a second");
    ServiceError::new(ErrorCode::ResourceExhausted, message).into()
}

/// What a caller is told whose wish was dropped with the queue.
pub(crate) fn stopping() -> Error {
    ServiceError::unavailable(
        "this server is stopping; the change may or may not have been made: repeat it with the same request key",
    )
    .into()
}
