//! What users do with instances.

mod admission;
mod change;
mod clone;
mod create;
mod explain;
mod filter;
mod update;

use std::sync::Arc;

use bytes::Bytes;
use hv_proto::v1;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{InstanceId, InstanceRecord, Invalid};
use prost::Message;

pub(crate) use admission::Admission;
pub use clone::CloneRequest;
pub use create::{MAX_SET, MAX_SET_NAME_BYTES};
pub use explain::MAX_PREVIEW;
pub(crate) use explain::Outlook;
pub use filter::{Filter, Seen};
pub use update::Update;
pub(crate) use update::refuse_in_rescue;

use crate::Cluster;
use crate::error::{Error, Result};
use crate::page::{First, Page};

/// Largest record, in bytes. It must fit into a transaction twice, as the record and as the recorded answer, with what
/// its node may add to it.
const MAX_RECORD_BYTES: usize = 640 << 10;

/// How many bytes of instances a page has at most, so that it fits into a message; a page is cut short for it.
const PAGE_BYTES: usize = hv_proto::MAX_MESSAGE_BYTES / 2;
/// How many instances are looked at while the state is held.
const LOOK_AT: usize = 2000;

/// The bytes that a record takes, if they are not too many.
fn check_size_in_store(record: &InstanceRecord) -> Result<usize> {
    let size = record.encode().len();
    if size > MAX_RECORD_BYTES {
        let expected = format!("and the metadata must together take at most {MAX_RECORD_BYTES} bytes");
        return Err(Invalid::new("spec", format!("{size} bytes"), expected).into());
    }
    Ok(size)
}

/// A page of instances.
#[derive(Debug)]
pub struct Listed {
    /// The instances, as users see them.
    pub instances: Vec<v1::Instance>,
    /// For the next page; empty on the last.
    pub next_page_token: String,
    /// How many match, over all pages: now, or, where that is not known without looking, as it was at the first page.
    pub total: usize,
    /// The revision of the first page. What changed after it is in a watch from the next revision on.
    pub revision: hv_types::Revision,
}

/// The id of the last of some instances.
fn last_id(instances: &[v1::Instance]) -> Option<InstanceId> {
    instances.last().and_then(|last| last.id.parse().ok())
}

impl Cluster {
    /// One instance, as users see it.
    ///
    /// # Errors
    /// There is none, or the store does not answer.
    pub async fn instance(&self, id: &InstanceId) -> Result<Arc<InstanceRecord>> {
        self.sync().await?;
        self.cache
            .read(|state| state.instance(id).map(|record| state.view(record)))
            .ok_or_else(|| Error::no_instance(id))
    }

    /// Instances that match, in the order of their ids; [`crate::page`] says what the pages of a list are together.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn instances(&self, filter: &Filter, page: &Page) -> Result<Listed> {
        let mut after = page.after.as_deref().map(str::parse::<InstanceId>).transpose()?;
        match page.first {
            // What the first page showed, this server must have seen too; what came after it, it may.
            Some(first) => self.cache.wait_for(first.revision).await?,
            None => drop(self.sync().await?),
        }
        let (known, now) = self.cache.read(|state| (state.known_count(filter), state.revision()));
        let revision = page.first.map_or(now, |first| first.revision);
        let total = match (known, page.first) {
            (Some(total), _) => total,
            (None, Some(first)) => first.total,
            (None, None) => self.count(filter).await,
        };
        let (mut instances, mut bytes, mut more) = (Vec::new(), 0, true);
        while more && instances.len() < page.size {
            let wanted = page.size - instances.len();
            let chunk =
                self.cache.read(|state| state.instances_matching(filter, after.as_ref(), LOOK_AT, wanted));
            more = chunk.next.is_some();
            after = chunk.next;
            for candidate in chunk.found {
                let record = candidate.shown();
                let message = hv_proto::convert::instance_to(&record);
                bytes += message.encoded_len();
                if bytes > PAGE_BYTES && !instances.is_empty() {
                    after = last_id(&instances);
                    more = true;
                    break;
                }
                instances.push(message);
            }
            if bytes > PAGE_BYTES {
                break;
            }
            tokio::task::consume_budget().await;
        }
        let next_page_token = match after.filter(|_| more) {
            Some(after) => page.token_at(after.as_str(), First { revision, total }),
            None => String::new(),
        };
        Ok(Listed { instances, next_page_token, total, revision })
    }

    /// How many instances match, looked at in pieces. A filter that no index narrows costs a look at the whole fleet,
    /// about 0.2 s for a million; only the first page of a list pays it.
    async fn count(&self, filter: &Filter) -> usize {
        let (mut total, mut after) = (0, None);
        loop {
            let (count, next) =
                self.cache.read(|state| state.count_matching(filter, after.as_ref(), LOOK_AT));
            total += count;
            if next.is_none() {
                return total;
            }
            after = next;
            tokio::task::yield_now().await;
        }
    }

    /// Writes a record that was read before.
    pub(crate) fn replace_instance(&self, before: &InstanceRecord, after: &InstanceRecord) -> (Compare, Op) {
        let key = self.keys.instance(&before.id);
        (Compare::ModRevision(key.clone(), before.revision), Op::put(key, after.encode()))
    }

    /// Removes a record that was read before, and its name. A member of a set has none of its own.
    pub(crate) fn remove_instance(&self, record: &InstanceRecord) -> (Vec<Compare>, Vec<Op>) {
        let key = self.keys.instance(&record.id);
        if !record.set.is_empty() {
            return (vec![Compare::ModRevision(key.clone(), record.revision)], vec![Op::delete(key)]);
        }
        let name = self.keys.instance_name(&record.project, &record.name);
        let id = Bytes::from(record.id.to_string());
        let compares =
            vec![Compare::ModRevision(key.clone(), record.revision), Compare::Value(name.clone(), id)];
        (compares, vec![Op::delete(key), Op::delete(name)])
    }
}
