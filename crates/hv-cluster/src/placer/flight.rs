//! Creates in the air: one transaction for many calls, and what its outcome means for each of them.
//!
//! # Theory of operation
//! A transaction is refused as a whole. So the keys that every call depends on are read in the same instant: a call whose
//! request key is there gets the recorded answer, one whose name is taken fails alone, and the others are tried again.
//! Where the outcome is not known, the record of one of the instances tells: all of a transaction is there or nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hv_proto::store::InstanceSetRecord;
use hv_proto::{convert, v1};
use hv_store::record::{Record, decode_message, encode_message};
use hv_store::{
    Compare, KeyRange, KeyValue, LeaseId, MAX_TXN_OPS, Op, RangeRequest, StoreError, StoreExt, Txn,
    TxnOutcome,
};
use hv_telemetry::crash::{self, Point};
use hv_types::{ErrorCode, InstanceRecord, NodeId, Revision, ServiceError};

use super::queue::{Reply, Wish};
use crate::error::{Error, Result};
use crate::events::About;
use crate::requests::{Done, repeat};
use crate::{Cluster, TXN_BYTES};

/// How often an unknown outcome is looked into before the caller is told that it is not known.
const LOOKS: usize = 3;
/// The pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(200);
/// Compares that a transaction has beside those of its calls: the leader's key and the cluster's record.
const COMMON_COMPARES: usize = 2;

/// What a call adds to a transaction.
#[derive(Clone, Copy, Default)]
pub(super) struct Weight {
    compares: usize,
    ops: usize,
    bytes: usize,
}

impl Weight {
    pub(super) fn of(wish: &Wish) -> Self {
        let keyed = usize::from(wish.mutation.key.is_some());
        let count = wish.records.len();
        if wish.is_set {
            // The set's key and the names that it must not meet; one node for each member at most.
            return Self { compares: 2 + keyed + count, ops: 1 + keyed + count, bytes: wish.bytes };
        }
        let numbered = usize::from(wish.records.first().is_some_and(|record| set_of(&record.name).is_some()));
        let emptied = usize::from(wish.empty_set.is_some());
        Self { compares: 2 + numbered + keyed, ops: 2 + keyed + emptied, bytes: wish.bytes }
    }

    /// Both together, if one transaction can take them.
    pub(super) fn with(self, other: Self) -> Option<Self> {
        let sum = Self {
            compares: self.compares + other.compares,
            ops: self.ops + other.ops,
            bytes: self.bytes + other.bytes,
        };
        let fits =
            sum.compares + COMMON_COMPARES <= MAX_TXN_OPS && sum.ops <= MAX_TXN_OPS && sum.bytes <= TXN_BYTES;
        fits.then_some(sum)
    }
}

/// The name of the set that would own this name: what is before the last `-`, where only digits follow.
pub(crate) fn set_of(name: &str) -> Option<&str> {
    let (set, number) = name.rsplit_once('-')?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(set)
}

/// Calls that are written together.
pub(crate) struct Flight {
    pub(crate) wishes: Vec<Wish>,
    /// The leader's guard; none where nothing is bound.
    pub(crate) guard: Option<Compare>,
    /// The nodes that instances are bound to, with their host names, and as which they were read.
    pub(crate) nodes: HashMap<NodeId, (Revision, String)>,
}

/// What became of a call.
pub(crate) enum Fate {
    /// It has its answer.
    Answered(Result<Done<Reply>>),
    /// It is to be tried again.
    Again,
}

/// What became of a transaction.
pub(crate) struct Landed {
    pub(crate) wishes: Vec<(Wish, Fate)>,
    /// When it was committed; none if it was not, as far as is known.
    pub(crate) committed: Option<Revision>,
    /// It may be committed yet.
    pub(crate) unknown: bool,
}

/// The keys whose values tell why a call cannot be done as it was meant.
struct Claims {
    request: Option<Bytes>,
    set: Option<Bytes>,
    name: Option<Bytes>,
}

impl Cluster {
    fn claims(&self, wish: &Wish) -> Claims {
        let request = wish.mutation.key.as_ref().map(|key| self.keys.request(key));
        let Some(first) = wish.records.first() else { return Claims { request, set: None, name: None } };
        let set = if wish.is_set { Some(first.set.as_str()) } else { set_of(&first.name) };
        Claims {
            request,
            set: set.map(|set| self.keys.instance_set(&first.project, set)),
            name: (!wish.is_set).then(|| self.keys.instance_name(&first.project, &first.name)),
        }
    }

