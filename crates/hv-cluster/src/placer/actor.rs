//! The placer's loop: what arrives, what is decided about it, and what is in the air.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hv_types::{InstanceId, RequestKey};
use rand::rngs::StdRng;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::choose::{attempt, seat, tell};
use super::decision::{self, Decision, Kind, Outcome};
use super::feed::Snapshot;
use super::flight::{Fate, Flight, Landed, Weight};
use super::queue::{Wish, stopping};
use super::reserve::{self, Reserved, Wanted};
use super::term::Term;
use crate::Cluster;
use crate::cache::SubscriptionError;
use crate::election::Leadership;
use crate::error::{Error, Result};
use crate::requests::{Done, key_was_used};

/// Transactions in the air at most.
const FLIGHTS: usize = 8;
/// Transactions of creates in the air that are not full at most: the next one waits and collects more.
const SMALL_FLIGHTS: usize = 2;
/// Calls that are taken from the queue ahead of being written.
const BACKLOG: usize = 1024;
/// How often a create is tried before its caller is told of the conflict.
const ATTEMPTS: u32 = 16;
/// How often of these it is tried to be bound at once.
const BOUND_ATTEMPTS: u32 = 3;
/// How many that wait are tried between two looks at what else there is to do.
const TRIES: usize = 256;
/// The least time between the beginnings of two rounds over all that wait.
const ROUND_PAUSE: Duration = Duration::from_millis(20);
/// How often what is rare is looked at: outdated reasons, unknown outcomes.
const TICK: Duration = Duration::from_secs(1);
/// Every so many ticks reasons that are outdated are written anew, so many at most, of so many that are looked at.
const RETELL: (u32, usize, usize) = (5, decision::BATCH, 10_000);
/// Every so many ticks a round begins though nothing seems to have changed, in case something was ever missed.
const SLOW_ROUND: u32 = 30;
/// How often in a row decisions may be overtaken before there is a pause: a leader that was deposed and does not know it
/// yet must not keep the store busy.
const OVERTAKEN_LIMIT: u32 = 8;
/// The pause after decisions that could not be written.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// How long an unknown outcome may take to become visible before the store is asked: longer than any server of the store
/// keeps a request.
const DOUBT: Duration = Duration::from_secs(30);
/// How long the actor waits for what is in the air when it is to stop.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// A create's place in the backlog: the higher priority first, then first come, first served.
type Turn = (Reverse<i32>, u64);

/// What came back.
enum Back {
    Creates { term: Option<u64>, landed: Landed },
    Decisions { term: u64, decisions: Vec<Decision>, outcome: Outcome, rest: Vec<Decision> },
    Looked { term: u64, id: InstanceId, is_there: Option<bool> },
    Swept,
}

/// The placer's actor.
pub(super) struct Actor<'a> {
    cluster: &'a Arc<Cluster>,
    rng: StdRng,
    term: Option<Term>,
    terms: u64,
    /// Creates that wait: the higher priority first, then first come, first served.
    backlog: BTreeMap<Turn, Wish>,
    taken: u64,
    /// The request keys of creates in the air, with the calls that repeat them.
    repeated: HashMap<RequestKey, Vec<Wish>>,
    air: JoinSet<Back>,
    small: usize,
    overtaken: u32,
    paused_until: Option<Instant>,
    next_round: Instant,
    ticks: u32,
    sweeping: bool,
    /// Who waits for room to be promised to an instance that is to move.
    reserving: HashMap<InstanceId, oneshot::Sender<Reserved>>,
    /// Room that was held for nobody who waits, a slow round ago.
    idle_holds: HashSet<InstanceId>,
}

impl<'a> Actor<'a> {
    pub(super) fn new(cluster: &'a Arc<Cluster>, rng: StdRng) -> Self {
        Self {
            cluster,
            rng,
            term: None,
            terms: 0,
            backlog: BTreeMap::new(),
            taken: 0,
            repeated: HashMap::new(),
            air: JoinSet::new(),
            small: 0,
            overtaken: 0,
            paused_until: None,
            next_round: Instant::now(),
            ticks: 0,
            sweeping: false,
            reserving: HashMap::new(),
            idle_holds: HashSet::new(),
        }
    }

