//! The task that owns one instance: it alone changes what is remembered of it and asks its driver for changes.
//!
//! # Theory of operation
//! The worker looks at the instance, asks [`next_step`] what to do, does it, and looks again, until there is nothing to
//! do. Orders come through a bounded queue, which is served while a driver works too: a driver that hangs holds up
//! neither the sender nor the other instances.
//!
//! # Failure and recovery
//! What is to be done is in the journal before it is begun, what was done after it was: a crash in between makes the
//! next process do it again, which drivers promise to be harmless. A failure that may pass is tried again with growing
//! pauses; any other is final until something else is wanted. A removal is tried for ever.

mod call;
mod devices;
mod fetch;
mod guarded;
mod migration;
mod snapshots;
mod update;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hv_driver::{Driver, DriverError, Observed};
use hv_telemetry::crash::{Point, reach};
use hv_telemetry::error_chain;
use hv_types::instance::{StopOptions, Verdict};
use hv_types::{Epoch, ErrorCode, InstanceState, ServiceError, Wanted, instance};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::context::Context;
use crate::entry::{Entry, Order, Origin, Taken};
use crate::fencing::Gate;
use crate::instances::Instances;
use crate::plan::{At, Next, Note, Step, done, next_step, remember};
use crate::view::{Shown, View};
use crate::worker::call::{Did, after, before, request};

pub(crate) use migration::{Answered, Asked, Wish};
pub(crate) use snapshots::{Refusal, SnapshotOrder, SnapshotWish, Snapshots};

/// What a worker is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// The control plane wants this.
    /// The session is that of the registration after which it was said.
    Order(Box<Order>, u64),
    /// The control plane wants it forgotten; the epoch of the report that this answers, if it answers one.
    Release(Option<Epoch>),
    /// The control plane took a report of this epoch and generation that said that nothing is left.
    GoneKnown(Epoch, u64),
    /// Report what is seen, again or for the first time.
    Report,
    /// Something may have changed: look.
    Look,
    /// A user of this node wants this; the answer is the serial number of what is wanted then.
    Local(instance::Request, StopOptions, oneshot::Sender<Result<u64, ServiceError>>),
    /// Something is to be done with its snapshots.
    Snapshot(Box<SnapshotOrder>),
    /// It is to be handed over, or to be taken.
    Migration(Box<migration::Asked>),
}

/// How a driver call ended.
enum Called<T> {
    Done(Result<T, DriverError>),
    /// Something else is wanted by now that cannot wait, or the node's lease has ended.
    Overtaken,
}

/// The owner of one instance.
pub(crate) struct Worker {
    context: Arc<Context>,
    instances: Arc<Instances>,
    commands: mpsc::Receiver<Command>,
    view: watch::Sender<Arc<View>>,
    stopping: CancellationToken,
    entry: Entry,
    driver: Option<Arc<dyn Driver>>,
    seen: Option<Observed>,
    recovered: bool,
    look: bool,
    next_look: Instant,
    unsaved: bool,
    failures: u32,
    not_before: Option<Instant>,
    trouble: Option<String>,
    last_done: Option<(Step, u64)>,
    reported: Option<hv_proto::v1::InstanceReport>,
    is_orphan: bool,
    /// Whether what may run elsewhere may start.
    gate: watch::Receiver<Gate>,
    /// The session in which the control plane last named it as bound here.
    named: u64,
    /// What is to be done about a migration, once nothing else is.
    asked: Option<migration::Asked>,
    /// The image of what another node is about to hand over, while it is fetched.
    incoming_fetch: Option<fetch::IncomingFetch>,
    /// What is to be done with its snapshots, once nothing else is.
    snapshot_orders: VecDeque<SnapshotOrder>,
}

impl Worker {
    /// The worker of an entry; `unsaved`: which the journal does not have yet.
    pub(crate) fn new(
        instances: Arc<Instances>,
        entry: Entry,
        commands: mpsc::Receiver<Command>,
        view: watch::Sender<Arc<View>>,
        stopping: CancellationToken,
        unsaved: bool,
        named: u64,
    ) -> Self {
        let context = Arc::clone(instances.context());
        let gate = context.guard.gate();
        Self {
            context,
            instances,
            commands,
            view,
            stopping,
            entry,
            driver: None,
            seen: None,
            recovered: false,
            look: true,
            next_look: Instant::now(),
            unsaved,
            failures: 0,
            not_before: None,
            trouble: None,
            last_done: None,
            reported: None,
            is_orphan: false,
            gate,
            named,
            asked: None,
            incoming_fetch: None,
            snapshot_orders: VecDeque::new(),
        }
    }

