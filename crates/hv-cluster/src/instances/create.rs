//! New instances, one or a set of them: checked here, recorded and bound by the placer.

use std::sync::Arc;

use hv_proto::v1;
use hv_types::{InstanceId, InstanceRecord, Invalid};

use crate::error::{Error, Result};
use crate::placer::{Fate, Flight, Reply, name_taken, stopping};
use crate::requests::{Done, Mutation};
use crate::{Cluster, TXN_BYTES};

/// Most instances of one set.
pub const MAX_SET: usize = 100;
/// Longest name of a set, in bytes: its members' names are that and up to four more.
pub const MAX_SET_NAME_BYTES: usize = 59;
/// What a binding adds to a record, at most, in bytes: a node's id, its host name, numbers.
const BINDING_BYTES: usize = 512;
/// How often a create is tried where no placer runs.
const ATTEMPTS: usize = 16;

impl Cluster {
    /// Records an instance that was asked for, bound to a node where this server leads and one can take it.
    ///
    /// # Errors
    /// The name is taken, or no node could ever take it: an unknown image, more than any node has.
    pub async fn create_instance(
        self: &Arc<Self>,
        mutation: &Mutation,
        record: InstanceRecord,
    ) -> Result<Done<v1::Instance>> {
        let bytes = super::check_size_in_store(&record)?;
        let done = self.create(mutation, vec![record], false, 2 * (bytes + BINDING_BYTES)).await?;
        match done.reply {
            Reply::One(instance) => Ok(Done { reply: *instance, revision: done.revision, fresh: done.fresh }),
            Reply::Set(_) => Err(Error::internal("the answer is to another call")),
        }
    }

    /// Records `count` instances like `template`, named after it: all of them or none. As far as nodes can take them and
    /// this server leads, they are bound at once.
    ///
    /// # Errors
    /// One of the names, or the name of the set, is taken; or no node could ever take one of them.
    pub async fn create_instances(
        self: &Arc<Self>,
        mutation: &Mutation,
        template: InstanceRecord,
        count: usize,
    ) -> Result<Done<v1::CreateInstancesResponse>> {
        if count == 0 || count > MAX_SET {
            return Err(Invalid::new("count", count, format!("must be between 1 and {MAX_SET}")).into());
        }
        if template.name.len() > MAX_SET_NAME_BYTES {
            let expected = format!("must have at most {MAX_SET_NAME_BYTES} characters where it names a set");
            return Err(Invalid::new("template.name", &template.name, expected).into());
        }
        let bytes = (super::check_size_in_store(&template)? + BINDING_BYTES) * count;
        if bytes > TXN_BYTES {
            let expected =
                format!("instances of this size must together take at most {TXN_BYTES} bytes; ask for fewer");
            return Err(Invalid::new("count", count, expected).into());
        }
        let member = |number: usize| InstanceRecord {
            id: InstanceId::generate(),
            name: format!("{}-{number}", template.name),
            set: template.name.clone(),
            ..template.clone()
        };
        let members = (1..=count).map(member).collect();
        let done = self.create(mutation, members, true, bytes).await?;
        match done.reply {
            Reply::Set(reply) => Ok(Done { reply, revision: done.revision, fresh: done.fresh }),
            Reply::One(_) => Err(Error::internal("the answer is to another call")),
        }
    }

    async fn create(
        self: &Arc<Self>,
        mutation: &Mutation,
        records: Vec<InstanceRecord>,
        is_set: bool,
        bytes: usize,
    ) -> Result<Done<Reply>> {
        if let Some(first) = records.first() {
            let checked = match self.check_name(first, is_set).await {
                Ok(()) => self.check_placeable(first).await,
                refused => refused,
            };
            if let Err(refusal) = checked {
                // What stands in the way may be what this very request has done before.
                return self.create_recorded(mutation, is_set).await?.ok_or(refusal);
            }
        }
        let (wish, answered) = self.creates.admit(mutation, records, is_set, bytes)?;
        match self.creates.submit(wish)? {
            None => answered.await.unwrap_or_else(|_| Err(stopping())),
            Some(wish) => self.create_alone(wish).await,
        }
    }

    /// Refuses a name that is taken, where that is known without asking the store; the transaction makes certain.
    async fn check_name(&self, record: &InstanceRecord, is_set: bool) -> Result<()> {
        let holder = || self.cache.read(|state| state.instance_named(&record.project, &record.name).cloned());
        if is_set || holder().is_none() {
            return Ok(());
        }
        // It may be free by now.
        self.sync().await?;
        match holder() {
            Some(holder) => Err(name_taken(record, holder.as_str())),
            None => Ok(()),
        }
    }

    pub(super) async fn create_recorded(
        &self,
        mutation: &Mutation,
        is_set: bool,
    ) -> Result<Option<Done<Reply>>> {
        Ok(if is_set {
            let done = self.recorded::<v1::CreateInstancesResponse>(mutation).await?;
            done.map(|done| Done { reply: Reply::Set(done.reply), revision: done.revision, fresh: false })
        } else {
            let done = self.recorded::<v1::Instance>(mutation).await?;
            done.map(|done| Done {
                reply: Reply::One(Box::new(done.reply)),
                revision: done.revision,
                fresh: false,
            })
        })
    }

    /// Where no placer runs: one call in a transaction of its own, bound to nothing.
    async fn create_alone(self: &Arc<Self>, mut wish: crate::placer::Wish) -> Result<Done<Reply>> {
        let name = wish.records.first().map_or(String::new(), |record| record.name.clone());
        for _ in 0..ATTEMPTS {
            let flight = Flight { wishes: vec![wish], guard: None, nodes: std::collections::HashMap::new() };
            let mut landed = self.clone().fly(flight).await;
            match landed.wishes.pop() {
                Some((_, Fate::Answered(answer))) => return answer,
                Some((again, Fate::Again)) => wish = again,
                None => return Err(Error::internal("a create was lost")),
            }
        }
        Err(Error::conflict(format!("instance {name}")))
    }
}
