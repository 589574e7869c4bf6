//! What has to be done so that an instance is as its document says: a pure comparison.

mod resize;

use std::collections::BTreeMap;

use hv_proto::convert::create_request_from;
use hv_proto::v1::{self, InstanceState, InstanceWanted};
use serde_json::Value;

use super::document::{Desired, Wanted};
use crate::command::Verb;
use crate::error::CtlError;
use crate::output::text::escape;
use crate::show::instance::type_name;

/// What has to be done.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// What changes, one line each, for people: `~ field: old → new`.
    pub(crate) changes: Vec<String>,
    /// Whether it must be created first.
    pub(crate) create: bool,
    /// The new labels and annotations.
    pub(crate) metadata: Option<v1::Metadata>,
    /// What else becomes different of it, without its id and a key.
    pub(crate) update: Option<v1::UpdateInstanceRequest>,
    /// What to ask of it then, in order; each is waited for before the next.
    pub(crate) verbs: Vec<Verb>,
}

impl Plan {
    /// Whether nothing has to be done.
    pub(crate) fn is_empty(&self) -> bool {
        !self.create && self.metadata.is_none() && self.update.is_none() && self.verbs.is_empty()
    }
}

/// Compares.
///
/// # Errors
/// [`CtlError::Document`] where the document asks for something that cannot be, or for another value of a field that
/// cannot change; [`CtlError::Precondition`] where the instance is being deleted.
pub(crate) fn plan(desired: &Desired, existing: Option<&v1::Instance>) -> Result<Plan, CtlError> {
    match existing {
        None => plan_creation(desired),
        Some(existing) => plan_update(desired, existing),
    }
}

fn plan_creation(desired: &Desired) -> Result<Plan, CtlError> {
    // The server's own checks, so that nothing is begun that would be refused half way.
    let mut checked = desired.request.clone();
    // A host name may stand where only an id is allowed; it is looked up later.
    checked.preferred_node_id.clear();
    create_request_from(checked)
        .map_err(|invalid| CtlError::Document(format!("{}: {invalid}", desired.place)))?;

    let mut changes = Vec::new();
    let json = serde_json::to_value(&desired.request).unwrap_or_default();
    flatten("", &json, &mut |path, value| {
        if path != "name" {
            changes.push(format!("+ {}: {}", snake(path), shown(value)));
        }
    });
    let wanted = desired.wanted.unwrap_or(Wanted::Running);
    changes.push(format!("+ wanted: {}", wanted.word()));
    let verbs = match wanted {
        Wanted::Running => vec![],
        Wanted::Stopped => vec![stop()],
        Wanted::Paused => vec![Verb::Pause],
    };
    Ok(Plan { changes, create: true, metadata: None, update: None, verbs })
}

fn plan_update(desired: &Desired, existing: &v1::Instance) -> Result<Plan, CtlError> {
    if existing.wanted() == InstanceWanted::Deleted {
        let name = escape(&existing.name);
        return Err(CtlError::Precondition(format!(
            "{}: instance {name} is being deleted; apply again when it is gone",
            desired.place
        )));
    }
    refuse_immutable(desired, existing)?;

    let mut changes = Vec::new();
    let old = existing.metadata.clone().unwrap_or_default();
    let mut new = old.clone();
    if let Some(labels) = &desired.labels {
        compare("metadata.labels", &old.labels.iter().collect(), labels, &mut changes);
        new.labels = labels.clone().into_iter().collect();
    }
    if let Some(annotations) = &desired.annotations {
        compare("metadata.annotations", &old.annotations.iter().collect(), annotations, &mut changes);
        new.annotations = annotations.clone().into_iter().collect();
    }
    let metadata = (!changes.is_empty()).then_some(new);
    let update = resize::plan(desired, existing, &mut changes)?;

    let verbs = desired.wanted.map(|wanted| verbs(wanted, existing)).unwrap_or_default();
    if let Some(wanted) = desired.wanted.filter(|_| !verbs.is_empty()) {
        let now = existing.wanted().as_str_name().trim_start_matches("INSTANCE_WANTED_").to_ascii_lowercase();
        let now = if now == wanted.word() {
            existing.state().as_str_name().trim_start_matches("INSTANCE_STATE_")
        } else {
            &now
        };
        changes.push(format!("~ wanted: {now} → {}", wanted.word()));
    }
    Ok(Plan { changes, create: false, metadata, update, verbs })
}

