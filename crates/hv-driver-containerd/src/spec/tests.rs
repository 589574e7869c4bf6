//! What a specification makes of hostile and of ordinary input.

use hv_types::instance::VolumeMount;
use hv_types::{InstanceId, Metadata};

use super::*;

fn config() -> InstanceConfig {
    let spec = InstanceSpec { cpu_cores: 2, memory_bytes: 64 << 20, ..InstanceSpec::default() };
    let (id, metadata) = (InstanceId::generate(), Metadata::default());
    InstanceConfig {
        id,
        name: "web".to_owned(),
        spec,
        metadata,
        image: None,
        rescue_image: None,
        devices: None,
    }
}

#[test]
fn a_host_name_is_one_whatever_the_name() {
    let cases = [
        ("web-1", "web-1"),
        ("Web 1", "web-1"),
        ("ü", "container"),
        ("a,b\"$(f)", "a-b---f"),
        ("", "container"),
    ];
    for (name, expected) in cases {
        assert_eq!(hostname(name), expected, "{name}");
    }
    assert!(hostname(&"x".repeat(300)).len() <= MAX_HOSTNAME);
}

#[test]
fn a_volume_is_a_directory_below_the_volumes_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
    std::fs::write(dir.path().join("file"), "").unwrap();
    let check = |name: &str, path: &str, root: Option<&Path>| {
        let mount = VolumeMount { name: name.to_owned(), mount_path: path.to_owned(), read_only: false };
        let spec = InstanceSpec { volume_mounts: vec![mount], ..InstanceSpec::default() };
        volumes(&spec, root).is_ok()
    };
    let root = Some(dir.path());
    assert!(check("data", "/data", root));
    for name in ["../etc", "..", ".", "", "/etc", "data/..", "link", "file", "missing"] {
        assert!(!check(name, "/data", root), "{name}");
    }
    for path in ["data", "/", "/a/../..", "/proc", "/sys/x", "/dev", ""] {
        assert!(!check("data", path, root), "{path}");
    }
    assert!(!check("data", "/data", None));
}

#[test]
fn a_command_replaces_the_images_and_arguments_only_its_arguments() {
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let image =
        ImageProcess { entrypoint: words(&["/e"]), command: words(&["c"]), ..ImageProcess::default() };
    let cases: [(&[&str], &[&str], &[&str]); 4] = [
        (&[], &[], &["/e", "c"]),
        (&[], &["a"], &["/e", "a"]),
        (&["/x"], &[], &["/x"]),
        (&["/x"], &["a"], &["/x", "a"]),
    ];
    for (command, args, expected) in cases {
        let mut config = config();
        (config.spec.command, config.spec.args) = (words(command), words(args));
        let made = process(&config, &image, User { uid: 1, gid: 1 }).unwrap();
        assert_eq!(made.args().clone().unwrap(), expected);
    }
    assert!(process(&config(), &ImageProcess::default(), User { uid: 1, gid: 1 }).is_err());
}

#[test]
fn the_specifications_environment_wins() {
    let mut config = config();
    config.spec.env.insert("A".to_owned(), "own".to_owned());
    let image =
        ImageProcess { env: vec!["A=image".to_owned(), "PATH=/p".to_owned()], ..ImageProcess::default() };
    let env = environment(&config, &image);
    assert!(env.contains(&"A=own".to_owned()) && env.contains(&"PATH=/p".to_owned()), "{env:?}");
    assert_eq!(env.iter().filter(|entry| entry.starts_with("PATH=")).count(), 1);
    assert!(!env.contains(&"A=image".to_owned()));
}

#[test]
fn only_root_that_asked_for_it_has_rights_and_few() {
    let rights = |uid| capabilities(User { uid, gid: 0 }).unwrap().bounding().clone().unwrap_or_default();
    assert!(rights(65534).is_empty());
    assert!(!rights(0).contains(&Cap::SysAdmin) && !rights(0).contains(&Cap::NetRaw));
}

#[test]
fn bounds_are_never_wider_than_what_was_asked_for() {
    let mut spec = config().spec;
    let value = |spec: &InstanceSpec| {
        serde_json::to_value(resources::of(spec, resources::Disk::of(&[])).unwrap()).unwrap()
    };
    let made = value(&spec);
    assert_eq!(made["cpu"]["quota"], 200_000);
    assert_eq!(made["memory"]["limit"], 64 << 20);
    spec.limits =
        Some(ResourceLimits { memory_limit: 1 << 40, cpu_quota: 5000, pids: 7, ..ResourceLimits::default() });
    let made = value(&spec);
    assert_eq!((&made["memory"]["limit"], &made["cpu"]["quota"]), (&(64 << 20).into(), &5000.into()));
    assert_eq!(made["pids"]["limit"], 7);
    spec.limits = Some(ResourceLimits { io_read_bps: 1, ..ResourceLimits::default() });
    assert!(
        resources::of(&spec, resources::Disk::of(&[])).is_err(),
        "a bound that cannot be kept was accepted"
    );
}
