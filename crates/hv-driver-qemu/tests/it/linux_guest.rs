//! A real Linux guest: the tiny image that the project's setup script builds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use hv_driver::conformance::cleaned;
use hv_driver::{
    Console, Driver, DriverError, Exec, ExecOutput, ExecRequest, Exit, Input, InstanceConfig, Observed,
    Result, StopMode,
};
use hv_driver_qemu::QemuDriver;

use crate::subject::{QemuSubject, skip};

/// Emulated guests on a busy machine take their time.
const PATIENCE: Duration = Duration::from_secs(150);

/// Where the setup script puts the images.
fn image_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = var("HYPERVISOR_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("hypervisor")))
        .or_else(|| var("HOME").map(|dir| dir.join(".cache/hypervisor")))?;
    Some(cache.join("images")).filter(|dir| dir.join("tiny/kernel").is_file())
}

fn tiny() -> Option<QemuSubject> {
    let Some(images) = image_dir() else {
        skip("hv-driver-qemu::linux_guest", "the tiny image is not built; run hack/setup.sh images");
        return None;
    };
    let mut subject = QemuSubject::new("state")?;
    subject.options.image_dir = images;
    subject.spec.image = "tiny".to_owned();
    subject.spec.memory_bytes = 256 << 20;
    Some(subject)
}

async fn read_until(output: &mut BoxStream<'static, Result<Bytes>>, text: &str) -> String {
    let mut printed = Vec::new();
    let work = async {
        while !String::from_utf8_lossy(&printed).contains(text) {
            let piece = output.next().await.unwrap_or_else(|| panic!("the console ended before {text:?}"));
            printed.extend_from_slice(&piece.unwrap());
        }
    };
    let outcome = tokio::time::timeout(PATIENCE, work).await;
    let printed = String::from_utf8_lossy(&printed).into_owned();
    assert!(outcome.is_ok(), "waited in vain for {text:?}: {printed}");
    printed
}

async fn booted(subject: &QemuSubject, config: &InstanceConfig) -> (QemuDriver, Console) {
    let driver = subject.qemu();
    assert!(driver.fingerprint().await.healthy);
    let begun = Instant::now();
    driver.create(config).await.unwrap();
    let created = begun.elapsed();
    driver.start(&config.id).await.unwrap();
    let started = begun.elapsed();
    let mut console = driver.console(&config.id).await.unwrap();
    read_until(&mut console.output, "hypervisor-guest: hello").await;
    let greeted = begun.elapsed();
    eprintln!(
        "created after {created:?}, monitor answered after {started:?}, guest greeted after {greeted:?}"
    );
    (driver, console)
}

async fn type_line(console: &Console, line: &str) {
    console.input.send(Input::Data(Bytes::copy_from_slice(line.as_bytes()))).await.unwrap();
}

async fn output_of(exec: Exec) -> (String, String, i32) {
    let (mut stdout, mut stderr, mut code) = (Vec::new(), Vec::new(), None);
    let mut output = exec.output;
    while let Some(item) = tokio::time::timeout(PATIENCE, output.next()).await.unwrap() {
        match item.unwrap() {
            ExecOutput::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecOutput::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecOutput::Exited { code: with } => code = Some(with),
        }
    }
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(stdout), text(stderr), code.expect("an exit code"))
}

/// One guest for everything that a running one can show: booting takes longer than all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_linux_guest_boots_runs_commands_and_stops_when_asked() {
    let Some(subject) = tiny() else { return };
    let mut config = subject.config("fallback");
    config.spec.kernel_args = "hypervisor.test=\"a,b c\"".to_owned();
    config.spec.user_data =
        "#cloud-config\nhostname: seeded\nruncmd:\n  - echo ran-the-seed >/dev/ttyS0\n".to_owned();
    let (driver, mut console) = booted(&subject, &config).await;
    read_until(&mut console.output, "ran-the-seed").await;
    type_line(&console, "echo name=$(hostname) args=$(cat /proc/cmdline)\n").await;
    let printed = read_until(&mut console.output, "\"a,b c\"").await;
    assert!(printed.contains("name=seeded"), "{printed}");

    // The agent may come a little later than the shell.
    let request = |words: &[&str]| ExecRequest {
        command: words.iter().map(|word| (*word).to_owned()).collect(),
        env: vec![("GREETING".to_owned(), "a \"b\" ü".to_owned())],
        tty: None,
    };
    let deadline = Instant::now() + PATIENCE;
    let first = loop {
        match driver
            .exec(&config.id, request(&["/bin/sh", "-c", "echo $GREETING; echo bad >&2; exit 7"]))
            .await
        {
            Ok(exec) => break exec,
            Err(DriverError::WrongState { .. }) => {
                assert!(Instant::now() < deadline, "the agent never answered");
            }
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(output_of(first).await, ("a \"b\" ü\n".to_owned(), "bad\n".to_owned(), 7));
    let missing = driver.exec(&config.id, request(&["/no/such/program"])).await.unwrap();
    assert_eq!(output_of(missing).await.2, 127);

    driver.stop(&config.id, StopMode::Graceful(PATIENCE)).await.unwrap();
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
    cleaned(&subject, &driver, &config).await;
}

/// The guest's own `poweroff`, with an agent that went away and came back in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_linux_guest_that_powers_off_by_itself_has_finished() {
    let Some(subject) = tiny() else { return };
    let config = subject.config("quits");
    let (driver, console) = booted(&subject, &config).await;
    drop((driver, console));
    let driver = subject.qemu();
    assert!(matches!(driver.recover(&config.id, None).await.unwrap(), Observed::Running(_)));
    let mut events = driver.events();
    let console = driver.console(&config.id).await.unwrap();
    type_line(&console, "\npoweroff -f\n").await;
    let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!(event.id, config.id);
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Finished));
    cleaned(&subject, &driver, &config).await;
}

/// A disk image boots by itself, and its seed gives it the instance's name without being asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_image_boots_with_its_own_name() {
    let Some(mut subject) = tiny() else { return };
    if !subject.options.image_dir.join("tiny-disk.qcow2").is_file() {
        return skip(
            "hv-driver-qemu::linux_guest",
            "the tiny disk image is not built; run hack/setup.sh images",
        );
    }
    subject.spec.image = "tiny-disk".to_owned();
    let config = subject.config("web-1");
    let (driver, _) = booted(&subject, &config).await;
    // A console of its own shows everything from the beginning.
    let mut console = driver.console(&config.id).await.unwrap();
    let printed = read_until(&mut console.output, &format!("seed instance-id={}", config.id)).await;
    assert!(printed.contains("hello from web-1"), "{printed}");
    let stats = driver.stats(&config.id).await.unwrap();
    assert!(
        stats.cpu_time_ns > 0 && stats.disk_read_bytes > 1 << 20 && stats.memory_used_bytes > 16 << 20,
        "{stats:?}"
    );
    cleaned(&subject, &driver, &config).await;
}
