//! Events: who did what to which object, when and why.

use std::time::SystemTime;

use crate::id::Revision;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Sortable by time.
    pub id: String,
    /// When it happened.
    pub at: SystemTime,
    /// `instance`, `node`, …
    pub object_kind: String,
    /// Which one.
    pub object_id: String,
    /// Its name at that time.
    pub object_name: String,
    /// One CamelCase word for machines: `Scheduled`.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
    /// Whether somebody should look at it.
    pub warning: bool,
    /// The part or caller that did it: `scheduler`, `agent/<node>`, `user`.
    pub source: String,
    /// The request that led to it; may be empty.
    pub request_id: String,
    /// Who asked for it; may be empty.
    pub actor: String,
    /// The revision this was read at; not part of the value.
    pub revision: Revision,
}
