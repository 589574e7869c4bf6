//! Who is bound where, as far as rules about other instances ask.
//!
//! # Theory of operation
//! Instances of one project with the same labels are of one [`Kind`]. Two sorts of things are counted by place:
//! - for each [`Query`] (a rule's peers, in a project) that was asked lately, the instances that match;
//! - for each [`Keeper`] (a required anti-affinity rule of something bound), the instances that have it: they keep others
//!   away.
//!
//! Each kind lists the queries and keepers whose labels match its own, so that a binding touches only what it changes, and
//! nothing at all where no rules are.
//!
//! # Invariants
//! - The counts of a query or keeper are those of the instances that are bound to nodes in the fleet, each at its place.
//! - A keeper exists as long as something bound has the rule; there are at most [`MAX_QUERIES`] queries.

use std::collections::HashMap;
use std::sync::Arc;

use hv_types::Labels;
use hv_types::placement::{Peers, Topology};

use crate::ask::{self, Ask};
use crate::counts::{Counts, Place};
use crate::hash::Keyed;
use crate::slab::Slab;

/// Most queries that are kept up to date. One ask has at most 32 rules, so those of one decision never push each other
/// out.
pub(crate) const MAX_QUERIES: usize = 256;

/// Instances of one project with the same labels.
#[derive(Clone, Debug)]
struct Kind {
    hash: u64,
    project: Arc<str>,
    labels: Labels,
    /// The instances, by number.
    instances: Vec<u32>,
    /// Queries and keepers whose labels match; their names may still differ.
    queries: Vec<u32>,
    keepers: Vec<u32>,
    /// The next kind with the same hash.
    next: Option<u32>,
}

/// What is asked about: peers in a project.
#[derive(Clone, Debug)]
struct Query {
    hash: u64,
    project: Arc<str>,
    peers: Peers,
    counts: Counts,
    used: u64,
}

/// A rule by which bound instances keep others away.
#[derive(Clone, Debug)]
struct Keeper {
    project: Arc<str>,
    peers: Peers,
    topology: Topology,
    counts: Counts,
    /// Instances that have the rule, also those on nodes that are not in the fleet.
    holders: u32,
}

#[derive(Clone, Debug, Default)]
struct Project {
    kinds: Vec<u32>,
    queries: Vec<u32>,
    keepers: Vec<u32>,
}

/// What the bookkeeping needs of an instance.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    pub(crate) kind: u32,
    pub(crate) name: &'a str,
    pub(crate) keepers: &'a [u32],
    pub(crate) place: Place,
}

/// Kinds, queries and keepers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Others {
    kinds: Slab<Kind>,
    by_hash: HashMap<u64, u32, Keyed>,
    projects: HashMap<Arc<str>, Project, Keyed>,
    queries: Slab<Query>,
    keepers: Slab<Keeper>,
    clock: u64,
}

impl Others {
    fn find_kind(&self, ask: &Ask) -> Option<u32> {
        let mut at = self.by_hash.get(&ask.kind_hash()).copied();
        while let Some(number) = at {
            let kind = self.kinds.get(number);
            if *kind.project == **ask.project() && kind.labels == *ask.labels() {
                return Some(number);
            }
            at = kind.next;
        }
        None
    }

    /// The ask's kind, with one instance more. Also returns the instance's position in it.
    pub(crate) fn join_kind(&mut self, ask: &Ask, instance: u32) -> (u32, u32) {
        let number = self.find_kind(ask).unwrap_or_else(|| self.add_kind(ask));
        let instances = &mut self.kinds.get_mut(number).instances;
        instances.push(instance);
        (number, instances.len() as u32 - 1)
    }

    fn add_kind(&mut self, ask: &Ask) -> u32 {
        let project = self.projects.entry(ask.project().clone()).or_default();
        let queries = project.queries.iter().copied();
        let keepers = project.keepers.iter().copied();
        let kind = Kind {
            hash: ask.kind_hash(),
            project: ask.project().clone(),
            labels: ask.labels().clone(),
            instances: Vec::new(),
            queries: queries.filter(|q| self.queries.get(*q).peers.labels.matches(ask.labels())).collect(),
            keepers: keepers.filter(|k| self.keepers.get(*k).peers.labels.matches(ask.labels())).collect(),
            next: self.by_hash.get(&ask.kind_hash()).copied(),
        };
        let number = self.kinds.insert(kind);
        project.kinds.push(number);
        self.by_hash.insert(ask.kind_hash(), number);
        number
    }

