//! Disks in every format that is taken, converted by the real `qemu-img`, and those that are refused.

use std::fs;
use std::path::Path;

use hv_driver::{DiskFormat, ImageContent};
use hv_types::{InstanceId, InstanceType};

use crate::fixture::{World, noise, run};
use crate::server::{Manner, Server};

const MIB: usize = 1 << 20;

/// A disk of two MiB with something on it, in a format.
fn disk(dir: &Path, format: &str, options: &str) -> Vec<u8> {
    let raw = dir.join("source.raw");
    let mut content = noise(11, MIB);
    content.resize(2 * MIB, 0);
    fs::write(&raw, content).unwrap();
    let target = dir.join("converted");
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([raw.to_str().unwrap(), target.to_str().unwrap()]);
    run("qemu-img", &args);
    fs::read(target).unwrap()
}

async fn acquired(world: &World, instance_type: InstanceType) -> (String, DiskFormat) {
    let user = InstanceId::generate();
    let local = world.store.acquire("image", instance_type, &user).await.unwrap();
    let ImageContent::Disk { path, format } = local.content else { panic!("{local:?}") };
    assert!(fs::metadata(&path).unwrap().permissions().readonly());
    (path.to_str().unwrap().to_owned(), format)
}

#[tokio::test]
async fn every_format_becomes_what_its_type_of_instance_starts_from() {
    let server = Server::start().await;
    let dir = tempfile::tempdir().unwrap();
    let mut raw = noise(11, MIB);
    raw.resize(2 * MIB, 0);
    for (format, options, for_vm) in [
        ("raw", "", DiskFormat::Raw),
        ("qcow2", "", DiskFormat::Qcow2),
        ("qcow2", "compat=0.10", DiskFormat::Qcow2),
        ("vmdk", "subformat=monolithicSparse", DiskFormat::Qcow2),
        ("vmdk", "subformat=streamOptimized", DiskFormat::Qcow2),
        ("vpc", "subformat=dynamic,force_size=on", DiskFormat::Qcow2),
        ("vpc", "subformat=fixed,force_size=on", DiskFormat::Qcow2),
        ("vhdx", "", DiskFormat::Qcow2),
    ] {
        let reference = server.file("/disk", &disk(dir.path(), format, options), Manner::default());
        for (instance_type, expected) in
            [(InstanceType::Vm, for_vm), (InstanceType::Microvm, DiskFormat::Raw)]
        {
            let world = World::new();
            world.pull(&reference, instance_type).await.unwrap_or_else(|e| panic!("{format}: {e}"));
            let (path, actual) = acquired(&world, instance_type).await;
            assert_eq!(actual, expected, "{format} {options}");
            let name = if actual == DiskFormat::Raw { "raw" } else { "qcow2" };
            let read = dir.path().join("read.raw");
            run("qemu-img", &["convert", "-f", name, "-O", "raw", &path, read.to_str().unwrap()]);
            assert!(fs::read(read).unwrap().starts_with(&raw), "{format} {options}: another content");
            world.store.verify("image").await.unwrap();
            // What was converted does not need its source any more.
            let blobs = fs::read_dir(world.store.dir().join("blobs/sha256")).unwrap().count();
            let is_kept = format == name;
            assert_eq!(blobs, usize::from(is_kept), "{format} {options}");
            world.assert_untouched();
        }
    }
}

