//! Placement rules, taints, overcommit, policies.

use hv_types::Invalid;
use hv_types::instance::{FailoverPolicy, RestartPolicy};
use hv_types::placement::{
    AffinityRule, Overcommit, Peers, PlacementRules, SpreadRule, Taint, Toleration, Topology,
};

use super::common::selector_from;
use crate::v1;

/// A restart policy as the wire carries it.
#[must_use]
pub fn restart_policy_to(policy: RestartPolicy) -> v1::RestartPolicy {
    match policy {
        RestartPolicy::Never => v1::RestartPolicy::Never,
        RestartPolicy::OnFailure => v1::RestartPolicy::OnFailure,
        RestartPolicy::Always => v1::RestartPolicy::Always,
    }
}

/// A restart policy from the wire; unsaid is never.
///
/// # Errors
/// The number stands for none.
pub fn restart_policy_from(value: i32) -> Result<RestartPolicy, Invalid> {
    match v1::RestartPolicy::try_from(value) {
        Ok(v1::RestartPolicy::Unspecified | v1::RestartPolicy::Never) => Ok(RestartPolicy::Never),
        Ok(v1::RestartPolicy::OnFailure) => Ok(RestartPolicy::OnFailure),
        Ok(v1::RestartPolicy::Always) => Ok(RestartPolicy::Always),
        Err(_) => {
            Err(Invalid::new("restart_policy", value, "must be 1 (never), 2 (on-failure) or 3 (always)"))
        }
    }
}

/// A failover policy as the wire carries it.
#[must_use]
pub fn failover_policy_to(policy: FailoverPolicy) -> v1::FailoverPolicy {
    match policy {
        FailoverPolicy::Never => v1::FailoverPolicy::Never,
        FailoverPolicy::Restart => v1::FailoverPolicy::Restart,
    }
}

/// A failover policy from the wire; unsaid is never.
///
/// # Errors
/// The number stands for none.
pub fn failover_policy_from(value: i32) -> Result<FailoverPolicy, Invalid> {
    match v1::FailoverPolicy::try_from(value) {
        Ok(v1::FailoverPolicy::Unspecified | v1::FailoverPolicy::Never) => Ok(FailoverPolicy::Never),
        Ok(v1::FailoverPolicy::Restart) => Ok(FailoverPolicy::Restart),
        Err(_) => Err(Invalid::new("failover_policy", value, "must be 1 (never) or 2 (restart)")),
    }
}

fn topology_to(topology: Topology) -> v1::Topology {
    match topology {
        Topology::Node => v1::Topology::Node,
        Topology::Zone => v1::Topology::Zone,
        Topology::Region => v1::Topology::Region,
    }
}

fn topology_from(value: i32) -> Result<Topology, Invalid> {
    match v1::Topology::try_from(value) {
        Ok(v1::Topology::Unspecified | v1::Topology::Node) => Ok(Topology::Node),
        Ok(v1::Topology::Zone) => Ok(Topology::Zone),
        Ok(v1::Topology::Region) => Ok(Topology::Region),
        Err(_) => Err(Invalid::new("placement.topology", value, "must be 1 (node), 2 (zone) or 3 (region)")),
    }
}

fn peers_to(peers: &Peers) -> v1::Peers {
    v1::Peers {
        label_selector: peers.labels.requirements().clone().into_iter().collect(),
        instance_name: peers.instance_name.clone(),
    }
}

fn peers_from(peers: Option<v1::Peers>) -> Result<Peers, Invalid> {
    let peers = peers.unwrap_or_default();
    let labels = selector_from(peers.label_selector)
        .map_err(|e| Invalid { field: "placement.peers.label_selector".into(), ..e })?;
    Ok(Peers { labels, instance_name: peers.instance_name })
}