    /// Works until the instance is forgotten or the agent stops.
    pub(crate) async fn run(mut self) {
        if self.unsaved && self.entry.origin == Origin::Assigned {
            reach(Point::AgentAssignmentBeforeJournal);
            self.save().await;
            reach(Point::AgentAssignmentAfterJournal);
        }
        while !self.stopping.is_cancelled() {
            if self.entry.gone && self.entry.config.devices.is_some() {
                self.return_devices().await;
            }
            if self.entry.is_over() && self.end().await {
                return;
            }
            let is_early = self.not_before.is_some_and(|at| Instant::now() < at);
            if is_early || !self.save().await {
                self.wait().await;
                continue;
            }
            if !self.find_driver().await {
                if !self.unsaved {
                    self.wait().await;
                }
                continue;
            }
            if self.look && !self.entry.gone {
                self.look_now().await;
                continue;
            }
            if let Some(order) = self.snapshot_orders.pop_front() {
                self.do_snapshot_order(order).await;
                continue;
            }
            if let Some(asked) = self.asked.take() {
                self.serve(asked).await;
                continue;
            }
            self.go_on().await;
        }
    }

    async fn go_on(&mut self) {
        let seen = self.seen.clone().unwrap_or(Observed::Absent);
        let context = Arc::clone(&self.context);
        let now = At { boot_id: &context.boot_id, at: context.guard.now() };
        match next_step(&self.entry, &seen, &now) {
            Next::Do(step) => {
                if self.may_do(step, &seen).await {
                    self.perform(step, &seen).await;
                }
            }
            Next::Note(note) => {
                if matches!(note, Note::Gone) {
                    // Before it is said: whoever hears that it is gone may remove its image.
                    self.context.images.release(self.entry.id()).await;
                }
                remember(&mut self.entry, note, &seen, &now);
                self.unsaved = true;
            }
            Next::Later(state, reason, at) => {
                self.publish(state, &reason);
                self.next_look = self.next_look.min(Instant::now() + at.since(now.at));
                self.wait().await;
            }
            Next::Fail(reason) => {
                self.entry.fail(reason.into());
                self.unsaved = true;
            }
            Next::Rest(state, reason) => {
                if let Observed::Stopped(exit) = &seen
                    && self.entry.last_exit.as_ref() != Some(exit)
                {
                    self.entry.last_exit = Some(exit.clone());
                    self.unsaved = self.entry.origin != Origin::Found;
                    return;
                }
                self.publish(state, &reason);
                self.wait().await;
            }
        }
    }

    /// Saves what is not saved yet. False: it could not be, and nothing may be done.
    async fn save(&mut self) -> bool {
        if !self.unsaved || self.entry.origin == Origin::Found {
            return true;
        }
        if !self.entry.pending {
            reach(Point::AgentJournalBeforeFinish);
        }
        match self.context.save(self.entry.clone()).await {
            Ok(()) => {
                self.unsaved = false;
                true
            }
            Err(error) => {
                let why = error_chain(&error);
                tracing::error!(instance = %self.entry.id(), error = why, "the journal cannot be written");
                self.pause_work(&format!("the node's journal cannot be written: {why}"));
                false
            }
        }
    }

    async fn find_driver(&mut self) -> bool {
        if self.driver.is_some() {
            return true;
        }
        let entry = &mut self.entry;
        self.driver = match &entry.driver {
            Some(name) => self.context.drivers.named(name),
            None if !entry.config.spec.devices.is_empty() => {
                let drivers = &self.context.drivers;
                drivers.for_devices(entry.instance_type).or_else(|| drivers.for_type(entry.instance_type))
            }
            None => {
                let (drivers, deadline) = (&self.context.drivers, self.context.tuning.look_deadline);
                let spec = &entry.config.spec;
                match &spec.clone_of {
                    Some(from) => drivers.for_clone(entry.instance_type, &from.instance, deadline).await,
                    None => drivers.for_instance(entry.instance_type, &spec.image, deadline).await,
                }
            }
        };
        if let Some(driver) = &self.driver {
            entry.driver = Some(driver.name().to_owned());
            return true;
        }
        if entry.gone {
            return true;
        }
        if entry.driver.is_none() && entry.wanted == Wanted::Deleted {
            let now = At { boot_id: &self.context.boot_id, at: self.context.guard.now() };
            remember(entry, Note::Gone, &Observed::Absent, &now);
            self.unsaved = true;
            return true;
        }
        let reason = match &entry.driver {
            Some(name) => {
                format!("this node has no driver {name} any more; set drivers.{name}.enabled on it")
            }
            None => format!("this node has no driver for the type {}", entry.instance_type),
        };
        if entry.pending && entry.wanted != Wanted::Deleted {
            entry.fail(reason);
            self.unsaved = true;
            return false;
        }
        let state =
            if entry.wanted == Wanted::Deleted { InstanceState::Deleting } else { InstanceState::Failed };
        self.publish(state, &reason);
        false
    }

