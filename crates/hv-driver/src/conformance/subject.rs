//! What a driver's own tests bring to the suite.

use std::sync::Arc;

use async_trait::async_trait;
use hv_types::instance::{NetworkSpec, VolumeMount};
use hv_types::{InstanceId, InstanceSpec};

use crate::{Driver, InstanceConfig, LocalImage, Storage};

/// A driver under test, with what only its own tests know. Its guests print [`Subject::greeting`] on their console,
/// then echo what is typed, and power off when asked to.
#[async_trait]
pub trait Subject: Send + Sync {
    /// A driver over the subject's state, as a new agent process makes it. The one before has been dropped.
    fn driver(&self) -> Arc<dyn Driver>;

    /// A small instance.
    fn spec(&self) -> InstanceSpec;

    /// What its guest prints first.
    fn greeting(&self) -> &str;

    /// Makes an instance one whose guest powers off by itself soon after its start.
    fn make_short_lived(&self, config: &mut InstanceConfig);

    /// What a crash in the middle of `create` leaves of an instance.
    fn leave_half_created(&self, config: &InstanceConfig);

    /// Kills the running instance behind the driver's back.
    async fn kill(&self, id: &InstanceId);

    /// How many copies of an instance run, counted without the driver.
    fn copies(&self, id: &InstanceId) -> usize;

    /// Everything that lies around of any instance, on both nodes: files, processes.
    fn leftovers(&self) -> Vec<String>;

    /// The driver of another node, with a state of its own, to which the first one can migrate; each call makes it as
    /// a new agent process does. `None`: the subject has one node only, and the claims about migration are skipped.
    fn second_driver(&self) -> Option<Arc<dyn Driver>> {
        None
    }

    /// What may become of the disks when something migrates between the two drivers.
    fn storage(&self) -> Vec<Storage> {
        vec![Storage::Copied]
    }

    /// A guest that keeps a number in its memory. `None`: claims that memory was kept look at states only.
    fn counter(&self) -> Option<Counter> {
        None
    }

    /// A guest that keeps a number on its boot disk.
    fn disk_counter(&self) -> Option<Counter> {
        None
    }

    /// A guest in which the driver can run commands, with `sh`, `cat`, `env` and, for a terminal, `stty`. `None`: the
    /// claims about what commands do are skipped.
    fn shell(&self) -> Option<InstanceSpec> {
        None
    }

    /// The guest of [`Subject::spec`] as an image of the node's store. `None`: only refusals are tried.
    fn local_image(&self) -> Option<LocalImage> {
        None
    }

    /// An image that [`Subject::spec`] can be rescued with: its name, and what its guest prints first, which
    /// [`Subject::greeting`] is no part of.
    fn rescue_image(&self) -> Option<(String, String)> {
        None
    }

    /// What a running instance has, asked of its runtime without the driver. `None`: it cannot be asked, and the driver
    /// is believed.
    async fn measured(&self, id: &InstanceId) -> Option<Measured> {
        let _ = id;
        None
    }

    /// Leaves behind what a crash in the middle of a snapshot of this name leaves. `false`: nothing of the kind.
    async fn leave_half_snapshot(&self, id: &InstanceId, name: &str) -> bool {
        let _ = (id, name);
        false
    }

    /// A network that exists, and that an instance of [`Subject::spec`] is not on.
    fn network(&self) -> Option<NetworkSpec> {
        None
    }

    /// A directory of the node to mount in [`Subject::spec`].
    fn volume(&self) -> Option<VolumeMount> {
        None
    }

    /// A guest that is booted from a kernel file.
    fn kernel(&self) -> Option<InstanceSpec> {
        None
    }

    /// What the driver stands on, where a crate runs the suite more than once: `double`, `snapshotter native`, …
    fn against(&self) -> &str {
        ""
    }

    /// Whether what comes of the claims says something about the driver, and belongs in the table of all drivers.
    fn is_in_table(&self) -> bool {
        true
    }

    /// The most that is kept of what a guest printed, in bytes. `None`: more than a test can print.
    fn log_bound(&self) -> Option<u64> {
        None
    }
}

/// How a guest that counts is asked. Beside that it is as every guest of the suite: it greets and echoes.
#[derive(Clone, Debug)]
pub struct Counter {
    /// The guest.
    pub spec: InstanceSpec,
    /// What is typed on its console, with the end of the line.
    pub ask: String,
    /// What it then prints before the number, in decimal, and a line end. Not part of `ask`.
    pub answer: String,
    /// When the number grows.
    pub grows: Grows,
}

/// When the number of a [`Counter`] grows. It begins at 0 or 1 when the guest boots, or, on a disk, when that is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grows {
    /// By one with each answer, and not otherwise.
    WhenAsked,
    /// By itself, as long as the guest runs.
    ByItself,
}

/// What a running instance has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Processor cores, where it can be told.
    pub cpu_cores: Option<u32>,
    /// Memory in bytes, where it can be told.
    pub memory_bytes: Option<u64>,
    /// Its disks beside the boot disk, in bytes, smallest first, where it can be told.
    pub disks: Option<Vec<u64>>,
}
