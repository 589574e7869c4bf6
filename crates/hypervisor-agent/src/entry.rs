//! What the agent remembers of one instance, and how orders change it. Pure; the journal keeps it.
//!
//! # Theory of operation
//! An order is numbered by epoch (the binding) and generation (what is wanted). A higher number replaces what was
//! wanted and makes the entry `pending`; an equal or lower one changes nothing, because a user of this node may have
//! asked for something else since. `pending` ends when the driver has done it or it failed for good.

use std::time::SystemTime;

use hv_driver::{Exit, Handle, InstanceConfig};
use hv_types::instance::{RestartPolicy, StopOptions};
use hv_types::{Epoch, InstanceId, InstanceSpec, InstanceType, Wanted};
use serde::{Deserialize, Serialize};

use crate::fencing::clock::Moment;

/// Version of the entries that this code writes, and the highest that it reads.
pub(crate) const ENTRY_SCHEMA: u32 = 3;
/// Of how many migrations it is remembered that they were aborted here.
const MAX_ENDED: usize = 8;

/// How an instance came to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Origin {
    /// The control plane bound it here.
    Assigned,
    /// A user of this node made it; the control plane does not know it.
    Local,
    /// A driver has it and nobody knows why. It is shown to the control plane and otherwise left alone.
    Found,
    /// It waits here for another node to hand it over, and is not bound to this one.
    Incoming,
}

/// What the control plane wants of an instance.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Order {
    pub(crate) config: InstanceConfig,
    pub(crate) instance_type: InstanceType,
    pub(crate) epoch: Epoch,
    pub(crate) generation: u64,
    pub(crate) wanted: Wanted,
    pub(crate) restart_generation: u64,
    pub(crate) stop: StopOptions,
    /// It may be started elsewhere when this node is lost.
    pub(crate) fence: bool,
    pub(crate) restart_policy: RestartPolicy,
    /// It was handed over to this node by this migration, and goes on from what waits here.
    pub(crate) migration: Option<String>,
}

/// A hand-over to another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outgoing {
    pub(crate) migration: String,
    /// It is to go on here.
    pub(crate) aborting: bool,
}

/// A moment of a boot of this node, as the journal keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BootMoment {
    pub(crate) boot_id: String,
    pub(crate) at: Moment,
}

/// Starts without having been asked for, after the instance ended by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restarts {
    /// How many there were since it was bound here.
    pub(crate) count: u32,
    /// How many in a row, without a good while of running in between.
    pub(crate) streak: u32,
    /// When the next one is due, once it is decided that there is one.
    pub(crate) due: Option<BootMoment>,
    /// When it was last started.
    pub(crate) started: Option<BootMoment>,
}

/// One instance, as the journal keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) schema: u32,
    pub(crate) config: InstanceConfig,
    pub(crate) instance_type: InstanceType,
    pub(crate) origin: Origin,
    /// The driver that has it; chosen once.
    pub(crate) driver: Option<String>,
    pub(crate) created_at: SystemTime,

    pub(crate) epoch: Epoch,
    pub(crate) generation: u64,
    pub(crate) wanted: Wanted,
    pub(crate) restart_generation: u64,
    pub(crate) stop: StopOptions,
    /// Raised with every change of what is wanted, whoever asked for it.
    pub(crate) serial: u64,

    /// What is wanted is not reached yet.
    pub(crate) pending: bool,
    /// The generation that was finished last.
    pub(crate) observed_generation: u64,
    /// It is to be stopped before it is started.
    pub(crate) restart_pending: bool,
    /// What is there belongs to an earlier life and must go before anything is made.
    pub(crate) discard: bool,
    /// The control plane told this node to forget it; nothing is reported any more.
    pub(crate) released: bool,
    /// Nothing is left; kept until the control plane knows.
    pub(crate) gone: bool,

    /// The driver has created it completely.
    pub(crate) created: bool,
    pub(crate) handle: Option<Handle>,
    /// Why what is wanted could not be reached.
    pub(crate) failure: Option<String>,
    /// How it ended, once that was seen; forgotten when it is started.
    pub(crate) last_exit: Option<Exit>,
    /// The boot of this node during which it was last started.
    pub(crate) boot_id: String,
    pub(crate) started_at: Option<SystemTime>,

    // Since schema 2.
    /// It may be started elsewhere when this node is lost: it runs only while the node's lease lives.
    #[serde(default)]
    pub(crate) fence: bool,
    #[serde(default)]
    pub(crate) restart_policy: RestartPolicy,
    #[serde(default)]
    pub(crate) restarts: Restarts,

    // Since schema 3.
    /// The migration that hands it over to this node, while it waits for that.
    #[serde(default)]
    pub(crate) incoming: Option<String>,
    /// The migration that hands it over to another node. From before that begins until the control plane has taken it
    /// away or had it aborted nothing starts it here, whatever becomes of it.
    #[serde(default)]
    pub(crate) outgoing: Option<Outgoing>,
    /// Migrations that were aborted here, the latest last: a request that was late on its way begins none of them anew.
    #[serde(default)]
    pub(crate) ended_migrations: Vec<String>,

    /// What its driver was told that it is, where that is not what it is to be: the driver is still to be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) told: Option<Box<Told>>,
    /// What of its specification takes effect at the next start only, and why; empty for nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) update_note: String,
    /// Its driver is to be told again before the next start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) tell_again: bool,
}

