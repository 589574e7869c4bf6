//! Making instances, from an image or from a snapshot, and making them other than they were.

use hv_driver::{DriverError, InstanceConfig, Result, Updated};
use hv_types::InstanceId;

use super::FirecrackerDriver;
use crate::files::{CONFIG, DIR_MODE, InstanceDir, NEXT, Stored};
use crate::images::Boot;
use crate::problem::{Outcome, Problem};
use crate::snapshot::{self, Meta};
use crate::{NAME, boot, create, layout};

impl FirecrackerDriver {
    pub(super) async fn make(&self, config: &InstanceConfig) -> Result<()> {
        let id = &config.id;
        let failed = |problem: Problem| DriverError::failed(id, "create", problem);
        self.check_supported(config)?;
        let boot = self.images.resolve(config).map_err(|reason| DriverError::invalid(id, reason))?;
        let size = boot.disk.as_deref().map(create::size_of).transpose().map_err(failed)?;
        create::check(&config.spec, size).map_err(|reason| DriverError::invalid(id, reason))?;
        self.rescue_of(config)?;
        let uid = self.take_uid().map_err(failed)?;
        let (state, owned) = (self.state.clone(), config.clone());
        let prepared = self.blocking(move || create::prepare(&state, &owned, &boot, uid)).await;
        self.made(id, uid, prepared).await
    }

    fn check_supported(&self, config: &InstanceConfig) -> Result<()> {
        match create::unsupported(&config.spec, &self.shared.options, self.is_jailed()) {
            Some((operation, reason)) => Err(DriverError::Unsupported { driver: NAME, operation, reason }),
            None => Ok(()),
        }
    }

    /// What a configuration boots from in rescue; `None`: it is not in rescue.
    pub(super) fn rescue_of(&self, config: &InstanceConfig) -> Result<Option<Boot>> {
        let Some(rescue) = config.in_rescue() else { return Ok(None) };
        let boot = self.images.resolve(&rescue).map_err(|reason| {
            let reason = reason.trim_start_matches("spec.image: ");
            DriverError::invalid(&config.id, format!("spec.rescue: {reason}"))
        })?;
        Ok(Some(boot))
    }

    async fn made(&self, id: &InstanceId, uid: u32, outcome: Outcome<()>) -> Result<()> {
        let Err(problem) = outcome else { return Ok(()) };
        self.free_uid(uid);
        Err(DriverError::failed(id, "create", problem))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Outcome<T> + Send + 'static,
    ) -> Outcome<T> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|panicked| Problem::Process(std::io::Error::other(panicked)))?
    }

    pub(super) async fn make_clone(
        &self,
        source: &InstanceId,
        name: &str,
        config: &InstanceConfig,
    ) -> Result<()> {
        let id = &config.id;
        let machine = self.machine(source, "clone")?;
        self.check_supported(config)?;
        // It must not be deleted meanwhile.
        let _unchanged = machine.change.lock().await;
        let meta = snapshot::read(&machine.dir, name).map_err(|e| DriverError::failed(source, "clone", e))?;
        let Some(meta) = meta else {
            return Err(DriverError::wrong_state(source, "clone", format!("it has no snapshot `{name}`")));
        };
        create::check(&config.spec, Some(0)).map_err(|reason| DriverError::invalid(id, reason))?;
        let uid = self.take_uid().map_err(|e| DriverError::failed(id, "clone", e))?;
        let stored = Stored {
            version: Stored::VERSION,
            config: config.clone(),
            cmdline: meta.cmdline.clone(),
            has_initrd: meta.has_initrd,
            disks: meta.disks.clone(),
            uid,
        };
        if let Some(reason) = differs(&stored, &meta) {
            self.free_uid(uid);
            return Err(DriverError::invalid(id, reason));
        }
        let (state, from, owned) = (self.state.clone(), machine.dir.clone(), source.clone());
        let laid_out = self.blocking(move || {
            let id = &stored.config.id;
            let path = state.make(id, DIR_MODE)?;
            let dir = InstanceDir::open(path.clone()).map_err(Problem::file("open", &path))?;
            snapshot::lay_out_clone((&from, &owned), &meta, (&dir, id))?;
            dir.write(CONFIG, &stored)
        });
        let laid_out = laid_out.await;
        self.made(id, uid, laid_out).await
    }

    /// What stands is changed at once. What runs goes on as it was started, and the change waits in a file for its next
    /// start; what Firecracker can change while it runs is changed.
    pub(super) async fn change(&self, config: &InstanceConfig) -> Result<Updated> {
        const OPERATION: &str = "update";
        let id = &config.id;
        let machine = self.machine(id, OPERATION)?;
        self.check_supported(config)?;
        let failed = |problem: Problem| DriverError::failed(id, OPERATION, problem);
        let _change = machine.change.lock().await;
        let old = machine.stored();
        if let Some(field) = layout::fixed_field(&old.config.spec, &config.spec) {
            let reason = format!("{field} is fixed when it is created; create another instance");
            return Err(DriverError::invalid(id, reason));
        }
        let root = machine.root();
        let has_root = old.disks.iter().any(|disk| disk.is_root);
        create::check(&config.spec, has_root.then_some(0))
            .map_err(|reason| DriverError::invalid(id, reason))?;
        if let Some(reason) = layout::shrinks(&old, &config.spec, &root).map_err(failed)? {
            return Err(DriverError::invalid(id, reason));
        }
        if config.spec.rescue != old.config.spec.rescue {
            self.rescue_of(config)?;
        }
        machine.dir.write(NEXT, config).map_err(failed)?;
        let Some(live) = machine.live_held(OPERATION).await? else {
            let changing = machine.clone();
            self.blocking(move || changing.apply_next()).await.map_err(failed)?;
            return Ok(Updated::Done);
        };
        if !layout::is_same_machine(&old.config.spec, &config.spec) {
            let what = "cores, memory, command line, cards, disks and what it boots from: firecracker fixes them when a machine starts";
            return Ok(Updated::AtNextStart(what.to_owned()));
        }
        let stored = Stored { config: config.clone(), ..old };
        let told = async { boot::retell(&mut live.api().await?, &stored).await };
        told.await.map_err(failed)?;
        machine.dir.write(CONFIG, &stored).map_err(failed)?;
        machine.dir.remove(NEXT).map_err(failed)?;
        machine.set_stored(stored);
        Ok(Updated::Done)
    }
}

/// Why a snapshot does not fit a configuration.
fn differs(stored: &Stored, meta: &Meta) -> Option<String> {
    let spec = &stored.config.spec;
    let root = meta.disks.iter().any(|disk| disk.is_root);
    let wanted: Vec<String> = create::plan(spec, root).into_iter().map(|(disk, _)| disk.name).collect();
    let there: Vec<String> = meta.disks.iter().map(|disk| disk.name.clone()).collect();
    if wanted != there {
        return Some(format!("spec.disks: the snapshot has the disks {there:?}, asked for are {wanted:?}"));
    }
    if !meta.memory {
        return None;
    }
    if spec.cpu_cores != meta.cpu_cores || spec.memory_bytes != meta.memory_bytes {
        return Some(format!(
            "spec.cpu_cores and spec.memory_bytes must be those of the snapshot: {} and {}",
            meta.cpu_cores, meta.memory_bytes
        ));
    }
    (stored.has_interface() != meta.has_interface).then(|| {
        "spec.network and spec.user_data: with memory it must have a network card exactly if the snapshot has one".into()
    })
}
