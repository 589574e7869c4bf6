//! Instances that another node hands over: everything is made ready, then QEMU waits.

use hv_driver::{Driver as _, DriverError, Incoming, IncomingRequest, InstanceConfig, Result, Storage};

use super::{Found, QemuDriver};
use crate::argv::Launch;
use crate::create::Disks;
use crate::files::{DIR_MODE, INCOMING, InstanceDir};
use crate::migration;
use crate::migration::target::Expected;
use crate::platform::Platform;
use crate::problem::Problem;

impl QemuDriver {
    /// Makes an instance that waits for what another node hands over.
    pub(super) async fn expect(
        &self,
        config: &InstanceConfig,
        request: &IncomingRequest,
    ) -> Result<Incoming> {
        let id = &config.id;
        let failed = |problem: Problem| DriverError::failed(id, "prepare an incoming migration", problem);
        let taken =
            || DriverError::wrong_state(id, "be migrated here", "it is on this node; delete it first");
        let path = self.state.of(id);
        let expected = match InstanceDir::open(path.clone()) {
            Ok(dir) => Expected::read(&dir).map_err(failed)?,
            Err(_) => None,
        };
        match self.find(id, "prepare an incoming migration")? {
            Found::Nothing => {}
            Found::Part if expected.is_none() => self.delete(id).await?,
            found => {
                let Some(expected) = expected.filter(|known| known.request.migration == request.migration)
                else {
                    return Err(taken());
                };
                if let Found::Whole(machine) = found
                    && let Some(answer) = expected.answer().map_err(failed)?
                    && machine.live("prepare an incoming migration").await?.is_some()
                {
                    return Ok(answer);
                }
                // Half prepared, and nobody was told of it; or what waited is dead.
                self.delete(id).await?;
            }
        }
        let platform = self.platform().await?;
        let prepared = self.prepare(config, request, &platform).await;
        if prepared.is_err() {
            self.delete(id).await?;
        }
        prepared
    }

    async fn prepare(
        &self,
        config: &InstanceConfig,
        request: &IncomingRequest,
        platform: &Platform,
    ) -> Result<Incoming> {
        let id = &config.id;
        let failed = |problem: Problem| DriverError::failed(id, "prepare an incoming migration", problem);
        let path = self.state.make(id, DIR_MODE).map_err(failed)?;
        let dir = InstanceDir::open(path.clone()).map_err(Problem::file("open", &path)).map_err(failed)?;
        // First of all: whose disks they are decides what may be removed.
        let expected = Expected { request: request.clone(), waiting: None, arrived: false };
        dir.write(INCOMING, &expected).map_err(failed)?;
        let from = match request.storage {
            Storage::Copied => Disks::Copied,
            Storage::Shared => Disks::Shared,
        };
        self.make(config, from).await?;
        let machine = self.machine(id, "prepare an incoming migration")?;
        if let Some(missing) = migration::target::missing_disk(&machine, request.storage) {
            return Err(DriverError::invalid(id, missing));
        }
        let launched = machine.launch(platform, &self.options.machine, Launch::Incoming).await?;
        let ended = || DriverError::failed(id, "prepare an incoming migration", "qemu ended at once");
        let live = launched.ok_or_else(ended)?;
        let listening =
            migration::target::listen(&machine, &live, request, &self.options.machine, platform).await;
        listening.map_err(failed)
    }
}
