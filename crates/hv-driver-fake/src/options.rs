//! The fake's options.

use std::path::PathBuf;

use hv_driver::Capability;
use hv_types::InstanceType;
use serde::{Deserialize, Serialize};

use crate::script::Script;

/// What it can do, all of it. A fake can be told to be able to do less.
pub const CAPABILITIES: [Capability; 20] = [
    Capability::Pause,
    Capability::Console,
    Capability::Logs,
    Capability::Exec,
    Capability::ExecTty,
    Capability::UserData,
    Capability::DirectBoot,
    Capability::ResizeLive,
    Capability::HotplugDisk,
    Capability::HotplugNetwork,
    Capability::Snapshot,
    Capability::SnapshotMemory,
    Capability::Clone,
    Capability::Migrate,
    Capability::MigrateStorage,
    Capability::Limits,
    Capability::Volumes,
    Capability::FetchedImages,
    Capability::Rescue,
    Capability::Devices,
];

/// The fake's configuration; in an agent's configuration file the section of its name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FakeOptions {
    /// Where it keeps one small file per instance. Made when needed.
    pub state_dir: PathBuf,
    /// What it claims to run.
    pub instance_type: InstanceType,
    /// The images it claims to have.
    pub images: Vec<String>,
    /// What it claims to be able to do; anything else is refused as unsupported.
    pub capabilities: Vec<Capability>,
    /// Whether it claims to work.
    pub healthy: bool,
    /// What goes slowly and what goes wrong, for every instance.
    pub script: Script,
}

impl Default for FakeOptions {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::new(),
            instance_type: InstanceType::Vm,
            images: vec!["tiny".to_owned()],
            capabilities: CAPABILITIES.to_vec(),
            healthy: true,
            script: Script::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn options_are_read_from_a_partial_document() {
        let json = r#"{"state_dir": "x", "script": {"start": {"delay": "2s"}, "exit_after": "1m"}}"#;
        let options: FakeOptions = serde_json::from_str(json).unwrap();
        assert_eq!(options.script.start.delay, Duration::from_secs(2));
        assert_eq!(options.script.exit_after, Some(Duration::from_mins(1)));
        assert_eq!(options.images, ["tiny"]);
        assert!(serde_json::from_str::<FakeOptions>(r#"{"stat_dir": "x"}"#).is_err());
    }
}
