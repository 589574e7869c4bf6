//! The plan, held against a model of a driver.

use hv_driver::{InstanceConfig, Running};
use hv_types::instance::StopOptions;
use hv_types::{Epoch, InstanceType};
use proptest::prelude::*;

use super::*;
use crate::entry::Order;

const BOOT: &str = "boot-1";
const NOW: At<'static> = At { boot_id: BOOT, at: Moment(1_000_000_000_000) };

fn order(generation: u64, wanted: Wanted, restart_generation: u64) -> Order {
    let id = "i-1".parse().unwrap();
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
        epoch: Epoch(1),
        generation,
        wanted,
        restart_generation,
        stop: StopOptions::default(),
        fence: false,
        restart_policy: RestartPolicy::Never,
        migration: None,
    }
}

fn entry(wanted: Wanted) -> Entry {
    Entry { boot_id: BOOT.into(), ..Entry::assigned(order(1, wanted, 0)) }
}

fn running() -> Observed {
    Observed::Running(Running::default())
}

fn paused() -> Observed {
    Observed::Paused(Running::default())
}

fn stopped() -> Observed {
    Observed::Stopped(Exit::Stopped)
}

#[test]
fn what_is_wanted_is_pursued_step_by_step() {
    use Observed::Absent;
    let created = |wanted| Entry { created: true, ..entry(wanted) };
    let restarting = Entry { restart_pending: true, ..created(Wanted::Running) };
    let discarding = Entry { discard: true, ..created(Wanted::Running) };
    let half = Observed::Stopped(Exit::NeverStarted);
    let finished = Next::Note(Note::Finished);
    for (entry, seen, expected) in [
        (entry(Wanted::Running), Absent, Next::Do(Step::Create)),
        (entry(Wanted::Running), half.clone(), Next::Do(Step::Create)),
        (created(Wanted::Running), half.clone(), Next::Do(Step::Start)),
        (created(Wanted::Running), stopped(), Next::Do(Step::Start)),
        (created(Wanted::Running), paused(), Next::Do(Step::Resume)),
        (created(Wanted::Running), running(), finished.clone()),
        (restarting.clone(), running(), Next::Do(Step::Stop)),
        (restarting.clone(), paused(), Next::Do(Step::Stop)),
        (restarting, stopped(), Next::Note(Note::Restarted)),
        (created(Wanted::Stopped), running(), Next::Do(Step::Stop)),
        (created(Wanted::Stopped), stopped(), finished.clone()),
        (entry(Wanted::Stopped), Absent, Next::Do(Step::Create)),
        (created(Wanted::Paused), running(), Next::Do(Step::Pause)),
        (created(Wanted::Paused), paused(), finished.clone()),
        (created(Wanted::Paused), stopped(), finished),
        (created(Wanted::Deleted), running(), Next::Do(Step::Delete)),
        (created(Wanted::Deleted), Absent, Next::Note(Note::Gone)),
        (entry(Wanted::Deleted), half, Next::Do(Step::Delete)),
        (discarding.clone(), running(), Next::Do(Step::Delete)),
        (discarding, Absent, Next::Note(Note::Discarded)),
    ] {
        assert_eq!(next_step(&entry, &seen, &NOW), expected, "{:?} {seen:?}", entry.wanted);
    }
}

#[test]
fn disks_that_vanished_are_not_replaced_in_silence() {
    let entry = Entry { created: true, ..entry(Wanted::Running) };
    assert!(matches!(next_step(&entry, &Observed::Absent, &NOW), Next::Fail(_)));
}

fn settled(exit: Exit, boot_id: &str) -> Next {
    let mut entry = Entry { created: true, ..entry(Wanted::Running) };
    entry.finish();
    next_step(&entry, &Observed::Stopped(exit), &At { boot_id, ..NOW })
}

#[test]
fn an_instance_that_ended_by_itself_is_shown_and_not_started() {
    let state = |next| match next {
        Next::Rest(state, reason) => (state, reason),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        state(settled(Exit::Finished, BOOT)),
        (InstanceState::Stopped, "the guest powered off".into())
    );
    assert_eq!(state(settled(Exit::Failed("boom".into()), BOOT)), (InstanceState::Failed, "boom".into()));
    assert_eq!(state(settled(Exit::Lost, BOOT)).0, InstanceState::Failed);
    assert_eq!(state(settled(Exit::Finished, "boot-2")).0, InstanceState::Stopped);
}