    /// Adds a call to a transaction.
    fn add_wish(&self, txn: &mut Txn, wish: &Wish, lease: Option<LeaseId>) -> Reply {
        let reply = reply_of(wish);
        if let Some(lease) = lease {
            match &reply {
                Reply::One(instance) => self.record_request(txn, &wish.mutation, &**instance, lease),
                Reply::Set(response) => self.record_request(txn, &wish.mutation, response, lease),
            }
        }
        let claims = self.claims(wish);
        if let Some(set) = claims.set {
            txn.compares.push(match wish.empty_set {
                Some(revision) => Compare::ModRevision(set.clone(), revision),
                None => Compare::Absent(set.clone()),
            });
            txn.otherwise_get.push(set.clone());
            if wish.is_set {
                let count = u32::try_from(wish.records.len()).unwrap_or(u32::MAX);
                let record = InstanceSetRecord { schema: convert::RECORD_SCHEMA, count };
                txn.then.push(Op::put(set, encode_message(&record)));
            } else if wish.empty_set.is_some() {
                txn.then.push(Op::delete(set));
            }
        }
        if let (Some(name), Some(first)) = (claims.name, wish.records.first()) {
            txn.compares.push(Compare::Absent(name.clone()));
            txn.otherwise_get.push(name.clone());
            txn.then.push(Op::put(name, Bytes::from(first.id.to_string())));
        } else if let Some(first) = wish.records.first() {
            let (start, end) = self.keys.numbered_instance_names(&first.project, &first.set);
            txn.compares.push(Compare::NoneIn(KeyRange::Between(start, end)));
        }
        let puts = wish.records.iter().map(|record| Op::put(self.keys.instance(&record.id), record.encode()));
        txn.then.extend(puts);
        reply
    }

    /// Writes a flight, and finds out what became of each call.
    pub(crate) async fn fly(self: Arc<Self>, flight: Flight) -> Landed {
        let unfrozen = match self.unfrozen() {
            Ok(compare) => compare,
            Err(error) => return answered_alike(flight.wishes, &error),
        };
        let keyed = flight.wishes.iter().any(|wish| wish.mutation.key.is_some());
        let lease = if keyed {
            match self.request_leases.current(&self.store, self.config.request_ttl).await {
                Ok(lease) => Some(lease),
                Err(error) => return answered_alike(flight.wishes, &error.into()),
            }
        } else {
            None
        };
        let mut txn = Txn { compares: vec![unfrozen], ..Txn::default() };
        txn.compares.extend(flight.guard.clone());
        txn.compares.extend(
            flight.nodes.iter().map(|(id, (seen, _))| Compare::ModRevision(self.keys.node(id), *seen)),
        );
        let replies: Vec<_> = flight.wishes.iter().map(|wish| self.add_wish(&mut txn, wish, lease)).collect();
        crash::reach(Point::ServerCreateBeforeTxn);
        let outcome = self.store.txn(txn).await;
        crash::reach(Point::ServerCreateAfterTxn);
        match outcome {
            Ok(TxnOutcome::Committed(revision)) => self.committed(flight, replies, revision),
            Ok(TxnOutcome::Refused(found)) => self.refused(flight.wishes, found).await,
            Err(StoreError::LeaseNotFound(lease)) => {
                self.request_leases.forget(lease).await;
                again(flight.wishes)
            }
            Err(error @ StoreError::InvalidRequest(_)) if flight.wishes.len() == 1 => {
                answered_alike(flight.wishes, &error.into())
            }
            Err(error) if may_have_been_applied(&error) => match self.find(&flight).await {
                Some(revision) => self.committed(flight, replies, revision),
                None => Landed { unknown: true, ..answered_alike(flight.wishes, &error.into()) },
            },
            Err(error) => answered_alike(flight.wishes, &error.into()),
        }
    }