    pub(super) async fn run(
        mut self,
        mut leading: watch::Receiver<Option<Leadership>>,
        stop: CancellationToken,
    ) {
        let mut queue = self.cluster.creates.serve();
        let mut moves = self.cluster.reservations.serve();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut entering = self.enter(&mut leading);
        loop {
            let wake = self.wake_at();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                changed = leading.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    self.term = None;
                    entering = self.enter(&mut leading);
                }
                leadership = &mut entering => {
                    self.begin(leadership);
                    entering = std::future::pending().boxed();
                }
                Some(back) = self.air.join_next(), if !self.air.is_empty() => self.back(back),
                batch = next_change(&mut self.term) => self.follow(batch),
                Some(wanted) = moves.recv() => self.reserve(wanted),
                taken = take(&mut queue), if self.backlog.len() < BACKLOG => self.accept(taken, &mut queue),
                _ = tick.tick() => self.tick(),
                () = tokio::time::sleep_until(wake) => {}
            }
            self.follow_all();
            self.launch();
        }
        drop(queue);
        self.finish().await;
    }

    /// Ends in order: what is in the air lands, whoever still waits is told.
    async fn finish(mut self) {
        for (_, wish) in std::mem::take(&mut self.backlog) {
            wish.answer(Err(stopping()));
        }
        self.term = None;
        let land = async {
            while let Some(back) = self.air.join_next().await {
                self.back(back);
            }
        };
        let _ = tokio::time::timeout(STOP_LIMIT, land).await;
    }

    /// Waits until the cache shows everything that was bound before this server's term.
    fn enter(&self, leading: &mut watch::Receiver<Option<Leadership>>) -> BoxFuture<'static, Leadership> {
        let Some(leadership) = leading.borrow_and_update().clone() else {
            return std::future::pending().boxed();
        };
        let cluster = self.cluster.clone();
        async move {
            // It fails after a few seconds without an answer of the store; then it is waited for anew.
            while cluster.cache.wait_for(leadership.since).await.is_err() {}
            leadership
        }
        .boxed()
    }

    fn begin(&mut self, leadership: Leadership) {
        self.terms += 1;
        let (snapshot, changes) = self.cluster.cache.subscribe(Snapshot::of);
        let shields = self.cluster.config.preemption;
        let term = Term::new(self.terms, leadership, shields, &snapshot, changes);
        info!(
            nodes = snapshot.nodes.len(),
            instances = snapshot.instances.len(),
            waiting = term.waiting.len(),
            "this server places instances"
        );
        self.term = Some(term);
        (self.overtaken, self.paused_until) = (0, None);
    }

    fn wake_at(&self) -> Instant {
        let far = Instant::now() + TICK;
        if self.air.len() >= FLIGHTS || self.cluster.is_frozen() {
            // What lands wakes it.
            return far;
        }
        match &self.term {
            Some(term) if term.waiting.wants_round() => {
                self.paused_until.map_or(self.next_round, |paused| paused.max(self.next_round))
            }
            Some(term) if term.waiting.has_work() => self.paused_until.unwrap_or_else(Instant::now),
            _ => far,
        }
        .min(far)
    }

    /// Takes over one batch of changes, or begins anew where some were missed.
    fn follow(&mut self, batch: Change) {
        let Some(term) = &mut self.term else { return };
        match batch {
            Ok(Some(batch)) => term.apply(&batch),
            Ok(None) => {}
            Err(SubscriptionError::Lagged | SubscriptionError::Expired) => {
                let (snapshot, changes) = self.cluster.cache.subscribe(Snapshot::of);
                term.rebuild(self.cluster.config.preemption, &snapshot, changes);
            }
        }
    }

    /// Takes over all changes that are there: decisions are made on what is known.
    fn follow_all(&mut self) {
        while let Some(change) = self.term.as_mut().and_then(|term| term.changes.next().now_or_never()) {
            let ended = matches!(change, Ok(None));
            self.follow(change);
            if ended {
                return;
            }
        }
    }

    /// Promises room to an instance that is to move.
    fn reserve(&mut self, wanted: Wanted) {
        self.follow_all();
        let Some(term) = &mut self.term else {
            // It asks again, or another server leads.
            let _ = wanted.answer.send(Reserved::Again);
            return;
        };
        let cluster = self.cluster;
        let decided =
            cluster.cache.read(|state| reserve::decide(cluster, state, &mut term.feed, &wanted.operation));
        match decided {
            Ok(decision) => {
                self.reserving.insert(decision.before.id.clone(), wanted.answer);
                self.write(vec![decision]);
            }
            Err(answer) => {
                let _ = wanted.answer.send(answer);
            }
        }
    }

    fn reserved(&mut self, number: u64, decision: &Decision, outcome: Outcome) {
        let id = &decision.before.id;
        let reserved = match outcome {
            Outcome::Committed(revision) => Reserved::Made(revision),
            // Where it may have been written it stays counted; whoever asks again learns.
            Outcome::Unknown | Outcome::Refused | Outcome::Failed => Reserved::Again,
        };
        if matches!(outcome, Outcome::Refused | Outcome::Failed)
            && let Some(term) = self.term.as_mut().filter(|term| term.number == number)
            && term.feed.let_go(id)
        {
            term.waiting.help();
        }
        if let Some(answer) = self.reserving.remove(id) {
            let _ = answer.send(reserved);
        }
    }

    fn accept(&mut self, first: Wish, queue: &mut mpsc::Receiver<Wish>) {
        self.keep(first);
        while self.backlog.len() < BACKLOG
            && let Ok(wish) = queue.try_recv()
        {
            self.keep(wish);
        }
    }

    fn keep(&mut self, wish: Wish) {
        self.taken += 1;
        self.backlog.insert((Reverse(wish.priority()), self.taken), wish);
    }

    /// Starts whatever can be started.
    fn launch(&mut self) {
        self.launch_waiting();
        while self.air.len() < FLIGHTS && self.launch_creates() {}
        self.sweep();
    }

    /// The next transaction of creates; false if there is none to start now.
    fn launch_creates(&mut self) -> bool {
        let Some((wishes, full)) = self.gather() else { return false };
        if !full && self.small >= SMALL_FLIGHTS {
            for (place, wish) in wishes {
                self.backlog.insert(place, wish);
            }
            return false;
        }
        self.small += 1;
        let bound = wishes.iter().all(|(_, wish)| wish.attempts < BOUND_ATTEMPTS);
        let mut wishes: Vec<_> = wishes.into_iter().map(|(_, wish)| wish).collect();
        for key in wishes.iter().filter_map(|wish| wish.mutation.key.clone()) {
            self.repeated.entry(key).or_default();
        }
        let mut nodes = HashMap::new();
        let frozen = self.cluster.is_frozen();
        let mut guard = None;
        let mut number = None;
        if let Some(term) = self.term.as_mut().filter(|_| bound && !frozen) {
            let strategy = self.cluster.config.strategy;
            wishes.iter_mut().for_each(|wish| seat(term, wish, strategy, &mut self.rng, &mut nodes));
            (guard, number) = (Some(term.leadership.guard()), Some(term.number));
        }
        let cluster = self.cluster.clone();
        let flight = Flight { wishes, guard, nodes };
        self.air.spawn(async move { Back::Creates { term: number, landed: cluster.fly(flight).await } });
        true
    }

    /// Calls for one transaction, and whether it is full.
    fn gather(&mut self) -> Option<(Vec<(Turn, Wish)>, bool)> {
        let mut weight = Weight::default();
        let mut chosen = Vec::new();
        let (mut keys, mut names) = (HashSet::new(), HashSet::new());
        let mut dropped = Vec::new();
        let mut full = false;
        for (place, wish) in &self.backlog {
            let key = wish.mutation.key.as_ref();
            if wish.is_abandoned() || key.is_some_and(|key| self.repeated.contains_key(key)) {
                dropped.push(*place);
                continue;
            }
            let Some(first) = wish.records.first() else { continue };
            let Some(sum) = weight.with(Weight::of(wish)) else {
                full = true;
                break;
            };
            // One transaction changes a key once: the second of a name, or of a key, is for the next.
            let alone = wish.is_set || wish.empty_set.is_some() || wish.attempts >= BOUND_ATTEMPTS;
            if alone && !chosen.is_empty() {
                continue;
            }
            let new_key = key.is_none_or(|key| keys.insert(key.clone()));
            if !new_key || !names.insert((first.project.clone(), first.name.clone())) {
                continue;
            }
            weight = sum;
            chosen.push(*place);
            if alone {
                full = true;
                break;
            }
        }
        for place in dropped {
            let Some(wish) = self.backlog.remove(&place) else { continue };
            if let Some(waiters) = wish.mutation.key.as_ref().and_then(|key| self.repeated.get_mut(key)) {
                waiters.push(wish);
            }
        }
        let wishes: Vec<_> =
            chosen.into_iter().filter_map(|place| self.backlog.remove_entry(&place)).collect();
        (!wishes.is_empty()).then_some((wishes, full))
    }

    /// Tries those that wait.
    fn launch_waiting(&mut self) {
        let now = Instant::now();
        if self.paused_until.is_some_and(|until| now < until) || self.cluster.is_frozen() {
            return;
        }
        self.paused_until = None;
        let Some(term) = &mut self.term else { return };
        if term.waiting.wants_round() {
            // Room that was made for somebody is not left to whoever comes first.
            if now < self.next_round && term.promised.is_empty() {
                return;
            }
            term.waiting.begin_round();
            self.next_round = now + ROUND_PAUSE;
        }
        let mut tries = 0;
        while self.air.len() < FLIGHTS && tries < TRIES {
            let Some(term) = &mut self.term else { return };
            let mut decisions = Vec::new();
            while decisions.len() < decision::BATCH && tries < TRIES {
                let Some(next) = term.waiting.next() else { break };
                tries += 1;
                attempt(self.cluster, term, next, &mut self.rng, &mut decisions);
            }
            if decisions.is_empty() {
                return;
            }
            self.write(decisions);
        }
    }

    fn write(&mut self, decisions: Vec<Decision>) {
        let Some(term) = &self.term else { return };
        let (cluster, leadership, number) = (self.cluster.clone(), term.leadership.clone(), term.number);
        self.air.spawn(async move {
            let (decisions, outcome, rest) = cluster.decide(&leadership, decisions).await;
            Back::Decisions { term: number, decisions, outcome, rest }
        });
    }

    fn back(&mut self, back: std::result::Result<Back, tokio::task::JoinError>) {
        match back {
            Ok(Back::Creates { term, landed }) => {
                self.small = self.small.saturating_sub(1);
                self.creates_back(term, landed);
            }
            Ok(Back::Decisions { term, decisions, outcome, rest }) => {
                self.decisions_back(term, &decisions, outcome);
                self.decisions_back(term, &rest, Outcome::Refused);
            }
            Ok(Back::Looked { term, id, is_there }) => self.looked(term, &id, is_there),
            Ok(Back::Swept) => self.sweeping = false,
            // A task of ours that panicked takes the process down: half a placer must not look healthy.
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => {}
        }
    }

    fn creates_back(&mut self, number: Option<u64>, landed: Landed) {
        let look_at = Instant::now() + DOUBT;
        for (mut wish, fate) in landed.wishes {
            if let Some(term) = self.term.as_mut().filter(|term| Some(term.number) == number) {
                for record in wish.records.iter().filter(|record| record.binding.is_some()) {
                    match landed.committed {
                        Some(revision) => term.landed(&record.id, revision),
                        None if landed.unknown => term.doubt(&record.id, look_at),
                        None => term.unseat(&record.id),
                    }
                }
            }
            match fate {
                Fate::Answered(answer) => self.answer(wish, answer),
                Fate::Again => {
                    wish.records.iter_mut().for_each(decision::unbind);
                    wish.attempts += 1;
                    self.release_key(&wish);
                    if wish.attempts < ATTEMPTS {
                        self.keep(wish);
                    } else {
                        let name = wish.records.first().map_or(String::new(), |first| first.name.clone());
                        wish.answer(Err(Error::conflict(format!("instance {name}"))));
                    }
                }
            }
        }
    }

    /// Those that repeat a call whose fate is open are calls like any other again.
    fn release_key(&mut self, wish: &Wish) {
        let waiters = wish.mutation.key.as_ref().and_then(|key| self.repeated.remove(key));
        waiters.into_iter().flatten().for_each(|waiter| self.keep(waiter));
    }

    /// Answers a call, and those that repeat it.
    fn answer(&mut self, wish: Wish, answer: Result<Done<super::Reply>>) {
        let Ok(done) = &answer else {
            self.release_key(&wish);
            wish.answer(answer);
            return;
        };
        let waiters = wish.mutation.key.as_ref().and_then(|key| self.repeated.remove(key));
        for waiter in waiters.into_iter().flatten() {
            let (a, b) = (&waiter.mutation, &wish.mutation);
            let answer = if a.method == b.method && a.digest == b.digest {
                Ok(Done { fresh: false, ..done.clone() })
            } else {
                Err(key_was_used())
            };
            waiter.answer(answer);
        }
        wish.answer(answer);
    }

    fn decisions_back(&mut self, number: u64, decisions: &[Decision], outcome: Outcome) {
        for decision in decisions.iter().filter(|decision| matches!(decision.kind, Kind::Reserve { .. })) {
            self.reserved(number, decision, outcome);
        }
        let Some(term) = self.term.as_mut().filter(|term| term.number == number) else { return };
        let look_at = Instant::now() + DOUBT;
        for decision in decisions {
            let id = &decision.before.id;
            match (outcome, &decision.kind) {
                (Outcome::Committed(revision), Kind::Bind(..)) => term.landed(id, revision),
                (Outcome::Committed(_), Kind::Tell(_) | Kind::GiveWay(_)) | (_, Kind::Reserve { .. }) => {}
                (Outcome::Unknown, Kind::Bind(..)) => term.doubt(id, look_at),
                (_, Kind::Bind(..) | Kind::Tell(_)) => {
                    term.unseat(id);
                    term.waiting.refused(&decision.before);
                }
                (_, Kind::GiveWay(_)) => {}
            }
        }
        match outcome {
            Outcome::Committed(_) => self.overtaken = 0,
            Outcome::Refused if !decisions.is_empty() => self.overtaken += 1,
            Outcome::Refused => {}
            Outcome::Failed | Outcome::Unknown => self.overtaken = OVERTAKEN_LIMIT,
        }
        if self.overtaken >= OVERTAKEN_LIMIT {
            self.overtaken = 0;
            self.paused_until = Some(Instant::now() + RETRY_PAUSE);
        }
    }

    fn looked(&mut self, number: u64, id: &InstanceId, is_there: Option<bool>) {
        let Some(term) = self.term.as_mut().filter(|term| term.number == number) else { return };
        match is_there {
            // The cache will show it.
            Some(true) => {
                term.unknown.remove(id);
            }
            Some(false) => {
                let record = self.cluster.cache.read(|state| state.instance(id).cloned());
                term.unseat(id);
                if let Some(record) = record {
                    term.waiting.refused(&record);
                }
            }
            None => term.doubt(id, Instant::now() + DOUBT),
        }
    }

    fn tick(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        self.cluster.outlook.forget_if_idle();
        let now = Instant::now();
        let Some(term) = &mut self.term else { return };
        term.promised.retain(|_, (until, _)| *until > now);
        if self.ticks.is_multiple_of(SLOW_ROUND) {
            term.waiting.help();
            let reserving = &self.reserving;
            self.idle_holds = term.feed.let_go_of_old(&self.idle_holds, |id| reserving.contains_key(id));
        }
        let due: Vec<_> =
            term.unknown.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
        for id in due.into_iter().take(FLIGHTS) {
            let Some(node) = term.assumed_node(&id).cloned() else {
                term.unknown.remove(&id);
                continue;
            };
            // Not again before this look has come back.
            term.doubt(&id, now + DOUBT);
            let (cluster, number) = (self.cluster.clone(), term.number);
            self.air.spawn(async move {
                let is_there = cluster.is_bound(&id, &node).await;
                if let Err(error) = &is_there {
                    warn!(
                        error = hv_telemetry::error_chain(error.service()),
                        "a binding's outcome is not known"
                    );
                }
                Back::Looked { term: number, id, is_there: is_there.ok() }
            });
        }
        let (every, limit, scan) = RETELL;
        if self.ticks.is_multiple_of(every) && self.air.len() < FLIGHTS {
            let told: Vec<_> = term
                .waiting
                .outdated(limit, scan)
                .into_iter()
                .map(|(record, why)| tell(&record, why, false))
                .collect();
            if !told.is_empty() {
                self.write(told);
            }
        }
    }

    /// Frees the names of sets that have no members any more.
    fn sweep(&mut self) {
        let Some(term) = self.term.as_mut().filter(|_| !self.sweeping) else { return };
        let Some((project, set)) = term.emptied.pop_first() else { return };
        let left = self.cluster.cache.read(|state| state.has_set(&project, &set));
        if !left {
            return;
        }
        self.sweeping = true;
        let (cluster, leadership) = (self.cluster.clone(), term.leadership.clone());
        self.air.spawn(async move {
            if let Err(error) = cluster.sweep_set(&leadership, &project, &set).await {
                // Its names are freed by whoever wants them, or in the next term.
                warn!(
                    set,
                    error = hv_telemetry::error_chain(error.service()),
                    "a set's names were not freed"
                );
            }
            Back::Swept
        });
    }
}

type Change = std::result::Result<Option<Arc<crate::cache::Batch>>, SubscriptionError>;

async fn next_change(term: &mut Option<Term>) -> Change {
    let Some(term) = term else { return std::future::pending().await };
    match term.changes.next().await {
        Ok(None) => std::future::pending().await,
        change => change,
    }
}

/// The next call; never ends, as the queue's other end is the cluster itself.
async fn take(queue: &mut mpsc::Receiver<Wish>) -> Wish {
    match queue.recv().await {
        Some(wish) => wish,
        None => std::future::pending().await,
    }
}
