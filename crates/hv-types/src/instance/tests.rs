//! Claims about states and requests.

use super::*;

#[test]
fn nothing_but_delete_is_possible_once_it_is_being_deleted() {
    for state in InstanceState::ALL {
        for request in Request::ALL {
            let verdict = decide(request, Wanted::Deleted, state);
            match request {
                Request::Delete => assert_eq!(verdict, Verdict::Already),
                _ => assert!(matches!(verdict, Verdict::Refused(_)), "{request:?} in {state}"),
            }
        }
    }
}

#[test]
fn delete_is_possible_in_every_state() {
    for wanted in [Wanted::Running, Wanted::Stopped, Wanted::Paused] {
        for state in InstanceState::ALL {
            assert_eq!(decide(Request::Delete, wanted, state), Verdict::Change(Wanted::Deleted));
        }
    }
}

#[test]
fn a_guest_that_powered_itself_off_can_be_started_again() {
    assert_eq!(
        decide(Request::Start, Wanted::Running, InstanceState::Stopped),
        Verdict::Change(Wanted::Running)
    );
    assert_eq!(decide(Request::Start, Wanted::Running, InstanceState::Running), Verdict::Already);
}

#[test]
fn a_paused_instance_is_resumed_not_started() {
    assert!(matches!(decide(Request::Start, Wanted::Paused, InstanceState::Paused), Verdict::Refused(_)));
    assert_eq!(
        decide(Request::Resume, Wanted::Paused, InstanceState::Paused),
        Verdict::Change(Wanted::Running)
    );
}

#[test]
fn state_names_read_back() {
    for state in InstanceState::ALL {
        assert_eq!(state.name().to_ascii_lowercase().parse::<InstanceState>().unwrap(), state);
    }
}

fn good_spec() -> InstanceSpec {
    InstanceSpec { image: "tiny".into(), cpu_cores: 1, memory_bytes: 128 << 20, ..InstanceSpec::default() }
}

#[test]
fn each_bad_field_of_a_spec_is_named() {
    let refuse = |change: fn(&mut InstanceSpec), field: &str| {
        let mut spec = good_spec();
        change(&mut spec);
        let refusal = spec.validate(InstanceType::Vm).unwrap_err();
        assert_eq!(refusal.field, field);
    };
    assert!(good_spec().validate(InstanceType::Vm).is_ok());
    refuse(|s| s.cpu_cores = 0, "spec.cpu_cores");
    refuse(|s| s.cpu_cores = u32::MAX, "spec.cpu_cores");
    refuse(|s| s.memory_bytes = 0, "spec.memory_bytes");
    refuse(|s| s.memory_bytes = u64::MAX, "spec.memory_bytes");
    refuse(|s| s.image = String::new(), "spec.image");
    refuse(|s| s.kernel = "../../etc/shadow".into(), "spec.kernel");
    refuse(|s| s.kernel_args = "a\nb".into(), "spec.kernel_args");
    refuse(|s| s.disks = vec![DiskSpec::default()], "spec.disks[0].name");
    refuse(|s| s.env = [("A=B".to_owned(), String::new())].into(), "spec.env");
}
