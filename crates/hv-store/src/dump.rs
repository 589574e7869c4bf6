//! All records as lines of JSON, for people and their tools.

use bytes::Bytes;
use futures::stream::{self, Stream};
use hv_proto::store as messages;
use prost::Message;
use serde::Serialize;
use serde_json::{Value, json};

use crate::keys::{Key, Keys};
use crate::{KeyRange, KeyValue, RangeRequest, Result, Revision, SharedStore};

/// How many records are read at once.
const PAGE: usize = 500;

/// Every record whose key, below the prefix of `keys`, starts with `path`, in key order and at one revision: pieces of
/// whole lines. A line is an object with `key`, `revision` and `value`; a value that is none of ours is `base64`.
///
/// # Errors
/// The store does not answer.
pub async fn dump(
    store: SharedStore,
    keys: Keys,
    path: &str,
) -> Result<impl Stream<Item = Result<Bytes>> + Send + 'static> {
    let revision = store.revision().await?;
    let start = Bytes::from([&keys.all()[..], path.as_bytes()].concat());
    let range = (start.clone(), after_all(&start));
    Ok(stream::try_unfold((store, keys, Some(range)), move |(store, keys, range)| async move {
        let Some((start, end)) = range else { return Ok(None) };
        let (piece, next) = page(&store, &keys, revision, start, end.clone()).await?;
        Ok(Some((piece, (store, keys, next.map(|next| (next, end))))))
    }))
}

/// The first key after all that start with `start`.
fn after_all(start: &Bytes) -> Bytes {
    let mut end = start.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end.into()
}

async fn page(
    store: &SharedStore,
    keys: &Keys,
    revision: Revision,
    start: Bytes,
    end: Bytes,
) -> Result<(Bytes, Option<Bytes>)> {
    let keys_range = KeyRange::Between(start, end);
    let request = RangeRequest { keys: keys_range, limit: PAGE, at: Some(revision), keys_only: false };
    let page = store.range(request).await?;
    let mut text = String::new();
    for kv in &page.kvs {
        text.push_str(&line(keys, kv).to_string());
        text.push('\n');
    }
    let next = page.kvs.last().filter(|_| page.more);
    let next = next.map(|kv| Bytes::from([&kv.key[..], &[0]].concat()));
    Ok((text.into(), next))
}

fn line(keys: &Keys, kv: &KeyValue) -> Value {
    let key = String::from_utf8_lossy(&kv.key);
    let revision = kv.mod_revision.0;
    match value(keys, kv) {
        Some(value) => json!({ "key": key, "revision": revision, "value": value }),
        None => json!({ "key": key, "revision": revision, "base64": pbjson_base64(&kv.value) }),
    }
}

/// The value as its message, where it is one.
fn value(keys: &Keys, kv: &KeyValue) -> Option<Value> {
    match keys.parse(&kv.key) {
        Key::Node(_) => decoded::<messages::NodeRecord>(kv),
        Key::Instance(_) => decoded::<messages::InstanceRecord>(kv),
        Key::NodeLease(_) => decoded::<messages::NodeLease>(kv),
        Key::Event(_) => decoded::<messages::EventRecord>(kv),
        Key::Operation(_) => decoded::<messages::OperationRecord>(kv),
        Key::InstanceSet { .. } => decoded::<messages::InstanceSetRecord>(kv),
        Key::Cluster => decoded::<messages::ClusterRecord>(kv),
        // Names hold ids, leaders and requests messages of their own.
        Key::NodeHold(_) | Key::Other => {
            let text = std::str::from_utf8(&kv.value).ok()?;
            text.chars().all(|c| c.is_ascii_graphic()).then(|| Value::String(text.to_owned()))
        }
    }
}

fn decoded<M: Message + Default + Serialize>(kv: &KeyValue) -> Option<Value> {
    serde_json::to_value(M::decode(kv.value.clone()).ok()?).ok()
}

/// Bytes as the canonical JSON of protobuf writes them.
fn pbjson_base64(bytes: &Bytes) -> Value {
    let record = messages::BackupRecord { key: String::new(), value: bytes.clone() };
    serde_json::to_value(record).ok().and_then(|value| value.get("value").cloned()).unwrap_or_default()
}
