//! Claims about what a specification may ask for: each driver does it, or refuses to create such an instance.

use std::path::PathBuf;
use std::time::Duration;

use hv_types::DeviceGrant;
use hv_types::instance::{ResourceLimits, VolumeMount};
use tokio::io::AsyncReadExt as _;

use super::{Subject, assert_unsupported, can, cleaned, config, report, runs, started, within};
use crate::{
    Capability, DiskFormat, Display, Driver, DriverError, ImageContent, InstanceConfig, LocalImage, Observed,
};

/// How often a screen is asked for that is not there yet.
const SCREEN_INTERVAL: Duration = Duration::from_millis(50);

/// Creates and starts it where the driver promises that; otherwise it must be refused without a trace.
async fn kept_or_refused(
    subject: &dyn Subject,
    driver: &dyn Driver,
    config: &InstanceConfig,
    of: Capability,
) {
    if can(driver, of).await {
        driver.create(config).await.expect("create");
        driver.start(&config.id).await.expect("start");
        assert!(runs(driver, &config.id).await);
        return cleaned(subject, driver, config).await;
    }
    assert_unsupported(driver.create(config).await, of.name());
    assert_eq!(driver.observe(&config.id).await.expect("observe"), Observed::Absent);
    assert_eq!(subject.leftovers(), Vec::<String>::new(), "left behind by what was refused");
}

/// Bounds of processor time and memory.
pub async fn limits_are_kept_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let memory_limit = i64::try_from(config.spec.memory_bytes).expect("memory");
    let limits =
        ResourceLimits { cpu_quota: 50_000, cpu_period: 100_000, memory_limit, ..Default::default() };
    config.spec.limits = Some(limits);
    kept_or_refused(subject, &*driver, &config, Capability::Limits).await;
}

/// A directory of the node.
pub async fn a_volume_is_mounted_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let volume = match subject.volume() {
        Some(volume) => volume,
        None if can(&*driver, Capability::Volumes).await => {
            return report::skipped("its tests have no directory to mount");
        }
        None => VolumeMount { name: "data".to_owned(), mount_path: "/data".to_owned(), read_only: false },
    };
    config.spec.volume_mounts.push(volume);
    kept_or_refused(subject, &*driver, &config, Capability::Volumes).await;
}

/// A processor of this machine for each core.
pub async fn devices_of_the_node_are_taken_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let takes = can(&*driver, Capability::Devices).await;
    assert_eq!(driver.takes_devices(), takes, "what it says to the agent is not what it says to users");
    config.spec.devices.dedicated_cpus = true;
    if takes {
        // Never without what its node is to give.
        let refused = driver.create(&config).await;
        assert!(matches!(refused, Err(DriverError::InvalidConfig { .. })), "{refused:?}");
        assert_eq!(driver.observe(&config.id).await.expect("observe"), Observed::Absent);
        let cpus = vec![a_processor(); config.spec.cpu_cores as usize];
        config.devices = Some(DeviceGrant { cpus, ..DeviceGrant::default() });
    }
    kept_or_refused(subject, &*driver, &config, Capability::Devices).await;
}

/// One that this process may run on.
fn a_processor() -> u32 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status of this process");
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("processors");
    list.trim().split([',', '-']).next().and_then(|first| first.parse().ok()).expect("a processor")
}

/// cloud-init, or what the runtime has in its place.
pub async fn user_data_is_taken_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    config.spec.user_data = "#cloud-config\nhostname: suite\n".to_owned();
    kept_or_refused(subject, &*driver, &config, Capability::UserData).await;
}

/// Without an image.
pub async fn a_kernel_is_booted_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    match subject.kernel() {
        Some(spec) => config.spec = spec,
        None if can(&*driver, Capability::DirectBoot).await => {
            return report::skipped("its tests have no guest that is a kernel file");
        }
        None => config.spec.kernel = "vmlinuz".to_owned(),
    }
    kept_or_refused(subject, &*driver, &config, Capability::DirectBoot).await;
}

