//! What the fencer decides: a pure function of what it was told and of the time. No clock, no files, no processes.
//!
//! # Theory of operation
//! The agent tells until when the node's lease lives at least, and what is to be killed when that moment passes. It
//! announces a start before it begins ([`Message::Watch`] with `starting`) and says when it is over
//! ([`Message::Settled`]): an instance whose start is under way when the lease ends is not gone just because nothing of
//! it can be seen, so the fencer waits a moment, then ends the agent itself, the only one that could still start it.
//!
//! # Invariants (each is a property test below)
//! - The end of the lease never moves back.
//! - Once it has passed, everything that is watched is killed, until it is certain that it is gone; a lease that is
//!   renewed too late saves nothing of it.
//! - Nothing may start without a lease that lives, nor while it is being killed.
//! - While failover is held nothing is killed that was not being killed before.

use std::collections::BTreeMap;
use std::time::Duration;

use hv_driver::FenceTarget;
use hv_driver::fence::{Outcome, Zeal};
use hv_types::InstanceId;
use serde::{Deserialize, Serialize};

use super::clock::Moment;

/// Version of the messages.
pub const PROTOCOL: u32 = 1;
/// Most targets: as many as a node may have instances.
pub const MAX_TARGETS: usize = 16_384;
/// How long the agent may take to say that a start is over, once the lease has ended, before it is killed.
/// Below every margin that is accepted.
pub const START_GRACE: Duration = Duration::from_millis(400);
/// First pause between two tries to kill; it doubles.
const RETRY_BASE: Duration = Duration::from_millis(20);
/// Longest pause between two tries to kill.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Tries that spare whoever only holds on to an instance.
const GENTLE_TRIES: u32 = 4;

/// What an agent tells the fencer. Each is answered with one [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum Message {
    /// An agent begins to talk, or does so again. Answered with [`Reply::Standing`].
    Hello {
        /// The version that it speaks.
        protocol: u32,
        /// Which process it is.
        agent: String,
    },
    /// Until when the node's lease lives at least.
    Lease {
        /// Counts from before the renewal was sent. `None`: as known.
        until: Option<Moment>,
        /// The operator holds failover: nothing needs to be killed.
        held: bool,
    },
    /// Kill this when the lease ends.
    Watch {
        /// Which instance.
        id: InstanceId,
        /// How it is killed.
        target: FenceTarget,
        /// It is about to be started; otherwise it may run already.
        starting: bool,
    },
    /// The start is over, whatever became of it.
    Settled {
        /// Which instance.
        id: InstanceId,
    },
    /// It does not run any more, or need not be killed any more.
    Forget {
        /// Which instance.
        id: InstanceId,
    },
}

/// What the fencer answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is so.
    Done,
    /// To [`Message::Hello`].
    Standing(Standing),
    /// It must not be, or cannot. The text says why.
    Refused {
        /// For people.
        reason: String,
    },
}

/// What a fencer knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The version that it speaks.
    pub protocol: u32,
    /// Until when the lease lives, as far as it was told.
    pub until: Option<Moment>,
    /// Whether failover is held.
    pub held: bool,
    /// What it will kill when the lease ends: it vouches for these.
    pub watched: Vec<InstanceId>,
    /// What it is killing.
    pub doomed: Vec<InstanceId>,
    /// What an operator should know of it, as that it could not get a high priority.
    pub message: String,
}

/// What is to be done in the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Kill this, and tell [`FencerCore::tried`] what came of it.
    Kill {
        /// Which instance.
        id: InstanceId,
        /// How.
        target: FenceTarget,
        /// Whom.
        zeal: Zeal,
    },
    /// End the agent's process, and tell [`FencerCore::agent_ended`] when it is gone.
    EndAgent,
}

#[derive(Clone, Debug)]
struct Watched {
    target: FenceTarget,
    starting: bool,
    doomed: Option<Doom>,
}

#[derive(Clone, Copy, Debug)]
struct Doom {
    since: Moment,
    tries: u32,
    next: Moment,
}

/// The fencer's mind.
#[derive(Clone, Debug, Default)]
pub struct FencerCore {
    until: Option<Moment>,
    held: bool,
    targets: BTreeMap<InstanceId, Watched>,
    agent: String,
    agent_ending: bool,
}

impl FencerCore {
    /// A fencer that knows nothing: without a lease, which is as one that has ended.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether instances may run now.
    #[must_use]
    pub fn is_alive(&self, now: Moment) -> bool {
        self.held || self.until.is_some_and(|until| now < until)
    }