    async fn look_now(&mut self) {
        let Some(driver) = self.driver.clone() else { return };
        let (id, handle, recovered) = (self.entry.id().clone(), self.entry.handle.clone(), self.recovered);
        let call = Box::pin(async move {
            if recovered { driver.observe(&id).await } else { driver.recover(&id, handle.as_ref()).await }
        });
        match self.call(call, self.context.tuning.look_deadline, "look", None, |_| false).await {
            Called::Done(Ok(seen)) => {
                if !matches!(seen, Observed::Running(_)) || self.seen.is_none() {
                    tracing::debug!(instance = %self.entry.id(), ?seen, "looked");
                }
                let seen = self.judge(seen);
                self.see_to_guard(&seen).await;
                self.seen = Some(seen);
                self.recovered = true;
                self.look = false;
                self.next_look = Instant::now() + self.context.tuning.look_every;
            }
            Called::Done(Err(error)) => {
                let why = error_chain(&error);
                tracing::warn!(instance = %self.entry.id(), error = why, "the instance cannot be looked at");
                self.pause_work(&format!("it cannot be looked at: {why}"));
            }
            Called::Overtaken => {}
        }
    }

    /// Waits before going on, and says why. What was shown before stays.
    fn pause_work(&mut self, why: &str) {
        self.failures = self.failures.saturating_add(1);
        let pause = self.backoff().nth(self.failures);
        self.not_before = Some(Instant::now() + pause);
        let state = match self.seen {
            Some(_) => self.view.borrow().record.state,
            None if self.entry.created => InstanceState::Unknown,
            None => InstanceState::Creating,
        };
        self.publish(state, why);
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(self.context.tuning.retry_base, self.context.tuning.retry_max)
    }

    async fn perform(&mut self, step: Step, seen: &Observed) {
        let Some(driver) = self.driver.clone() else { return };
        let serial = self.entry.serial;
        let trouble = self.trouble.clone().unwrap_or_default();
        self.publish(step.state(seen), &trouble);
        let guest_time = Duration::from_secs(u64::from(self.entry.stop.timeout_seconds));
        let deadline = self.context.tuning.deadline(step, guest_time);
        if let Some(point) = before(step) {
            reach(point);
        }
        tracing::info!(instance = %self.entry.id(), name = self.entry.config.name, step = step.name(), "working");
        if matches!(step, Step::Create | Step::Update) && !self.provide_images(&driver, step, serial).await {
            return;
        }
        if matches!(step, Step::Create | Step::Start) && !self.provide_devices(&driver, step, serial).await {
            return;
        }
        let session = self.session_of(step);
        if session.is_some() && !self.announce(step, seen, &driver).await {
            return;
        }
        if step == Step::Create && *seen == Observed::Absent {
            self.entry.forget_updates();
        }
        let call = request(driver, step, &self.entry);
        // A guest that takes its time to stop must not keep the plug from being pulled.
        let is_overtaking = move |entry: &Entry| match step {
            Step::Stop => entry.stop.force || entry.wanted == Wanted::Deleted,
            Step::Update => entry.wanted == Wanted::Deleted,
            Step::Create | Step::Start | Step::Pause | Step::Resume | Step::Delete | Step::TakeBack => false,
        };
        let was_forced = is_overtaking(&self.entry);
        let called = self
            .call(call, deadline, step.name(), session, |entry| !was_forced && is_overtaking(entry))
            .await;
        if session.is_some() {
            self.context.guard.settled(self.entry.id()).await;
        }
        if let Some(point) = after(step) {
            reach(point);
        }
        self.look = true;
        let outcome = match called {
            Called::Overtaken => "overtaken",
            Called::Done(Ok(Did::Update(told, note))) => {
                self.entry.updated(*told, note, !matches!(seen, Observed::Stopped(_)));
                (self.unsaved, self.failures, self.trouble) = (true, 0, None);
                self.last_done = Some((step, serial));
                "ok"
            }
            Called::Done(Ok(Did::Step(handle))) => {
                let now = At { boot_id: &self.context.boot_id, at: self.context.guard.now() };
                done(&mut self.entry, step, serial, handle, &now);
                if step == Step::Start {
                    self.context.guard.note_fenced(self.entry.id());
                }
                self.unsaved = true;
                if self.last_done.replace((step, serial)) == Some((step, serial)) {
                    let error = DriverError::failed(
                        self.entry.id(),
                        step.name(),
                        "the driver did it, and nothing changed",
                    );
                    self.setback(step, serial, &error);
                    "without_effect"
                } else {
                    self.failures = 0;
                    self.trouble = None;
                    "ok"
                }
            }
            Called::Done(Err(error)) => {
                self.setback(step, serial, &error);
                "failed"
            }
        };
        metrics::counter!("hypervisor_agent_driver_calls_total", "operation" => step.name(), "outcome" => outcome)
            .increment(1);
    }

