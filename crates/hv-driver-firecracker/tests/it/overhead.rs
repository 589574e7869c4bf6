//! What the driver adds to a bare Firecracker, from the request to the guest's first output. Both in turns.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hv_driver::Driver as _;
use hv_driver::conformance::cleaned;

use crate::subject::{FirecrackerSubject, GREETING, PATIENCE, read_until, real};

/// How often each is started.
const ROUNDS: usize = 10;
/// The most that the driver may add on a machine that does other things too; a quiet one shows some milliseconds.
const MOST_ADDED: Duration = Duration::from_millis(250);

/// A bare VMM with the least that boots the guest.
fn bare(subject: &FirecrackerSubject) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let begun = Instant::now();
    let screen = fs::File::create(dir.path().join("screen")).unwrap();
    let mut child = Command::new(subject.options.binary.as_ref().unwrap())
        .args(["--api-sock", "api.sock"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::from(screen))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stream = loop {
        match UnixStream::connect(dir.path().join("api.sock")) {
            Ok(stream) => break stream,
            Err(_) => assert!(begun.elapsed() < PATIENCE, "the bare VMM does not accept"),
        }
        std::thread::yield_now();
    };
    let kernel = subject.options.image_dir.join("console.elf");
    let kernel = serde_json::json!({ "kernel_image_path": kernel, "boot_args": "console=ttyS0" }).to_string();
    for (path, body) in [
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":16}"#),
        ("/boot-source", kernel.as_str()),
        ("/actions", r#"{"action_type":"InstanceStart"}"#),
    ] {
        let head = format!(
            "PUT {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut answer = [0; 1024];
        let length = stream.read(&mut answer).unwrap();
        assert!(
            answer[..length].starts_with(b"HTTP/1.1 204"),
            "{}",
            String::from_utf8_lossy(&answer[..length])
        );
    }
    wait_for_greeting(&dir.path().join("screen"), begun);
    let took = begun.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    took
}

fn wait_for_greeting(screen: &Path, begun: Instant) {
    while !String::from_utf8_lossy(&fs::read(screen).unwrap()).contains(GREETING) {
        assert!(begun.elapsed() < PATIENCE, "the bare guest does not greet");
        std::thread::yield_now();
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_microvm_greets_hardly_later_than_a_bare_one() {
    let Some(subject) = real().await else { return };
    let driver = subject.firecracker();
    assert!(driver.fingerprint().await.healthy);
    let (mut through, mut starts, mut bares) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bares.push(tokio::task::block_in_place(|| bare(&subject)));
        let config = subject.config("timed");
        let begun = Instant::now();
        driver.create(&config).await.unwrap();
        let created = begun.elapsed();
        driver.start(&config.id).await.unwrap();
        let mut console = driver.console(&config.id).await.unwrap();
        read_until(&mut console, GREETING).await;
        through.push(begun.elapsed());
        starts.push(begun.elapsed().saturating_sub(created));
        cleaned(&subject, &driver, &config).await;
    }
    let (through, start, bare) = (median(through), median(starts), median(bares));
    eprintln!(
        "first output: bare {bare:?}; create and start {through:?}, of which start {start:?}; medians of {ROUNDS}"
    );
    assert!(through < bare + MOST_ADDED, "the driver adds {:?}", through.saturating_sub(bare));
}
