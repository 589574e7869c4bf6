//! How the values of flags are read. Each refusal says what is accepted.

use std::collections::HashMap;
use std::str::FromStr;

use hv_config::{ByteSize, HumanDuration};
use hv_proto::v1;
use hv_types::instance::{FailoverPolicy, RestartPolicy};
use hv_types::{InstanceState, InstanceType, NodeStatus, Selector};

/// Longest grace that a stop may ask for, in seconds: the API's bound.
const MAX_GRACE_SECONDS: u64 = 3600;
/// Shortest time between two readings, in milliseconds.
const MIN_INTERVAL_MS: u64 = 100;

/// One `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair(pub String, pub String);

/// Several of them from one flag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pairs(pub Vec<Pair>);

/// The object of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventObject {
    /// `instance` or `node`.
    pub kind: &'static str,
    /// As typed.
    pub reference: String,
}

/// The byte that detaches from a console, if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetachKey(pub Option<u8>);

/// All pairs as the wire carries them; a later one wins.
pub(crate) fn map_of<'a>(pairs: impl IntoIterator<Item = &'a Pair>) -> HashMap<String, String> {
    pairs.into_iter().map(|Pair(key, value)| (key.clone(), value.clone())).collect()
}

/// All selectors as the wire carries them.
pub(crate) fn selector_of(selectors: &[Pairs]) -> HashMap<String, String> {
    map_of(selectors.iter().flat_map(|Pairs(pairs)| pairs))
}

pub(super) fn instance_type(text: &str) -> Result<InstanceType, String> {
    InstanceType::from_str(&text.to_ascii_lowercase())
        .map_err(|_| "expected vm, container or microvm".to_owned())
}

pub(super) fn instance_state(text: &str) -> Result<InstanceState, String> {
    text.parse().map_err(|invalid: hv_types::Invalid| invalid.to_string())
}

pub(super) fn node_status(text: &str) -> Result<NodeStatus, String> {
    match text.to_ascii_lowercase().replace('_', "-").as_str() {
        "ready" => Ok(NodeStatus::Ready),
        "not-ready" | "notready" => Ok(NodeStatus::NotReady),
        "maintenance" | "cordoned" => Ok(NodeStatus::Maintenance),
        "draining" => Ok(NodeStatus::Draining),
        _ => Err("expected ready, not-ready, maintenance or draining".to_owned()),
    }
}

pub(super) fn memory(text: &str) -> Result<ByteSize, String> {
    const EXPECTED: &str = "expected a number of MiB, or a size with one of the units KiB, MiB, GiB, TiB, at least \
                            4MiB, as 512, 512MiB or 1GiB";
    let size = match text.parse::<u64>() {
        Ok(mib) => {
            mib.checked_mul(1 << 20).filter(|bytes| *bytes <= ByteSize::MAX.bytes()).map(ByteSize::from_bytes)
        }
        Err(_) => text.parse().ok(),
    };
    size.filter(|size| size.bytes() >= hv_types::instance::spec::MIN_MEMORY_BYTES)
        .ok_or_else(|| EXPECTED.to_owned())
}

pub(super) fn pair(text: &str) -> Result<Pair, String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok(Pair(key.trim().to_owned(), value.to_owned())),
        _ => Err("expected key=value".to_owned()),
    }
}

pub(super) fn selector(text: &str) -> Result<Pairs, String> {
    const EXPECTED: &str = "expected key=value, key=* or key, separated by commas";
    let one = |part: &str| {
        let (key, value) = part.split_once('=').unwrap_or((part, Selector::ANY));
        // `==` is what users of other tools type; `!=` has no counterpart on the wire.
        let (key, value) = (key.trim(), value.strip_prefix('=').unwrap_or(value).trim());
        if key.is_empty() || key.ends_with('!') || key.contains(char::is_whitespace) {
            return Err(EXPECTED.to_owned());
        }
        Ok(Pair(key.to_owned(), value.to_owned()))
    };
    text.split(',').map(str::trim).map(one).collect::<Result<_, _>>().map(Pairs)
}

