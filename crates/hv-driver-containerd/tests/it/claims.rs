//! What only containers can show: exits, bounds, rights, volumes, logs, commands, addresses.

use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt as _;
use hv_driver::conformance::{Subject as _, cleaned};
use hv_driver::{
    Capability, Driver, DriverError, ExecOutput, ExecRequest, Exit, Input, InstanceConfig, LogRequest,
    Observed, StopMode, TerminalSize, Updated,
};
use hv_driver_containerd::{ContainerdDriver, ContainerdOptions};
use hv_types::InstanceId;
use hv_types::instance::{HealthCheck, ResourceLimits, VolumeMount};

use crate::image::GREETING;
use crate::subject::{ContainerdSubject, setup};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Creates and starts it.
pub(crate) async fn run(driver: &dyn Driver, config: &InstanceConfig) {
    driver.create(config).await.expect("create");
    driver.start(&config.id).await.expect("start");
}

/// How it ends, soon.
pub(crate) async fn exit(driver: &dyn Driver, id: &InstanceId) -> Exit {
    let begun = Instant::now();
    loop {
        if let Observed::Stopped(exit) = driver.observe(id).await.expect("observe") {
            return exit;
        }
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) async fn log_of(driver: &dyn Driver, id: &InstanceId, request: LogRequest) -> String {
    let pieces: Vec<_> = driver.logs(id, request).await.expect("logs").collect().await;
    let bytes: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.expect("output")).collect();
    String::from_utf8_lossy(&bytes).replace('\r', "")
}

/// What a script prints, and how it ends.
async fn outcome(
    subject: &ContainerdSubject,
    driver: &dyn Driver,
    config: &InstanceConfig,
) -> (String, Exit) {
    run(driver, config).await;
    let exit = exit(driver, &config.id).await;
    let text = log_of(driver, &config.id, LogRequest::default()).await;
    cleaned(subject, driver, config).await;
    (text, exit)
}

pub(crate) async fn command(driver: &dyn Driver, id: &InstanceId, script: &str) -> (String, i32) {
    let request = ExecRequest {
        command: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        env: Vec::new(),
        tty: None,
    };
    let mut exec = driver.exec(id, request).await.expect("exec");
    let mut text = Vec::new();
    while let Some(output) = exec.output.next().await {
        match output.expect("output") {
            ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => text.extend_from_slice(&bytes),
            ExecOutput::Exited { code } => return (String::from_utf8_lossy(&text).into_owned(), code),
        }
    }
    panic!("it ended without an exit code")
}

#[tokio::test]
async fn the_exit_code_is_in_the_reason() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let (_, exit) = outcome(&subject, &driver, &subject.script("exit 3")).await;
    assert_eq!(exit, Exit::Failed("exit code 3".to_owned()));
    let (_, exit) = outcome(&subject, &driver, &subject.script("exit 0")).await;
    assert_eq!(exit, Exit::Finished);
}

