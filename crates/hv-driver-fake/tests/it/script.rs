//! What the fake is told to do, it does; and it keeps count.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::StreamExt as _;
use hv_driver::{
    Driver, DriverError, ExecOutput, ExecRequest, Exit, Input, InstanceConfig, LogRequest, Observed, StopMode,
};
use hv_driver_fake::{
    ANNOTATION_PREFIX, FakeDriver, FakeOptions, LedgerEntry, LedgerEvent, Script, Step, read_ledger,
    read_record,
};
use hv_types::{InstanceId, InstanceSpec, Metadata};

pub(crate) fn fake(dir: &tempfile::TempDir) -> FakeDriver {
    FakeDriver::new(FakeOptions { state_dir: dir.path().to_owned(), ..FakeOptions::default() })
}

pub(crate) fn annotated(pairs: &[(&str, &str)]) -> InstanceConfig {
    let mut metadata = Metadata::default();
    for (key, value) in pairs {
        metadata.annotations.insert(format!("{ANNOTATION_PREFIX}{key}"), (*value).to_owned());
    }
    let spec = InstanceSpec {
        image: "tiny".to_owned(),
        cpu_cores: 1,
        memory_bytes: 64 << 20,
        ..InstanceSpec::default()
    };
    InstanceConfig {
        id: InstanceId::generate(),
        name: "scripted".to_owned(),
        spec,
        metadata,
        image: None,
        rescue_image: None,
        devices: None,
    }
}

#[tokio::test]
async fn failures_are_counted_across_restarts_of_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let config = annotated(&[("fail-create", "2"), ("fail-start", "1")]);
    for _ in 0..2 {
        let error = fake(&dir).create(&config).await.unwrap_err();
        assert!(error.retryable(), "{error}");
        assert_eq!(
            fake(&dir).list().await.unwrap(),
            std::slice::from_ref(&config.id),
            "a failed create leaves a part"
        );
    }
    fake(&dir).create(&config).await.unwrap();
    assert!(fake(&dir).start(&config.id).await.is_err());
    fake(&dir).start(&config.id).await.unwrap();
}

#[tokio::test]
async fn a_permanent_failure_is_not_worth_trying_again_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let error = fake(&dir).create(&annotated(&[("fail-permanently-create", "true")])).await.unwrap_err();
    assert!(!error.retryable(), "{error}");
    assert!(fake(&dir).list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_late_failure_has_had_its_effect() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[("fail-late-start", "1")]);
    driver.create(&config).await.unwrap();
    assert!(driver.start(&config.id).await.unwrap_err().retryable());
    assert!(matches!(driver.observe(&config.id).await.unwrap(), Observed::Running(_)));
    driver.start(&config.id).await.unwrap();
    assert_eq!(read_record(dir.path(), &config.id).unwrap().unwrap().starts, 1);
}

#[tokio::test]
async fn delays_and_hangs_hold_an_operation_up() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[("delay-start", "100ms"), ("hang-stop", "1")]);
    driver.create(&config).await.unwrap();
    let begun = Instant::now();
    driver.start(&config.id).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(100));
    let stop = driver.stop(&config.id, StopMode::Force);
    assert!(tokio::time::timeout(Duration::from_millis(100), stop).await.is_err(), "it did not hang");
    driver.stop(&config.id, StopMode::Force).await.unwrap();
}

#[tokio::test]
async fn a_deaf_guest_takes_the_whole_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[("ignore-shutdown", "true")]);
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let begun = Instant::now();
    driver.stop(&config.id, StopMode::Graceful(Duration::from_millis(150))).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(150));
    assert_eq!(driver.observe(&config.id).await.unwrap(), Observed::Stopped(Exit::Stopped));
}

#[tokio::test]
async fn a_guest_that_exits_with_a_code_has_failed() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[("exit-after", "20ms"), ("exit-code", "3")]);
    let mut events = driver.events();
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(events.next().await.unwrap().id, config.id);
    assert_eq!(
        driver.observe(&config.id).await.unwrap(),
        Observed::Stopped(Exit::Failed("exit code 3".to_owned()))
    );
}

#[tokio::test]
async fn failures_by_probability_follow_the_seed() {
    let outcomes = async |seed: u64| {
        let dir = tempfile::tempdir().unwrap();
        let create = Step { fail_probability: 0.5, ..Step::default() };
        let script = Script { seed, create, ..Script::default() };
        let driver = FakeDriver::new(FakeOptions {
            state_dir: dir.path().to_owned(),
            script,
            ..FakeOptions::default()
        });
        let mut outcomes = Vec::new();
        for _ in 0..64 {
            outcomes.push(driver.create(&annotated(&[])).await.is_ok());
        }
        outcomes
    };
    let first = outcomes(7).await;
    assert_eq!(first, outcomes(7).await);
    assert_ne!(first, outcomes(8).await);
    assert!((16..48).contains(&first.iter().filter(|ok| **ok).count()), "{first:?}");
}