/// The part of a configuration that drivers can change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Told {
    pub(crate) name: String,
    pub(crate) spec: InstanceSpec,
}

impl Told {
    /// Of a configuration.
    pub(crate) fn of(config: &InstanceConfig) -> Self {
        Self { name: config.name.clone(), spec: config.spec.clone() }
    }

    fn is_as(&self, config: &InstanceConfig) -> bool {
        self.name == config.name && self.spec == config.spec
    }
}

/// Whether an order changed something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is newer than what was known.
    Newer,
    /// It is known already, or older.
    Known,
    /// It is known already, except for its policies.
    Policies,
}

impl Entry {
    fn blank(config: InstanceConfig, instance_type: InstanceType, origin: Origin) -> Self {
        Self {
            schema: ENTRY_SCHEMA,
            config,
            instance_type,
            origin,
            driver: None,
            created_at: SystemTime::now(),
            epoch: Epoch::default(),
            generation: 0,
            wanted: Wanted::Running,
            restart_generation: 0,
            stop: StopOptions::default(),
            serial: 0,
            pending: false,
            observed_generation: 0,
            restart_pending: false,
            discard: false,
            released: false,
            gone: false,
            created: false,
            handle: None,
            failure: None,
            last_exit: None,
            boot_id: String::new(),
            started_at: None,
            fence: false,
            restart_policy: RestartPolicy::Never,
            restarts: Restarts::default(),
            incoming: None,
            outgoing: None,
            ended_migrations: Vec::new(),
            told: None,
            update_note: String::new(),
            tell_again: false,
        }
    }

    /// An instance that the control plane binds here for the first time.
    pub(crate) fn assigned(order: Order) -> Self {
        let mut entry = Self::blank(order.config.clone(), order.instance_type, Origin::Assigned);
        // Of a life that this journal does not know, only a restart that is the very request is to be done.
        let restart_generation = order.restart_generation;
        let is_request = restart_generation == order.generation;
        entry.take(order);
        entry.restart_pending &= is_request;
        entry
    }

    /// An instance that a user of this node makes.
    pub(crate) fn local(config: InstanceConfig, instance_type: InstanceType) -> Self {
        let mut entry = Self::blank(config, instance_type, Origin::Local);
        entry.want(Wanted::Running);
        entry
    }

    /// An instance that a driver has and nobody knows of.
    pub(crate) fn found(id: InstanceId, instance_type: InstanceType, driver: &str) -> Self {
        let name = id.to_string();
        let config = InstanceConfig {
            id,
            name,
            spec: Default::default(),
            metadata: Default::default(),
            image: None,
            rescue_image: None,
            devices: None,
        };
        let mut entry = Self::blank(config, instance_type, Origin::Found);
        entry.driver = Some(driver.to_owned());
        entry
    }

    /// An instance that another node is about to hand over.
    pub(crate) fn incoming(order: Order, migration: String, driver: &str) -> Self {
        let mut entry = Self::blank(order.config, order.instance_type, Origin::Incoming);
        entry.epoch = order.epoch;
        entry.incoming = Some(migration);
        entry.driver = Some(driver.to_owned());
        entry
    }

    /// Which instance.
    pub(crate) fn id(&self) -> &InstanceId {
        &self.config.id
    }

    fn changed(&mut self) {
        self.serial += 1;
        self.pending = true;
        self.failure = None;
        self.restarts.streak = 0;
        self.restarts.due = None;
    }

