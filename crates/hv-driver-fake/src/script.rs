//! What goes slowly and what goes wrong: a script for the whole driver, annotations for one instance.

use std::time::Duration;

use hv_types::Metadata;
use serde::{Deserialize, Serialize};

/// What every annotation of the fake begins with.
pub const ANNOTATION_PREFIX: &str = "fake.hypervisor/";
/// A count that is never used up; written `always`.
pub const ALWAYS: u32 = u32::MAX;

/// What goes slowly and what goes wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Script {
    /// Seed of the failures by probability.
    pub seed: u64,
    /// Creating.
    pub create: Step,
    /// Starting.
    pub start: Step,
    /// Stopping.
    pub stop: Step,
    /// Pausing.
    pub pause: Step,
    /// Resuming.
    pub resume: Step,
    /// Deleting.
    pub delete: Step,
    /// Changing what it is made of.
    pub update: Step,
    /// Taking a snapshot.
    pub snapshot: Step,
    /// Returning to a snapshot.
    pub revert: Step,
    /// Making an instance from a snapshot.
    pub clone: Step,
    /// Preparing for what another node hands over.
    pub prepare: Step,
    /// Handing over. The call returns at once all the same: the delay is how long the transfer takes.
    pub migrate: Step,
    /// Giving up a migration.
    pub abort: Step,
    /// The guest ends by itself so long after its start.
    #[serde(with = "duration::option")]
    pub exit_after: Option<Duration>,
    /// With this code.
    pub exit_code: i32,
    /// Only after the first so many starts; `None`: after each.
    pub exits: Option<u32>,
    /// The guest does not hear that it is to power off: a graceful stop takes its whole timeout.
    pub ignore_shutdown: bool,
    /// Every change waits for the next start.
    pub update_waits: bool,
    /// The first so many migrations break down half-way, and the instance runs on.
    pub migration_breaks: u32,
    /// The first so many migrations stay half-way until they are given up.
    pub migration_hangs: u32,
}

/// How one operation goes. Counts are per instance and outlive the agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Step {
    /// It takes so long.
    #[serde(with = "duration")]
    pub delay: Duration,
    /// The first so many attempts fail; trying again helps.
    pub fail: u32,
    /// Each attempt fails with this probability, 0 to 1.
    pub fail_probability: f64,
    /// Every attempt fails; trying again does not help.
    pub fail_permanently: bool,
    /// The first so many attempts succeed and are reported as failed.
    pub fail_late: u32,
    /// The first so many attempts never return.
    pub hang: u32,
}

impl Step {
    pub(crate) fn counts(&self) -> bool {
        self.fail > 0 || self.fail_late > 0 || self.hang > 0
    }
}

/// An operation that can be scripted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Create.
    Create,
    /// Start.
    Start,
    /// Stop.
    Stop,
    /// Pause.
    Pause,
    /// Resume.
    Resume,
    /// Delete.
    Delete,
    /// Update.
    Update,
    /// Take a snapshot.
    Snapshot,
    /// Return to a snapshot.
    Revert,
    /// Make an instance from a snapshot.
    Clone,
    /// Prepare for what another node hands over.
    Prepare,
    /// Hand over to another node.
    Migrate,
    /// Give a migration up.
    Abort,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 13] = [
        Self::Create,
        Self::Start,
        Self::Stop,
        Self::Pause,
        Self::Resume,
        Self::Delete,
        Self::Update,
        Self::Snapshot,
        Self::Revert,
        Self::Clone,
        Self::Prepare,
        Self::Migrate,
        Self::Abort,
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
            Self::Update => "update",
            Self::Snapshot => "snapshot",
            Self::Revert => "revert",
            Self::Clone => "clone",
            Self::Prepare => "prepare",
            Self::Migrate => "migrate",
            Self::Abort => "abort",
        }
    }
}

impl Script {
    /// The step of an operation.
    pub fn step_mut(&mut self, operation: Operation) -> &mut Step {
        match operation {
            Operation::Create => &mut self.create,
            Operation::Start => &mut self.start,
            Operation::Stop => &mut self.stop,
            Operation::Pause => &mut self.pause,
            Operation::Resume => &mut self.resume,
            Operation::Delete => &mut self.delete,
            Operation::Update => &mut self.update,
            Operation::Snapshot => &mut self.snapshot,
            Operation::Revert => &mut self.revert,
            Operation::Clone => &mut self.clone,
            Operation::Prepare => &mut self.prepare,
            Operation::Migrate => &mut self.migrate,
            Operation::Abort => &mut self.abort,
        }
    }

