//! The wall clock and the disk of one process: a library, built here, that is loaded into it before the C library.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Where the two figures lie in the control file.
const CLOCK: u64 = 0;
const FLUSH: u64 = 8;

/// What one process sees of time and of its disk.
#[derive(Debug)]
pub struct Shim {
    library: PathBuf,
    control_path: PathBuf,
    control: File,
}

impl Shim {
    /// Builds the library in `dir`, unless it is there, and a control file of its own. `None` where there is no C compiler.
    ///
    /// # Errors
    /// The compiler refuses it.
    pub fn build(dir: &Path) -> Result<Option<Self>> {
        let library = dir.join("chaos-shim.so");
        if !library.exists() {
            let source = dir.join("chaos-shim.c");
            std::fs::write(&source, include_str!("shim.c"))?;
            let mut compiler = Command::new("cc");
            compiler
                .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
                .arg(&library)
                .arg(&source)
                .arg("-ldl");
            let Ok(output) = compiler.output() else { return Ok(None) };
            ensure!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
        }
        let (control, control_path) =
            tempfile::NamedTempFile::new_in(dir)?.keep().context("the control file")?;
        control.write_all_at(&[0; 16], 0)?;
        Ok(Some(Self { library, control_path, control }))
    }

    /// The variables of a process that is to be under control.
    #[must_use]
    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("CHAOS_SHIM_CONTROL", self.control_path.display().to_string()),
        ]
    }

    /// Sets the process's wall clock so far from the true one: seconds, forward or back.
    ///
    /// # Errors
    /// The control file cannot be written.
    pub fn set_clock(&self, seconds: i64) -> Result<()> {
        self.write(CLOCK, seconds.saturating_mul(1_000_000_000))
    }

    /// From now on each flush of a file takes so much longer.
    ///
    /// # Errors
    /// The control file cannot be written.
    pub fn slow_disk(&self, delay: Duration) -> Result<()> {
        self.write(FLUSH, i64::try_from(delay.as_micros())?)
    }

    fn write(&self, at: u64, value: i64) -> Result<()> {
        Ok(self.control.write_all_at(&value.to_ne_bytes(), at)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_sees_another_day_and_its_monotonic_clock_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let Some(shim) = Shim::build(dir.path()).unwrap() else {
            crate::skip("hv-testkit shim", "there is no C compiler");
            return;
        };
        let year = |shim: &Shim| {
            let output = Command::new("date").arg("+%Y").envs(shim.env()).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().parse::<i64>().unwrap()
        };
        let before = year(&shim);
        shim.set_clock(-400 * 24 * 3600).unwrap();
        let after = year(&shim);
        assert!(after < before, "{after} is not before {before}");
    }
}