    fn take(&mut self, order: Order) {
        let is_new_life = order.epoch > self.epoch && self.serial > 0;
        let is_going = self.wanted == Wanted::Deleted || self.released;
        if order.epoch > self.epoch {
            self.restarts = Restarts::default();
        }
        self.discard |= is_new_life && is_going && !self.gone;
        // What waits here is taken up by the binding that the migration led to, and by no other.
        let takes_up = order.migration.is_some() && self.incoming == order.migration;
        self.discard |= self.incoming.is_some() && !takes_up && !self.gone;
        if order.epoch > self.epoch {
            self.incoming = None;
            // What was about to be handed over stands still, or may yet: it is no part of a later life.
            self.discard |= self.outgoing.take().is_some() && !self.gone;
        }
        if self.gone {
            self.created = false;
            self.handle = None;
            self.last_exit = None;
        }
        // What was handed over is never made anew: if it is not there any more, it is lost.
        self.created |= order.migration.is_some() && !self.discard;
        let is_restart = order.migration.is_none() || order.epoch == self.epoch;
        self.restart_pending |= is_restart && order.restart_generation > self.restart_generation;
        if self.serial > 0 {
            let told = self.told.take().unwrap_or_else(|| Box::new(Told::of(&self.config)));
            self.tell_of(*told, &order.config);
        }
        if is_new_life || self.gone {
            self.forget_updates();
        }
        let image = self.config.image.take().filter(|_| self.config.spec.image == order.config.spec.image);
        let is_same = self.config.spec.rescue == order.config.spec.rescue;
        let rescue_image = self.config.rescue_image.take().filter(|_| is_same);
        let devices = self.config.devices.take();
        self.config = order.config;
        self.config.devices = devices;
        self.config.image = self.config.image.take().or(image);
        self.config.rescue_image = self.config.rescue_image.take().or(rescue_image);
        self.instance_type = order.instance_type;
        self.origin = Origin::Assigned;
        self.epoch = order.epoch;
        self.generation = order.generation;
        self.wanted = order.wanted;
        self.restart_generation = order.restart_generation;
        self.stop = order.stop;
        self.fence = order.fence;
        self.restart_policy = order.restart_policy;
        self.released = false;
        self.gone = false;
        self.restart_pending &= self.wanted == Wanted::Running;
        self.changed();
    }

    /// The driver was told this; it is to be told again where that is not what the instance is to be.
    fn tell_of(&mut self, told: Told, config: &InstanceConfig) {
        self.told = (!told.is_as(config)).then(|| Box::new(told));
    }

    /// The driver was told this, and says that so much waits for the next start; empty: nothing does.
    pub(crate) fn updated(&mut self, told: Told, note: String, runs: bool) {
        let config = self.config.clone();
        self.tell_of(told, &config);
        self.tell_again = runs && !note.is_empty();
        self.update_note = note;
    }

    /// What is made is made as it is to be.
    pub(crate) fn forget_updates(&mut self) {
        self.told = None;
        self.tell_again = false;
        self.update_note.clear();
    }

    /// Takes an order, if it is newer than what is known.
    pub(crate) fn order(&mut self, order: Order) -> Taken {
        let known = self.origin == Origin::Assigned
            && (order.epoch, order.generation) <= (self.epoch, self.generation);
        let waits = self.origin == Origin::Incoming && order.epoch <= self.epoch;
        if known || waits || self.origin == Origin::Local {
            let is_same = known && (order.epoch, order.generation) == (self.epoch, self.generation);
            let policies = (order.fence, order.restart_policy);
            if is_same && policies != (self.fence, self.restart_policy) {
                // An older release of this agent took the order, and knew nothing of them.
                (self.fence, self.restart_policy) = policies;
                return Taken::Policies;
            }
            return Taken::Known;
        }
        self.take(order);
        Taken::Newer
    }

    /// A user of this node wants something.
    pub(crate) fn want(&mut self, wanted: Wanted) {
        self.wanted = wanted;
        self.restart_pending &= wanted == Wanted::Running;
        self.changed();
    }

    /// What is wanted is to be reached again, as what was there is about to change.
    pub(crate) fn pursue_again(&mut self) {
        self.serial += 1;
        self.pending = true;
        self.restarts.due = None;
    }

    /// A user of this node wants a restart.
    pub(crate) fn want_restart(&mut self) {
        self.restart_pending = true;
        self.want(Wanted::Running);
    }

    /// The control plane wants it forgotten; `epoch` is that of the report it answers, if it answers one.
    pub(crate) fn release(&mut self, epoch: Option<Epoch>) -> Taken {
        let is_stale = epoch.is_some_and(|epoch| epoch < self.epoch);
        if is_stale || self.released || self.origin == Origin::Local {
            return Taken::Known;
        }
        self.released = true;
        if !self.gone {
            self.stop.force = true;
            self.want(Wanted::Deleted);
        }
        Taken::Newer
    }

    /// A migration is given up: it never begins again here, and what was handed over by it is to go on.
    pub(crate) fn abort_migration(&mut self, migration: &str) {
        if !self.has_ended(migration) {
            self.ended_migrations.push(migration.to_owned());
            let surplus = self.ended_migrations.len().saturating_sub(MAX_ENDED);
            self.ended_migrations.drain(..surplus);
        }
        if let Some(outgoing) = &mut self.outgoing {
            outgoing.aborting |= outgoing.migration == migration;
        }
    }

    /// Whether a migration was aborted here.
    pub(crate) fn has_ended(&self, migration: &str) -> bool {
        self.ended_migrations.iter().any(|ended| ended == migration)
    }