#[test]
fn after_a_boot_of_the_node_what_ran_runs_again() {
    assert_eq!(settled(Exit::Lost, "boot-2"), Next::Note(Note::Revive));
    let mut known = Entry { created: true, last_exit: Some(Exit::Lost), ..entry(Wanted::Running) };
    known.finish();
    let next = next_step(&known, &Observed::Stopped(Exit::Lost), &At { boot_id: "boot-2", ..NOW });
    assert!(matches!(next, Next::Rest(InstanceState::Failed, _)), "it was lost before the boot: {next:?}");
}

#[test]
fn what_was_found_is_left_alone_whatever_it_does() {
    let found = Entry::found("i-1".parse().unwrap(), InstanceType::Vm, "fake");
    for seen in [Observed::Absent, running(), paused(), Observed::Stopped(Exit::Lost), stopped()] {
        assert!(
            matches!(next_step(&found, &seen, &At { boot_id: "boot-9", ..NOW }), Next::Rest(..)),
            "{seen:?}"
        );
    }
}

/// A driver as its contract says, that checks what it is asked.
struct Model {
    seen: Observed,
    complete: bool,
    starts: u32,
}

impl Model {
    fn apply(&mut self, step: Step) -> Result<(), String> {
        let bad = format!("{step:?} of {:?}", self.seen);
        self.seen = match (step, &self.seen) {
            (Step::Create, Observed::Absent) => Observed::Stopped(Exit::NeverStarted),
            // A crash made the journal forget that it is there.
            (Step::Create, Observed::Stopped(exit)) => Observed::Stopped(exit.clone()),
            (Step::Start, Observed::Stopped(_)) if self.complete => running(),
            (Step::Stop, Observed::Running(_) | Observed::Paused(_)) => stopped(),
            (Step::Pause, Observed::Running(_)) => paused(),
            (Step::Resume, Observed::Paused(_)) => running(),
            (Step::Delete, Observed::Stopped(_) | Observed::Running(_) | Observed::Paused(_)) => {
                Observed::Absent
            }
            _ => return Err(bad),
        };
        self.complete = self.seen != Observed::Absent;
        self.starts += u32::from(step == Step::Start);
        Ok(())
    }
}

/// Works until there is nothing to do; `crash_after` steps the journal forgets the step that was just done.
fn settle(
    entry: &mut Entry,
    model: &mut Model,
    mut crash_after: Option<u32>,
) -> Result<InstanceState, String> {
    const MOST_STEPS: u32 = 16;
    for _ in 0..MOST_STEPS {
        match next_step(entry, &model.seen, &NOW) {
            Next::Rest(state, _) | Next::Later(state, ..) => return Ok(state),
            Next::Fail(reason) => return Err(reason.into()),
            Next::Note(note) => remember(entry, note, &model.seen, &NOW),
            Next::Do(step) => {
                model.apply(step)?;
                let is_crash = crash_after == Some(0);
                crash_after = crash_after.and_then(|left| left.checked_sub(1));
                if !is_crash {
                    done(entry, step, entry.serial, None, &NOW);
                }
            }
        }
    }
    Err(format!("no end: {entry:?} {:?}", model.seen))
}

fn wish() -> impl Strategy<Value = Wanted> {
    prop_oneof![Just(Wanted::Running), Just(Wanted::Stopped), Just(Wanted::Paused)]
}

proptest! {
    #[test]
    fn any_sequence_of_orders_converges_through_crashes(
        orders in prop::collection::vec((wish(), any::<bool>(), prop::option::of(0u32..4)), 1..8),
    ) {
        let mut model = Model { seen: Observed::Absent, complete: false, starts: 0 };
        let mut entry: Option<Entry> = None;
        for (index, (wanted, restart, crash)) in orders.into_iter().enumerate() {
            let generation = index as u64 + 1;
            let restart = restart && wanted == Wanted::Running;
            let next = order(generation, wanted, if restart { generation } else { 0 });
            let entry = match &mut entry {
                Some(entry) => { entry.order(next); entry }
                None => entry.insert(Entry::assigned(next)),
            };
            let starts = model.starts;
            let state = settle(entry, &mut model, crash).map_err(TestCaseError::fail)?;
            let expected = match wanted {
                Wanted::Running => InstanceState::Running,
                Wanted::Paused if matches!(model.seen, Observed::Paused(_)) => InstanceState::Paused,
                Wanted::Stopped | Wanted::Paused | Wanted::Deleted => InstanceState::Stopped,
            };
            prop_assert_eq!(state, expected);
            prop_assert_eq!(entry.observed_generation, generation);
            prop_assert!(model.starts - starts <= 1, "started {} times for one order", model.starts - starts);
        }
        let mut entry = entry.unwrap();
        entry.order(order(99, Wanted::Deleted, 0));
        settle(&mut entry, &mut model, None).map_err(TestCaseError::fail)?;
        prop_assert!(entry.gone && model.seen == Observed::Absent);
    }
}

