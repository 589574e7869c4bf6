//! The plan, held against a model of a driver.

use hv_driver::{InstanceConfig, Running};
use hv_types::instance::StopOptions;
use hv_types::{Epoch, InstanceType};
use proptest::prelude::*;

use super::*;
use crate::entry::Order;

const BOOT: &str = "boot-1";

fn order(generation: u64, wanted: Wanted, restart_generation: u64) -> Order {
    let id = "i-1".parse().unwrap();
    Order {
        config: InstanceConfig {
            id,
            name: "a".into(),
            spec: Default::default(),
            metadata: Default::default(),
        },
        instance_type: InstanceType::Vm,
        epoch: Epoch(1),
        generation,
        wanted,
        restart_generation,
        stop: StopOptions::default(),
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
        assert_eq!(next_step(&entry, &seen, BOOT), expected, "{:?} {seen:?}", entry.wanted);
    }
}

#[test]
fn disks_that_vanished_are_not_replaced_in_silence() {
    let entry = Entry { created: true, ..entry(Wanted::Running) };
    assert!(matches!(next_step(&entry, &Observed::Absent, BOOT), Next::Fail(_)));
}

fn settled(exit: Exit, boot_id: &str) -> Next {
    let mut entry = Entry { created: true, ..entry(Wanted::Running) };
    entry.finish();
    next_step(&entry, &Observed::Stopped(exit), boot_id)
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
    let next = next_step(&known, &Observed::Stopped(Exit::Lost), "boot-2");
    assert!(matches!(next, Next::Rest(InstanceState::Failed, _)), "it was lost before the boot: {next:?}");
}

#[test]
fn what_was_found_is_left_alone_whatever_it_does() {
    let found = Entry::found("i-1".parse().unwrap(), InstanceType::Vm, "fake");
    for seen in [Observed::Absent, running(), paused(), Observed::Stopped(Exit::Lost), stopped()] {
        assert!(matches!(next_step(&found, &seen, "boot-9"), Next::Rest(..)), "{seen:?}");
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
        match next_step(entry, &model.seen, BOOT) {
            Next::Rest(state, _) => return Ok(state),
            Next::Fail(reason) => return Err(reason.into()),
            Next::Note(note) => remember(entry, note, &model.seen, BOOT),
            Next::Do(step) => {
                model.apply(step)?;
                let is_crash = crash_after == Some(0);
                crash_after = crash_after.and_then(|left| left.checked_sub(1));
                if !is_crash {
                    done(entry, step, entry.serial, None, BOOT);
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
