//! The fencer's decisions, one by one and under random histories.

use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn at(seconds: u64) -> Moment {
    Moment(seconds * SECOND)
}

fn id(index: u8) -> InstanceId {
    format!("i-{index}").parse().unwrap()
}

fn target(index: u8) -> FenceTarget {
    FenceTarget::Marker { path: format!("/{index}").into() }
}

fn lease(seconds: u64) -> Message {
    Message::Lease { until: Some(at(seconds)), held: false }
}

fn watch(index: u8, starting: bool) -> Message {
    Message::Watch { id: id(index), target: target(index), starting }
}

fn kills(actions: &[Action]) -> Vec<InstanceId> {
    let kill = |action: &Action| match action {
        Action::Kill { id, .. } => Some(id.clone()),
        Action::EndAgent => None,
    };
    actions.iter().filter_map(kill).collect()
}

fn running(index: u8) -> FencerCore {
    let mut core = FencerCore::new();
    assert_eq!(core.hear(at(1), lease(10)), Reply::Done);
    assert_eq!(core.hear(at(1), watch(index, true)), Reply::Done);
    assert_eq!(core.hear(at(1), Message::Settled { id: id(index) }), Reply::Done);
    core
}

#[test]
fn what_is_watched_is_killed_when_the_lease_ends_and_not_before() {
    let mut core = running(1);
    assert_eq!(core.next_wake(), Some(at(10)));
    assert_eq!(core.tick(Moment(10 * SECOND - 1)), []);
    assert_eq!(kills(&core.tick(at(10))), [id(1)]);
    assert!(core.tried(&id(1), &Outcome::Gone));
    assert!(core.is_idle() && core.next_wake().is_none());
}

#[test]
fn a_lease_that_is_renewed_moves_the_end_and_never_back() {
    let mut core = running(1);
    core.hear(at(5), lease(20));
    core.hear(at(6), lease(12));
    assert_eq!(core.tick(at(19)), []);
    assert_eq!(kills(&core.tick(at(20))), [id(1)]);
}

#[test]
fn a_renewal_that_comes_too_late_saves_nothing() {
    let mut core = running(1);
    core.hear(at(11), lease(30));
    assert_eq!(kills(&core.tick(at(11))), [id(1)]);
    assert!(matches!(core.hear(at(12), watch(1, true)), Reply::Refused { .. }));
    assert!(matches!(core.hear(at(12), Message::Forget { id: id(1) }), Reply::Refused { .. }));
    assert!(core.tried(&id(1), &Outcome::Gone));
    assert_eq!(core.hear(at(13), watch(1, true)), Reply::Done);
}

#[test]
fn nothing_starts_without_a_lease() {
    let mut core = FencerCore::new();
    assert!(matches!(core.hear(at(1), watch(1, true)), Reply::Refused { .. }));
    core.hear(at(1), lease(5));
    assert!(matches!(core.hear(at(5), watch(1, true)), Reply::Refused { .. }));
}

#[test]
fn what_runs_and_is_handed_over_without_a_lease_is_killed() {
    let mut core = FencerCore::new();
    core.hear(at(1), watch(1, false));
    assert_eq!(kills(&core.tick(at(1))), [id(1)]);
}

#[test]
fn while_failover_is_held_nothing_is_killed() {
    let mut core = running(1);
    core.hear(at(9), Message::Lease { until: None, held: true });
    assert_eq!(core.tick(at(100)), []);
    assert_eq!(core.next_wake(), None);
    core.hear(at(101), Message::Lease { until: Some(at(110)), held: false });
    assert_eq!(core.tick(at(109)), []);
    assert_eq!(kills(&core.tick(at(110))), [id(1)]);
}

#[test]
fn a_start_under_way_ends_the_agent_before_the_instance_counts_as_gone() {
    let mut core = FencerCore::new();
    core.hear(at(1), lease(10));
    core.hear(at(9), watch(1, true));
    assert_eq!(kills(&core.tick(at(10))), [id(1)]);
    assert!(!core.tried(&id(1), &Outcome::Gone), "it may be started any moment");
    let later = at(10).after(START_GRACE);
    assert!(core.next_wake().unwrap() <= later);
    assert!(core.tick(later).contains(&Action::EndAgent));
    assert!(!core.tick(at(11)).contains(&Action::EndAgent), "it is ended once");
    core.agent_ended();
    assert_eq!(kills(&core.tick(at(11))), [id(1)]);
    assert!(core.tried(&id(1), &Outcome::Gone));
}

