//! The drivers that the configuration asks for.

use std::path::Path;
use std::sync::Arc;

use hv_driver::Driver;
use hv_driver_containerd::{ContainerdDriver, ContainerdOptions};
use hv_driver_fake::{ANNOTATION_PREFIX, FakeDriver, FakeOptions, Script};
use hv_driver_firecracker::{FirecrackerDriver, FirecrackerOptions};
use hv_driver_libvirt::{LibvirtDriver, LibvirtOptions};
use hv_driver_qemu::{QemuDriver, QemuOptions};
use hv_types::{InstanceType, Metadata};

use crate::config::{Config, Refused};
use crate::context::DriverSet;

/// Makes the drivers that the configuration asks for, each with a directory of its own. Where the runtime of one is not
/// there the driver says so.
///
/// # Errors
/// The fake's script is not understood.
pub(crate) fn choose(config: &Config) -> Result<DriverSet, Refused> {
    let state_dir = &config.agent.state_dir;
    let mut drivers: Vec<Arc<dyn Driver>> = Vec::new();
    // Of two for one type new instances go to the first.
    if config.libvirt.enabled {
        drivers.push(Arc::new(LibvirtDriver::new(libvirt_options(config, state_dir))));
    }
    if config.drivers.qemu.enabled {
        let driver = QemuDriver::new(qemu_options(config, state_dir));
        drivers.push(Arc::new(match &config.drivers.qemu.disk_dir {
            Some(dir) => driver.with_disk_dir(dir),
            None => driver,
        }));
    }
    if config.containerd.enabled || is_named(config, InstanceType::Container) {
        drivers.push(Arc::new(ContainerdDriver::new(containerd_options(config, state_dir))));
    }
    if config.firecracker.enabled || is_named(config, InstanceType::Microvm) {
        drivers.push(Arc::new(FirecrackerDriver::new(firecracker_options(config, state_dir))));
    }
    if config.drivers.fake.enabled {
        drivers.push(Arc::new(FakeDriver::new(fake_options(config, state_dir)?)));
    }
    Ok(DriverSet::new(drivers))
}

/// Whether the node is to run this type, and nothing else of the configuration says what runs it.
fn is_named(config: &Config, instance_type: InstanceType) -> bool {
    let fake = &config.drivers.fake;
    config.agent.supported_instance_types.contains(&instance_type)
        && !(fake.enabled && fake.instance_type == instance_type)
}

fn libvirt_options(config: &Config, state_dir: &Path) -> LibvirtOptions {
    let libvirt = &config.libvirt;
    LibvirtOptions {
        uri: libvirt.uri.clone(),
        state_dir: state_dir.join("libvirt"),
        image_dir: libvirt.image_path.clone(),
        default_network: libvirt.default_network.clone(),
        default_storage_pool: libvirt.default_storage_pool.clone(),
        ..LibvirtOptions::default()
    }
}

fn containerd_options(config: &Config, state_dir: &Path) -> ContainerdOptions {
    let containerd = &config.containerd;
    ContainerdOptions {
        state_dir: state_dir.join("containerd"),
        address: containerd.address.clone(),
        namespace: containerd.namespace.clone(),
        snapshotter: containerd.snapshotter.clone(),
        runtime: containerd.runtime.clone(),
        cgroup_parent: containerd.cgroup_parent.clone(),
        cni_bin_dir: containerd.cni_bin_dir.clone(),
        bridge: containerd.bridge.clone(),
        subnet: containerd.subnet.clone(),
        masquerade: containerd.masquerade,
        volumes_dir: containerd.volumes_dir.clone(),
        ..ContainerdOptions::default()
    }
}

fn firecracker_options(config: &Config, state_dir: &Path) -> FirecrackerOptions {
    let firecracker = &config.firecracker;
    let there = |path: &Path| path.exists().then(|| path.to_owned());
    let named = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    FirecrackerOptions {
        state_dir: state_dir.join("firecracker"),
        image_dir: firecracker.image_dir.clone().unwrap_or_else(|| state_dir.join("images")),
        binary: named(&firecracker.binary_path),
        jailer: firecracker.jailer_path.clone(),
        use_jailer: firecracker.use_jailer,
        default_kernel: there(&firecracker.kernel_path),
        default_root_drive: there(&firecracker.root_drive_path),
        uid_base: firecracker.uid_base,
        bridge: firecracker.bridge.clone(),
        ..FirecrackerOptions::default()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_type_that_the_node_is_to_run_gets_its_driver() {
        let names = |config: &Config| -> Vec<_> {
            choose(config).unwrap().all().iter().map(|driver| driver.name()).collect()
        };
        let mut config = Config::default();
        config.agent.state_dir = "state".into();
        assert_eq!(names(&config), ["qemu"]);
        config.agent.supported_instance_types = vec![InstanceType::Vm, InstanceType::Container];
        assert_eq!(names(&config), ["qemu", "containerd"]);
        config.drivers.fake.enabled = true;
        config.drivers.fake.instance_type = InstanceType::Container;
        assert_eq!(names(&config), ["qemu", "fake"]);
        config.firecracker.enabled = true;
        config.libvirt.enabled = true;
        assert_eq!(names(&config), ["libvirt", "qemu", "firecracker", "fake"]);
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
