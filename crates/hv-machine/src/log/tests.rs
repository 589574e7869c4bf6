//! What a reader of a log sees while it is cut in either way.

use std::io::Write as _;
use std::time::Duration;

use super::*;

fn all(_: Option<&Metadata>, _: Option<&Metadata>) -> Places {
    Places { old: Some(0), log: 0 }
}

fn read(log: &Log) -> (String, Tail) {
    let (text, tail) = log.read(all).unwrap().joined();
    (String::from_utf8(text).unwrap(), tail)
}

#[test]
fn a_log_that_is_not_there_is_empty_and_may_come() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    let (text, mut tail) = read(&log);
    assert!(text.is_empty() && tail.more().unwrap().is_empty());
    fs::write(log.path(), "a").unwrap();
    assert_eq!(tail.more().unwrap(), "a");
    assert!(tail.more().unwrap().is_empty());
}

#[test]
fn a_log_that_was_renamed_and_has_no_successor_yet_is_read_and_followed() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::with_older(dir.path(), &["console.log.0", LOG_OLD]);
    fs::write(dir.path().join(LOG_OLD), "older").unwrap();
    fs::write(log.path(), "a").unwrap();
    let mut tail = Tail::at_end(&log).unwrap();
    // Written before it was renamed, and not read yet.
    fs::write(log.path(), "ab").unwrap();
    fs::rename(log.path(), dir.path().join("console.log.0")).unwrap();
    assert_eq!(read(&log).0, "ab");
    assert_eq!(tail.more().unwrap(), "b");
    assert!(tail.more().unwrap().is_empty());
    assert_eq!(tail.since(0).unwrap(), b"ab");
    // What it had before is what was there before the file that is held.
    let mut before = Vec::new();
    read_from(&log.older(tail.inode()).unwrap().unwrap(), 0, &mut before).unwrap();
    assert_eq!(before, b"older");
    fs::write(log.path(), "c").unwrap();
    assert_eq!(tail.more().unwrap(), "c");
    assert_eq!((tail.begins(), tail.position()), (1, 1));
}

#[test]
fn a_log_that_was_emptied_goes_on_at_its_begin() {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    fs::write(log.path(), "abc").unwrap();
    let mut tail = Tail::at_end(&log).unwrap();
    fs::write(log.path(), "d").unwrap();
    assert_eq!(tail.more().unwrap(), "d");
    assert_eq!((tail.begins(), tail.position()), (1, 1));
}

/// Writes numbered lines, and cuts after so many.
fn write_and_cut(path: PathBuf, lines: u32, cut: impl Fn(&Path)) {
    const LINES_EACH: u32 = 512;
    for line in 0..lines {
        if line % LINES_EACH == LINES_EACH - 1 {
            cut(&path);
        }
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        file.write_all(format!("{line:07}\n").as_bytes()).unwrap();
    }
}

fn assert_no_gap_while(cut: impl Fn(&Path) + Send + 'static) {
    const LINES: u32 = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let log = Log::new(dir.path());
    let path = log.path();
    let writer = std::thread::spawn(move || write_and_cut(path, LINES, cut));
    while !writer.is_finished() {
        // What is cut faster than it is read says so; what is read has no gap, and nothing twice.
        let Ok(mut text) = log.read(all) else { continue };
        if text.log.starts_with(&text.old) {
            text.old.clear();
        }
        let text = String::from_utf8(text.joined().0).unwrap();
        let lines: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert!(lines.windows(2).all(|two| two[0] + 1 == two[1]), "{lines:?}");
    }
    writer.join().unwrap();
}

#[test]
fn a_log_that_is_renamed_all_the_time_is_read_without_a_gap() {
    assert_no_gap_while(|path| fs::rename(path, path.with_file_name(LOG_OLD)).unwrap());
}

#[test]
fn a_log_that_is_copied_and_emptied_all_the_time_is_read_without_a_gap() {
    assert_no_gap_while(|path| {
        let partial = path.with_file_name("console.log.partial");
        fs::copy(path, &partial).unwrap();
        fs::rename(partial, path.with_file_name(LOG_OLD)).unwrap();
        File::options().append(true).open(path).unwrap().set_len(0).unwrap();
    });
}

fn at(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

/// Something is written every so often; whatever time is asked for, all that was written since then is given.
#[test]
fn however_many_times_were_noted_never_less_is_given_than_was_asked_for() {
    for every_ms in [1, 30, 250] {
        let mut times = Times::of_whole(0);
        let written: Vec<(u64, u64)> = (1..=20_000).map(|index| (index * every_ms, index)).collect();
        for (time, place) in &written {
            times.note(*time, *place);
        }
        assert!(times.0.len() <= MAX_TIMES);
        for since in (0..=20_000 * every_ms).step_by(997) {
            let given = times.first_since(at(since));
            let wanted = written.iter().find(|(time, _)| *time >= since).map(|(_, place)| *place);
            assert!(
                wanted.is_none() || given.is_some_and(|given| Some(given) <= wanted),
                "{since}: {given:?}"
            );
        }
        assert_eq!(times.first_since(at(20_000 * every_ms + 2 * TIMES_EVERY_MS)), None);
    }
}

#[test]
fn a_clock_that_is_set_back_hides_nothing() {
    let mut times = Times::default();
    times.note(10_000, 0);
    times.note(2_000, 10);
    times.note(3_000, 20);
    assert_eq!(times.first_since(at(2_500)), Some(0));
}
