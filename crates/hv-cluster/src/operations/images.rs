//! The fetching of an image by nodes, as an operation.
//!
//! # Theory of operation
//! The operation names the image, where it comes from, and the nodes that are to have it. How each node stands is a parameter
//! of the record, `node.<id>`: how far it is, or what came of it. The leader asks nodes in parallel, within a bound.
//!
//! # Failure and recovery
//! A node that is asked again goes on where it was, so whoever leads next asks all nodes that have no result yet. A node that is
//! away is waited for; one that says that it failed is asked again a few times where that may help. A cancellation drops what
//! is under way: the nodes stop, and keep what has arrived for the next pull.

mod drive;
mod tasks;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::validate::excerpt;
use hv_types::{
    ErrorCode, InstanceType, Invalid, NodeId, OperationKind, OperationRecord, OperationState, Revision,
    ServiceError,
};

use super::shown;
use crate::Cluster;
use crate::cache::State;
use crate::error::Result;
use crate::requests::{Done, Mutation, Plan};

/// Parameter: where from.
const REFERENCE: &str = "reference";
/// Parameter: what it is for.
const TYPE: &str = "type";
/// Parameter: what it must be.
const DIGEST: &str = "digest";
/// Parameter: how many nodes fetch at once.
const PARALLEL: &str = "max_parallel";
/// What the parameters that tell of nodes begin with.
const NODE: &str = "node.";
/// What a result that is no success begins with.
const FAILED: &str = "failed: ";
/// How many nodes one operation may be about.
pub const MAX_NODES: usize = 500;
/// How many nodes fetch at once at most, and where nothing else is asked for.
pub const MAX_PARALLEL: u32 = 16;
/// How many operations of this kind may be under way.
const MAX_ACTIVE: usize = 100;
/// Bytes that a record keeps of the reason why a node failed.
const REASON_BYTES: usize = 400;
/// How long a node may take to report an image that it has taken; it sends a heartbeat at once. Later than that it still is
/// there; it is only not known yet.
const REPORT_LIMIT: Duration = Duration::from_secs(3);
/// The longest reference or name of an image, in bytes.
const MAX_NAME: usize = 1024;

/// Which image is fetched, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePull {
    /// Where from.
    pub reference: String,
    /// The name under which nodes keep it; empty: the reference.
    pub name: String,
    /// What it is for.
    pub instance_type: InstanceType,
    /// What it must be: `sha256:…`; empty: what the source says.
    pub digest: String,
    /// The nodes.
    pub nodes: Vec<NodeId>,
    /// How many of them fetch at once; 0: [`MAX_PARALLEL`], which is also the most.
    pub max_parallel: u32,
}

/// How a node stands with the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It was not asked yet, or is waited for.
    Waiting,
    /// It is at it.
    Working {
        /// A word for people.
        phase: String,
        /// Bytes done.
        done: u64,
        /// Bytes in all; 0: not known.
        total: u64,
    },
    /// It has the image.
    Done,
    /// It cannot have it, and why.
    Failed(String),
    /// The operation was given up before the node had it.
    Cancelled,
}

impl Standing {
    /// Whether nothing more comes of it.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_) | Self::Cancelled)
    }

    fn text(&self) -> String {
        match self {
            Self::Waiting => "waiting".into(),
            Self::Working { phase, done, total } => format!("{phase} {done}/{total}"),
            Self::Done => "done".into(),
            Self::Failed(why) => {
                let mut end = why.len().min(REASON_BYTES);
                while !why.is_char_boundary(end) {
                    end -= 1;
                }
                format!("{FAILED}{}", &why[..end])
            }
            Self::Cancelled => "cancelled".into(),
        }
    }

    fn parse(text: &str) -> Self {
        if let Some(why) = text.strip_prefix(FAILED) {
            return Self::Failed(why.to_owned());
        }
        match text {
            "done" => return Self::Done,
            "cancelled" => return Self::Cancelled,
            _ => {}
        }
        let working = || {
            let (phase, bytes) = text.rsplit_once(' ')?;
            let (done, total) = bytes.split_once('/')?;
            Some(Self::Working { phase: phase.into(), done: done.parse().ok()?, total: total.parse().ok()? })
        };
        working().unwrap_or(Self::Waiting)
    }
}

/// How the nodes of an operation stand, as its record says; empty for an operation of another kind.
pub fn standings(operation: &OperationRecord) -> impl Iterator<Item = (NodeId, Standing)> {
    let is_pull = operation.kind == OperationKind::PullImage;
    let told = operation.parameters.iter().filter(move |_| is_pull);
    told.filter_map(|(name, text)| Some((name.strip_prefix(NODE)?.parse().ok()?, Standing::parse(text))))
}

fn parameter(node: &NodeId) -> String {
    format!("{NODE}{node}")
}