fn ended(policy: RestartPolicy) -> Entry {
    let mut entry = Entry { created: true, restart_policy: policy, ..entry(Wanted::Running) };
    entry.finish();
    entry
}

#[test]
fn what_ends_by_itself_is_started_again_as_its_policy_says() {
    use RestartPolicy::{Always, Never, OnFailure};
    let failed = Exit::Failed("exit code 3".into());
    for (policy, exit, expected) in [
        (Never, failed.clone(), false),
        (OnFailure, failed.clone(), true),
        (Always, failed, true),
        (Never, Exit::Finished, false),
        (OnFailure, Exit::Finished, false),
        (Always, Exit::Finished, true),
        (OnFailure, Exit::Lost, true),
        (Always, Exit::Stopped, false),
        (Always, Exit::NeverStarted, false),
    ] {
        let next = next_step(&ended(policy), &Observed::Stopped(exit.clone()), &NOW);
        assert_eq!(next == Next::Note(Note::Planned), expected, "{policy:?} {exit:?}: {next:?}");
    }
}

#[test]
fn what_was_fenced_is_started_again_whatever_its_policy() {
    let mut entry = ended(RestartPolicy::Never);
    let seen = Observed::Stopped(Exit::Fenced);
    assert_eq!(next_step(&entry, &seen, &NOW), Next::Note(Note::Again));
    remember(&mut entry, Note::Again, &seen, &NOW);
    assert_eq!(next_step(&entry, &seen, &NOW), Next::Do(Step::Start));
    assert_eq!(entry.restarts.count, 1);
    let stopped = Entry { wanted: Wanted::Stopped, ..ended(RestartPolicy::Always) };
    assert!(matches!(next_step(&stopped, &seen, &NOW), Next::Rest(InstanceState::Stopped, _)));
}

#[test]
fn pauses_between_starts_double_and_begin_anew_after_a_long_run() {
    let mut entry = ended(RestartPolicy::OnFailure);
    let seen = Observed::Stopped(Exit::Failed("exit code 3".into()));
    let mut now = NOW;
    let mut pauses = Vec::new();
    for round in 1..=11 {
        assert_eq!(next_step(&entry, &seen, &now), Next::Note(Note::Planned));
        remember(&mut entry, Note::Planned, &seen, &now);
        let Next::Later(InstanceState::Failed, reason, due) = next_step(&entry, &seen, &now) else {
            panic!("it does not wait")
        };
        if round == 4 {
            assert_eq!(reason, "failed with exit code 3; started again after 8 s (4th time)");
        }
        pauses.push(due.since(now.at).as_secs());
        now.at = due;
        assert_eq!(next_step(&entry, &seen, &now), Next::Note(Note::Again));
        remember(&mut entry, Note::Again, &seen, &now);
        let serial = entry.serial;
        done(&mut entry, Step::Start, serial, None, &now);
        assert_eq!(entry.restarts.count, round);
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    now.at = now.at.after(RESTART_RESET);
    remember(&mut entry, Note::Planned, &seen, &now);
    assert_eq!(now.of_this_boot(entry.restarts.due.as_ref()), Some(now.at.after(RESTART_BASE)));
}

#[test]
fn a_pause_outlives_the_agent_but_not_the_boot() {
    let mut entry = ended(RestartPolicy::Always);
    let seen = Observed::Stopped(Exit::Finished);
    remember(&mut entry, Note::Planned, &seen, &NOW);
    let text = serde_json::to_vec(&entry).unwrap();
    let read: Entry = serde_json::from_slice(&text).unwrap();
    assert!(matches!(next_step(&read, &seen, &NOW), Next::Later(InstanceState::Stopped, ..)));
    let booted = At { boot_id: "boot-2", at: Moment(1) };
    assert_eq!(next_step(&read, &seen, &booted), Next::Note(Note::Planned));
}

#[test]
fn ordinals_are_spelled_as_people_do() {
    let spelled: Vec<_> = [1, 2, 3, 4, 11, 12, 13, 21, 102, 113].map(ordinal).into();
    assert_eq!(spelled, ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "113th"]);
}

const M: &str = "0190-m";

fn outgoing(aborting: bool) -> Entry {
    let outgoing = Some(Outgoing { migration: M.into(), aborting });
    Entry { created: true, pending: false, outgoing, ..entry(Wanted::Running) }
}