#[tokio::test]
async fn a_disk_that_names_other_files_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start().await;
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("secret.raw"), noise(12, MIB)).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &at("secret.raw"), "-F", "raw", &at("backed")]);
    let json =
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{}"}}}}"#, at("secret.raw"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &json, "-F", "raw", &at("json")]);
    let data = format!("data_file={},data_file_raw=on", at("data"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, &at("external"), "1M"]);
    run(
        "qemu-img",
        &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", &at("flat.vmdk"), "1M"],
    );
    run("qemu-img", &["create", "-q", "-f", "vmdk", &at("base.vmdk"), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-b", &at("base.vmdk"), "-F", "vmdk", &at("child.vmdk")]);
    for (name, words) in [
        ("backed", "depends on another file"),
        ("json", "json:"),
        ("external", "another file"),
        ("flat.vmdk", "only names other files"),
        ("child.vmdk", "parent VMDK"),
    ] {
        let reference = server.file("/disk", &fs::read(at(name)).unwrap(), Manner::default());
        for instance_type in [InstanceType::Vm, InstanceType::Microvm] {
            let refusal = World::new().refusal(&reference, instance_type).await;
            assert!(refusal.contains(words), "{refusal}");
        }
    }
}

#[tokio::test]
async fn a_disk_that_is_huge_truncated_or_damaged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start().await;
    let huge = dir.path().join("huge");
    run("qemu-img", &["create", "-q", "-f", "qcow2", huge.to_str().unwrap(), "60T"]);
    let good = disk(dir.path(), "qcow2", "");
    let mut damaged = good.clone();
    // The first entry of the first refcount block's table: another cluster than the one it should be.
    let table = usize::try_from(u64::from_be_bytes(damaged[48..56].try_into().unwrap())).unwrap();
    damaged[table..table + 8].copy_from_slice(&0x123u64.to_be_bytes());
    let vmdk = disk(dir.path(), "vmdk", "subformat=streamOptimized");
    for (bytes, words) in [
        (fs::read(huge).unwrap(), "the size of its disk exceeds"),
        (good[..100_000].to_vec(), "truncated"),
        (good[..400_000].to_vec(), "damaged"),
        (damaged, "damaged"),
        (vmdk[..vmdk.len() / 2].to_vec(), "image"),
        (Vec::new(), "empty"),
        (crate::fixture::gzip(&good), "decompress it first"),
    ] {
        let reference = server.file("/disk", &bytes, Manner::default());
        let refusal = World::new().refusal(&reference, InstanceType::Vm).await;
        assert!(refusal.contains(words), "{words}: {refusal}");
    }
}

#[tokio::test]
async fn a_conversion_that_takes_too_long_is_ended_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start().await;
    // In place of qemu-img: what never ends, and proves that it has no network and nobody's identity.
    let program = dir.path().join("never");
    fs::write(&program, "#!/bin/sh\nwhile :; do :; done\n").unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let reference = server.file("/disk", &disk(dir.path(), "vmdk", ""), Manner::default());
    let world = World::with(|options| {
        options.qemu_img = Some(program);
        options.convert_timeout = std::time::Duration::from_secs(1);
    });
    let refusal = world.refusal(&reference, InstanceType::Vm).await;
    assert!(refusal.contains("qemu-img failed"), "{refusal}");
}

#[tokio::test]
async fn what_reads_image_files_has_no_network_no_privileges_and_no_directory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start().await;
    let program = dir.path().join("look");
    let look = "#!/bin/sh\nexec >&2\ngrep -E '^(Uid|Cap(Eff|Prm|Bnd)|NoNewPrivs)' /proc/self/status | tr -s '\\t\\n' '  '\n\
                echo links $(grep -c : /proc/net/dev) pid $$\nls /work-of-nobody $1 2>/dev/null\nexit 7\n";
    fs::write(&program, look).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let reference = server.file("/disk", &disk(dir.path(), "vmdk", ""), Manner::default());
    let world = World::with(|options| options.qemu_img = Some(program));
    let said = world.refusal(&reference, InstanceType::Vm).await;
    assert!(said.contains("NoNewPrivs: 1") && said.contains("links 1 pid 1"), "{said}");
    if rustix::process::geteuid().is_root() {
        assert!(said.contains("Uid: 65534 65534 65534 65534"), "{said}");
        assert!(
            said.contains("CapEff: 0000000000000000") && said.contains("CapBnd: 0000000000000000"),
            "{said}"
        );
    }
}