    /// When a transaction whose outcome was lost was committed, if it was.
    async fn find(&self, flight: &Flight) -> Option<Revision> {
        let first = flight.wishes.first().and_then(|wish| wish.records.first())?;
        for look in 0..LOOKS {
            if look > 0 {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
            if let Ok(Some(kv)) = self.store.get(self.keys.instance(&first.id)).await {
                return Some(kv.create_revision);
            }
        }
        None
    }

    fn committed(&self, flight: Flight, replies: Vec<Reply>, revision: Revision) -> Landed {
        let Flight { wishes, nodes, .. } = flight;
        let mut landed = Vec::with_capacity(wishes.len());
        for (wish, reply) in wishes.into_iter().zip(replies) {
            self.tell_of_create(&wish, &nodes);
            landed.push((wish, Fate::Answered(Ok(Done { reply, revision, fresh: true }))));
        }
        Landed { wishes: landed, committed: Some(revision), unknown: false }
    }

    /// One event for each call.
    fn tell_of_create(&self, wish: &Wish, nodes: &HashMap<NodeId, (Revision, String)>) {
        let Some(first) = wish.records.first() else { return };
        let bound = wish.records.iter().filter(|record| record.binding.is_some()).count();
        metrics::counter!("hypervisor_placements_total").increment(bound as u64);
        let message = if wish.is_set {
            let (count, waiting) = (wish.records.len(), wish.records.len() - bound);
            format!("set {} of {count} asked for: {bound} bound, {waiting} wait for a node", first.set)
        } else {
            match first.node_id().and_then(|node| nodes.get(node)) {
                Some((_, hostname)) => format!("asked for; bound to node {hostname}"),
                None => "asked for; waits for a node".to_owned(),
            }
        };
        self.events.record(About::Instance(first), "Created", message, "user");
    }

    async fn refused(&self, wishes: Vec<Wish>, found: Vec<Option<KeyValue>>) -> Landed {
        let mut found = found.into_iter();
        let mut landed = Vec::with_capacity(wishes.len());
        for mut wish in wishes {
            let claims = self.claims(&wish);
            let mut value = |key: &Option<Bytes>| key.as_ref().and_then(|_| found.next().flatten());
            let (request, set, name) = (value(&claims.request), value(&claims.set), value(&claims.name));
            let fate = self.judge(&mut wish, request, set, name).await;
            landed.push((wish, fate.unwrap_or_else(|error| Fate::Answered(Err(error)))));
        }
        if landed.iter().all(|(_, fate)| matches!(fate, Fate::Again)) {
            // It was a node that changed, or another server leads: see what they did before it is tried again.
            let _ = self.sync().await;
        }
        Landed { wishes: landed, committed: None, unknown: false }
    }

    async fn judge(
        &self,
        wish: &mut Wish,
        request: Option<KeyValue>,
        set: Option<KeyValue>,
        name: Option<KeyValue>,
    ) -> Result<Fate> {
        if let Some(kv) = request {
            return repeated(wish, &kv).map(|done| Fate::Answered(Ok(done)));
        }
        let Some(first) = wish.records.first() else { return Ok(Fate::Again) };
        if let Some(kv) = name {
            let holder = String::from_utf8_lossy(&kv.value);
            return Err(name_taken(first, &holder));
        }
        wish.empty_set = None;
        if let Some(kv) = set {
            let count = decode_message::<InstanceSetRecord>(&kv)?.count;
            self.cache.wait_for(kv.mod_revision).await?;
            let set = if wish.is_set { first.set.as_str() } else { set_of(&first.name).unwrap_or_default() };
            if self.set_is_empty(&first.project, set, count) {
                wish.empty_set = Some(kv.mod_revision);
                return Ok(Fate::Again);
            }
            return Err(if wish.is_set { set_taken(first) } else { name_in_set(first, set) });
        }
        if wish.is_set
            && let Some(name) = self.numbered_name(first).await?
        {
            let message = format!(
                "name {name} is taken in project {}, and names of the form {}-<number> are what the set needs; choose \
                 another name or delete that instance",
                first.project, first.set
            );
            return Err(ServiceError::new(ErrorCode::AlreadyExists, message).into());
        }
        Ok(Fate::Again)
    }

    /// Whether none of the set's members is left. Members never come back, so that this stays so.
    pub(crate) fn set_is_empty(&self, project: &str, set: &str, count: u32) -> bool {
        self.cache.read(|state| {
            (1..=count).all(|number| {
                let member = state.instance_named(project, &format!("{set}-{number}"));
                member.and_then(|id| state.instance(id)).is_none_or(|record| record.set != set)
            })
        })
    }

    /// An instance that was created alone and has a name that a set of this name would give.
    async fn numbered_name(&self, member: &InstanceRecord) -> Result<Option<String>> {
        let (start, end) = self.keys.numbered_instance_names(&member.project, &member.set);
        let request =
            RangeRequest { keys: KeyRange::Between(start, end), limit: 1, at: None, keys_only: true };
        let found = self.store.range(request).await?.kvs.into_iter().next();
        Ok(found.map(|kv| {
            let key = String::from_utf8_lossy(&kv.key);
            key.rsplit_once('/').map_or_else(|| key.to_string(), |(_, name)| name.to_owned())
        }))
    }
}

/// The recorded answer to a call that is repeated.
pub(super) fn repeated(wish: &Wish, kv: &KeyValue) -> Result<Done<Reply>> {
    if wish.is_set {
        let done = repeat::<v1::CreateInstancesResponse>(&wish.mutation, kv)?;
        return Ok(Done { reply: Reply::Set(done.reply), revision: done.revision, fresh: done.fresh });
    }
    let done = repeat::<v1::Instance>(&wish.mutation, kv)?;
    Ok(Done { reply: Reply::One(Box::new(done.reply)), revision: done.revision, fresh: done.fresh })
}

fn reply_of(wish: &Wish) -> Reply {
    match wish.records.first() {
        Some(record) if !wish.is_set => Reply::One(Box::new(convert::instance_to(record))),
        _ => {
            let created = wish.records.iter().map(|record| v1::CreatedInstance {
                id: record.id.to_string(),
                name: record.name.clone(),
                node_id: record.node_id().map(ToString::to_string).unwrap_or_default(),
            });
            Reply::Set(v1::CreateInstancesResponse { instances: created.collect(), revision: 0 })
        }
    }
}

pub(crate) fn name_taken(record: &InstanceRecord, holder: &str) -> Error {
    let message = format!(
        "name {} is taken by instance {holder} in project {}; choose another name or delete that instance",
        record.name, record.project
    );
    ServiceError::new(ErrorCode::AlreadyExists, message).into()
}

pub(crate) fn name_in_set(record: &InstanceRecord, set: &str) -> Error {
    let message = format!(
        "name {} belongs to the set {set} in project {}, which owns all names {set}-<number> while one of its instances \
         is there; choose another name or delete the set's instances",
        record.name, record.project
    );
    ServiceError::new(ErrorCode::AlreadyExists, message).into()
}

fn set_taken(member: &InstanceRecord) -> Error {
    let message = format!(
        "set {} is there already in project {}; choose another name or delete its instances",
        member.set, member.project
    );
    ServiceError::new(ErrorCode::AlreadyExists, message).into()
}

/// Whether a transaction that failed like this may have been, or may yet be, applied.
pub(crate) fn may_have_been_applied(error: &StoreError) -> bool {
    match error {
        StoreError::Unavailable { .. }
        | StoreError::Timeout { .. }
        | StoreError::Closed
        | StoreError::Io { .. }
        | StoreError::Corrupt { .. } => true,
        StoreError::Full(_)
        | StoreError::InvalidRequest(_)
        | StoreError::Compacted { .. }
        | StoreError::NewerSchema { .. }
        | StoreError::LeaseNotFound(_) => false,
    }
}

fn again(wishes: Vec<Wish>) -> Landed {
    let wishes = wishes.into_iter().map(|wish| (wish, Fate::Again)).collect();
    Landed { wishes, committed: None, unknown: false }
}

fn answered_alike(wishes: Vec<Wish>, error: &Error) -> Landed {
    if error.code() == ErrorCode::Internal || error.code() == ErrorCode::Unavailable {
        tracing::warn!(error = hv_telemetry::error_chain(error.service()), "creates were not recorded");
    }
    let copy = || Error::from(ServiceError::new(error.code(), error.service().message()));
    let wishes = wishes.into_iter().map(|wish| (wish, Fate::Answered(Err(copy())))).collect();
    Landed { wishes, committed: None, unknown: false }
}