    /// What is wanted is reached.
    pub(crate) fn finish(&mut self) {
        self.pending = false;
        self.observed_generation = self.generation;
    }

    /// What is wanted cannot be reached.
    pub(crate) fn fail(&mut self, reason: String) {
        self.failure = Some(reason);
        self.finish();
    }

    /// Whether nothing needs to be remembered.
    pub(crate) fn is_over(&self) -> bool {
        self.gone && (self.released || self.origin != Origin::Assigned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn order(epoch: u64, generation: u64, wanted: Wanted) -> Order {
        let id: InstanceId = "i-1".parse().unwrap();
        Order {
            config: InstanceConfig {
                id,
                name: "a".into(),
                spec: Default::default(),
                metadata: Default::default(),
                image: None,
                rescue_image: None,
                devices: None,
            },
            instance_type: InstanceType::Vm,
            epoch: Epoch(epoch),
            generation,
            wanted,
            restart_generation: 0,
            stop: StopOptions::default(),
            fence: false,
            restart_policy: RestartPolicy::Never,
            migration: None,
        }
    }

    #[test]
    fn policies_that_an_older_release_did_not_know_are_taken_over() {
        let mut entry = Entry::assigned(order(1, 1, Wanted::Running));
        let serial = entry.serial;
        let again = Order { fence: true, ..order(1, 1, Wanted::Running) };
        assert_eq!(entry.order(again.clone()), Taken::Policies);
        assert_eq!(entry.order(again), Taken::Known);
        assert!(entry.fence && entry.serial == serial);
    }

    #[test]
    fn only_a_newer_order_changes_what_is_wanted() {
        let mut entry = Entry::assigned(order(2, 5, Wanted::Running));
        for (epoch, generation) in [(2, 5), (2, 4), (1, 9)] {
            assert_eq!(entry.order(order(epoch, generation, Wanted::Deleted)), Taken::Known);
            assert_eq!(entry.wanted, Wanted::Running);
        }
        for (epoch, generation) in [(2, 6), (3, 1)] {
            assert_eq!(entry.order(order(epoch, generation, Wanted::Stopped)), Taken::Newer);
        }
    }

    #[test]
    fn a_local_wish_stands_until_something_newer_comes() {
        let mut entry = Entry::assigned(order(1, 1, Wanted::Running));
        entry.finish();
        entry.want(Wanted::Stopped);
        assert_eq!(entry.order(order(1, 1, Wanted::Running)), Taken::Known);
        assert_eq!((entry.wanted, entry.pending), (Wanted::Stopped, true));
        assert_eq!(entry.order(order(1, 2, Wanted::Running)), Taken::Newer);
        assert_eq!(entry.wanted, Wanted::Running);
    }

    #[test]
    fn a_new_binding_of_what_is_going_makes_it_go_first() {
        let mut entry = Entry::assigned(order(1, 1, Wanted::Running));
        entry.order(order(1, 2, Wanted::Deleted));
        entry.order(order(2, 3, Wanted::Running));
        assert!(entry.discard && !entry.gone);
        let mut released = Entry::assigned(order(1, 1, Wanted::Running));
        released.release(None);
        released.order(order(2, 3, Wanted::Running));
        assert!(released.discard && !released.released);
    }

    #[test]
    fn a_release_for_an_older_binding_is_not_taken() {
        let mut entry = Entry::assigned(order(3, 1, Wanted::Running));
        assert_eq!(entry.release(Some(Epoch(2))), Taken::Known);
        assert_eq!(entry.release(Some(Epoch(3))), Taken::Newer);
        assert_eq!(entry.wanted, Wanted::Deleted);
    }

    #[test]
    fn what_was_made_here_is_never_released_or_taken_over() {
        let config = order(1, 1, Wanted::Running).config;
        let mut entry = Entry::local(config, InstanceType::Vm);
        assert_eq!(entry.release(None), Taken::Known);
        assert_eq!(entry.order(order(9, 9, Wanted::Deleted)), Taken::Known);
        assert_eq!(entry.wanted, Wanted::Running);
    }

    #[test]
    fn a_restart_is_asked_for_once() {
        let mut entry = Entry::assigned(order(1, 1, Wanted::Running));
        let restart = Order { restart_generation: 2, ..order(1, 2, Wanted::Running) };
        entry.order(restart);
        assert!(entry.restart_pending);
        entry.restart_pending = false;
        entry.order(Order { restart_generation: 2, ..order(1, 3, Wanted::Running) });
        assert!(!entry.restart_pending);
    }

    #[test]
    fn a_node_that_lost_its_journal_does_not_repeat_an_old_restart() {
        let entry = Entry::assigned(Order { restart_generation: 2, ..order(1, 5, Wanted::Running) });
        assert!(!entry.restart_pending);
    }
}
