//! The drivers that the configuration asks for.

use std::path::Path;
use std::sync::Arc;

use hv_driver::Driver;
use hv_driver_fake::{ANNOTATION_PREFIX, FakeDriver, FakeOptions, Script};
use hv_driver_qemu::{QemuDriver, QemuOptions};
use hv_types::{DriverInfo, InstanceType, Metadata};

use crate::config::{Config, Refused};
use crate::context::DriverSet;

/// The drivers that there are, and those that are asked for and are not.
pub(crate) struct Chosen {
    pub(crate) drivers: DriverSet,
    pub(crate) missing: Vec<DriverInfo>,
}

/// Makes the drivers that the configuration asks for, each with a directory of its own.
///
/// # Errors
/// The fake's script is not understood.
pub(crate) fn choose(config: &Config) -> Result<Chosen, Refused> {
    let state_dir = &config.agent.state_dir;
    let mut drivers: Vec<Arc<dyn Driver>> = Vec::new();
    if config.drivers.qemu.enabled {
        drivers.push(Arc::new(QemuDriver::new(qemu_options(config, state_dir))));
    }
    if config.drivers.fake.enabled {
        drivers.push(Arc::new(FakeDriver::new(fake_options(config, state_dir)?)));
    }
    Ok(Chosen { drivers: DriverSet::new(drivers), missing: missing(config) })
}

fn qemu_options(config: &Config, state_dir: &Path) -> QemuOptions {
    let qemu = &config.drivers.qemu;
    QemuOptions {
        state_dir: state_dir.join("qemu"),
        image_dir: qemu.image_dir.clone().unwrap_or_else(|| state_dir.join("images")),
        qemu_binary: qemu.binary.clone(),
        qemu_img: qemu.qemu_img.clone(),
        accel: qemu.accel,
        machine: qemu.machine.clone(),
    }
}

fn fake_options(config: &Config, state_dir: &Path) -> Result<FakeOptions, Refused> {
    let fake = &config.drivers.fake;
    let annotations =
        fake.script.iter().map(|(key, value)| (format!("{ANNOTATION_PREFIX}{key}"), value.clone()));
    let script = Metadata { annotations: annotations.collect(), ..Metadata::default() };
    let script = Script::default()
        .with_annotations(&script)
        .map_err(|problem| Refused { key: "drivers.fake.script", problem })?;
    Ok(FakeOptions {
        state_dir: state_dir.join("fake"),
        instance_type: fake.instance_type,
        images: fake.images.clone(),
        script,
        ..FakeOptions::default()
    })
}

/// Runtimes of the guide that this release does not have: shown as unhealthy where they are asked for, so that nobody
/// waits for them in vain.
fn missing(config: &Config) -> Vec<DriverInfo> {
    let types = &config.agent.supported_instance_types;
    let asked = [
        ("libvirt", InstanceType::Vm, config.libvirt.enabled),
        (
            "containerd",
            InstanceType::Container,
            config.containerd.enabled || types.contains(&InstanceType::Container),
        ),
        (
            "firecracker",
            InstanceType::Microvm,
            config.firecracker.enabled || types.contains(&InstanceType::Microvm),
        ),
    ];
    let info = |(name, instance_type, _): (&str, InstanceType, bool)| DriverInfo {
        name: name.to_owned(),
        instance_type,
        healthy: false,
        version: String::new(),
        message: format!(
            "the {name} driver comes with a later release; take it out of the agent's configuration"
        ),
        capabilities: Vec::new(),
        images_are_local: true,
    };
    let is_run_otherwise =
        |instance_type| config.drivers.fake.enabled && config.drivers.fake.instance_type == instance_type;
    asked.into_iter().filter(|(_, of, asked)| *asked && !is_run_otherwise(*of)).map(info).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_of_a_later_release_is_shown_only_where_it_is_asked_for() {
        let mut config = Config::default();
        assert!(missing(&config).is_empty());
        config.agent.supported_instance_types = vec![InstanceType::Vm, InstanceType::Container];
        config.firecracker.enabled = true;
        let names: Vec<_> = missing(&config).into_iter().map(|info| (info.name, info.healthy)).collect();
        assert_eq!(names, [("containerd".to_owned(), false), ("firecracker".to_owned(), false)]);
    }

    #[test]
    fn a_script_that_is_not_understood_is_refused_by_its_key() {
        let mut config = Config::default();
        config.drivers.fake.script.insert("delay-strat".into(), "1s".into());
        let refusal = fake_options(&config, Path::new("x")).unwrap_err();
        assert_eq!(refusal.key, "drivers.fake.script");
        assert!(refusal.problem.contains("delay-strat"), "{refusal}");
    }
}