    fn setback(&mut self, step: Step, serial: u64, error: &DriverError) {
        let why = error_chain(error);
        if self.entry.serial != serial {
            // Something else is wanted by now; whether that works is another question.
            return;
        }
        let attempts = self.context.tuning.attempts;
        self.failures = self.failures.saturating_add(1);
        if step == Step::Update && self.refused_update(error) {
            return;
        }
        let is_for_ever = matches!(step, Step::Delete | Step::TakeBack);
        // A state that does not allow it may have changed in between: look, then plan again.
        let may_pass =
            error.retryable() || matches!(error, DriverError::WrongState { .. } | DriverError::NotFound(_));
        tracing::warn!(instance = %self.entry.id(), step = step.name(), attempt = self.failures, error = why, "failed");
        if !is_for_ever && (!may_pass || self.failures >= attempts) {
            let tries = if may_pass { format!(" after {attempts} attempts") } else { String::new() };
            self.entry.fail(format!("{} failed{tries}: {why}", step.doing()));
            self.unsaved = true;
            self.failures = 0;
            self.trouble = None;
            return;
        }
        let pause = self.backoff().nth(self.failures);
        let of = if is_for_ever { String::new() } else { format!(" of {attempts}") };
        let number = self.failures;
        let seconds = pause.as_secs_f64().ceil();
        let text =
            format!("{} failed (attempt {number}{of}): {why}; next attempt in {seconds} s", step.doing());
        self.not_before = Some(Instant::now() + pause);
        let state = self.view.borrow().record.state;
        self.publish(state, &text);
        self.trouble = Some(format!("{} failed {number} times, trying again: {why}", step.doing()));
    }

    /// Asks a driver, serving orders meanwhile.
    async fn call<T: Send>(
        &mut self,
        mut call: BoxFuture<'static, Result<T, DriverError>>,
        deadline: Duration,
        operation: &'static str,
        session: Option<u64>,
        is_overtaken: impl Fn(&Entry) -> bool,
    ) -> Called<T> {
        let timeout = tokio::time::sleep(deadline);
        let lapse = guarded::lapse(self.gate.clone(), session);
        tokio::pin!(timeout, lapse);
        loop {
            tokio::select! {
                biased;
                result = &mut call => return Called::Done(result),
                () = &mut timeout => {
                    let timeout_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
                    let id = self.entry.id().clone();
                    return Called::Done(Err(DriverError::Timeout { id, operation, timeout_ms }));
                }
                () = &mut lapse => return Called::Overtaken,
                Some(command) = self.commands.recv() => {
                    self.obey(command).await;
                    if is_overtaken(&self.entry) {
                        return Called::Overtaken;
                    }
                }
            }
        }
    }