    /// Whether there is anything to kill, now or later.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.targets.is_empty()
    }

    /// Until when the lease lives, as far as it was told.
    #[must_use]
    pub fn until(&self) -> Option<Moment> {
        self.until
    }

    /// Whether this instance is being killed.
    #[must_use]
    pub fn is_doomed(&self, id: &InstanceId) -> bool {
        self.targets.get(id).is_some_and(|watched| watched.doomed.is_some())
    }

    /// What is to be killed when the lease ends, and whether its start is under way.
    pub(crate) fn watched(&self) -> Vec<(InstanceId, FenceTarget, bool)> {
        let living = self.targets.iter().filter(|(_, watched)| watched.doomed.is_none());
        living.map(|(id, watched)| (id.clone(), watched.target.clone(), watched.starting)).collect()
    }

    /// What it knows.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let which = |doomed: bool| {
            let chosen = self.targets.iter().filter(move |(_, watched)| watched.doomed.is_some() == doomed);
            chosen.map(|(id, _)| id.clone()).collect()
        };
        Standing {
            protocol: PROTOCOL,
            until: self.until,
            held: self.held,
            watched: which(false),
            doomed: which(true),
            message: String::new(),
        }
    }

    /// The agent says something at `now`.
    pub fn hear(&mut self, now: Moment, message: Message) -> Reply {
        // What is late is late: the message may have waited.
        self.doom(now);
        match message {
            Message::Hello { agent, .. } => {
                // Only one process at a time has the state directory, so the one before is dead.
                if self.agent != agent {
                    self.agent = agent;
                    self.agent_ended();
                }
                Reply::Standing(self.standing())
            }
            Message::Lease { until, held } => {
                self.until = self.until.max(until);
                self.held = held;
                self.doom(now);
                Reply::Done
            }
            Message::Watch { id, target, starting } => self.watch(now, id, target, starting),
            Message::Settled { id } => {
                if let Some(watched) = self.targets.get_mut(&id) {
                    watched.starting = false;
                }
                Reply::Done
            }
            Message::Forget { id } => match self.targets.get(&id) {
                Some(Watched { doomed: Some(_), .. }) => Self::refused("it is being killed"),
                _ => {
                    self.targets.remove(&id);
                    Reply::Done
                }
            },
        }
    }

    fn refused(reason: &str) -> Reply {
        Reply::Refused { reason: reason.to_owned() }
    }

    fn watch(&mut self, now: Moment, id: InstanceId, target: FenceTarget, starting: bool) -> Reply {
        if let Some(watched) = self.targets.get_mut(&id) {
            if watched.doomed.is_some() {
                return Self::refused("it is being killed because the lease had ended");
            }
            watched.target = target;
            watched.starting |= starting;
            return Reply::Done;
        }
        if starting && !self.is_alive(now) {
            return Self::refused("the node's lease has ended");
        }
        if self.targets.len() >= MAX_TARGETS {
            return Self::refused("too many instances are watched already");
        }
        self.targets.insert(id, Watched { target, starting, doomed: None });
        self.doom(now);
        Reply::Done
    }

    /// Passes sentence on what is overdue at `now`, without carrying it out.
    pub(crate) fn doom(&mut self, now: Moment) {
        if self.is_alive(now) {
            return;
        }
        for watched in self.targets.values_mut() {
            watched.doomed.get_or_insert(Doom { since: now, tries: 0, next: now });
        }
    }

    /// What is to be done at `now`.
    pub fn tick(&mut self, now: Moment) -> Vec<Action> {
        self.doom(now);
        let mut actions = Vec::new();
        let mut ends_agent = false;
        for (id, watched) in &mut self.targets {
            let Some(doom) = &mut watched.doomed else { continue };
            ends_agent |= watched.starting && doom.since.after(START_GRACE) <= now;
            if doom.next <= now {
                let zeal = if doom.tries < GENTLE_TRIES { Zeal::Instance } else { Zeal::Everyone };
                doom.next = now.after((RETRY_BASE * (1 << doom.tries.min(8))).min(RETRY_MAX));
                doom.tries = doom.tries.saturating_add(1);
                actions.push(Action::Kill { id: id.clone(), target: watched.target.clone(), zeal });
            }
        }
        if ends_agent && !self.agent_ending {
            self.agent_ending = true;
            actions.push(Action::EndAgent);
        }
        actions
    }

    /// What a try to kill came to. Whether it is over: it is gone, and nobody starts it.
    pub fn tried(&mut self, id: &InstanceId, outcome: &Outcome) -> bool {
        let Some(Watched { starting, doomed: Some(_), .. }) = self.targets.get(id) else { return false };
        let is_over = !starting && *outcome == Outcome::Gone;
        if is_over {
            self.targets.remove(id);
        }
        is_over
    }

    /// The agent's process is dead: it starts nothing any more.
    pub fn agent_ended(&mut self) {
        self.agent_ending = false;
        for watched in self.targets.values_mut() {
            watched.starting = false;
            if let Some(doom) = &mut watched.doomed {
                doom.next = doom.since;
            }
        }
    }

    /// When [`FencerCore::tick`] has something to do next; `None`: not before something is heard.
    #[must_use]
    pub fn next_wake(&self) -> Option<Moment> {
        let doomed = self.targets.values().filter_map(|watched| {
            let doom = watched.doomed?;
            let agent = watched.starting && !self.agent_ending;
            Some(if agent { doom.next.min(doom.since.after(START_GRACE)) } else { doom.next })
        });
        let waits = self.targets.values().any(|watched| watched.doomed.is_none()) && !self.held;
        let lapse = waits.then(|| self.until.unwrap_or_default());
        doomed.chain(lapse).min()
    }
}

#[cfg(test)]
mod tests;