#[tokio::test]
async fn want_of_memory_is_in_the_reason() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let mut config = subject.script("exec tail /dev/zero");
    config.spec.memory_bytes = 16 << 20;
    let (_, exit) = outcome(&subject, &driver, &config).await;
    assert_eq!(exit, Exit::Failed("out of memory".to_owned()));
    // Also if nobody watched.
    config.id = InstanceId::generate();
    config.spec.command[2] = "sleep 1; exec tail /dev/zero".to_owned();
    run(&driver, &config).await;
    drop(driver);
    let begun = Instant::now();
    while !subject.pids(&config.id).is_empty() {
        assert!(begun.elapsed() < PATIENCE, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let driver = subject.containerd();
    let seen = driver.recover(&config.id, None).await.unwrap();
    assert_eq!(seen, Observed::Stopped(Exit::Failed("out of memory".to_owned())));
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn bounds_are_the_control_groups() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let mut config = subject.config("bounds");
    let limits = ResourceLimits {
        cpu_quota: 30_000,
        cpu_period: 100_000,
        memory_limit: 32 << 20,
        pids: 9,
        ..Default::default()
    };
    config.spec.limits = Some(limits);
    run(&driver, &config).await;
    let read = |controller: &str, v1: &str, v2: &str| {
        let old = fs::read_to_string(subject.group(controller, &config.id).join(v1));
        old.or_else(|_| fs::read_to_string(subject.group("", &config.id).join(v2))).unwrap().trim().to_owned()
    };
    assert_eq!(read("pids", "pids.max", "pids.max"), "9");
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (32 << 20).to_string());
    assert!(read("cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("30000"));
    // And can be changed while it runs.
    config.spec.limits = Some(ResourceLimits { pids: 11, memory_limit: 48 << 20, ..limits });
    config.name = "renamed".to_owned();
    let updated = driver.update(&config).await.expect("update");
    assert!(matches!(&updated, Updated::AtNextStart(why) if why.contains("host name")), "{updated:?}");
    assert_eq!(read("pids", "pids.max", "pids.max"), "11");
    assert_eq!(read("memory", "memory.limit_in_bytes", "memory.max"), (48 << 20).to_string());
    assert_eq!(driver.update(&config).await.expect("again"), Updated::Done);
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(command(&driver, &config.id, "hostname").await.0.trim(), "renamed");
    assert_eq!(read("pids", "pids.max", "pids.max"), "11");
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn a_container_has_no_more_rights_than_it_needs() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let script = "id -u; cat /proc/self/status; touch /etc/x; touch /proc/sys/kernel/x; unshare -U true; \
                  mount -t tmpfs x /data; cat /proc/kcore; echo done";
    let (text, exit) = outcome(&subject, &driver, &subject.script(script)).await;
    assert_eq!(exit, Exit::Finished, "{text}");
    assert!(text.starts_with("65534\n"), "{text}");
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    for refused in ["touch: /etc/x", "touch: /proc/sys/kernel/x", "unshare: ", "mount: "] {
        assert!(text.contains(refused), "{refused} was not refused: {text}");
    }
    // Root only where it is asked for, and then without most of what root can do.
    let mut config =
        subject.script("id -u; cat /proc/self/status; mount -t tmpfs x /data; touch /x && echo written");
    config.spec.user = "0".to_owned();
    let (text, _) = outcome(&subject, &driver, &config).await;
    assert!(text.starts_with("0\n") && text.contains("written") && text.contains("mount: "), "{text}");
    let effective = text.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    assert_eq!(u64::from_str_radix(effective, 16).unwrap() & (1 << 21), 0, "CAP_SYS_ADMIN");
    config.id = InstanceId::generate();
    config.spec.read_only_root = true;
    let (text, _) = outcome(&subject, &driver, &config).await;
    assert!(text.contains("Read-only file system") && !text.contains("written"), "{text}");
}

#[tokio::test]
async fn the_process_is_as_image_and_specification_say() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let mut config =
        subject.script("echo $FROM_IMAGE $OWN; cat /proc/self/cwd/../etc/hostname; id -u; id -g; hostname");
    config.spec.env.insert("OWN".to_owned(), "a b\"c".to_owned());
    config.spec.user = "33:34".to_owned();
    config.name = "Web 1".to_owned();
    let (text, _) = outcome(&subject, &driver, &config).await;
    assert_eq!(text, "yes a b\"c\nweb-1\n33\n34\nweb-1\n");
}

#[tokio::test]
async fn volumes_keep_what_is_written_to_them() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let dir = subject.dir.path().join("volumes/shared");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("from-node"), "hello").unwrap();
    let mount =
        VolumeMount { name: "shared".to_owned(), mount_path: "/data/inner".to_owned(), read_only: false };
    let mut config = subject.script("cat /data/inner/from-node; echo back > /data/inner/from-container");
    config.spec.user = "0".to_owned();
    config.spec.volume_mounts = vec![mount.clone()];
    let (text, _) = outcome(&subject, &driver, &config).await;
    assert!(text.starts_with("hello"), "{text}");
    assert_eq!(fs::read_to_string(dir.join("from-container")).unwrap(), "back\n");
    config.id = InstanceId::generate();
    config.spec.volume_mounts = vec![VolumeMount { read_only: true, ..mount.clone() }];
    let (text, _) = outcome(&subject, &driver, &config).await;
    assert!(text.contains("Read-only"), "{text}");
    for name in ["../volumes/shared", "missing", "/etc"] {
        config.id = InstanceId::generate();
        config.spec.volume_mounts = vec![VolumeMount { name: name.to_owned(), ..mount.clone() }];
        let error = driver.create(&config).await.expect_err("a volume that is none was mounted");
        assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
        assert_eq!(subject.leftovers(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_log_is_cut_and_goes_on() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let config = subject.script("seq 1 200000; sleep 3; echo late");
    run(&driver, &config).await;
    let begun = Instant::now();
    let last = LogRequest { tail_lines: Some(1), ..LogRequest::default() };
    while log_of(&driver, &config.id, last).await != "200000\n" {
        assert!(begun.elapsed() < PATIENCE, "it does not print");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Times are kept to a tenth of a second.
    let before = SystemTime::now() + Duration::from_millis(300);
    assert_eq!(exit(&driver, &config.id).await, Exit::Finished);
    let text = log_of(&driver, &config.id, LogRequest::default()).await;
    assert!(text.ends_with("200000\nlate\n"), "the end is missing");
    // The terminal makes two bytes of each line end.
    assert!(
        text.len() as u64 <= 2 * subject.options.log_file_bytes && text.len() > 100_000,
        "{}",
        text.len()
    );
    for file in ["console.log", "console.log.1"] {
        let length = fs::metadata(subject.instance_dir(&config.id).join(file)).unwrap().len();
        assert!(length <= subject.options.log_file_bytes, "{file}: {length}");
    }
    let request = LogRequest { tail_lines: Some(2), ..LogRequest::default() };
    assert_eq!(log_of(&driver, &config.id, request).await, "200000\nlate\n");
    let request = LogRequest { since: Some(before), ..LogRequest::default() };
    let young = log_of(&driver, &config.id, request).await;
    assert_eq!(young, "late\n");
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn containers_have_addresses_and_reach_each_other() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let fingerprint = driver.fingerprint().await;
    if fingerprint.message.contains("CNI") {
        return eprintln!("skipped: {}", fingerprint.message);
    }
    let (one, mut other) = (subject.config("one"), subject.script("sleep 60"));
    // A raw socket is root's, and not even root has it here: UDP would do, ping does not.
    other.spec.user = "0".to_owned();
    run(&driver, &one).await;
    run(&driver, &other).await;
    let address = |seen: Observed| match seen {
        Observed::Running(running) => running.ip.expect("an address"),
        other => panic!("{other:?}"),
    };
    let first = address(driver.observe(&one.id).await.unwrap());
    let second = address(driver.observe(&other.id).await.unwrap());
    assert_ne!(first, second);
    assert!(matches!(first, IpAddr::V4(_)));
    let (text, _) = command(&driver, &other.id, "ip addr show eth0; ip route; cat /etc/hosts").await;
    assert!(text.contains(&second.to_string()) && text.contains("default via"), "{text}");
    let (text, _) = command(&driver, &other.id, &format!("ping -c 1 -W 5 {first}")).await;
    assert!(
        text.contains("1 packets received") || text.contains("denied") || text.contains("permitted"),
        "{text}"
    );
    // Stopped, it gives its address back; the other keeps its own.
    driver.stop(&one.id, StopMode::Force).await.unwrap();
    let kept =
        fs::read_dir(subject.options.state_dir.join(".addresses").join(&subject.options.bridge)).unwrap();
    let kept: Vec<_> = kept.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(kept.contains(&second.to_string()) && !kept.contains(&first.to_string()), "{kept:?}");
    let stats = driver.stats(&other.id).await.unwrap();
    assert!(stats.network_rx_bytes > 0 || stats.network_tx_bytes > 0, "{stats:?}");
    driver.delete(&other.id).await.unwrap();
    cleaned(&subject, &driver, &one).await;
}

#[tokio::test]
async fn a_terminal_of_a_command_is_one_and_has_its_size() {
    let Some(subject) = setup().await else { return };
    let (driver, config) = (subject.containerd(), subject.config("tty"));
    run(&driver, &config).await;
    let request = ExecRequest {
        command: ["/bin/sh", "-c", "read line; stty size; echo got $line; exit 7"]
            .map(str::to_owned)
            .to_vec(),
        env: vec![("X".to_owned(), "y".to_owned())],
        tty: Some(TerminalSize { width: 80, height: 24 }),
    };
    let mut exec = driver.exec(&config.id, request).await.unwrap();
    exec.input.send(Input::Resize(TerminalSize { width: 101, height: 33 })).await.unwrap();
    exec.input.send(Input::Data("words\n".into())).await.unwrap();
    let mut text = String::new();
    let code = loop {
        match exec.output.next().await.expect("output").expect("output") {
            ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => {
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
            ExecOutput::Exited { code } => break code,
        }
    };
    assert_eq!(code, 7);
    assert!(text.contains("33 101") && text.contains("got words"), "{text}");
    // Dropped, a command ends.
    let request =
        ExecRequest { command: ["/bin/sleep", "61"].map(str::to_owned).to_vec(), env: Vec::new(), tty: None };
    let before = subject.pids(&config.id).len();
    drop(driver.exec(&config.id, request).await.unwrap());
    let begun = Instant::now();
    while subject.pids(&config.id).len() > before {
        assert!(begun.elapsed() < PATIENCE, "the command goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn an_unwell_container_is_ended_with_the_reason() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let mut config = subject.script("touch /tmp/well; sleep 60");
    let words = |script: &str| ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let check = HealthCheck {
        command: words("cat /tmp/well"),
        interval_seconds: 1,
        timeout_seconds: 20,
        retries: 2,
        start_seconds: 0,
    };
    config.spec.health_check = Some(check);
    let mut events = driver.events();
    run(&driver, &config).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(
        matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)),
        "a well container was ended"
    );
    assert_eq!(command(&driver, &config.id, "/bin/busybox rm /tmp/well").await.1, 0);
    match exit(&driver, &config.id).await {
        Exit::Failed(reason) => {
            assert!(
                reason.starts_with("health check failed: exit code 1: ") && reason.contains("/tmp/well"),
                "{reason}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(events.next().await.unwrap().id, config.id);
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn pipes_are_given_to_those_who_ask_for_them() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let mut config =
        subject.script("[ -t 0 ] || echo no terminal; echo error >&2; cat; /bin/sleep 1; echo over");
    config.metadata.annotations.insert("terminal".to_owned(), "false".to_owned());
    run(&driver, &config).await;
    let console = driver.console(&config.id).await.unwrap();
    assert!(
        console.input.send(Input::Data("typed\n".into())).await.is_err(),
        "somebody hears what nobody reads"
    );
    assert_eq!(exit(&driver, &config.id).await, Exit::Finished);
    let text = log_of(&driver, &config.id, LogRequest::default()).await;
    for line in ["no terminal", "error", "over"] {
        assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line}: {text}");
    }
    cleaned(&subject, &driver, &config).await;
}

#[tokio::test]
async fn many_instances_of_one_image_unpack_it_once() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let configs: Vec<_> = (0..6).map(|_| subject.script("echo hello; sleep 60")).collect();
    futures::future::join_all(configs.iter().map(|config| run(&driver, config))).await;
    let listed = subject.daemon.ctr(&["snapshots", "list"]).unwrap();
    assert_eq!(listed.lines().filter(|line| line.contains("Committed")).count(), 2, "{listed}");
    assert!(!listed.contains("extract-"), "{listed}");
    for config in &configs {
        driver.delete(&config.id).await.unwrap();
    }
    assert_eq!(subject.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn a_damaged_image_is_refused_and_leaves_nothing() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let blobs = subject.image.layout.join("blobs/sha256");
    let config = subject.script("true");
    let manifest = blobs.join(subject.image.manifest.strip_prefix("sha256:").unwrap());
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("layer.v1.tar", "layer.v1.zip")).unwrap();
    let error = driver.create(&config).await.expect_err("a manifest that was changed was accepted");
    assert!(matches!(error, DriverError::InvalidConfig { .. }), "{error}");
    assert!(error.to_string().contains("something else"), "{error}");
    assert_eq!(subject.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn an_image_that_the_store_gave_up_is_given_up() {
    let Some(subject) = setup().await else { return };
    let driver = subject.containerd();
    let (config, other) = (subject.script("sleep 60"), subject.config("other"));
    let is_known = || {
        let images = subject.daemon.ctr(&["images", "list", "--quiet"]).unwrap();
        assert!(images.contains("guest"), "somebody else's image was given up: {images}");
        images.contains(&subject.image.manifest)
    };
    driver.create(&other).await.unwrap();
    run(&driver, &config).await;
    driver.delete(&other.id).await.unwrap();
    assert!(is_known(), "given up while it is in use");
    driver.delete(&config.id).await.unwrap();
    assert!(is_known(), "given up while the store has it");
    fs::remove_dir_all(&subject.image.layout).unwrap();
    driver.create(&other).await.unwrap();
    driver.delete(&other.id).await.unwrap();
    assert!(!is_known(), "kept for nobody");
    assert_eq!(subject.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn where_containerd_is_not_there_everything_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let options = ContainerdOptions {
        state_dir: dir.path().join("state"),
        address: dir.path().join("nothing.sock"),
        cni_bin_dir: Some(dir.path().join("no-plugins")),
        ..ContainerdOptions::default()
    };
    let driver = ContainerdDriver::new(options);
    let fingerprint = driver.fingerprint().await;
    assert!(
        !fingerprint.healthy && fingerprint.message.contains("apt-get install containerd"),
        "{}",
        fingerprint.message
    );
    assert!(fingerprint.capabilities.contains(&Capability::Exec));
    assert!(driver.list().await.unwrap().is_empty());
    let config = InstanceConfig {
        id: InstanceId::generate(),
        name: "x".to_owned(),
        spec: hv_types::InstanceSpec { image: "x".to_owned(), cpu_cores: 1, ..Default::default() },
        metadata: hv_types::Metadata::default(),
        image: None,
        rescue_image: None,
        devices: None,
    };
    let error = driver.create(&config).await.expect_err("created without containerd");
    assert!(matches!(&error, DriverError::Unavailable { .. }) && error.retryable(), "{error:?}");
    assert!(matches!(driver.images().await, Err(DriverError::Unavailable { .. })));
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Absent);
}

#[tokio::test]
async fn a_container_greets_without_the_network_plugins() {
    let Some(mut subject) = setup().await else { return };
    subject.options.cni_bin_dir = Some("/nonexistent".into());
    let driver = subject.containerd();
    let fingerprint = driver.fingerprint().await;
    assert!(fingerprint.healthy && fingerprint.message.contains("loopback only"), "{}", fingerprint.message);
    let config = subject.config("alone");
    run(&driver, &config).await;
    match driver.observe(&config.id).await.unwrap() {
        Observed::Running(running) => assert_eq!(running.ip, None),
        other => panic!("{other:?}"),
    }
    let (text, _) = command(&driver, &config.id, "ip link; ping -c 1 127.0.0.1 || true").await;
    assert!(text.contains("LOOPBACK,UP") && !text.contains("eth0"), "{text}");
    let mut console = driver.console(&config.id).await.unwrap();
    assert!(String::from_utf8_lossy(&console.output.next().await.unwrap().unwrap()).contains(GREETING));
    drop(console);
    cleaned(&subject, &driver, &config).await;
}
