//! Waiting for what guests print, in the files where their output is kept.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// How often one file is looked at: far below what is measured.
const LOOK: Duration = Duration::from_micros(500);
/// How often many are: looking itself takes time.
const LOOK_AT_MANY: Duration = Duration::from_millis(5);
/// How long all of them may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Blocks until each of the files has a text.
pub(crate) fn wait_for_all(mut files: Vec<PathBuf>, text: &[u8], begin: Instant) -> Result<()> {
    let pause = if files.len() > 1 { LOOK_AT_MANY } else { LOOK };
    loop {
        files.retain(|file| !has(file, text));
        if files.is_empty() {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < PATIENCE,
            "{} guests printed nothing, as {}",
            files.len(),
            files[0].display()
        );
        #[allow(clippy::disallowed_methods, reason = "nothing else runs in this program meanwhile")]
        std::thread::sleep(pause);
    }
}

fn has(file: &Path, text: &[u8]) -> bool {
    let read = std::fs::read(file).unwrap_or_default();
    read.windows(text.len()).any(|window| window == text)
}
