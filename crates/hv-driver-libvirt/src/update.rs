//! Changes of what a machine is made of.
//!
//! # Theory of operation
//! What is wanted is compared with what is stored. Disks come and go and grow, and cores are added, while the machine
//! runs; what cannot be done so is stored and waits for the next start, which describes the machine anew. What still
//! waits is found by comparing with the live machine, so the same request is answered in the same way.

use std::fs;

use hv_driver::{DriverError, InstanceConfig, Result, Updated};
use hv_types::{DiskSpec, InstanceSpec};

use crate::create::{self, Plan};
use crate::daemon::Daemon;
use crate::domain;
use crate::files::{Stored, StoredDisk};
use crate::machine::{Machine, Seen};
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::protocol::flag;
use crate::rescue;
use crate::xml::Element;

/// Most disks on the SCSI bus.
const MAX_EXTRA_DISKS: usize = 255;

impl Machine {
    pub(crate) async fn update(&self, plan: &Plan<'_>, node: &Node) -> Result<Updated> {
        let _change = self.change.lock().await;
        let failed = self.failed("change");
        let config = plan.config;
        let before = self.stored();
        check(&before, config).map_err(|reason| DriverError::invalid(&self.id, reason))?;
        let seen = self.look().await.map_err(&failed)?;
        let is_live = match seen {
            Seen::HandedOver => return Err(self.handed_over("change")),
            Seen::Running | Seen::Paused => true,
            Seen::Down(_) => false,
        };
        let in_rescue = is_live && rescue::is_defined(self);
        let same = InstanceSpec { rescue: before.config.spec.rescue.clone(), ..config.spec.clone() };
        if in_rescue && same != before.config.spec {
            let reason = "it runs in rescue, where nothing of it can be changed; stop it first";
            return Err(DriverError::wrong_state(&self.id, "change", reason));
        }
        let mut stored = (*before).clone();
        stored.config.name.clone_from(&config.name);
        stored.config.metadata.clone_from(&config.metadata);
        self.change_disks(&mut stored, &config.spec, is_live).await.map_err(&failed)?;
        stored.config.spec.clone_from(&config.spec);
        stored.network.clone_from(&plan.network);
        stored.kernel.clone_from(&plan.boot.kernel);
        stored.initrd.clone_from(&plan.boot.initrd);
        stored.cmdline.clone_from(&plan.boot.cmdline);
        stored.rescue.clone_from(&plan.rescue);
        stored.config.rescue_image.clone_from(&config.rescue_image);
        let turns = in_rescue != stored.rescue.is_some();
        self.store(stored).map_err(&failed)?;
        if !is_live {
            return Ok(Updated::Done);
        }
        let mut waits = Vec::new();
        if !in_rescue {
            waits = self.change_live(node).await.map_err(&failed)?;
        }
        if turns {
            waits.push("the disk that it boots from is chosen when it starts".to_owned());
        }
        if waits.is_empty() { Ok(Updated::Done) } else { Ok(Updated::AtNextStart(waits.join("; "))) }
    }