    /// One instance less in the kind. Returns the instance that is at its position now.
    pub(crate) fn leave_kind(&mut self, number: u32, position: u32) -> Option<u32> {
        let kind = self.kinds.get_mut(number);
        kind.instances.swap_remove(position as usize);
        let moved = kind.instances.get(position as usize).copied();
        if kind.instances.is_empty() {
            self.drop_kind(number);
        }
        moved
    }

    fn drop_kind(&mut self, number: u32) {
        let Some(kind) = self.kinds.remove(number) else { return };
        match self.by_hash.get(&kind.hash).copied() {
            Some(head) if head == number => match kind.next {
                Some(next) => drop(self.by_hash.insert(kind.hash, next)),
                None => drop(self.by_hash.remove(&kind.hash)),
            },
            Some(mut before) => {
                while self.kinds.get(before).next.is_some_and(|next| next != number) {
                    before = self.kinds.get(before).next.unwrap_or(number);
                }
                self.kinds.get_mut(before).next = kind.next;
            }
            None => {}
        }
        if let Some(project) = self.projects.get_mut(&kind.project) {
            project.kinds.retain(|other| *other != number);
        }
        self.drop_project(&kind.project);
    }

    fn drop_project(&mut self, name: &Arc<str>) {
        let unused = |p: &Project| p.kinds.is_empty() && p.queries.is_empty() && p.keepers.is_empty();
        if self.projects.get(name).is_some_and(unused) {
            self.projects.remove(name);
        }
    }

    /// The keepers that the ask's rules are, each with one holder more.
    pub(crate) fn hold_keepers(&mut self, ask: &Ask) -> Box<[u32]> {
        ask.keeps_away().map(|rule| self.hold_keeper(ask, &rule.peers, rule.topology)).collect()
    }

    fn hold_keeper(&mut self, ask: &Ask, peers: &Peers, topology: Topology) -> u32 {
        let project = self.projects.entry(ask.project().clone()).or_default();
        let same = |number: &u32| {
            let keeper = self.keepers.get(*number);
            keeper.topology == topology && keeper.peers == *peers
        };
        if let Some(number) = project.keepers.iter().copied().find(same) {
            self.keepers.get_mut(number).holders += 1;
            return number;
        }
        let keeper = Keeper {
            project: ask.project().clone(),
            peers: peers.clone(),
            topology,
            counts: Counts::default(),
            holders: 1,
        };
        let number = self.keepers.insert(keeper);
        project.keepers.push(number);
        for kind in &project.kinds {
            let kind = self.kinds.get_mut(*kind);
            if peers.labels.matches(&kind.labels) {
                kind.keepers.push(number);
            }
        }
        number
    }

    /// One holder less of each.
    pub(crate) fn let_keepers_go(&mut self, keepers: &[u32]) {
        for &number in keepers {
            let keeper = self.keepers.get_mut(number);
            keeper.holders -= 1;
            if keeper.holders > 0 {
                continue;
            }
            let Some(keeper) = self.keepers.remove(number) else { continue };
            if let Some(project) = self.projects.get_mut(&keeper.project) {
                project.keepers.retain(|other| *other != number);
                for kind in &project.kinds {
                    self.kinds.get_mut(*kind).keepers.retain(|other| *other != number);
                }
            }
            self.drop_project(&keeper.project);
        }
    }

    /// Counts an instance at its place.
    pub(crate) fn arrive(&mut self, member: Member<'_>) {
        for number in self.kinds.get(member.kind).queries.iter() {
            let query = self.queries.get_mut(*number);
            if named(&query.peers, member.name) {
                query.counts.add(member.place);
            }
        }
        for number in member.keepers {
            self.keepers.get_mut(*number).counts.add(member.place);
        }
    }

    /// Counts an instance at its place no longer.
    pub(crate) fn depart(&mut self, member: Member<'_>) {
        for number in self.kinds.get(member.kind).queries.iter() {
            let query = self.queries.get_mut(*number);
            if named(&query.peers, member.name) {
                query.counts.remove(member.place);
            }
        }
        for number in member.keepers {
            self.keepers.get_mut(*number).counts.remove(member.place);
        }
    }