#[test]
fn what_is_being_handed_over_never_starts_again_unless_it_was_aborted() {
    let policies = [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];
    let ends = [
        Exit::Finished,
        Exit::Lost,
        Exit::Fenced,
        Exit::Stopped,
        Exit::Failed("x".into()),
        Exit::NeverStarted,
    ];
    let ended = ends.into_iter().map(Observed::Stopped).chain([Observed::Absent]);
    for seen in ended.chain([Observed::HandedOver, running(), paused()]) {
        for restart_policy in policies {
            for boot_id in [BOOT, "an earlier boot"] {
                let entry = Entry { restart_policy, boot_id: boot_id.into(), ..outgoing(false) };
                let next = next_step(&entry, &seen, &NOW);
                assert!(matches!(next, Next::Rest(..)), "{seen:?} {restart_policy:?}: {next:?}");
            }
        }
    }
    for seen in [Observed::HandedOver, running(), paused()] {
        assert_eq!(next_step(&outgoing(true), &seen, &NOW), Next::Do(Step::TakeBack));
    }
    for seen in [stopped(), Observed::Absent] {
        assert_eq!(next_step(&outgoing(true), &seen, &NOW), Next::Note(Note::TakenBack));
    }
    // Once it was taken back, it is an instance like any other.
    let mut entry = Entry { restart_policy: RestartPolicy::Always, ..outgoing(true) };
    remember(&mut entry, Note::TakenBack, &stopped(), &NOW);
    assert_eq!(entry.outgoing, None);
    let failed = Observed::Stopped(Exit::Failed("x".into()));
    assert_eq!(next_step(&entry, &failed, &NOW), Next::Note(Note::Planned));
    // A removal waits for nobody.
    let deleted = Entry { wanted: Wanted::Deleted, pending: true, ..outgoing(false) };
    assert_eq!(next_step(&deleted, &Observed::HandedOver, &NOW), Next::Do(Step::Delete));
}

fn incoming() -> Entry {
    Entry::incoming(order(3, Wanted::Running, 0), M.into(), "fake")
}

#[test]
fn what_waits_goes_on_only_by_the_binding_of_its_own_migration() {
    for seen in [paused(), running(), stopped(), Observed::Absent] {
        assert!(matches!(next_step(&incoming(), &seen, &NOW), Next::Rest(..)), "{seen:?}");
    }
    let bound = |migration: Option<&str>| {
        let order =
            Order { epoch: Epoch(2), migration: migration.map(Into::into), ..order(3, Wanted::Running, 0) };
        let mut entry = incoming();
        entry.order(order);
        entry
    };
    let its = bound(Some(M));
    assert_eq!(next_step(&its, &paused(), &NOW), Next::Do(Step::Resume));
    // Lost in between: it is never made anew, as its disks would be empty.
    assert!(matches!(next_step(&its, &Observed::Absent, &NOW), Next::Fail(_)));
    for other in [bound(None), bound(Some("another"))] {
        assert_eq!(next_step(&other, &paused(), &NOW), Next::Do(Step::Delete));
    }
    // A journal that was lost with what waits: the same.
    let order = Order { epoch: Epoch(2), migration: Some(M.into()), ..order(3, Wanted::Running, 0) };
    assert!(matches!(next_step(&Entry::assigned(order), &Observed::Absent, &NOW), Next::Fail(_)));
    // The binding that is about to end is not its own.
    let mut waits = incoming();
    waits.order(super::tests::order(9, Wanted::Running, 0));
    assert_eq!(waits.origin, Origin::Incoming);
}

#[test]
fn an_aborted_migration_stays_aborted_and_a_later_one_is_another() {
    let mut entry = outgoing(false);
    entry.abort_migration("another");
    assert!(entry.has_ended("another") && !entry.outgoing.as_ref().unwrap().aborting);
    entry.abort_migration(M);
    assert!(entry.outgoing.as_ref().unwrap().aborting);
    for n in 0..20 {
        entry.abort_migration(&format!("m{n}"));
    }
    assert!(entry.has_ended("m19") && entry.ended_migrations.len() < 10);
}

#[test]
fn what_was_about_to_be_handed_over_is_no_part_of_a_later_life() {
    let mut entry = outgoing(false);
    entry.order(Order { epoch: Epoch(2), ..order(3, Wanted::Running, 0) });
    assert_eq!(next_step(&entry, &Observed::HandedOver, &NOW), Next::Do(Step::Delete));
}
