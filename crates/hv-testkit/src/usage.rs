//! What processes use, and figures over many values.

use std::time::Duration;

use anyhow::{Context, Result};

/// Ticks of the processor accounting in `/proc` per second: USER_HZ, fixed in the kernel's interface to programs.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Processor time, user and system.
    pub cpu: Duration,
    /// Memory that is resident now, in bytes.
    pub resident_bytes: u64,
    /// The most memory that was resident, in bytes.
    pub peak_bytes: u64,
}

impl Usage {
    /// Of a process.
    ///
    /// # Errors
    /// It is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The second field is the program's name in parentheses, which may hold anything; utime and stime are the 14th and
        // 15th field (proc(5)).
        let fields = stat.rsplit_once(')').context("no name in stat")?.1;
        let mut fields = fields.split_whitespace().skip(11);
        let mut ticks = || -> Result<f64> { Ok(fields.next().context("no times in stat")?.parse()?) };
        let cpu = Duration::from_secs_f64((ticks()? + ticks()?) / TICKS_PER_SECOND);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let kib = |name: &str| -> Result<u64> {
            let line = status.lines().find(|line| line.starts_with(name)).with_context(|| name.to_owned())?;
            Ok(line.split_whitespace().nth(1).context("no figure")?.parse()?)
        };
        Ok(Self { cpu, resident_bytes: kib("VmRSS:")? << 10, peak_bytes: kib("VmHWM:")? << 10 })
    }

    /// Of this process.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn own() -> Result<Self> {
        Self::of(std::process::id())
    }
}

/// The middle value; NaN of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    percentile(values, 50.0)
}

/// The value that so many percent of all do not exceed; NaN of none.
#[must_use]
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return f64::NAN;
    }
    let rank = (percent / 100.0 * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted[rank.min(sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (median(&values), percentile(&values, 99.0), percentile(&values, 100.0)),
            (50.0, 99.0, 100.0)
        );
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_process_that_computes_uses_time_and_memory() {
        let before = Usage::own().unwrap();
        let begin = std::time::Instant::now();
        while begin.elapsed() < Duration::from_millis(100) {
            std::hint::black_box(begin);
        }
        let after = Usage::own().unwrap();
        assert!(
            after.cpu > before.cpu
                && after.resident_bytes > 1 << 20
                && after.peak_bytes >= after.resident_bytes
        );
    }
}
