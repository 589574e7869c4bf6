//! What the driver has beside its machines: where everything lies, what the node can do, what a specification means.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hv_driver::{Capability, DriverError, Fingerprint, IncomingRequest, InstanceConfig, Result, Storage};
pub(crate) use hv_machine::Found;
use hv_machine::check_version;
use hv_machine::images::Images;
use hv_types::InstanceId;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::create::{self, Plan, USER_NETWORK};
use crate::daemon::Daemon;
use crate::files::{CONFIG, DIR_MODE, InstanceDir, MAX_STATE_DIR_BYTES, MIGRATION, StateDir, Stored, StoredMigration, StoredPhase, remove_tree};
use crate::link::Link;
use crate::machine::{Machine, Shared};
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::rescue::StoredRescue;
use crate::stats::StatsCache;
use crate::{LibvirtOptions, NAME, watch};

/// How many events wait for a slow receiver before it loses the oldest.
const EVENT_QUEUE: usize = 1024;

/// What it can do where libvirtd is there.
const CAPABILITIES: [Capability; 14] = [
    Capability::Pause,
    Capability::Console,
    Capability::Logs,
    Capability::Exec,
    Capability::Display,
    Capability::UserData,
    Capability::DirectBoot,
    Capability::HotplugDisk,
    Capability::Snapshot,
    Capability::SnapshotMemory,
    Capability::MigrateStorage,
    Capability::Rescue,
    Capability::FetchedImages,
    Capability::Devices,
];

/// What is known of libvirtd's node, with the connection of which it is known.
type KnownNode = Option<(std::sync::Weak<Daemon>, Arc<Node>)>;

/// What the driver and its tasks share.
pub(crate) struct Inner {
    pub(crate) options: LibvirtOptions,
    pub(crate) state: StateDir,
    emulator: PathBuf,
    pub(crate) images: Images,
    pub(crate) shared: Arc<Shared>,
    pub(crate) machines: Mutex<HashMap<InstanceId, Arc<Machine>>>,
    node: tokio::sync::Mutex<KnownNode>,
    pub(crate) stats: StatsCache,
}

impl Inner {
    pub(crate) fn new(options: LibvirtOptions) -> Self {
        // QEMU runs elsewhere, so every path must be good from everywhere.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let shared = Shared { events: broadcast::channel(EVENT_QUEUE).0, link: Link::new(&options.uri) };
        let state = StateDir(absolute(&options.state_dir));
        let emulator = options.emulator.as_deref().map_or_else(|| state.0.join(".emulator"), absolute);
        Self {
            images: Images::new(&absolute(&options.image_dir)),
            state,
            emulator,
            shared: Arc::new(shared),
            machines: Mutex::default(),
            node: tokio::sync::Mutex::default(),
            stats: StatsCache::default(),
            options,
        }
    }

    /// Begins to look after the connection, once.
    pub(crate) fn begin(self: &Arc<Self>) {
        if let Some(heard) = self.shared.link.begin() {
            watch::spawn(self, heard);
        }
    }

    pub(crate) async fn daemon(self: &Arc<Self>) -> Result<Arc<Daemon>> {
        self.begin();
        self.shared.link.daemon().await.map_err(|problem| unavailable(&problem))
    }

    pub(crate) async fn node(self: &Arc<Self>) -> Result<Arc<Node>> {
        let daemon = self.daemon().await?;
        let mut known = self.node.lock().await;
        if let Some((of, node)) = &*known
            && of.upgrade().is_some_and(|of| Arc::ptr_eq(&of, &daemon))
        {
            return Ok(node.clone());
        }
        let inspected = Node::inspect(&daemon, &self.options, &self.emulator).await;
        let node = Arc::new(inspected.map_err(|reason| DriverError::Unavailable { driver: NAME, reason })?);
        *known = Some((Arc::downgrade(&daemon), node.clone()));
        Ok(node)
    }

    /// Every machine that was ever looked at.
    pub(crate) fn known(&self) -> Vec<Arc<Machine>> {
        self.machines.lock().values().cloned().collect()
    }