    /// This script with an instance's annotations on top: `fake.hypervisor/fail-create: "2"`, `delay-start: "500ms"`,
    /// `hang-stop: "always"`, `fail-permanently-create: "true"`, `fail-late-start: "1"`, `exit-after: "1s"`,
    /// `exit-code: "3"`, `exits: "2"` (only the first two starts end so), `ignore-shutdown: "true"`,
    /// `update-waits: "true"`, `migration-breaks: "1"`, `migration-hangs: "1"`; the operations are those of
    /// [`Operation`].
    ///
    /// # Errors
    /// Names the annotation that is not understood.
    pub fn with_annotations(mut self, metadata: &Metadata) -> Result<Self, String> {
        for (key, value) in &metadata.annotations {
            if let Some(name) = key.strip_prefix(ANNOTATION_PREFIX) {
                self.annotate(name, value).map_err(|what| format!("annotation `{key}: {value}`: {what}"))?;
            }
        }
        Ok(self)
    }

    fn annotate(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "exit-after" => self.exit_after = Some(duration::parse(value)?),
            "exit-code" => self.exit_code = value.parse().map_err(|_| "must be a number".to_owned())?,
            "exits" => self.exits = Some(count(value)?),
            "ignore-shutdown" => self.ignore_shutdown = flag(value)?,
            "update-waits" => self.update_waits = flag(value)?,
            "migration-breaks" => self.migration_breaks = count(value)?,
            "migration-hangs" => self.migration_hangs = count(value)?,
            _ => {
                let unknown = || format!("the fake knows no `{name}`");
                let (what, operation) = name.rsplit_once('-').ok_or_else(unknown)?;
                let is_named = |candidate: &Operation| candidate.name() == operation;
                let operation = Operation::ALL.into_iter().find(is_named).ok_or_else(unknown)?;
                let step = self.step_mut(operation);
                match what {
                    "delay" => step.delay = duration::parse(value)?,
                    "fail" => step.fail = count(value)?,
                    "fail-late" => step.fail_late = count(value)?,
                    "fail-permanently" => step.fail_permanently = flag(value)?,
                    "hang" => step.hang = count(value)?,
                    _ => return Err(unknown()),
                }
            }
        }
        Ok(())
    }
}

fn count(value: &str) -> Result<u32, String> {
    match value {
        "always" | "true" => Ok(ALWAYS),
        number => number.parse().map_err(|_| "must be a count or `always`".to_owned()),
    }
}

fn flag(value: &str) -> Result<bool, String> {
    value.parse().map_err(|_| "must be `true` or `false`".to_owned())
}

/// Durations as people write them: `250ms`, `2s`, `1m`.
mod duration {
    use std::time::Duration;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn parse(text: &str) -> Result<Duration, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit_ms = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            _ => 0,
        };
        match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)) {
            Some(ms) if unit_ms > 0 => Ok(Duration::from_millis(ms)),
            _ => Err("must be a duration such as `250ms`, `2s` or `1m`".to_owned()),
        }
    }

    pub(super) fn serialize<S: Serializer>(value: &Duration, out: S) -> Result<S::Ok, S::Error> {
        out.collect_str(&format_args!("{}ms", value.as_millis()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }

    pub(super) mod option {
        use super::{Deserialize, Deserializer, Duration, Error, Serializer, parse};

        pub(in super::super) fn serialize<S: Serializer>(
            v: &Option<Duration>,
            out: S,
        ) -> Result<S::Ok, S::Error> {
            match v {
                Some(v) => super::serialize(v, out),
                None => out.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Option::<String>::deserialize(from)?
                .map(|text| parse(&text).map_err(D::Error::custom))
                .transpose()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(key: &str, value: &str) -> Result<Script, String> {
        let mut metadata = Metadata::default();
        metadata.annotations.insert(format!("{ANNOTATION_PREFIX}{key}"), value.to_owned());
        Script::default().with_annotations(&metadata)
    }

    #[test]
    fn annotations_override_the_script() {
        assert_eq!(annotated("fail-create", "2").unwrap().create.fail, 2);
        assert_eq!(annotated("hang-stop", "always").unwrap().stop.hang, ALWAYS);
        assert_eq!(annotated("delay-start", "500ms").unwrap().start.delay, Duration::from_millis(500));
        assert_eq!(annotated("exit-after", "1s").unwrap().exit_after, Some(Duration::from_secs(1)));
        assert!(annotated("fail-permanently-create", "true").unwrap().create.fail_permanently);
    }

    #[test]
    fn an_annotation_that_is_not_understood_is_named() {
        for (key, value) in
            [("delay-start", "5"), ("fail-create", "-1"), ("fial-create", "1"), ("nonsense", "")]
        {
            let refusal = annotated(key, value).unwrap_err();
            assert!(refusal.contains(key), "{refusal}");
        }
    }
}