    /// Waits for something to do.
    async fn wait(&mut self) {
        let next_look = if self.entry.gone { None } else { Some(self.next_look) };
        let at = self.not_before.or(next_look);
        let timer = async move {
            match at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let stopping = self.stopping.clone();
        tokio::select! {
            command = self.commands.recv() => match command {
                Some(command) => self.obey(command).await,
                None => stopping.cancelled().await,
            },
            () = timer => {
                self.not_before = None;
                self.look = true;
                self.next_look = Instant::now() + self.context.tuning.look_every;
            }
            Ok(()) = self.gate.changed() => self.look |= self.entry.fence,
            () = stopping.cancelled() => {}
        }
    }

    async fn obey(&mut self, command: Command) {
        let serial = self.entry.serial;
        match command {
            Command::Order(order, session) => {
                reach(Point::AgentAssignmentBeforeJournal);
                if order.epoch >= self.entry.epoch {
                    self.named = session;
                }
                match self.entry.order(*order) {
                    Taken::Newer => self.changed().await,
                    Taken::Known => self.report(true),
                    Taken::Policies => {
                        self.unsaved = true;
                        self.look = true;
                        self.report(true);
                    }
                }
                reach(Point::AgentAssignmentAfterJournal);
            }
            Command::Release(epoch) => {
                if self.entry.release(epoch) == Taken::Newer {
                    tracing::info!(instance = %self.entry.id(), "released by the control plane, removing it");
                    self.changed().await;
                }
            }
            Command::GoneKnown(epoch, generation) => {
                if self.entry.gone && (self.entry.epoch, self.entry.generation) == (epoch, generation) {
                    self.entry.released = true;
                }
            }
            Command::Report => {
                self.is_orphan = true;
                self.report(true);
            }
            Command::Look => self.look = true,
            Command::Snapshot(order) => self.take_snapshot_order(*order),
            Command::Migration(asked) => self.take_asked(*asked).await,
            Command::Local(request, stop, answer) => {
                let result = self.local(request, stop);
                if self.entry.serial != serial {
                    self.changed().await;
                }
                // A caller who went away needs no answer.
                let _ = answer.send(result.map(|()| self.entry.serial));
            }
        }
    }

    /// Something else is wanted: remember it, and begin afresh.
    async fn changed(&mut self) {
        self.unsaved = true;
        self.failures = 0;
        self.not_before = None;
        self.trouble = None;
        self.look = true;
        self.driver = None;
        // A failure shows in the next round, which does nothing before the entry is saved.
        self.save().await;
        let shown = self.view.borrow().record.state;
        self.show(shown, "", false);
    }

    fn local(&mut self, request: instance::Request, stop: StopOptions) -> Result<(), ServiceError> {
        migration::refuse_local(&self.entry)?;
        let entry = &mut self.entry;
        if entry.origin == Origin::Found {
            return Err(ServiceError::precondition(format!(
                "instance {} was found on the node without a record; it is only shown",
                entry.id()
            )));
        }
        if request == instance::Request::Delete && entry.origin == Origin::Assigned {
            return Err(ServiceError::precondition(format!(
                "instance {} was assigned by the control plane; delete it there: hypervisor-ctl instance delete {}",
                entry.id(),
                entry.id()
            )));
        }
        let state = self.view.borrow().record.state;
        match instance::decide(request, entry.wanted, state) {
            Verdict::Already => {}
            Verdict::Refused(why) => {
                let text = format!("instance {} cannot {}: {why}", entry.id(), request.name());
                return Err(ServiceError::new(ErrorCode::FailedPrecondition, text));
            }
            Verdict::Change(wanted) => {
                entry.stop = stop;
                if request == instance::Request::Restart {
                    entry.want_restart();
                } else {
                    entry.want(wanted);
                }
            }
        }
        Ok(())
    }

    /// Forgets the instance. False: there is more to do.
    async fn end(&mut self) -> bool {
        let id = self.entry.id().clone();
        if let Err(error) = self.context.forget(id.clone()).await {
            self.pause_work(&format!("the node's journal cannot be written: {}", error_chain(&error)));
            self.wait().await;
            return false;
        }
        self.context.reports.withdraw(&id);
        self.context.guard.forget(&id).await;
        self.context.guard.note_fenced(&id);
        self.context.images.release(&id).await;
        self.context.devices.release(&id);
        if self.instances.retire(&id, &self.commands) {
            self.show(InstanceState::Deleting, "removed from its node", true);
            tracing::info!(instance = %id, "nothing is left of it, forgotten");
            return true;
        }
        // An order came in between; it may make the entry live again.
        if let Ok(command) = self.commands.try_recv() {
            self.obey(command).await;
        }
        false
    }

    fn publish(&mut self, state: InstanceState, reason: &str) {
        self.show(state, reason, false);
        self.report(false);
    }

    fn show(&self, state: InstanceState, reason: &str, is_over: bool) {
        let shown = Shown { state, reason, seen: self.seen.as_ref(), is_over };
        let view = View::of(&self.entry, &shown, &self.context.node_id);
        self.view.send_if_modified(|old| {
            let differs = **old != view;
            if differs {
                *old = Arc::new(view);
            }
            differs
        });
    }

    /// Hands what is shown to the reporter, if it changed or must be said again.
    fn report(&mut self, again: bool) {
        let is_reported = match self.entry.origin {
            Origin::Assigned => !self.entry.released,
            Origin::Found | Origin::Incoming => self.is_orphan && !self.entry.released,
            Origin::Local => false,
        };
        if !is_reported {
            return;
        }
        if again && self.seen.is_none() && !self.entry.gone {
            // Nothing is known yet; what is seen first will be reported.
            self.reported = None;
            return;
        }
        let report = self.view.borrow().report(&self.entry);
        if again || self.reported.as_ref() != Some(&report) {
            self.context.reports.submit(self.entry.id().clone(), report.clone());
            self.reported = Some(report);
        }
    }
}
