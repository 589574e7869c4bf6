//! The process beside each container that keeps what it prints.
//!
//! # Theory of operation
//! containerd's shim starts it (`binary://` logging) with the container's output on descriptors 3 and 4. It outlives
//! the agent and containerd, so a container never waits for either, and its log has a bound whoever watches. It ends
//! when the output does.

use std::ffi::OsString;
use std::process::ExitCode;

/// The argument that asks for it.
pub(crate) const ARGUMENT: &str = "container-log";
/// When which part of the log was written.
#[cfg(target_os = "linux")]
pub(crate) const TIMES: &str = "console.times";
/// The same of what it had before it was cut.
#[cfg(target_os = "linux")]
pub(crate) const TIMES_OLD: &str = "console.times.1";
/// Held by the keeper for as long as it writes.
#[cfg(target_os = "linux")]
pub(crate) const LOCK: &str = "keeper.lock";

/// Runs the keeper if this process was started to be one, and says how it ended. To be called first of all in `main`
/// of a program that a driver names as its keeper.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != ARGUMENT {
        return None;
    }
    let order = arguments.next()?;
    Some(match keep(&order) {
        Ok(()) => ExitCode::SUCCESS,
        // The shim's log is the only place that hears it.
        Err(error) => {
            eprintln!("container-log: {error}");
            ExitCode::FAILURE
        }
    })
}

#[cfg(not(target_os = "linux"))]
fn keep(_order: &OsString) -> std::io::Result<()> {
    Err(std::io::Error::from(std::io::ErrorKind::Unsupported))
}

#[cfg(all(test, target_os = "linux"))]
pub(crate) use linux::Log;
#[cfg(target_os = "linux")]
use linux::keep;
#[cfg(target_os = "linux")]
pub(crate) use linux::uri;

#[cfg(target_os = "linux")]
mod linux {
    //! Log files are an affair of this system's drivers.

    use std::fmt::Write as _;
    use std::fs::{self, File};
    use std::io::{self, Read as _, Write as _};
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::time::{SystemTime, UNIX_EPOCH};

    use hv_machine::log::{LOG, LOG_OLD, TIMES_EVERY_MS};
    use rustix::fs::FlockOperation;

    use super::{LOCK, OsString, TIMES, TIMES_OLD};

    /// Most bytes that are read at once.
    const PIECE_BYTES: usize = 32 << 10;

    /// The address that makes the shim start a keeper for an instance.
    pub(crate) fn uri(program: &Path, dir: &Path, limit_bytes: u64, has_terminal: bool) -> String {
        let kind = if has_terminal { 't' } else { 'p' };
        let program = encoded(program.as_os_str().as_bytes(), true);
        let dir = encoded(dir.as_os_str().as_bytes(), false);
        format!("binary://{program}?{}={limit_bytes}:{kind}:{dir}", super::ARGUMENT)
    }

    /// Percent-encoding (RFC 3986, 2.1).
    fn encoded(bytes: &[u8], keeps_slashes: bool) -> String {
        let mut text = String::new();
        for byte in bytes {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    text.push(char::from(*byte));
                }
                b'/' if keeps_slashes => text.push('/'),
                // Writing to a string cannot fail.
                _ => drop(write!(text, "%{byte:02X}")),
            }
        }
        text
    }

    pub(super) fn keep(order: &OsString) -> io::Result<()> {
        let damaged = || io::Error::from(io::ErrorKind::InvalidInput);
        let mut parts = order.as_bytes().splitn(3, |byte| *byte == b':');
        let mut part = || parts.next().ok_or_else(damaged);
        let limit =
            std::str::from_utf8(part()?).ok().and_then(|text| text.parse().ok()).ok_or_else(damaged)?;
        let has_terminal = part()? == b"t";
        let dir = PathBuf::from(std::ffi::OsStr::from_bytes(part()?));
        // The shim tells it to end before everything has been read; the end of the output is its end.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let entered = runtime.enter();
        let ignored = {
            use tokio::signal::unix::{SignalKind, signal};
            [
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                signal(SignalKind::hangup())?,
            ]
        };
        drop(entered);
        let lock = File::options().create(true).append(true).open(dir.join(LOCK))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)?;
        let stdout = File::open("/proc/self/fd/3")?;
        let stderr = if has_terminal { None } else { Some(File::open("/proc/self/fd/4")?) };
        let log = Arc::new(Mutex::new(Log::open(dir, limit)?));
        // The shim waits for this.
        File::options().write(true).open("/proc/self/fd/5")?.write_all(b"r")?;
        let other = stderr.map(|stderr| {
            let log = log.clone();
            std::thread::spawn(move || copy(stderr, &log))
        });
        let outcome = copy(stdout, &log);
        if let Some(other) = other {
            let _ = other.join();
        }
        drop((lock, ignored, runtime));
        outcome
    }

    fn copy(mut from: File, log: &Mutex<Log>) -> io::Result<()> {
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let length = match from.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            // A full disk loses output; it must not stop the container.
            if let Err(error) = log.write(&piece[..length]) {
                eprintln!("container-log: {error}");
            }
        }
    }

    /// The log and its bound.
    pub(crate) struct Log {
        dir: PathBuf,
        limit_bytes: u64,
        file: File,
        times: File,
        length: u64,
        noted_ms: u64,
    }

    impl Log {
        pub(crate) fn open(dir: PathBuf, limit_bytes: u64) -> io::Result<Self> {
            let append = |name: &str| File::options().create(true).append(true).open(dir.join(name));
            let (file, times) = (append(LOG)?, append(TIMES)?);
            let length = file.metadata()?.len();
            Ok(Self { limit_bytes, file, times, length, noted_ms: 0, dir })
        }

        fn cut(&mut self) -> io::Result<()> {
            for (name, old) in [(TIMES, TIMES_OLD), (LOG, LOG_OLD)] {
                match fs::rename(self.dir.join(name), self.dir.join(old)) {
                    // A cut that a full disk broke off has moved it already.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    other => other?,
                }
            }
            *self = Self::open(self.dir.clone(), self.limit_bytes)?;
            Ok(())
        }

        pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
            if self.length > 0 && self.length + bytes.len() as u64 > self.limit_bytes {
                self.cut()?;
            }
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
            if now_ms >= self.noted_ms + TIMES_EVERY_MS {
                self.noted_ms = now_ms;
                writeln!(self.times, "{now_ms} {}", self.length)?;
            }
            self.file.write_all(bytes)?;
            self.length += bytes.len() as u64;
            Ok(())
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_log_never_outgrows_its_bound() {
            let dir = tempfile::tempdir().unwrap();
            let mut log = Log::open(dir.path().to_owned(), 1000).unwrap();
            for number in 0..100 {
                log.write(format!("{number:049}\n").as_bytes()).unwrap();
                let length = |name: &str| fs::metadata(dir.path().join(name)).map_or(0, |file| file.len());
                assert!(length(LOG) <= 1000 && length(LOG_OLD) <= 1000);
            }
            let last = fs::read_to_string(dir.path().join(LOG)).unwrap();
            assert!(last.ends_with("99\n"), "{last}");
        }

        #[test]
        fn odd_paths_survive_the_address() {
            let uri = uri(Path::new("/a b/ü?"), Path::new("/x/a&b=c"), 7, true);
            assert_eq!(uri, "binary:///a%20b/%C3%BC%3F?container-log=7:t:%2Fx%2Fa%26b%3Dc");
        }
    }
}