pub(super) fn disk(text: &str) -> Result<v1::DiskSpec, String> {
    let mut disk = v1::DiskSpec::default();
    for part in text.split(',') {
        match part.split_once('=').unwrap_or((part, "")) {
            ("name", name) if !name.is_empty() => disk.name = name.to_owned(),
            ("size", size) => {
                let size: ByteSize =
                    size.parse().map_err(|error: hv_config::ValueError| error.to_string())?;
                disk.size_bytes = i64::try_from(size.bytes()).unwrap_or(i64::MAX);
            }
            ("type", kind @ ("ssd" | "hdd" | "nvme")) => disk.r#type = kind.to_owned(),
            ("boot", "" | "true") => disk.boot = true,
            _ => return Err(format!("{part:?} is none of name=NAME, size=SIZE, type=ssd|hdd|nvme, boot")),
        }
    }
    if disk.name.is_empty() || (disk.size_bytes == 0 && !disk.boot) {
        return Err("expected a name and a size, as name=data,size=10GiB".to_owned());
    }
    Ok(disk)
}

pub(super) fn grace(text: &str) -> Result<HumanDuration, String> {
    let grace: HumanDuration = text.parse().map_err(|error: hv_config::ValueError| error.to_string())?;
    if (1..=MAX_GRACE_SECONDS).contains(&grace.get().as_secs()) && grace.get().subsec_nanos() == 0 {
        return Ok(grace);
    }
    Err("expected whole seconds from 1s to 1h; to pull the plug at once use --force".to_owned())
}

pub(super) fn interval(text: &str) -> Result<HumanDuration, String> {
    let interval: HumanDuration = text.parse().map_err(|error: hv_config::ValueError| error.to_string())?;
    if interval >= HumanDuration::from_millis(MIN_INTERVAL_MS) {
        return Ok(interval);
    }
    Err(format!("expected at least {MIN_INTERVAL_MS}ms"))
}

pub(super) fn event_object(text: &str) -> Result<EventObject, String> {
    let kind = match text.split_once('/') {
        Some(("instance" | "vm" | "container" | "microvm", _)) => Some("instance"),
        Some(("node", _)) => Some("node"),
        _ => None,
    };
    let reference =
        text.split_once('/').map(|(_, reference)| reference).filter(|reference| !reference.is_empty());
    kind.zip(reference)
        .map(|(kind, reference)| EventObject { kind, reference: reference.to_owned() })
        .ok_or_else(|| "expected instance/NAME or node/NAME".to_owned())
}

pub(super) fn detach_key(text: &str) -> Result<DetachKey, String> {
    let lower = text.to_ascii_lowercase();
    if lower == "none" {
        return Ok(DetachKey(None));
    }
    let key = lower.strip_prefix("ctrl-").or_else(|| lower.strip_prefix('^')).map(str::as_bytes);
    match key {
        // A control character is the key's code without its two high bits (ECMA-48, section 5.2).
        Some([key @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_' | b'@')]) => {
            Ok(DetachKey(Some(key & 0x1f)))
        }
        _ => Err("expected ctrl- and a letter or one of [ \\ ] ^ _ @, as ctrl-], or none".to_owned()),
    }
}

impl std::fmt::Display for DetachKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(byte) => write!(f, "Ctrl-{}", char::from(byte | 0x40)),
            None => f.write_str("none"),
        }
    }
}

/// Peers with what a rule says about them: labels, and the words `instance=`, `topology=`, `max-skew=`, `preferred`.
struct Rule {
    peers: v1::Peers,
    topology: v1::Topology,
    max_skew: u32,
    preferred: bool,
}

fn rule(text: &str) -> Result<Rule, String> {
    const EXPECTED: &str = "expected labels or instance=NAME, then topology=node|zone|region, max-skew=N or preferred, \
                            separated by commas, as tier=web,topology=zone";
    let mut rule =
        Rule { peers: v1::Peers::default(), topology: v1::Topology::Node, max_skew: 0, preferred: false };
    for part in text.split(',').map(str::trim) {
        match part.split_once('=').unwrap_or((part, "")) {
            ("preferred", "" | "true") => rule.preferred = true,
            ("topology", "node") => rule.topology = v1::Topology::Node,
            ("topology", "zone") => rule.topology = v1::Topology::Zone,
            ("topology", "region") => rule.topology = v1::Topology::Region,
            ("topology", _) => return Err("topology is node, zone or region".to_owned()),
            ("instance", name) if !name.is_empty() => rule.peers.instance_name = name.to_owned(),
            ("max-skew", number) => {
                rule.max_skew = number.parse().map_err(|_| "max-skew is a number from 1 on".to_owned())?;
            }
            (key, value) if !key.is_empty() => {
                let value = if part.contains('=') { value } else { Selector::ANY };
                rule.peers.label_selector.insert(key.to_owned(), value.to_owned());
            }
            _ => return Err(EXPECTED.to_owned()),
        }
    }
    if rule.peers == v1::Peers::default() {
        return Err(EXPECTED.to_owned());
    }
    Ok(rule)
}