/// What leads from what is wanted now to what the document wants.
fn verbs(wanted: Wanted, existing: &v1::Instance) -> Vec<Verb> {
    let down = matches!(existing.state(), InstanceState::Failed | InstanceState::Stopped);
    match (wanted, existing.wanted()) {
        (Wanted::Running, InstanceWanted::Running) if down => vec![Verb::Start],
        (Wanted::Running, InstanceWanted::Running) => vec![],
        (Wanted::Running, InstanceWanted::Paused) => vec![Verb::Resume],
        (Wanted::Running, _) => vec![Verb::Start],
        (Wanted::Stopped, InstanceWanted::Stopped) => vec![],
        (Wanted::Stopped, _) => vec![stop()],
        (Wanted::Paused, InstanceWanted::Paused) => vec![],
        (Wanted::Paused, InstanceWanted::Running) if !down => vec![Verb::Pause],
        (Wanted::Paused, _) => vec![Verb::Start, Verb::Pause],
    }
}

fn stop() -> Verb {
    Verb::Stop { force: false, timeout_seconds: 0 }
}

/// Refuses another value of what cannot change. Only what the document gives is compared: the server fills in the rest.
fn refuse_immutable(desired: &Desired, existing: &v1::Instance) -> Result<(), CtlError> {
    let refuse = |field: &str, now: &str, new: &str| {
        let name = escape(&existing.name);
        CtlError::Document(format!(
            "{}: {field}: instance {name} has {now}, which cannot be changed to {new}; take the old value, or delete the \
             instance first with `hypervisor-ctl instance delete {name}`",
            desired.place
        ))
    };
    let (now, new) = (existing.r#type(), desired.request.r#type());
    if new != v1::InstanceType::Unspecified && new != now {
        return Err(refuse("type", type_name(now), type_name(new)));
    }
    let spec = |spec: &Option<v1::InstanceSpec>| json(&spec.clone().unwrap_or_default());
    let differs = |(now, new): (&Value, &Value), fields: &[&str], prefix: &str| {
        let field = fields.iter().find(|field| !same(now.get(field), new.get(field)))?;
        let text = |value: &Value| value.get(field).map_or_else(|| "none".to_owned(), shown);
        Some(refuse(&format!("{prefix}{}", snake(field)), &text(now), &text(new)))
    };
    let specs = (spec(&existing.spec), spec(&desired.request.spec));
    let rules = (json(existing), json(&desired.request));
    let fixed: Vec<&str> =
        desired.given.iter().copied().filter(|field| !resize::CHANGEABLE.contains(field)).collect();
    differs((&specs.0, &specs.1), &fixed, "spec.")
        .or_else(|| differs((&rules.0, &rules.1), &desired.given_rules, ""))
        .map_or(Ok(()), Err)
}

fn json(message: &impl serde::Serialize) -> Value {
    serde_json::to_value(message).unwrap_or_default()
}

/// Equal, where nothing and an empty message are the same.
fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    let filled = |value: Option<&Value>| {
        value
            .filter(|value| {
                !matches!(value, Value::Null) && value.as_object().is_none_or(|map| !map.is_empty())
            })
            .cloned()
    };
    filled(a) == filled(b)
}

fn compare(
    path: &str,
    old: &BTreeMap<&String, &String>,
    new: &BTreeMap<String, String>,
    changes: &mut Vec<String>,
) {
    for (key, value) in new {
        match old.get(key) {
            None => changes.push(format!("+ {path}.{}: {}", escape(key), quoted(value))),
            Some(now) if *now != value => {
                changes.push(format!("~ {path}.{}: {} → {}", escape(key), quoted(now), quoted(value)));
            }
            Some(_) => {}
        }
    }
    for (key, value) in old.iter().filter(|(key, _)| !new.contains_key(**key)) {
        changes.push(format!("- {path}.{}: {}", escape(key), quoted(value)));
    }
}

/// A value on one line, cut where it is long.
fn quoted(text: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}… ({} bytes)", escape(&text[..end]), text.len()),
        None => escape(text),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        other => quoted(&other.to_string()),
    }
}

/// Visits each value of nested objects with its dotted path.
fn flatten(path: &str, value: &Value, visit: &mut dyn FnMut(&str, &Value)) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                flatten(&path, value, visit);
            }
        }
        value => visit(path, value),
    }
}

/// `spec.memoryBytes` as documents usually spell it.
fn snake(path: &str) -> String {
    let mut text = String::new();
    // Below metadata and selectors the names are the user's own.
    let own = ["metadata.", "nodeSelector.", "spec.env."].into_iter().find(|prefix| path.starts_with(prefix));
    for (index, c) in path.char_indices() {
        if c.is_ascii_uppercase() && own.is_none_or(|prefix| index < prefix.len()) {
            text.push('_');
            text.push(c.to_ascii_lowercase());
        } else {
            text.push(c);
        }
    }
    escape(&text)
}

#[cfg(test)]
mod tests;