    pub(crate) fn find(self: &Arc<Self>, id: &InstanceId, operation: &'static str) -> Result<Found<Machine>> {
        self.begin();
        let mut machines = self.machines.lock();
        if let Some(machine) = machines.get(id) {
            return Ok(Found::Whole(machine.clone()));
        }
        let dir = InstanceDir::at(self.state.of(id));
        if !dir.path.exists() {
            return Ok(if self.state.trash(id).exists() { Found::Part } else { Found::Nothing });
        }
        let stored = dir.read::<Stored>(CONFIG).map_err(|e| DriverError::failed(id, operation, e))?;
        let Some(stored) = stored else { return Ok(Found::Part) };
        check_version(id, stored.version, Stored::VERSION)?;
        let machine = Arc::new(Machine::new(dir, stored, self.shared.clone()));
        machines.insert(id.clone(), machine.clone());
        Ok(Found::Whole(machine))
    }

    pub(crate) fn machine(self: &Arc<Self>, id: &InstanceId, operation: &'static str) -> Result<Arc<Machine>> {
        self.find(id, operation)?.whole(id, operation)
    }

    /// Decides everything that a creation needs, and makes nothing.
    pub(crate) async fn plan<'a>(self: &Arc<Self>, config: &'a InstanceConfig, node: &Node) -> Result<Plan<'a>> {
        let id = &config.id;
        if let Some((operation, reason)) = create::unsupported(&config.spec) {
            return Err(DriverError::Unsupported { driver: NAME, operation, reason });
        }
        let invalid = |reason| DriverError::invalid(id, reason);
        if config.devices.is_none() && !config.spec.devices.is_empty() {
            return Err(invalid("spec.devices: its node gave it nothing".to_owned()));
        }
        let boot = self.images.resolve(&config.spec, config.image.as_ref()).map_err(invalid)?;
        create::check(&config.spec, &boot, node).map_err(invalid)?;
        let rescue = self.rescue_of(config).map_err(invalid)?;
        let asked = config.spec.network.as_ref().map_or("", |network| network.network_id.as_str());
        let network = match asked {
            "" | "default" => self.options.default_network.as_str(),
            named => named,
        };
        let network = (!network.is_empty() && network != USER_NETWORK).then(|| network.to_owned());
        if let Some(name) = &network {
            let has = self.daemon().await?.has_network(name).await.map_err(|problem| unavailable(&problem))?;
            if !has {
                let operation = "connect an instance to that network";
                let reason = format!("spec.network.network_id `{name}`: libvirtd has no such network; `virsh net-list`");
                return Err(DriverError::Unsupported { driver: NAME, operation, reason });
            }
        }
        let disk_dir = self.pool().await?.map(|pool| pool.join(id.as_str()));
        Ok(Plan { config, boot, rescue, network, disk_dir, incoming: None })
    }

    /// What a configuration boots from in rescue; `None`: it is not in rescue.
    fn rescue_of(self: &Arc<Self>, config: &InstanceConfig) -> std::result::Result<Option<StoredRescue>, String> {
        let Some(rescue) = config.in_rescue() else { return Ok(None) };
        // It may run from an image that is not there any more.
        if let Ok(Found::Whole(machine)) = self.find(&config.id, "change")
            && machine.stored().config.spec.rescue == config.spec.rescue
            && let Some(known) = machine.stored().rescue.clone()
        {
            return Ok(Some(known));
        }
        let boot = self.images.resolve(&rescue.spec, rescue.image.as_ref());
        boot.map(|boot| Some(StoredRescue::of(boot)))
            .map_err(|reason| format!("spec.rescue: {}", reason.trim_start_matches("spec.image: ")))
    }

    /// The directory of the storage pool, if one is configured.
    async fn pool(self: &Arc<Self>) -> Result<Option<PathBuf>> {
        let name = &self.options.default_storage_pool;
        if name.is_empty() {
            return Ok(None);
        }
        let found = self.daemon().await?.pool_directory(name).await.map_err(|problem| unavailable(&problem))?;
        let reason = || format!("libvirtd has no storage pool {name} with a directory; see drivers.libvirt.default_storage_pool");
        found.map(|path| Some(path.into())).ok_or_else(|| DriverError::Unavailable { driver: NAME, reason: reason() })
    }

    /// Makes an instance of which nothing is there.
    pub(crate) async fn make(self: &Arc<Self>, plan: &Plan<'_>, node: &Node) -> Result<()> {
        let id = &plan.config.id;
        create::prepare(&self.state, plan, node).await.map(drop).map_err(|problem| match problem {
            Problem::Spawn { tool, remedy, source } => DriverError::Unavailable {
                driver: NAME,
                reason: format!("{tool} could not be run ({source}); {remedy}"),
            },
            other => DriverError::failed(id, "create", other),
        })
    }

    /// Makes everything for an instance that another node hands over.
    pub(crate) async fn receive(self: &Arc<Self>, config: &InstanceConfig, request: &IncomingRequest) -> Result<()> {
        let node = self.node().await?;
        let plan = Plan { incoming: Some(request.storage), ..self.plan(config, &node).await? };
        // First of all it is noted whose disks these are: giving up must not remove another node's.
        let noted = || {
            let dir = InstanceDir::at(self.state.make(&config.id, DIR_MODE)?);
            let note = StoredMigration::new(
                &request.migration,
                StoredPhase::Awaited,
                request.storage,
                serde_json::Value::Null,
            );
            dir.write(MIGRATION, &note)
        };
        noted().map_err(|e| DriverError::failed(&config.id, "migrate", e))?;
        self.make(&plan, &node).await
    }

    /// Removes the files of what does not run.
    pub(crate) async fn remove(self: &Arc<Self>, id: &InstanceId) -> Result<()> {
        let pool = match self.find(id, "delete")? {
            Found::Whole(machine) => {
                let note = machine.note().map_err(|e| DriverError::failed(id, "delete", e))?;
                let is_elsewhere = note.is_some_and(|note| note.disks_are_elsewhere());
                machine.stored().disk_dir.clone().filter(|_| !is_elsewhere)
            }
            Found::Part => {
                let dir = InstanceDir::at(self.state.of(id));
                let note = dir.read::<StoredMigration>(MIGRATION);
                let note = note.map_err(|e| DriverError::failed(id, "delete", e))?;
                let is_elsewhere = note.is_some_and(|note| note.disks_are_elsewhere());
                // It may have come as far as making disks; a deletion that was cut short has removed them.
                let may_have_disks = dir.path.exists() && !is_elsewhere;
                self.pool().await?.map(|pool| pool.join(id.as_str())).filter(|_| may_have_disks)
            }
            Found::Nothing => None,
        };
        let (state, owned) = (self.state.clone(), id.clone());
        let removal = tokio::task::spawn_blocking(move || -> Outcome<()> {
            if let Some(pool) = pool {
                remove_tree(&pool)?;
            }
            state.remove(&owned)
        });
        match removal.await {
            Ok(outcome) => outcome.map_err(|e| DriverError::failed(id, "delete", e)),
            Err(panicked) => Err(DriverError::failed(id, "delete", panicked)),
        }
    }

    /// Disks that both nodes reach lie in a pool; nobody else's directory is touched.
    pub(crate) fn can_move(&self, storage: Storage) -> Result<()> {
        if storage == Storage::Shared && self.options.default_storage_pool.is_empty() {
            let reason = "its disks lie on this node; set drivers.libvirt.default_storage_pool to a pool that both nodes \
                          reach, or copy the disks"
                .to_owned();
            return Err(DriverError::Unsupported { driver: NAME, operation: "migrate", reason });
        }
        Ok(())
    }

    pub(crate) async fn fingerprint(self: &Arc<Self>) -> Fingerprint {
        let looked = async {
            if self.state.0.as_os_str().len() > MAX_STATE_DIR_BYTES {
                return Err(format!("drivers.libvirt.state_dir is longer than {MAX_STATE_DIR_BYTES} bytes; use a shorter one"));
            }
            std::fs::create_dir_all(&self.state.0).map_err(|e| {
                format!("{} cannot be made: {e}; check drivers.libvirt.state_dir", self.state.0.display())
            })?;
            self.begin();
            // Who asks how it is does not wait for it to come back.
            let node = match self.shared.link.trouble() {
                Some(problem) => Err(unavailable(&problem)),
                None => self.node().await,
            };
            node.map_err(|error| match error {
                DriverError::Unavailable { reason, .. } => reason,
                other => other.to_string(),
            })
        };
        let (healthy, version, message) = match looked.await {
            Ok(node) => (true, node.version.clone(), node.message.clone()),
            Err(reason) => (false, String::new(), reason),
        };
        let mut capabilities = CAPABILITIES.to_vec();
        if self.can_move(Storage::Shared).is_ok() {
            capabilities.push(Capability::Migrate);
        }
        Fingerprint { healthy, version, message, capabilities, images_are_local: true }
    }
}

pub(crate) fn unavailable(problem: &Problem) -> DriverError {
    let reason = format!("{problem}; check that libvirtd runs (systemctl status libvirtd)");
    DriverError::Unavailable { driver: NAME, reason }
}