fn affinity(text: &str, anti: bool) -> Result<v1::AffinityRule, String> {
    let Rule { peers, topology, max_skew, preferred } = rule(text)?;
    if max_skew != 0 {
        return Err("max-skew belongs to --spread".to_owned());
    }
    Ok(v1::AffinityRule { anti, peers: Some(peers), topology: topology.into(), preferred })
}

pub(super) fn near(text: &str) -> Result<v1::AffinityRule, String> {
    affinity(text, false)
}

pub(super) fn away(text: &str) -> Result<v1::AffinityRule, String> {
    affinity(text, true)
}

pub(super) fn spread(text: &str) -> Result<v1::SpreadRule, String> {
    let Rule { peers, topology, max_skew, preferred } = rule(text)?;
    Ok(v1::SpreadRule { peers: Some(peers), topology: topology.into(), max_skew, preferred })
}

pub(super) fn toleration(text: &str) -> Result<v1::Toleration, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, value),
        None if text == Selector::ANY => ("", Selector::ANY),
        None => (text, Selector::ANY),
    };
    if text.is_empty() || (key.is_empty() && text != Selector::ANY) {
        return Err("expected key, key=value or *".to_owned());
    }
    Ok(v1::Toleration { key: key.to_owned(), value: value.to_owned() })
}

pub(super) fn taint(text: &str) -> Result<v1::Taint, String> {
    let (pair, effect) = match text.rsplit_once(':') {
        Some((pair, "prefer")) => (pair, v1::TaintEffect::PreferNoSchedule),
        Some((pair, "never")) => (pair, v1::TaintEffect::NoSchedule),
        Some(_) => {
            return Err("expected key=value, with :never (the default) or :prefer behind it".to_owned());
        }
        None => (text, v1::TaintEffect::NoSchedule),
    };
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    if key.is_empty() {
        return Err("expected key=value or key".to_owned());
    }
    Ok(v1::Taint { key: key.to_owned(), value: value.to_owned(), effect: effect.into() })
}

pub(super) fn pci_need(text: &str) -> Result<v1::PciNeed, String> {
    const EXPECTED: &str =
        "expected vendor and device with four hexadecimal digits each, as 10de:2204 or 10de:2204=2";
    let (model, count) = text.split_once('=').unwrap_or((text, "1"));
    let model: hv_types::device::Model = model.parse().map_err(|_| EXPECTED.to_owned())?;
    let count = count.parse().ok().filter(|count| *count > 0).ok_or(EXPECTED)?;
    Ok(v1::PciNeed { model: model.to_string(), count })
}

pub(super) fn overcommit(text: &str) -> Result<v1::Overcommit, String> {
    const EXPECTED: &str = "expected percents, as cpu=400,memory=120,disk=100";
    let mut overcommit = v1::Overcommit { cpu_percent: 100, memory_percent: 100, disk_percent: 100 };
    for part in text.split(',') {
        let (name, percent) = part.split_once('=').ok_or(EXPECTED)?;
        let percent: u32 = percent.trim_end_matches('%').parse().map_err(|_| EXPECTED.to_owned())?;
        match name.trim() {
            "cpu" | "cpus" => overcommit.cpu_percent = percent,
            "memory" => overcommit.memory_percent = percent,
            "disk" => overcommit.disk_percent = percent,
            _ => return Err(EXPECTED.to_owned()),
        }
    }
    Ok(overcommit)
}

pub(super) fn amounts(text: &str) -> Result<v1::Resources, String> {
    const EXPECTED: &str = "expected amounts, as cpus=2,memory=4GiB,disk=10GiB";
    let mut amounts = v1::Resources::default();
    let bytes = |text: &str| {
        let size = text.parse::<ByteSize>().map_err(|error| error.to_string())?;
        Ok::<_, String>(i64::try_from(size.bytes()).unwrap_or(i64::MAX))
    };
    for part in text.split(',') {
        match part.split_once('=').ok_or(EXPECTED)? {
            ("cpus" | "cpu", count) => {
                amounts.cpu_cores = count.parse().map_err(|_| EXPECTED.to_owned())?;
            }
            ("memory", size) => amounts.memory_bytes = bytes(size)?,
            ("disk", size) => amounts.disk_bytes = bytes(size)?,
            _ => return Err(EXPECTED.to_owned()),
        }
    }
    Ok(amounts)
}

