//! What users do with instances.

mod change;
mod create;
mod filter;

use std::sync::Arc;

use bytes::Bytes;
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_types::{InstanceId, InstanceRecord, Invalid};
use prost::Message;

pub use filter::{Filter, Seen};

use crate::Cluster;
use crate::error::{Error, Result};
use crate::page::Page;

/// Largest record, in bytes. It must fit into a transaction twice, as the record and as the recorded answer, with what
/// its node may add to it.
const MAX_RECORD_BYTES: usize = 640 << 10;

/// How many bytes of instances a page has at most, so that it fits into a message; a page is cut short for it.
const PAGE_BYTES: usize = hv_proto::MAX_MESSAGE_BYTES / 2;

fn check_size_in_store(record: &InstanceRecord) -> Result<()> {
    let size = record.encode().len();
    if size > MAX_RECORD_BYTES {
        let expected = format!("and the metadata must together take at most {MAX_RECORD_BYTES} bytes");
        return Err(Invalid::new("spec", format!("{size} bytes"), expected).into());
    }
    Ok(())
}

/// A page of instances.
#[derive(Debug)]
pub struct Listed {
    /// The instances, as users see them.
    pub instances: Vec<Arc<InstanceRecord>>,
    /// For the next page; empty on the last.
    pub next_page_token: String,
    /// How many match, over all pages.
    pub total: usize,
    /// The revision that this is.
    pub revision: hv_types::Revision,
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

    /// Instances that match, in the order of their ids.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn instances(&self, filter: &Filter, page: &Page) -> Result<Listed> {
        let after = page.after.as_deref().map(str::parse::<InstanceId>).transpose()?;
        self.sync().await?;
        Ok(self.cache.read(|state| {
            let matching =
                |record: &Arc<InstanceRecord>| Some(state.view(record)).filter(|seen| filter.matches(seen));
            let total = state.instances_after(None).filter_map(matching).count();
            let rest = state.instances_after(after.as_ref()).filter_map(matching);
            let (mut instances, mut bytes, mut more) = (Vec::new(), 0, false);
            for record in rest {
                bytes += hv_proto::convert::instance_to(&record).encoded_len();
                more = instances.len() == page.size || (bytes > PAGE_BYTES && !instances.is_empty());
                if more {
                    break;
                }
                instances.push(record);
            }
            let last = instances.last().filter(|_| more);
            let next_page_token = last.map(|record| page.token_after(record.id.as_str())).unwrap_or_default();
            Listed { instances, next_page_token, total, revision: state.revision() }
        }))
    }

    /// Writes a record that was read before.
    pub(crate) fn replace_instance(&self, before: &InstanceRecord, after: &InstanceRecord) -> (Compare, Op) {
        let key = self.keys.instance(&before.id);
        (Compare::ModRevision(key.clone(), before.revision), Op::put(key, after.encode()))
    }

    /// Removes a record that was read before, and its name.
    pub(crate) fn remove_instance(&self, record: &InstanceRecord) -> (Vec<Compare>, Vec<Op>) {
        let key = self.keys.instance(&record.id);
        let name = self.keys.instance_name(&record.project, &record.name);
        let id = Bytes::from(record.id.to_string());
        let compares =
            vec![Compare::ModRevision(key.clone(), record.revision), Compare::Value(name.clone(), id)];
        (compares, vec![Op::delete(key), Op::delete(name)])
    }
}