    /// Disks that are wanted and not there, there and not wanted, or too small.
    async fn change_disks(&self, stored: &mut Stored, wanted: &InstanceSpec, is_live: bool) -> Outcome<()> {
        let daemon = self.daemon().await?;
        let domain = stored.domain();
        let place = stored.disk_dir.clone().unwrap_or_else(|| self.dir.path.clone());
        let is_wanted = |disk: &StoredDisk| wanted.disks.iter().any(|asked| asked.name == disk.name);
        let gone: Vec<_> =
            stored.disks.iter().filter(|disk| disk.bus() == "scsi" && !is_wanted(disk)).cloned().collect();
        for disk in gone {
            if is_live && has_disk(&live_xml(&daemon, stored).await?, &disk.target) {
                daemon.detach(&domain, &domain::disk(&disk), flag::LIVE).await?;
            }
            stored.disks.retain(|known| known.target != disk.target);
            // From here on nothing leads to it.
            self.store(stored.clone())?;
            match fs::remove_file(&disk.path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Problem::file("remove", &disk.path)(e));
                }
                _ => {}
            }
        }
        for asked in wanted.disks.iter().filter(|asked| !asked.boot) {
            match stored.disks.iter().position(|disk| disk.name == asked.name) {
                Some(index) => grow(&daemon, stored, index, asked, is_live).await?,
                None => {
                    let free = (0..MAX_EXTRA_DISKS).map(|index| create::extra(&place, asked, index));
                    let used = |disk: &StoredDisk| stored.disks.iter().any(|known| known.target == disk.target);
                    let mut free = free.filter(|disk| !used(disk));
                    let disk = free.next().ok_or_else(|| Problem::Unwanted("there are too many disks".to_owned()))?;
                    create::make_disk(&disk).await?;
                    if is_live {
                        daemon.attach(&domain, &domain::disk(&disk), flag::LIVE).await?;
                    }
                    stored.disks.push(disk);
                    self.store(stored.clone())?;
                }
            }
        }
        if let Some(asked) = wanted.disks.iter().find(|asked| asked.boot)
            && let Some(index) = stored.disks.iter().position(|disk| disk.target == "vda")
        {
            grow(&daemon, stored, index, asked, is_live).await?;
            stored.disks[index].name.clone_from(&asked.name);
        }
        Ok(())
    }

    /// What can be changed while it runs is; the rest is told.
    async fn change_live(&self, node: &Node) -> Outcome<Vec<String>> {
        let daemon = self.daemon().await?;
        let stored = self.stored();
        let domain = stored.domain();
        let live = live_xml(&daemon, &stored).await?;
        let spec = &stored.config.spec;
        let mut waits = Vec::new();
        let most: u32 = live.text_at("vcpu").and_then(|text| text.parse().ok()).unwrap_or(0);
        let now = live.at("vcpu").and_then(|vcpu| vcpu.attribute("current")).and_then(|text| text.parse().ok());
        let now: u32 = now.unwrap_or(most);
        if now != spec.cpu_cores {
            let outcome = match spec.cpu_cores {
                more if more > now && more <= most => daemon.set_vcpus(&domain, more, flag::LIVE).await,
                _ => Err(Problem::Unwanted("cores are only added, up to four times what it began with".to_owned())),
            };
            match outcome {
                Ok(()) => {}
                Err(problem) if problem.is_away() => return Err(problem),
                Err(problem) => waits.push(format!("{} cores: {problem}", spec.cpu_cores)),
            }
        }
        let has: u64 = live.text_at("memory").and_then(|text| text.parse().ok()).unwrap_or(0);
        if has != spec.memory_bytes / 1024 {
            waits.push(format!("{} bytes of memory: libvirt has given it what it began with", spec.memory_bytes));
        }
        let network = live.at("devices/interface");
        let source = network.and_then(|interface| interface.at("source")).and_then(|s| s.attribute("network"));
        if network.is_some() && source != stored.network.as_deref() {
            waits.push("the network: its card is made when it is started".to_owned());
        }
        let described = domain::describe(&stored, &self.dir, node);
        for (what, path) in [("the kernel", "os/kernel"), ("the kernel's arguments", "os/cmdline")] {
            if described.text_at(path) != live.text_at(path) {
                waits.push(format!("{what}: it is read when it is started"));
            }
        }
        Ok(waits)
    }
}

async fn live_xml(daemon: &Daemon, stored: &Stored) -> Outcome<Element> {
    daemon.domain_xml(&stored.domain(), 0).await
}

fn has_disk(live: &Element, target: &str) -> bool {
    let Some(devices) = live.at("devices") else { return false };
    let mut disks = devices.all("disk");
    disks.any(|disk| disk.at("target").and_then(|found| found.attribute("dev")) == Some(target))
}

/// Makes a disk as large as asked for, if it is smaller.
async fn grow(
    daemon: &Daemon,
    stored: &mut Stored,
    index: usize,
    asked: &DiskSpec,
    is_live: bool,
) -> Outcome<()> {
    let domain = stored.domain();
    let disk = &mut stored.disks[index];
    if asked.size_bytes <= disk.size_bytes {
        return Ok(());
    }
    if is_live {
        daemon.resize_disk(&domain, &disk.target, asked.size_bytes).await?;
    } else {
        let mut command = tokio::process::Command::new("qemu-img");
        command.args(["resize", "-q", "-f", disk.format.name()]);
        command.arg(&disk.path).arg(asked.size_bytes.to_string());
        create::run_tool(command, "qemu-img").await?;
    }
    disk.size_bytes = asked.size_bytes;
    Ok(())
}

/// What can never be.
fn check(before: &Stored, config: &InstanceConfig) -> std::result::Result<(), String> {
    let (old, new) = (&before.config.spec, &config.spec);
    if old.image != new.image || before.config.image != config.image {
        return Err("spec.image: an instance keeps its image; create another one".to_owned());
    }
    if old.user_data != new.user_data {
        return Err("spec.user_data: it was read when the guest first started; create another one".to_owned());
    }
    if old.firmware != new.firmware || old.tpm != new.tpm {
        return Err("spec.firmware, spec.tpm: an instance keeps them; create another one".to_owned());
    }
    for asked in &new.disks {
        let known = before.disks.iter().find(|disk| match asked.boot {
            true => disk.target == "vda",
            false => disk.name == asked.name && disk.bus() == "scsi",
        });
        if let Some(known) = known
            && asked.size_bytes < known.size_bytes
            && !(asked.boot && asked.size_bytes == 0)
        {
            let (name, has) = (&asked.name, known.size_bytes);
            return Err(format!("spec.disks[{name}].size_bytes: a disk never shrinks; it has {has} bytes"));
        }
    }
    Ok(())
}