impl ImagePull {
    fn check(&self) -> Result<()> {
        for (field, text) in [("image_ref", &self.reference), ("name", &self.name)] {
            if text.len() > MAX_NAME {
                let expected = format!("must have at most {MAX_NAME} bytes");
                return Err(Invalid::new(field, excerpt(text), expected).into());
            }
        }
        if self.nodes.is_empty() || self.nodes.len() > MAX_NODES {
            let expected = format!("must be 1 to {MAX_NODES} nodes");
            return Err(Invalid::new("node_ids", self.nodes.len(), expected).into());
        }
        if self.max_parallel > MAX_PARALLEL {
            let expected = format!("must be at most {MAX_PARALLEL}");
            return Err(Invalid::new("max_parallel", self.max_parallel, expected).into());
        }
        Ok(())
    }

    fn parameters(&self) -> BTreeMap<String, String> {
        let parallel = if self.max_parallel == 0 { MAX_PARALLEL } else { self.max_parallel };
        let mut parameters = BTreeMap::from([
            (REFERENCE.to_owned(), self.reference.clone()),
            (TYPE.to_owned(), self.instance_type.to_string()),
            (PARALLEL.to_owned(), parallel.to_string()),
        ]);
        if !self.digest.is_empty() {
            parameters.insert(DIGEST.to_owned(), self.digest.clone());
        }
        parameters.extend(self.nodes.iter().map(|node| (parameter(node), Standing::Waiting.text())));
        parameters
    }

    fn begun(&self) -> OperationRecord {
        let now = SystemTime::now();
        let name = if self.name.is_empty() { &self.reference } else { &self.name };
        let parameters = self.parameters();
        OperationRecord {
            id: uuid::Uuid::now_v7().to_string(),
            kind: OperationKind::PullImage,
            object_kind: "image".into(),
            object_id: name.clone(),
            object_name: name.clone(),
            state: OperationState::Pending,
            phase: "waiting".into(),
            message: "waits for the leader".into(),
            done: 0,
            total: parameters.keys().filter(|name| name.starts_with(NODE)).count() as u64,
            blockers: Vec::new(),
            parameters,
            cancel_requested: false,
            created_at: now,
            updated_at: now,
            finished_at: None,
            actor: String::new(),
            request_id: hv_telemetry::RequestId::current()
                .map(|id| id.as_str().to_owned())
                .unwrap_or_default(),
            revision: Revision::default(),
        }
    }
}

impl Cluster {
    /// The operation that an earlier call with the same request key began, if there was one.
    ///
    /// # Errors
    /// The key was used for something else, or the store does not answer.
    pub async fn image_pull_begun(&self, mutation: &Mutation) -> Result<Option<v1::Operation>> {
        Ok(self.recorded(mutation).await?.map(|done: Done<v1::Operation>| done.reply))
    }

    /// Records that nodes are to fetch an image; the leader asks them.
    ///
    /// # Errors
    /// It is not well formed, or too many are under way.
    pub async fn begin_image_pull(
        &self,
        mutation: &Mutation,
        pull: &ImagePull,
    ) -> Result<Done<v1::Operation>> {
        pull.check()?;
        let mut done = self
            .mutate(mutation, "the image", || {
                let is_active = |operation: &&std::sync::Arc<OperationRecord>| {
                    operation.kind == OperationKind::PullImage && !operation.state.is_final()
                };
                let active = self.cache.read(|state| state.operations_before(None).filter(is_active).count());
                if active >= MAX_ACTIVE {
                    let message = format!(
                        "{MAX_ACTIVE} images are being fetched already; see `hypervisor-ctl operation list`"
                    );
                    return Err(ServiceError::new(ErrorCode::ResourceExhausted, message).into());
                }
                let operation = pull.begun();
                let key = self.keys.operation(&operation.id);
                let compares = vec![Compare::Absent(key.clone())];
                Ok(Plan { compares, then: vec![Op::put(key, operation.encode())], reply: shown(&operation) })
            })
            .await?;
        if done.reply.revision == 0 {
            done.reply.revision = done.revision.0;
        }
        self.cache.wait_for(done.revision).await?;
        Ok(done)
    }

    /// Waits a moment for a node to report an image that it has just taken: whoever asked for it may use it at once.
    pub async fn until_image_reported(&self, node: &NodeId, name: &str, instance_type: InstanceType) {
        let has = |state: &State| {
            let record = state.node(node).and_then(|entry| entry.record.as_ref());
            record.is_none_or(|record| {
                record.images.iter().any(|image| image.name == name && image.instance_type == instance_type)
            })
        };
        let (is_there, mut changes) = self.cache.subscribe(has);
        if is_there {
            return;
        }
        let reported = async {
            while let Ok(Some(_)) = changes.next().await {
                if self.cache.read(has) {
                    return;
                }
            }
        };
        // Nothing depends on it.
        let _ = tokio::time::timeout(REPORT_LIMIT, reported).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standing_is_read_as_it_was_written() {
        let working = Standing::Working { phase: "downloading".into(), done: 3, total: 9 };
        for standing in [
            Standing::Waiting,
            working,
            Standing::Done,
            Standing::Failed("no 3/4".into()),
            Standing::Cancelled,
        ] {
            assert_eq!(Standing::parse(&standing.text()), standing);
        }
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let text = Standing::Failed("ä".repeat(REASON_BYTES)).text();
        assert_eq!(text.len(), FAILED.len() + REASON_BYTES);
    }
}
