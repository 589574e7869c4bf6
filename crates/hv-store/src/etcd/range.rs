//! Reading keys.

use bytes::Bytes;
use etcd_client::{GetOptions, GetResponse};

use super::error::answer_too_large;
use super::members::{Failure, Members, Repeat};
use super::wire::{WireRange, from_etcd, kv_from_etcd, to_etcd};
use crate::bounds::{Interval, successor};
use crate::{KeyRange, RangeRequest, RangeResult, Result, Revision, StoreError};

/// Most keys that are asked for at once; fewer when the answer turns out to be too large.
const CHUNK_KEYS: usize = 2000;
/// How often a range that is read in chunks starts over because the revision it began at was compacted meanwhile.
const MAX_RESTARTS: usize = 3;
/// Reading the revision asks for a key that is never there.
const NO_KEY: &[u8] = b"\0";

/// etcd's revision, as a linearizable read.
pub(super) async fn revision(members: &Members) -> Result<Revision> {
    let options = || Some(GetOptions::new().with_count_only());
    let read = |mut member: super::members::Member| async move { member.kv.get(NO_KEY, options()).await };
    Ok(revision_of(&members.call(Repeat::Always, read).await?))
}

pub(super) async fn range(members: &Members, request: RangeRequest) -> Result<RangeResult> {
    if Interval::of(&request.keys).is_empty() {
        return Ok(RangeResult { kvs: Vec::new(), more: false, revision: revision(members).await? });
    }
    let mut restarts = 0;
    loop {
        match chunked(members, &request).await {
            Err(StoreError::Compacted { .. }) => match request.at {
                None if restarts < MAX_RESTARTS => restarts += 1,
                at => {
                    let requested = at.unwrap_or_default();
                    let oldest = super::watch::oldest(members, requested).await;
                    return Err(StoreError::Compacted { requested, oldest });
                }
            },
            result => return result,
        }
    }
}

/// Reads in chunks, all at the revision of the first.
async fn chunked(members: &Members, request: &RangeRequest) -> Result<RangeResult> {
    let mut kvs = Vec::new();
    let mut wire = WireRange::of(&request.keys);
    let (mut at, mut revision) = (request.at, None);
    let mut chunk = CHUNK_KEYS;
    loop {
        let limit = chunk.min(request.limit - kvs.len());
        let mut answer = match get(members, &wire, limit, at, request.keys_only).await {
            Err(Failure::Error { error, .. }) if answer_too_large(&error) && limit > 1 => {
                chunk = limit / 2;
                continue;
            }
            answer => answer.map_err(|failure| failure.into_store_error(members))?,
        };
        let revision = *revision.get_or_insert_with(|| revision_of(&answer));
        at = at.or(Some(revision));
        kvs.extend(std::mem::take(&mut answer.0.kvs).into_iter().map(kv_from_etcd));
        let more = answer.0.more;
        if !more || kvs.len() >= request.limit {
            return Ok(RangeResult { kvs, more, revision });
        }
        let last = kvs.last().map_or(Bytes::new(), |kv| kv.key.clone());
        wire.key = successor(&last).to_vec();
    }
}

async fn get(
    members: &Members,
    wire: &WireRange,
    limit: usize,
    at: Option<Revision>,
    keys_only: bool,
) -> std::result::Result<GetResponse, Failure> {
    let mut options = GetOptions::new().with_limit(i64::try_from(limit).unwrap_or(i64::MAX));
    if !wire.end.is_empty() {
        options = options.with_range(wire.end.clone());
    }
    if let Some(at) = at {
        options = options.with_revision(to_etcd(at));
    }
    if keys_only {
        options = options.with_keys_only();
    }
    let read = |mut member: super::members::Member| {
        let (key, options) = (wire.key.clone(), options.clone());
        async move { member.kv.get(key, Some(options)).await }
    };
    members.try_call(Repeat::Always, read).await
}

fn revision_of(answer: &GetResponse) -> Revision {
    Revision(answer.header().map_or(0, |header| from_etcd(header.revision())))
}

/// Whether `keys` can hold anything.
pub(super) fn is_empty(keys: &KeyRange) -> bool {
    Interval::of(keys).is_empty()
}