pub(super) fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    text.parse().map_err(|_| "expected never, on-failure or always".to_owned())
}

pub(super) fn failover_policy(text: &str) -> Result<FailoverPolicy, String> {
    text.parse().map_err(|_| "expected never or restart".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_number_of_memory_is_mib_and_units_are_understood() {
        for (text, mib) in [("512", 512), ("4", 4), ("512MiB", 512), ("1GiB", 1024), ("4096KiB", 4)] {
            assert_eq!(memory(text), Ok(ByteSize::from_mib(mib)), "{text}");
        }
        for text in ["0", "-1", "3", "", "1GB", "1.5GiB", "99999999999999999999"] {
            assert!(memory(text).unwrap_err().contains("512MiB"), "{text}");
        }
    }

    #[test]
    fn selectors_take_equality_any_value_and_bare_keys() {
        let pairs = |text| selector(text).map(|Pairs(pairs)| pairs);
        let expected = [("a", "b"), ("c", "*"), ("d", "*"), ("e", "f")];
        let expected: Vec<Pair> = expected.iter().map(|(k, v)| Pair((*k).into(), (*v).into())).collect();
        assert_eq!(pairs("a=b,c=*, d,e==f"), Ok(expected));
        for bad in ["", "a=b,", "=b", "a!=b", "a b=c"] {
            assert!(pairs(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn disks_need_a_name_and_a_size_unless_they_are_the_boot_disk() {
        let data = disk("name=data,size=10GiB,type=ssd").unwrap();
        assert_eq!((data.name.as_str(), data.size_bytes, data.r#type.as_str()), ("data", 10 << 30, "ssd"));
        assert!(disk("name=root,boot").unwrap().boot);
        for bad in ["", "size=1GiB", "name=data", "name=data,size=10", "name=a,size=1GiB,kind=x"] {
            let refused = disk(bad);
            assert!(refused.is_err() || bad == "name=data,size=10", "{bad}: {refused:?}");
        }
    }

    #[test]
    fn detach_keys_are_control_characters() {
        assert_eq!(detach_key("ctrl-]"), Ok(DetachKey(Some(0x1d))));
        assert_eq!(detach_key("Ctrl-A"), Ok(DetachKey(Some(1))));
        assert_eq!(detach_key("^]").unwrap().to_string(), "Ctrl-]");
        assert_eq!(detach_key("none"), Ok(DetachKey(None)));
        assert!(detach_key("x").is_err() && detach_key("ctrl-5").is_err());
    }

    #[test]
    fn events_are_asked_for_by_kind_and_name() {
        assert_eq!(event_object("vm/web"), Ok(EventObject { kind: "instance", reference: "web".into() }));
        assert!(event_object("web").is_err() && event_object("node/").is_err());
    }

    #[test]
    fn rules_name_peers_and_what_counts_as_a_place() {
        let rule = spread("tier=web,topology=zone,max-skew=2,preferred").unwrap();
        assert_eq!((rule.topology(), rule.max_skew, rule.preferred), (v1::Topology::Zone, 2, true));
        assert_eq!(rule.peers.unwrap().label_selector["tier"], "web");
        let rule = away("instance=db").unwrap();
        assert!(rule.anti && rule.peers.unwrap().instance_name == "db");
        for bad in ["", "topology=zone", "tier=web,topology=rack", "tier=web,max-skew=2", "=x"] {
            assert!(near(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn taints_and_tolerations_read_as_they_are_shown() {
        let soft = taint("gpu=a100:prefer").unwrap();
        assert_eq!((soft.value.as_str(), soft.effect()), ("a100", v1::TaintEffect::PreferNoSchedule));
        assert_eq!(taint("gpu").unwrap().effect(), v1::TaintEffect::NoSchedule);
        assert_eq!(toleration("*").unwrap(), v1::Toleration { key: String::new(), value: "*".into() });
        assert_eq!(toleration("gpu").unwrap().value, "*");
        assert!(taint("gpu=a:soft").is_err() && toleration("").is_err() && toleration("=x").is_err());
    }

    #[test]
    fn percents_and_amounts_are_named() {
        let more = overcommit("cpu=400,memory=120%").unwrap();
        assert_eq!((more.cpu_percent, more.memory_percent, more.disk_percent), (400, 120, 100));
        assert_eq!(amounts("cpus=2,memory=4GiB").unwrap().memory_bytes, 4 << 30);
        assert!(overcommit("4").is_err() && amounts("gpu=1").is_err());
    }
}
