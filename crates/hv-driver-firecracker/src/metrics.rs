//! Counters of disks and networks, from the metrics that Firecracker writes.
//!
//! # Theory of operation
//! Each flush appends one line of JSON to a file; its counters tell what was added since the line before
//! (Firecracker's docs/metrics.md). So they are summed up, from the file's beginning after an agent's restart. What was
//! summed is given back to the file system from time to time, by holes: Firecracker writes on at its own offset.

use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags};
use serde::{Deserialize, Serialize};

use crate::files::{InstanceDir, open_in_root};
use crate::problem::Outcome;

/// What was summed up so far, in the instance's directory.
const SUMS: &str = "metrics.json";
/// Space is given back when so many bytes were summed.
const MAX_KEPT_BYTES: u64 = 1 << 20;
/// The longest line that is read; Firecracker's have about 10 KiB.
const MAX_LINE_BYTES: u64 = 256 << 10;
/// The VMM's own log is given back when it is longer, but for its end.
const MAX_LOG_BYTES: u64 = 2 << 20;
/// What is kept of the log.
const KEPT_LOG_BYTES: u64 = 128 << 10;

/// The sums of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sums {
    run: u64,
    offset: u64,
    given_back: u64,
    pub(crate) disk_read_bytes: u64,
    pub(crate) disk_write_bytes: u64,
    pub(crate) network_rx_bytes: u64,
    pub(crate) network_tx_bytes: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Line {
    block: Block,
    net: Net,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Block {
    read_bytes: u64,
    write_bytes: u64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Net {
    rx_bytes_count: u64,
    tx_bytes_count: u64,
}

impl Sums {
    /// What an earlier agent had summed up of this run.
    pub(crate) fn load(dir: &InstanceDir, run: u64) -> Outcome<Self> {
        let known = dir.read::<Self>(SUMS)?.filter(|sums| sums.run == run);
        Ok(known.unwrap_or(Self { run, ..Self::default() }))
    }

    /// Adds what was written since the last time.
    pub(crate) fn advance(&mut self, dir: &InstanceDir, metrics: &Path) -> io::Result<()> {
        let mut file = open_in_root(metrics, OFlags::RDWR)?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut reader = BufReader::new(&file);
        loop {
            let mut line = Vec::new();
            let length = reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? as u64;
            // The last line may be half written, and is read again.
            if length == 0 || (line.last() != Some(&b'\n') && length < MAX_LINE_BYTES) {
                break;
            }
            self.offset += length;
            if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                self.add(&line);
            }
        }
        if self.offset - self.given_back > MAX_KEPT_BYTES {
            // What is in a hole would be counted no more, so the sums come first.
            self.given_back = self.offset;
            dir.note(SUMS, self).map_err(io::Error::other)?;
            give_back(&file, self.offset)?;
        }
        Ok(())
    }

    fn add(&mut self, line: &Line) {
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut self.disk_read_bytes, line.block.read_bytes);
        add(&mut self.disk_write_bytes, line.block.write_bytes);
        add(&mut self.network_rx_bytes, line.net.rx_bytes_count);
        add(&mut self.network_tx_bytes, line.net.tx_bytes_count);
    }
}

/// Keeps the space that the VMM's log takes within its bound.
pub(crate) fn trim_log(log: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let file = open_in_root(log, OFlags::RDWR)?;
    let found = file.metadata()?;
    match found.blocks() * 512 > MAX_LOG_BYTES {
        true => give_back(&file, found.len().saturating_sub(KEPT_LOG_BYTES)),
        false => Ok(()),
    }
}

fn give_back(file: &std::fs::File, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, 0, bytes) {
        // A file system without holes keeps it all.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => other.map_err(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn lines_are_summed_once_and_their_space_is_given_back() {
        let path = std::env::temp_dir().join(format!("hv-fc-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let dir = InstanceDir::open(path.clone()).unwrap();
        let metrics = path.join("metrics");
        let pad = "x".repeat(8 << 10);
        let line = format!(
            "{{\"pad\":\"{pad}\",\"block\":{{\"read_bytes\":512,\"write_bytes\":1}},\"net\":{{\"rx_bytes_count\":2,\"tx_bytes_count\":3}}}}\n"
        );
        let mut sums = Sums::load(&dir, 7).unwrap();
        let mut text = String::new();
        for round in 1..=200 {
            text.push_str(&line);
            std::fs::write(&metrics, &text).unwrap();
            sums.advance(&dir, &metrics).unwrap();
            assert_eq!(sums.disk_read_bytes, 512 * round);
        }
        assert!(std::fs::metadata(&metrics).unwrap().blocks() * 512 < 2 << 20);
        // Another agent goes on where the sums were kept; a half line counts when it is whole.
        std::fs::write(&metrics, text.clone() + &line[..40]).unwrap();
        let mut again = Sums::load(&dir, 7).unwrap();
        again.advance(&dir, &metrics).unwrap();
        assert_eq!((again.disk_read_bytes, again.network_tx_bytes), (512 * 200, 3 * 200));
        std::fs::write(&metrics, text + &line).unwrap();
        again.advance(&dir, &metrics).unwrap();
        assert_eq!(again.disk_read_bytes, 512 * 201);
        assert_eq!(Sums::load(&dir, 8).unwrap(), Sums { run: 8, ..Sums::default() });
        std::fs::remove_dir_all(&path).unwrap();
    }
}