#[test]
fn an_agent_that_gives_up_its_start_in_time_lives_on() {
    let mut core = FencerCore::new();
    core.hear(at(1), lease(10));
    core.hear(at(9), watch(1, true));
    core.tick(at(10));
    core.hear(at(10), Message::Settled { id: id(1) });
    let actions = core.tick(at(11));
    assert_eq!((kills(&actions), actions.contains(&Action::EndAgent)), (vec![id(1)], false));
}

#[test]
fn what_does_not_die_is_killed_again_and_again_with_more_zeal() {
    let mut core = running(1);
    let mut now = at(10);
    let mut zeals = Vec::new();
    for _ in 0..12 {
        for action in core.tick(now) {
            if let Action::Kill { zeal, .. } = action {
                zeals.push(zeal);
                core.tried(&id(1), &Outcome::Alive("stuck".into()));
            }
        }
        let next = core.next_wake().unwrap();
        assert!(next > now && next.since(now) <= RETRY_MAX);
        now = next;
    }
    assert_eq!(zeals.len(), 12);
    assert!(zeals.starts_with(&[Zeal::Instance; 4]) && zeals.ends_with(&[Zeal::Everyone]));
}

#[derive(Clone, Debug)]
enum Happening {
    Pass(u64),
    Renew { ms: u64, held: bool },
    Watch(u8, bool),
    Settle(u8),
    Forget(u8),
    AgentDies,
    Tick { dies: bool },
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (0..700_u64).prop_map(Happening::Pass),
        3 => (0..3000_u64, prop::bool::weighted(0.1)).prop_map(|(ms, held)| Happening::Renew { ms, held }),
        4 => (0..4_u8, any::<bool>()).prop_map(|(index, starting)| Happening::Watch(index, starting)),
        3 => (0..4_u8).prop_map(Happening::Settle),
        1 => (0..4_u8).prop_map(Happening::Forget),
        1 => Just(Happening::AgentDies),
        6 => any::<bool>().prop_map(|dies| Happening::Tick { dies }),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_nothing_outlives_the_lease(history in prop::collection::vec(happening(), 1..120)) {
        let mut core = FencerCore::new();
        let mut now = at(100);
        let mut end = None;
        for step in history {
            let doomed_before = core.standing().doomed;
            match step {
                Happening::Pass(ms) => now = now.after(Duration::from_millis(ms)),
                Happening::Renew { ms, held } => {
                    let until = Moment(now.0 - SECOND).after(Duration::from_millis(ms));
                    let was_lapsed = !core.is_alive(now);
                    let watched = core.standing().watched;
                    core.hear(now, Message::Lease { until: Some(until), held });
                    prop_assert!(!was_lapsed || watched.iter().all(|id| core.standing().doomed.contains(id)));
                }
                Happening::Watch(index, starting) => {
                    let alive = core.is_alive(now);
                    let was_doomed = doomed_before.contains(&id(index));
                    let reply = core.hear(now, watch(index, starting));
                    if was_doomed || (starting && !alive) {
                        prop_assert!(reply != Reply::Done, "it was let start");
                    }
                }
                Happening::Settle(index) => drop(core.hear(now, Message::Settled { id: id(index) })),
                Happening::Forget(index) => {
                    let reply = core.hear(now, Message::Forget { id: id(index) });
                    prop_assert!(!doomed_before.contains(&id(index)) || reply != Reply::Done);
                }
                Happening::AgentDies => core.agent_ended(),
                Happening::Tick { dies } => {
                    let actions = core.tick(now);
                    if !core.is_alive(now) {
                        prop_assert!(core.standing().watched.is_empty(), "spared after the lease's end");
                    }
                    for killed in kills(&actions) {
                        let outcome = if dies { Outcome::Gone } else { Outcome::Alive("no".into()) };
                        let starting = core.targets[&killed].starting;
                        prop_assert_eq!(core.tried(&killed, &outcome), dies && !starting);
                    }
                    // It always knows when to look again, and that is later.
                    let waits_for_nothing = core.is_idle() || (core.held && core.standing().doomed.is_empty());
                    if !waits_for_nothing {
                        let wake = core.next_wake();
                        prop_assert!(wake.is_some_and(|wake| wake > now || core.agent_ending), "{wake:?}");
                    }
                }
            }
            prop_assert!(core.until >= end);
            end = core.until;
            let gone: Vec<_> = doomed_before.iter().filter(|id| !core.standing().doomed.contains(id)).collect();
            prop_assert!(gone.is_empty() || matches!(step, Happening::Tick { dies: true }), "spared: {gone:?}");
        }
    }
}