#[tokio::test]
async fn a_script_can_be_changed_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[]);
    driver.create(&config).await.unwrap();
    let start = Step { fail_permanently: true, ..Step::default() };
    driver.set_script(Script { start, ..Script::default() });
    assert!(driver.start(&config.id).await.is_err());
    driver.set_script(Script::default());
    driver.start(&config.id).await.unwrap();
}

#[tokio::test]
async fn an_annotation_that_is_not_understood_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = fake(&dir).create(&annotated(&[("fial-create", "1")])).await.unwrap_err();
    assert!(
        matches!(&error, DriverError::InvalidConfig { reason, .. } if reason.contains("fial-create")),
        "{error}"
    );
}

#[tokio::test]
async fn the_ledger_tells_every_start_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let config = annotated(&[]);
    let driver = fake(&dir);
    driver.create(&config).await.unwrap();
    for _ in 0..2 {
        driver.start(&config.id).await.unwrap();
        driver.start(&config.id).await.unwrap();
        driver.stop(&config.id, StopMode::Force).await.unwrap();
    }
    driver.delete(&config.id).await.unwrap();
    let told: Vec<_> = read_ledger(dir.path()).unwrap().into_iter().map(|entry| entry.what).collect();
    use LedgerEvent::{Created, Deleted, Ended, Started};
    assert_eq!(told, [Created, Started, Ended, Started, Ended, Deleted]);
}

/// What an agent wrote down that died before it did it.
fn die_after_noting(dir: &tempfile::TempDir, id: &InstanceId, what: LedgerEvent, start: u32) {
    let entry = LedgerEntry { id: id.clone(), what, start, at_us: 1, pid: 1 };
    let line = format!("{}\n", serde_json::to_string(&entry).unwrap());
    let path = dir.path().join(".ledger.jsonl");
    let written = std::fs::read_to_string(&path).unwrap() + &line;
    std::fs::write(&path, written).unwrap();
}

#[tokio::test]
async fn what_was_written_down_and_not_done_is_no_start_and_no_end() {
    use LedgerEvent::{Created, Ended, Started};
    let dir = tempfile::tempdir().unwrap();
    let config = annotated(&[]);
    let driver = fake(&dir);
    let told = || read_ledger(dir.path()).unwrap().into_iter().map(|entry| entry.what).collect::<Vec<_>>();
    driver.create(&config).await.unwrap();

    die_after_noting(&dir, &config.id, Started, 1);
    assert_eq!(told(), [Created]);
    driver.start(&config.id).await.unwrap();
    assert_eq!(told(), [Created, Started]);

    die_after_noting(&dir, &config.id, Ended, 1);
    assert_eq!(told(), [Created, Started]);
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    assert_eq!(told(), [Created, Started, Ended]);

    driver.start(&config.id).await.unwrap();
    die_after_noting(&dir, &config.id, Started, 2);
    driver.stop(&config.id, StopMode::Force).await.unwrap();
    driver.start(&config.id).await.unwrap();
    assert_eq!(told(), [Created, Started, Ended, Started, Ended, Started]);
}

async fn ran(driver: &FakeDriver, id: &InstanceId, words: &[&str], typed: &[Input]) -> (String, String, i32) {
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    let request = ExecRequest { command, env: vec![("A".to_owned(), "b".to_owned())], tty: None };
    let mut exec = driver.exec(id, request).await.unwrap();
    for input in typed {
        exec.input.send(input.clone()).await.unwrap();
    }
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(item) = exec.output.next().await {
        match item.unwrap() {
            ExecOutput::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecOutput::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecOutput::Exited { code } => {
                return (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), code);
            }
        }
    }
    panic!("no exit code");
}

#[tokio::test]
async fn a_handful_of_commands_run() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[]);
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let id = &config.id;
    assert_eq!(ran(&driver, id, &["echo", "a", "b"], &[]).await, ("a b\n".into(), String::new(), 0));
    assert_eq!(ran(&driver, id, &["false"], &[]).await.2, 1);
    assert_eq!(ran(&driver, id, &["env"], &[]).await.0, "A=b\n");
    assert_eq!(
        ran(&driver, id, &["nonsense"], &[]).await,
        (String::new(), "nonsense: not found\n".into(), 127)
    );
    let typed = [Input::Data(Bytes::from_static(b"x\n")), Input::Eof];
    assert_eq!(ran(&driver, id, &["cat"], &typed).await, ("x\n".into(), String::new(), 0));
}

#[tokio::test]
async fn a_log_is_read_from_a_time_on() {
    let dir = tempfile::tempdir().unwrap();
    let driver = fake(&dir);
    let config = annotated(&[]);
    driver.create(&config).await.unwrap();
    driver.start(&config.id).await.unwrap();
    let read = async |since| {
        let request = LogRequest { since: Some(since), ..LogRequest::default() };
        let pieces: Vec<_> = driver.logs(&config.id, request).await.unwrap().collect().await;
        pieces.into_iter().flat_map(|piece| piece.unwrap().to_vec()).collect::<Vec<u8>>()
    };
    assert!(read(UNIX_EPOCH).await.starts_with(b"fake-guest: hello"));
    assert_eq!(read(SystemTime::now() + Duration::from_mins(1)).await, b"");
}
