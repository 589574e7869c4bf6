//! What becomes of one instance whose node is lost: a pure function, so that it can be looked at from all sides.

use std::time::Duration;

use hv_types::instance::FailoverPolicy;
use hv_types::{InstanceRecord, NodeRecord, Wanted};

/// What is known of a node.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// Its record.
    pub node: &'a NodeRecord,
    /// Whether its lease lives.
    pub live: bool,
    /// How long it has been lost, as the one who decides has seen it itself.
    pub lost_for: Duration,
    /// How long it must have been lost before a node that fences has stopped for certain.
    pub certain_after: Duration,
}

/// What becomes of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Its node answers: there is nothing to do.
    Fine,
    /// It is started afresh elsewhere, now.
    Restart,
    /// It was to be deleted, and runs nowhere any more: its record goes.
    Remove,
    /// It is certain in so long; the text says what then happens.
    WaitUntil(Duration, String),
    /// It stays bound to its node, and why.
    No(String),
}

/// Decides on an instance that is bound to the node.
///
/// Nothing is started elsewhere while the lease lives; nor before it is certain that the node has stopped it, be it by
/// the node's own fencing or by an operator's word.
#[must_use]
pub fn decide(instance: &InstanceRecord, situation: &Situation<'_>) -> Decision {
    let node = situation.node;
    let name = &node.hostname;
    if situation.live {
        return Decision::Fine;
    }
    let when_certain = match instance.wanted {
        Wanted::Deleted => Decision::Remove,
        Wanted::Stopped => {
            return Decision::No(format!(
                "it is to be stopped, so there is nothing to start elsewhere; it belongs to node {name} until that is \
                 back, is removed for good, or it is deleted"
            ));
        }
        Wanted::Running | Wanted::Paused => Decision::Restart,
    };
    if node.confirmed_down && when_certain == Decision::Remove {
        return Decision::Remove;
    }
    if instance.failover_policy == FailoverPolicy::Never {
        return Decision::No(format!("its failover policy is never; it waits for node {name}"));
    }
    if instance.placement.preferred_node.as_ref() == Some(&node.id) && when_certain == Decision::Restart {
        return Decision::No(format!("it may only run on node {name}; it waits for that"));
    }
    if node.confirmed_down {
        return when_certain;
    }
    if node.failover_held {
        return Decision::No(format!(
            "failover of node {name} is held by the operator; `hypervisor-ctl node release-failover {name}` lets it work, \
             `node confirm-down {name}` vouches that it is off"
        ));
    }
    if !node.fencing.armed {
        return Decision::No(format!(
            "node {name} did not say that it stops its instances by itself ({}); once you have seen that it is off, \
             `hypervisor-ctl node confirm-down {name}` lets them be started elsewhere",
            node.fencing.message
        ));
    }
    let Some(left) = situation.certain_after.checked_sub(situation.lost_for).filter(|left| !left.is_zero())
    else {
        return when_certain;
    };
    let then = match when_certain {
        Decision::Remove => "its record goes",
        Decision::Fine | Decision::Restart | Decision::WaitUntil(..) | Decision::No(_) => {
            "it is started afresh elsewhere"
        }
    };
    let limit = situation.certain_after.as_secs_f64();
    let text = format!("node {name} is lost; {then} unless it is back within {limit:.1} s of its loss");
    Decision::WaitUntil(left, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_proto::{convert, v1};
    use hv_types::instance::Binding;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn node(held: bool, armed: bool, confirmed: bool) -> NodeRecord {
        let request = v1::RegisterNodeRequest {
            node_id: "n1".into(),
            hostname: "one".into(),
            ip: "127.0.0.1".into(),
            ..v1::RegisterNodeRequest::default()
        };
        let mut node = convert::node_from_registration(request).unwrap();
        node.failover_held = held;
        node.fencing.armed = armed;
        node.confirmed_down = confirmed;
        node
    }

    fn instance(wanted: Wanted, policy: FailoverPolicy, pinned: bool) -> InstanceRecord {
        let request = v1::CreateInstanceRequest {
            name: "web".into(),
            r#type: v1::InstanceType::Container.into(),
            spec: Some(v1::InstanceSpec {
                image: "tiny".into(),
                cpu_cores: 1,
                memory_bytes: 64 << 20,
                ..v1::InstanceSpec::default()
            }),
            ..v1::CreateInstanceRequest::default()
        };
        let mut record = convert::create_request_from(request).unwrap();
        record.wanted = wanted;
        record.failover_policy = policy;
        record.binding = Some(Binding { node_id: "n1".parse().unwrap(), release: false });
        if pinned {
            Arc::make_mut(&mut record.placement).preferred_node = Some("n1".parse().unwrap());
        }
        record
    }

    fn wanted() -> impl Strategy<Value = Wanted> {
        prop_oneof![Just(Wanted::Running), Just(Wanted::Paused), Just(Wanted::Stopped), Just(Wanted::Deleted)]
    }

    fn policy() -> impl Strategy<Value = FailoverPolicy> {
        prop_oneof![Just(FailoverPolicy::Never), Just(FailoverPolicy::Restart)]
    }

    proptest! {
        #[test]
        fn nothing_is_started_elsewhere_unless_it_is_certain(
            (wanted, policy) in (wanted(), policy()),
            (held, armed, confirmed, pinned, live) in any::<(bool, bool, bool, bool, bool)>(),
            (lost_ms, certain_ms) in (0_u64..100, 0_u64..100),
        ) {
            let (node, record) = (node(held, armed, confirmed), instance(wanted, policy, pinned));
            let situation = Situation {
                node: &node,
                live,
                lost_for: Duration::from_millis(lost_ms),
                certain_after: Duration::from_millis(certain_ms),
            };
            let decision = decide(&record, &situation);
            let certain = !live && (confirmed || (armed && !held && lost_ms >= certain_ms));
            match &decision {
                Decision::Restart => prop_assert!(
                    certain && policy == FailoverPolicy::Restart && !pinned
                        && matches!(wanted, Wanted::Running | Wanted::Paused)
                ),
                Decision::Remove => prop_assert!(certain && wanted == Wanted::Deleted),
                Decision::WaitUntil(left, text) => {
                    prop_assert!(!certain && armed && !held && !left.is_zero() && !text.is_empty());
                    // And it acts as soon as that has passed.
                    let then = Situation { lost_for: situation.lost_for + *left, ..situation };
                    prop_assert!(matches!(decide(&record, &then), Decision::Restart | Decision::Remove));
                }
                Decision::No(text) => prop_assert!(!live && !text.is_empty()),
                Decision::Fine => prop_assert!(live),
            }
            prop_assert_eq!(live, decision == Decision::Fine);
            // Whatever may be started elsewhere, is.
            if certain && policy == FailoverPolicy::Restart && !pinned && matches!(wanted, Wanted::Running | Wanted::Paused) {
                prop_assert_eq!(decision, Decision::Restart);
            }
        }
    }

    #[test]
    fn each_refusal_names_its_one_reason() {
        let lost = |node| Situation {
            node,
            live: false,
            lost_for: Duration::from_secs(3600),
            certain_after: Duration::from_secs(1),
        };
        let cases = [
            (
                node(false, true, false),
                FailoverPolicy::Never,
                false,
                "its failover policy is never; it waits for node one",
            ),
            (node(false, true, true), FailoverPolicy::Restart, true, "may only run on node one"),
            (node(true, true, false), FailoverPolicy::Restart, false, "is held by the operator"),
            (
                node(false, false, false),
                FailoverPolicy::Restart,
                false,
                "its agent does not say that it fences",
            ),
        ];
        for (node, policy, pinned, expected) in &cases {
            match decide(&instance(Wanted::Running, *policy, *pinned), &lost(node)) {
                Decision::No(reason) => assert!(reason.contains(expected), "{reason}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }
}