    /// Counts the matching instances afresh. `member` tells an instance's name and place, if that is in the fleet.
    pub(crate) fn count<'a>(
        &self,
        project: &str,
        peers: &Peers,
        member: impl Fn(u32) -> Option<(&'a str, Place)>,
    ) -> Counts {
        let mut counts = Counts::default();
        let kinds = self.projects.get(project).into_iter().flat_map(|project| &project.kinds);
        let kinds = kinds.map(|kind| self.kinds.get(*kind)).filter(|kind| peers.labels.matches(&kind.labels));
        for instance in kinds.flat_map(|kind| &kind.instances) {
            if let Some((name, place)) = member(*instance)
                && named(peers, name)
            {
                counts.add(place);
            }
        }
        counts
    }

    /// The query of these peers, which is kept up to date from now on.
    pub(crate) fn ask_for<'a>(
        &mut self,
        ask: &Ask,
        peers: &Peers,
        member: impl Fn(u32) -> Option<(&'a str, Place)>,
    ) -> u32 {
        self.clock += 1;
        let hash = ask::hash((ask.project(), peers));
        let known = self.projects.get(ask.project()).and_then(|project| {
            project.queries.iter().copied().find(|number| {
                let query = self.queries.get(*number);
                query.hash == hash && query.peers == *peers
            })
        });
        if let Some(number) = known {
            self.queries.get_mut(number).used = self.clock;
            return number;
        }
        if self.queries.len() >= MAX_QUERIES {
            let oldest = self.queries.iter().min_by_key(|(_, query)| query.used).map(|(number, _)| number);
            oldest.into_iter().for_each(|number| self.drop_query(number));
        }
        let counts = self.count(ask.project(), peers, member);
        let (project, used) = (ask.project().clone(), self.clock);
        let number = self.queries.insert(Query { hash, project, peers: peers.clone(), counts, used });
        let project = self.projects.entry(ask.project().clone()).or_default();
        project.queries.push(number);
        for kind in &project.kinds {
            let kind = self.kinds.get_mut(*kind);
            if peers.labels.matches(&kind.labels) {
                kind.queries.push(number);
            }
        }
        number
    }

    fn drop_query(&mut self, number: u32) {
        let Some(query) = self.queries.remove(number) else { return };
        if let Some(project) = self.projects.get_mut(&query.project) {
            project.queries.retain(|other| *other != number);
            for kind in &project.kinds {
                self.kinds.get_mut(*kind).queries.retain(|other| *other != number);
            }
        }
        self.drop_project(&query.project);
    }

    /// The counts of a query.
    pub(crate) fn counts(&self, query: u32) -> &Counts {
        &self.queries.get(query).counts
    }

    /// Whether an instance of this kind and name is one of the ask's peers.
    pub(crate) fn is_peer(&self, ask: &Ask, peers: &Peers, kind: u32, name: &str) -> bool {
        let kind = self.kinds.get(kind);
        kind.project == *ask.project() && peers.matches(name, &kind.labels)
    }

    /// Whether anything bound keeps something away.
    pub(crate) fn has_keepers(&self) -> bool {
        self.keepers.len() > 0
    }

    /// Where the ask is kept away, by those that keep it away.
    pub(crate) fn kept_away(&self, ask: &Ask) -> impl Iterator<Item = (Topology, &Counts)> {
        // A kind knows which keepers concern its labels; for the first of a kind all of the project's are looked at.
        let known = self.find_kind(ask).map(|kind| &self.kinds.get(kind).keepers);
        let all = || self.projects.get(ask.project()).map(|project| &project.keepers);
        let keepers = known.or_else(all).into_iter().flatten();
        let keepers = keepers.map(|number| self.keepers.get(*number));
        let (name, labels) = (ask.name(), ask.labels());
        keepers
            .filter(move |keeper| keeper.counts.total > 0 && keeper.peers.matches(name, labels))
            .map(|keeper| (keeper.topology, &keeper.counts))
    }
}

fn named(peers: &Peers, name: &str) -> bool {
    peers.instance_name.is_empty() || peers.instance_name == name
}