/// The rules that the wire carries together; node, region, zone and node labels travel beside them.
#[must_use]
pub fn placement_to(rules: &PlacementRules) -> v1::PlacementRules {
    let affinity = |rule: &AffinityRule| v1::AffinityRule {
        anti: rule.anti,
        peers: Some(peers_to(&rule.peers)),
        topology: topology_to(rule.topology).into(),
        preferred: !rule.required,
    };
    let spread = |rule: &SpreadRule| v1::SpreadRule {
        peers: Some(peers_to(&rule.peers)),
        topology: topology_to(rule.topology).into(),
        max_skew: rule.max_skew,
        preferred: !rule.required,
    };
    let toleration = |toleration: &Toleration| v1::Toleration {
        key: toleration.key.clone(),
        value: toleration.value.clone(),
    };
    v1::PlacementRules {
        affinity: rules.affinity.iter().map(affinity).collect(),
        spread: rules.spread.iter().map(spread).collect(),
        tolerations: rules.tolerations.iter().map(toleration).collect(),
        priority: rules.priority,
    }
}

/// The rules that the wire carries together; the rest of the result is empty.
///
/// # Errors
/// A number stands for no topology, or a selector is not one.
pub fn placement_from(rules: Option<v1::PlacementRules>) -> Result<PlacementRules, Invalid> {
    let Some(rules) = rules else { return Ok(PlacementRules::default()) };
    let affinity = |rule: v1::AffinityRule| {
        Ok(AffinityRule {
            anti: rule.anti,
            topology: topology_from(rule.topology)?,
            peers: peers_from(rule.peers)?,
            required: !rule.preferred,
        })
    };
    let spread = |rule: v1::SpreadRule| {
        Ok(SpreadRule {
            topology: topology_from(rule.topology)?,
            peers: peers_from(rule.peers)?,
            max_skew: rule.max_skew.max(1),
            required: !rule.preferred,
        })
    };
    let toleration = |toleration: v1::Toleration| Toleration { key: toleration.key, value: toleration.value };
    Ok(PlacementRules {
        affinity: rules.affinity.into_iter().map(affinity).collect::<Result<_, Invalid>>()?,
        spread: rules.spread.into_iter().map(spread).collect::<Result<_, Invalid>>()?,
        tolerations: rules.tolerations.into_iter().map(toleration).collect(),
        priority: rules.priority,
        ..PlacementRules::default()
    })
}

/// A taint as the wire carries it.
#[must_use]
pub fn taint_to(taint: &Taint) -> v1::Taint {
    let effect = if taint.hard { v1::TaintEffect::NoSchedule } else { v1::TaintEffect::PreferNoSchedule };
    v1::Taint { key: taint.key.clone(), value: taint.value.clone(), effect: effect.into() }
}

/// A taint from the wire.
///
/// # Errors
/// The number stands for no effect.
pub fn taint_from(taint: v1::Taint) -> Result<Taint, Invalid> {
    let hard = match v1::TaintEffect::try_from(taint.effect) {
        Ok(v1::TaintEffect::Unspecified | v1::TaintEffect::NoSchedule) => true,
        Ok(v1::TaintEffect::PreferNoSchedule) => false,
        Err(_) => {
            let expected = "must be 1 (no-schedule) or 2 (prefer-no-schedule)";
            return Err(Invalid::new("taints.effect", taint.effect, expected));
        }
    };
    Ok(Taint { key: taint.key, value: taint.value, hard })
}

/// Overcommit as the wire carries it.
#[must_use]
pub fn overcommit_to(overcommit: Overcommit) -> v1::Overcommit {
    v1::Overcommit {
        cpu_percent: overcommit.cpu_percent,
        memory_percent: overcommit.memory_percent,
        disk_percent: overcommit.disk_percent,
    }
}

/// Overcommit from the wire; 0 is 100 %. Its bounds are checked by [`Overcommit::validate`].
#[must_use]
pub fn overcommit_from(overcommit: Option<v1::Overcommit>) -> Overcommit {
    let overcommit = overcommit.unwrap_or_default();
    let or_all = |percent| if percent == 0 { 100 } else { percent };
    Overcommit {
        cpu_percent: or_all(overcommit.cpu_percent),
        memory_percent: or_all(overcommit.memory_percent),
        disk_percent: or_all(overcommit.disk_percent),
    }
}
