//! The calls of libvirt's protocol that are used, with their numbers and flags.
//!
//! The numbers are those of `remote_protocol.x` and `qemu_protocol.x`; libvirt never changes one, because every client
//! must go on talking to every server. Flags are those of libvirt's public headers.

/// The main program (`REMOTE_PROGRAM`).
pub(crate) const REMOTE: u32 = 0x2000_8086;
/// What only QEMU has (`QEMU_PROGRAM`).
const QEMU: u32 = 0x2000_8087;

/// A procedure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) program: u32,
    pub(crate) number: u32,
    pub(crate) name: &'static str,
}

const fn remote(number: u32, name: &'static str) -> Call {
    Call { program: REMOTE, number, name }
}

/// The procedures.
pub(crate) mod call {
    use super::{Call, QEMU, remote};

    pub(crate) const OPEN: Call = remote(1, "connect open");
    pub(crate) const CAPABILITIES: Call = remote(7, "capabilities");
    pub(crate) const DOMAIN_XML: Call = remote(14, "domain xml");
    pub(crate) const RESUME: Call = remote(28, "domain resume");
    pub(crate) const SUSPEND: Call = remote(34, "domain suspend");
    pub(crate) const NETWORK_LOOKUP: Call = remote(46, "network lookup");
    pub(crate) const AUTH_LIST: Call = remote(66, "auth list");
    pub(crate) const POOL_LOOKUP: Call = remote(84, "storage pool lookup");
    pub(crate) const POOL_XML: Call = remote(88, "storage pool xml");
    pub(crate) const LIB_VERSION: Call = remote(157, "library version");
    pub(crate) const ATTACH_DEVICE: Call = remote(160, "attach device");
    pub(crate) const DETACH_DEVICE: Call = remote(161, "detach device");
    pub(crate) const ABORT_JOB: Call = remote(164, "abort job");
    pub(crate) const SET_MAX_DOWNTIME: Call = remote(166, "migrate set max downtime");
    pub(crate) const SNAPSHOT_CREATE: Call = remote(185, "snapshot create");
    pub(crate) const SNAPSHOT_XML: Call = remote(186, "snapshot xml");
    pub(crate) const SNAPSHOT_LOOKUP: Call = remote(189, "snapshot lookup");
    pub(crate) const SNAPSHOT_REVERT: Call = remote(192, "snapshot revert");
    pub(crate) const SNAPSHOT_DELETE: Call = remote(193, "snapshot delete");
    pub(crate) const CREATE: Call = remote(196, "domain create");
    pub(crate) const SET_VCPUS: Call = remote(199, "set vcpus");
    pub(crate) const STATE: Call = remote(212, "domain state");
    pub(crate) const UNDEFINE: Call = remote(231, "domain undefine");
    pub(crate) const DESTROY: Call = remote(234, "domain destroy");
    pub(crate) const BLOCK_RESIZE: Call = remote(251, "block resize");
    pub(crate) const SHUTDOWN: Call = remote(258, "domain shutdown");
    pub(crate) const LIST_SNAPSHOTS: Call = remote(274, "list snapshots");
    pub(crate) const JOB_STATS: Call = remote(298, "job stats");
    pub(crate) const MIGRATE_BEGIN: Call = remote(302, "migrate begin");
    pub(crate) const MIGRATE_PREPARE: Call = remote(303, "migrate prepare");
    pub(crate) const MIGRATE_PERFORM: Call = remote(305, "migrate perform");
    pub(crate) const MIGRATE_FINISH: Call = remote(306, "migrate finish");
    pub(crate) const MIGRATE_CONFIRM: Call = remote(307, "migrate confirm");
    pub(crate) const REGISTER_EVENT: Call = remote(316, "register event");
    pub(crate) const DOMAIN_CAPABILITIES: Call = remote(342, "domain capabilities");
    pub(crate) const ALL_STATS: Call = remote(344, "all domain stats");
    pub(crate) const DEFINE: Call = remote(350, "domain define");
    pub(crate) const INTERFACE_ADDRESSES: Call = remote(353, "interface addresses");
    pub(crate) const AGENT_COMMAND: Call = Call { program: QEMU, number: 3, name: "guest agent command" };
}

/// The event messages.
pub(crate) mod event {
    /// The life cycle (`REMOTE_PROC_DOMAIN_EVENT_CALLBACK_LIFECYCLE`).
    pub(crate) const LIFECYCLE: u32 = 318;
    /// An error of a disk (`…_IO_ERROR_REASON`).
    pub(crate) const IO_ERROR: u32 = 324;
    /// A device has gone (`…_DEVICE_REMOVED`).
    pub(crate) const DEVICE_REMOVED: u32 = 333;
    /// What to ask for each (`virDomainEventID`).
    pub(crate) const IDS: [i32; 3] = [0, 6, 15];

