//! A console whose guest is a file that is written to, or a socket that is not read.

use std::io::Write as _;

use tempfile::TempDir;
use tokio::net::UnixListener;

use super::*;
use crate::log::LOG_OLD;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Guest {
    dir: TempDir,
    log: Log,
    end: watch::Sender<bool>,
    hub: ConsoleHub,
}

fn screen(log: &Log, is_replaced: bool) -> Screen {
    Screen { log: log.clone(), is_replaced, side_logs: Vec::new() }
}

async fn nobody_reads(mut typed: mpsc::Receiver<Bytes>) {
    let _ = typed.recv().await;
    std::future::pending::<()>().await;
}

impl Guest {
    fn new(is_replaced: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path());
        fs::write(log.path(), "").unwrap();
        let (end, ended) = watch::channel(false);
        let hub = ConsoleHub::start(screen(&log, is_replaced), nobody_reads, ended, CancellationToken::new());
        Self { dir, log, end, hub }
    }

    fn prints(&self, text: &str) {
        let mut log = File::options().create(true).append(true).open(self.log.path()).unwrap();
        log.write_all(text.as_bytes()).unwrap();
    }

    async fn logs(&self, request: LogRequest) -> String {
        let output = logs(&self.log, Some(&self.hub), request).await.unwrap();
        let pieces: Vec<_> = tokio::time::timeout(PATIENCE, output.collect()).await.expect("an end");
        text_of(pieces)
    }
}

fn text_of(pieces: Vec<Result<Bytes>>) -> String {
    String::from_utf8(pieces.into_iter().flat_map(|piece| piece.unwrap()).collect()).unwrap()
}