/// RFC 6143, section 7.1.1: the server speaks first, and says which version.
pub async fn a_screen_is_served_or_refused(subject: &dyn Subject) {
    let (driver, config) = started(subject).await;
    if can(&*driver, Capability::Display).await {
        let Display::Vnc(socket) = driver.display(&config.id).await.expect("display");
        let version = within("the screen is served", async {
            let mut version = [0; 12];
            loop {
                if let Ok(mut screen) = connect(&socket).await
                    && screen.read_exact(&mut version).await.is_ok()
                {
                    return version;
                }
                tokio::time::sleep(SCREEN_INTERVAL).await;
            }
        })
        .await;
        assert!(version.starts_with(b"RFB 003."), "{version:?}");
    } else {
        assert_unsupported(driver.display(&config.id).await, "a screen");
        assert!(runs(&*driver, &config.id).await);
    }
    cleaned(subject, &*driver, &config).await;
}

/// A socket's address has a hundred bytes; the directory's descriptor stands for a longer one.
async fn connect(socket: &std::path::Path) -> std::io::Result<tokio::net::UnixStream> {
    use std::os::fd::AsRawFd as _;
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let dir = std::fs::File::open(dir)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    tokio::net::UnixStream::connect(short).await
}

/// What the node's image store has is started, in the forms that the driver takes, or refused.
pub async fn an_image_of_the_store_is_started_or_refused(subject: &dyn Subject) {
    let (driver, mut config) = (subject.driver(), config(subject));
    let is_able = can(&*driver, Capability::FetchedImages).await;
    config.spec.image = "registry.example/suite:1".to_owned();
    config.image = subject.local_image();
    match (&config.image, is_able) {
        (None, true) => return report::skipped("its tests have no image in a store"),
        (None, false) => {
            // A file that is there; what it is does not matter to who takes none.
            let path = std::env::current_exe().expect("this program");
            let content = ImageContent::Disk { path, format: DiskFormat::Raw };
            config.image = Some(LocalImage { digest: format!("sha256:{}", "0".repeat(64)), content });
        }
        (Some(_), _) => {}
    }
    if is_able {
        driver.create(&config).await.expect("create");
        driver.start(&config.id).await.expect("start");
        assert!(runs(&*driver, &config.id).await);
        return cleaned(subject, &*driver, &config).await;
    }
    match driver.create(&config).await {
        Err(DriverError::Unsupported { reason, .. } | DriverError::InvalidConfig { reason, .. }) => {
            assert_eq!(subject.leftovers(), Vec::<String>::new());
            report::refused(&reason);
        }
        other => panic!("an image of the store is not among the capabilities: {other:?}"),
    }
}

/// In whichever form: it is not taken, or is missing; nothing is left of the attempt.
pub async fn an_image_that_is_not_there_is_refused(subject: &dyn Subject) {
    let driver = subject.driver();
    let digest = format!("sha256:{}", "0".repeat(64));
    let path = PathBuf::from("/nonexistent/image");
    let forms = [
        ImageContent::Disk { path: path.clone(), format: DiskFormat::Qcow2 },
        ImageContent::Oci { layout: path.clone(), manifest: digest.clone() },
        ImageContent::RootFs {
            path: path.clone(),
            command: vec!["/init".to_owned()],
            env: Vec::new(),
            working_dir: String::new(),
        },
        ImageContent::Kernel { path },
    ];
    for content in forms {
        let mut config = config(subject);
        config.spec.image = "registry.example/suite:1".to_owned();
        config.image = Some(LocalImage { digest: digest.clone(), content: content.clone() });
        let error = driver.create(&config).await.expect_err("an image that is not there was accepted");
        let is_clear = matches!(error, DriverError::InvalidConfig { .. } | DriverError::Unsupported { .. });
        assert!(is_clear, "{content:?}: {error}");
        assert_eq!(driver.observe(&config.id).await.expect("observe"), Observed::Absent, "{content:?}");
        assert_eq!(subject.leftovers(), Vec::<String>::new(), "{content:?}");
    }
}