    /// `VIR_DOMAIN_EVENT_SUSPENDED`, `STOPPED` and `CRASHED`.
    pub(crate) const SUSPENDED: i32 = 3;
    pub(crate) const STOPPED: i32 = 5;
    pub(crate) const CRASHED: i32 = 8;
    /// Stopped because a disk failed (`VIR_DOMAIN_EVENT_SUSPENDED_IOERROR`).
    pub(crate) const SUSPENDED_IOERROR: i32 = 2;
}

/// The states of a domain (`virDomainState`).
pub(crate) mod state {
    pub(crate) const PAUSED: i32 = 3;
    pub(crate) const SHUTOFF: i32 = 5;
    pub(crate) const CRASHED: i32 = 6;
    /// Paused because its memory was handed over (`VIR_DOMAIN_PAUSED_MIGRATION`).
    pub(crate) const PAUSED_MIGRATION: i32 = 2;
    /// Libvirt has still work to do before it runs (`VIR_DOMAIN_PAUSED_STARTING_UP`).
    pub(crate) const PAUSED_STARTING_UP: i32 = 11;
    /// The guest powered off (`VIR_DOMAIN_SHUTOFF_SHUTDOWN`).
    pub(crate) const SHUTOFF_SHUTDOWN: i32 = 1;
    pub(crate) const SHUTOFF_DESTROYED: i32 = 2;
    pub(crate) const SHUTOFF_CRASHED: i32 = 3;
    pub(crate) const SHUTOFF_MIGRATED: i32 = 4;
    pub(crate) const SHUTOFF_FAILED: i32 = 6;
}

/// Flags.
pub(crate) mod flag {
    /// `VIR_DOMAIN_UNDEFINE_MANAGED_SAVE`, `_SNAPSHOTS_METADATA`, `_NVRAM`, `_CHECKPOINTS_METADATA`.
    pub(crate) const UNDEFINE: u32 = 1 | 2 | 4 | 16;
    /// `VIR_DOMAIN_UNDEFINE_TPM`, since 8.9.
    pub(crate) const UNDEFINE_TPM: u32 = 32;
    /// `VIR_DOMAIN_START_FORCE_BOOT`: no managed save is looked at.
    pub(crate) const START: u32 = 8;
    /// `VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN`.
    pub(crate) const POWER_BUTTON: u32 = 1;
    /// `VIR_DOMAIN_AFFECT_LIVE`.
    pub(crate) const LIVE: u32 = 1;
    /// `VIR_DOMAIN_BLOCK_RESIZE_BYTES`.
    pub(crate) const RESIZE_BYTES: u32 = 1;
    /// `VIR_DOMAIN_XML_SECURE` and `_MIGRATABLE`.
    pub(crate) const XML_MIGRATABLE: u32 = 1 | 8;
    /// `VIR_DOMAIN_SNAPSHOT_REVERT_FORCE`.
    pub(crate) const REVERT_FORCE: u32 = 4;
    /// `VIR_DOMAIN_SNAPSHOT_LIST_TOPOLOGICAL`.
    pub(crate) const PARENTS_FIRST: u32 = 1024;
    /// `VIR_DOMAIN_STATS_STATE | CPU_TOTAL | BALLOON | INTERFACE | BLOCK`.
    pub(crate) const STATS: u32 = 1 | 2 | 4 | 16 | 32;
    /// `VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | _NOWAIT`.
    pub(crate) const STATS_ACTIVE: u32 = 1 | (1 << 29);
    /// `VIR_MIGRATE_LIVE`, `_PAUSED`, `_CHANGE_PROTECTION`, `_ABORT_ON_ERROR`.
    pub(crate) const MIGRATE: u32 = 1 | 32 | 256 | 4096;
    /// `VIR_MIGRATE_NON_SHARED_DISK`.
    pub(crate) const MIGRATE_DISKS: u32 = 64;
    /// `VIR_MIGRATE_UNSAFE`: that the disks are shared safely is for the operator to know.
    pub(crate) const MIGRATE_UNSAFE: u32 = 512;
    /// `VIR_MIGRATE_AUTO_CONVERGE`.
    pub(crate) const MIGRATE_CONVERGE: u32 = 8192;
}