async fn read_until(output: &mut Output, end: &str) -> String {
    let mut text = String::new();
    let read = async {
        while !text.ends_with(end) {
            let piece = output.next().await.expect("more").unwrap();
            text.push_str(std::str::from_utf8(&piece).unwrap());
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("what is waited for");
    text
}

#[tokio::test]
async fn a_viewer_gets_the_history_and_what_comes_once_each_and_an_end() {
    let guest = Guest::new(false);
    guest.prints("one ");
    let mut early = guest.hub.view().await.unwrap();
    assert_eq!(read_until(&mut early, "one ").await, "one ");
    guest.prints("two ");
    let mut late = guest.hub.view().await.unwrap();
    guest.prints("three");
    assert_eq!(read_until(&mut late, "three").await, "one two three");
    assert_eq!(read_until(&mut early, "three").await, "two three");
    guest.end.send(true).unwrap();
    assert!(tokio::time::timeout(PATIENCE, late.next()).await.unwrap().is_none());
    assert!(guest.hub.view().await.is_none());
}

/// The kernel has a bound on watches; here one cannot be had because a file is missing.
#[tokio::test]
async fn a_console_that_cannot_be_watched_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    fs::write(log.path(), "one ").unwrap();
    let (_end, ended) = watch::channel(false);
    let unwatched = Screen { side_logs: vec![dir.path().join("missing")], ..screen(&log, false) };
    assert!(watch_for(&unwatched).is_err());
    let hub = ConsoleHub::start(unwatched, nobody_reads, ended, CancellationToken::new());
    let mut viewer = hub.view().await.expect("a viewer");
    fs::write(log.path(), "one two").unwrap();
    assert_eq!(read_until(&mut viewer, "two").await, "one two");
}

/// Whoever replaces the log may have got no further than renaming it when a viewer comes.
#[tokio::test]
async fn a_viewer_who_meets_the_replacing_of_the_log_misses_nothing() {
    let guest = Guest::new(true);
    guest.prints("one ");
    fs::rename(guest.log.path(), guest.dir.path().join(LOG_OLD)).unwrap();
    let mut viewer = guest.hub.view().await.expect("a viewer");
    guest.prints("two");
    assert_eq!(read_until(&mut viewer, "two").await, "one two");
    assert_eq!(guest.logs(LogRequest::default()).await, "one two");
}

/// The log is longer than its bound several times over; nobody misses a line, and what is kept is its end. All is on
/// one thread, so nothing is printed in the instant in which it is emptied.
#[tokio::test]
async fn a_log_that_is_cut_is_followed_without_a_gap_and_keeps_its_bound() {
    const LINE: usize = 1 << 10;
    const LINES: usize = 3 * (MAX_LOG_BYTES as usize) / LINE;
    let guest = Guest::new(false);
    let mut viewer = guest.hub.view().await.unwrap();
    for line in 0..LINES {
        let text = format!("{line:0width$}\n", width = LINE - 1);
        guest.prints(&text);
        assert_eq!(read_until(&mut viewer, &text).await, text);
    }
    let kept = guest.logs(LogRequest::default()).await;
    assert!(kept.len() as u64 <= 2 * (MAX_LOG_BYTES + LINE as u64), "{}", kept.len());
    let lines: Vec<usize> = kept.lines().map(|line| line.parse().unwrap()).collect();
    assert!(lines.windows(2).all(|two| two[0] + 1 == two[1]) && lines.last() == Some(&(LINES - 1)));
    assert!(fs::metadata(guest.log.path()).unwrap().len() <= MAX_LOG_BYTES + LINE as u64);
    assert_eq!(
        guest.logs(LogRequest { tail_lines: Some(2), ..LogRequest::default() }).await.lines().count(),
        2
    );
}

#[tokio::test]
async fn what_is_asked_for_since_a_time_is_what_was_printed_since_and_little_more() {
    let guest = Guest::new(false);
    let mut viewer = guest.hub.view().await.unwrap();
    // A time of the file may be so much later than what was written.
    tokio::time::sleep(2 * CLOCK_STEP).await;
    guest.prints("before ");
    read_until(&mut viewer, "before ").await;
    tokio::time::sleep(CLOCK_STEP).await;
    let since = SystemTime::now();
    guest.prints("after");
    read_until(&mut viewer, "after").await;
    let request = LogRequest { since: Some(since), ..LogRequest::default() };
    assert_eq!(guest.logs(request).await, "after");
    let mut follower =
        logs(&guest.log, Some(&guest.hub), LogRequest { follow: true, ..request }).await.unwrap();
    guest.prints(" all");
    assert_eq!(read_until(&mut follower, "all").await, "after all");
    // Without the one who knows times the file counts as a whole.
    let output = logs(&guest.log, None, request).await.unwrap();
    assert_eq!(text_of(output.collect().await), "before after all");
    let later = LogRequest { since: Some(SystemTime::now() + 100 * CLOCK_STEP), ..LogRequest::default() };
    assert!(logs(&guest.log, None, later).await.unwrap().next().await.is_none());
    assert_eq!(guest.logs(later).await, "");
}

#[tokio::test]
async fn what_an_agent_that_died_had_copied_and_not_emptied_is_given_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    fs::write(log.path(), "one two").unwrap();
    fs::write(dir.path().join(LOG_OLD), "one ").unwrap();
    let output = logs(&log, None, LogRequest::default()).await.unwrap();
    assert_eq!(text_of(output.collect().await), "one two");
}

#[tokio::test]
async fn a_guest_that_takes_no_input_is_heard_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    fs::write(log.path(), "").unwrap();
    let path = dir.path().join("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (_end, ended) = watch::channel(false);
    let keyboard = |typed| async move { type_on_socket(&path, typed).await };
    let hub = ConsoleHub::start(screen(&log, false), keyboard, ended, CancellationToken::new());
    let (mut port, _) = tokio::time::timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let mut viewer = hub.view().await.unwrap();
    // More than a socket holds, and nobody reads.
    let typing = hub.keyboard();
    typing.send(Input::Data(vec![b'x'; 4 << 20].into())).await.unwrap();
    port.readable().await.unwrap();
    // The guest prints on the log and on its port; both are taken while what is typed waits. A port that is given up
    // would refuse it.
    let prints = async {
        let text = "so it goes on\n".repeat(30_000);
        fs::write(log.path(), "so it goes on").unwrap();
        port.write_all(text.as_bytes()).await.unwrap();
    };
    let both = async { tokio::join!(prints, read_until(&mut viewer, "so it goes on")) };
    tokio::time::timeout(PATIENCE, both).await.expect("output while input waits");
    // What is typed is passed on when the guest takes it.
    let mut taken = vec![0; 1 << 10];
    assert!(tokio::time::timeout(PATIENCE, port.read(&mut taken)).await.unwrap().unwrap() > 0);
}
