//! Names that lead nowhere, and headers that lead elsewhere.

use std::os::unix::fs::symlink;

use super::*;

struct Fixture {
    _outer: tempfile::TempDir,
    images: Images,
    dir: PathBuf,
}

fn qcow2(backing: u64, features: u64) -> Vec<u8> {
    let mut header = vec![0; 104];
    header[..4].copy_from_slice(&QCOW2_MAGIC);
    header[4..8].copy_from_slice(&3u32.to_be_bytes());
    header[8..16].copy_from_slice(&backing.to_be_bytes());
    header[24..32].copy_from_slice(&(5u64 << 20).to_be_bytes());
    header[72..80].copy_from_slice(&features.to_be_bytes());
    header
}

fn fixture() -> Fixture {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("images");
    fs::create_dir_all(dir.join("direct")).unwrap();
    fs::write(outer.path().join("secret.raw"), "secret").unwrap();
    fs::write(outer.path().join("kernel"), "secret").unwrap();
    for (name, content) in [
        ("plain.raw", vec![0; 1000]),
        ("good.qcow2", qcow2(0, 0)),
        ("backed.qcow2", qcow2(512, 0)),
        ("outside-data.qcow2", qcow2(0, 0b100)),
        ("fake.qcow2", b"not at all".to_vec()),
        ("guessed.img", qcow2(0, 0)),
        ("direct/kernel", b"k".to_vec()),
        ("direct/initrd", b"i".to_vec()),
        ("direct/cmdline", b" console=ttyS0\n".to_vec()),
        ("vmlinuz", b"k".to_vec()),
    ] {
        fs::write(dir.join(name), content).unwrap();
    }
    symlink(outer.path().join("secret.raw"), dir.join("link.raw")).unwrap();
    symlink(outer.path(), dir.join("way-out")).unwrap();
    symlink(dir.join("plain.raw"), dir.join("alias.raw")).unwrap();
    Fixture { images: Images::new(&dir), dir, _outer: outer }
}

fn image(name: &str) -> InstanceSpec {
    InstanceSpec { image: name.to_owned(), ..InstanceSpec::default() }
}

#[test]
fn images_are_found_by_name() {
    let f = fixture();
    let names: Vec<_> = f.images.list().unwrap().into_iter().map(|image| image.name).collect();
    assert_eq!(names, ["alias", "direct", "good", "guessed", "plain"]);
    let plain = f.images.resolve(&image("plain"), None).unwrap().disk.unwrap();
    assert_eq!((plain.format, plain.size_bytes), (DiskFormat::Raw, 1024));
    let good = f.images.resolve(&image("good"), None).unwrap().disk.unwrap();
    assert_eq!((good.format, good.size_bytes), (DiskFormat::Qcow2, 5 << 20));
    assert_eq!(f.images.resolve(&image("guessed"), None).unwrap().disk.unwrap().format, DiskFormat::Qcow2);
}

#[test]
fn nothing_outside_the_directory_is_reached() {
    let f = fixture();
    for name in ["link", "way-out", "../secret", "..", ".", "/etc/passwd", "direct/kernel", "a\0b", ".lock"] {
        let refusal = f.images.resolve(&image(name), None).unwrap_err();
        assert!(refusal.starts_with("spec.image: "), "{name}: {refusal}");
    }
    let direct = |kernel: &str| InstanceSpec { kernel: kernel.to_owned(), ..InstanceSpec::default() };
    for name in ["../kernel", "way-out/kernel", "link.raw", "missing"] {
        let refusal = f.images.resolve(&direct(name), None).unwrap_err();
        assert!(refusal.starts_with("spec.kernel"), "{name}: {refusal}");
    }
    assert_eq!(
        f.images.resolve(&direct("vmlinuz"), None).unwrap().kernel,
        Some(f.dir.join("vmlinuz").canonicalize().unwrap())
    );
}

#[test]
fn an_image_that_depends_on_another_file_is_refused() {
    let f = fixture();
    for (name, why) in [("backed", "depends"), ("outside-data", "depends"), ("fake", "no qcow2")] {
        let refusal = f.images.resolve(&image(name), None).unwrap_err();
        assert!(refusal.contains(why), "{name}: {refusal}");
    }
}

#[test]
fn command_lines_add_up_and_need_a_kernel() {
    let f = fixture();
    let mut spec = image("direct");
    spec.kernel_args = "quiet".to_owned();
    let boot = f.images.resolve(&spec, None).unwrap();
    assert_eq!(boot.cmdline, "console=ttyS0 quiet");
    assert!(boot.kernel.is_some() && boot.initrd.is_some() && boot.disk.is_none());
    spec.image = "plain".to_owned();
    assert!(f.images.resolve(&spec, None).unwrap_err().contains("spec.kernel"));
}

#[test]
fn a_directory_that_is_not_there_has_no_images() {
    let images = Images::new(Path::new("/nonexistent"));
    assert!(images.list().unwrap().is_empty());
    assert!(images.resolve(&image("x"), None).unwrap_err().contains("there are none in /nonexistent"));
}

/// What the store says counts, not what the file looks like.
#[test]
fn an_image_of_the_store_has_the_format_that_the_store_gives_it() {
    let f = fixture();
    let spec = image("registry.example/suite:1");
    let boot =
        |content| f.images.resolve(&spec, Some(&LocalImage { digest: "sha256:0".to_owned(), content }));
    let path = f.dir.join("good.qcow2");
    let raw = boot(ImageContent::Disk { path: path.clone(), format: DiskFormat::Raw }).unwrap().disk.unwrap();
    assert_eq!((raw.format, raw.size_bytes), (DiskFormat::Raw, 512));
    let qcow2 = boot(ImageContent::Disk { path, format: DiskFormat::Qcow2 }).unwrap().disk.unwrap();
    assert_eq!((qcow2.format, qcow2.size_bytes), (DiskFormat::Qcow2, 5 << 20));
    let backed = ImageContent::Disk { path: f.dir.join("backed.qcow2"), format: DiskFormat::Qcow2 };
    assert!(boot(backed).unwrap_err().contains("depends on another file"));
    let kernel = boot(ImageContent::Kernel { path: f.dir.join("vmlinuz") }).unwrap();
    assert!(kernel.kernel.is_some() && kernel.disk.is_none());
    let layout = ImageContent::Oci { layout: f.dir.clone(), manifest: "sha256:0".to_owned() };
    assert!(boot(layout).unwrap_err().contains("container"));
}
