//! Waiting for conditions, and looking at processes.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use rustix::process::Pid;

/// How long a condition may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(25);

/// Waits until `look` returns something.
///
/// # Errors
/// It did not within [`DEADLINE`]; the message says what was waited for and what was seen last.
pub async fn until<T, F>(what: &str, mut look: F) -> Result<T>
where
    F: AsyncFnMut() -> Result<Option<T>>,
{
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let seen = look().await;
        if let Ok(Some(found)) = seen {
            return Ok(found);
        }
        if tokio::time::Instant::now() >= deadline {
            match seen {
                Err(error) => return Err(error.context(format!("waited in vain for {what}"))),
                Ok(_) => bail!("waited in vain for {what}"),
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The processes whose working directory is `dir` or below it.
pub(crate) fn working_below(dir: &Path) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pid = |entry: std::fs::DirEntry| {
        let pid = entry.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw)?;
        let place = std::fs::read_link(entry.path().join("cwd")).ok()?;
        place.starts_with(dir).then_some(pid)
    };
    entries.filter_map(pid).collect()
}

/// The QEMU processes that run for an instance.
///
/// # Errors
/// The list of processes cannot be read.
pub fn qemu_processes(instance_id: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        // A process may end between the two looks.
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).into_owned();
        let program = command.split('\0').next().unwrap_or_default();
        if program.contains("qemu-system") && command.contains(instance_id) {
            found.push(pid);
        }
    }
    Ok(found)
}
