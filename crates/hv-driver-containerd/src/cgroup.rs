//! A container's control group: where it is, what it counts, who is in it. Both versions (cgroups(7)).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hv_driver::Stats;

const ROOT: &str = "/sys/fs/cgroup";
/// How often a group is tried to be removed.
const REMOVE_TRIES: u32 = 100;
/// How long between two tries.
const REMOVE_INTERVAL: Duration = Duration::from_millis(10);

/// A control group, by its path below the hierarchies' roots.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    is_unified: bool,
    /// Absolute, as the runtime takes it.
    pub(crate) path: String,
}

/// Whether this machine has version 2 only.
pub(crate) fn is_unified() -> bool {
    Path::new(ROOT).join("cgroup.controllers").exists()
}

/// Whether the kernel accounts for swap, so that it can be bounded.
pub(crate) fn counts_swap() -> bool {
    is_unified() || Path::new(ROOT).join("memory/memory.memsw.limit_in_bytes").exists()
}

impl Cgroup {
    pub(crate) fn new(parent: &str, id: &str) -> Self {
        Self { is_unified: is_unified(), path: format!("/{}/{id}", parent.trim_matches('/')) }
    }

    /// The group's directory in a hierarchy.
    pub(crate) fn dir(&self, controller: &str) -> PathBuf {
        let relative = self.path.trim_start_matches('/');
        match self.is_unified {
            true => Path::new(ROOT).join(relative),
            false => Path::new(ROOT).join(controller).join(relative),
        }
    }

    /// The directory whose processes are the container.
    pub(crate) fn processes_dir(&self) -> PathBuf {
        self.dir("freezer")
    }

    /// Removes the group, which has no processes any more. The runtime does it too, but gives up early.
    pub(crate) async fn remove(&self) {
        let all = match self.is_unified {
            true => vec![self.dir("")],
            false => {
                let hierarchies = fs::read_dir(ROOT).into_iter().flatten().flatten();
                hierarchies.map(|entry| entry.path().join(self.path.trim_start_matches('/'))).collect()
            }
        };
        for dir in all {
            let mut tries = 0;
            // Busy as long as the kernel is not done with its last process.
            while tries < REMOVE_TRIES && dir.exists() && fs::remove_dir(&dir).is_err() {
                tries += 1;
                tokio::time::sleep(REMOVE_INTERVAL).await;
            }
        }
    }

    fn read(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.dir(controller).join(file)).ok()
    }

    fn number(&self, controller: &str, file: &str) -> Option<u64> {
        self.read(controller, file)?.trim().parse().ok()
    }

    /// The value of a line `key value`.
    fn keyed(&self, controller: &str, file: &str, key: &str) -> Option<u64> {
        let text = self.read(controller, file)?;
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
        line.trim().parse().ok()
    }

    /// Whether a process is in the group itself.
    pub(crate) fn holds(&self, pid: i32) -> bool {
        let listed = fs::read_to_string(self.processes_dir().join("cgroup.procs")).unwrap_or_default();
        listed.lines().any(|line| line.trim().parse() == Ok(pid))
    }

    /// Whether everything in it stands still.
    pub(crate) fn is_frozen(&self) -> bool {
        match self.is_unified {
            true => self.number("", "cgroup.freeze") == Some(1),
            false => self.read("freezer", "freezer.state").is_some_and(|state| state.trim() != "THAWED"),
        }
    }

    /// How many of its processes were killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let found = match self.is_unified {
            true => self.keyed("", "memory.events", "oom_kill"),
            false => self.keyed("memory", "memory.oom_control", "oom_kill"),
        };
        found.unwrap_or(0)
    }

    /// Processor time, memory and disks. `None` where the group is gone.
    pub(crate) fn stats(&self) -> Option<Stats> {
        let stats = match self.is_unified {
            true => {
                let (read, written) = self.read("", "io.stat").map_or((0, 0), |text| io_stat(&text));
                Stats {
                    cpu_time_ns: self.keyed("", "cpu.stat", "usage_usec")?.saturating_mul(1000),
                    memory_used_bytes: self.number("", "memory.current").unwrap_or(0),
                    memory_cache_bytes: self.keyed("", "memory.stat", "file").unwrap_or(0),
                    disk_read_bytes: read,
                    disk_write_bytes: written,
                    ..Stats::default()
                }
            }
            false => {
                let blkio = self.read("blkio", "blkio.throttle.io_service_bytes");
                let (read, written) = blkio.map_or((0, 0), |text| service_bytes(&text));
                Stats {
                    cpu_time_ns: self.number("cpuacct", "cpuacct.usage")?,
                    memory_used_bytes: self.number("memory", "memory.usage_in_bytes").unwrap_or(0),
                    memory_cache_bytes: self.keyed("memory", "memory.stat", "total_cache").unwrap_or(0),
                    disk_read_bytes: read,
                    disk_write_bytes: written,
                    ..Stats::default()
                }
            }
        };
        Some(stats)
    }
}

/// Sums version 2's `8:0 rbytes=1 wbytes=2 …`.
fn io_stat(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let values =
            text.split_ascii_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok());
        values.fold(0u64, u64::saturating_add)
    };
    (sum("rbytes="), sum("wbytes="))
}

/// Sums version 1's `8:0 Read 1`, a line each.
fn service_bytes(text: &str) -> (u64, u64) {
    let sum = |key: &str| {
        let values = text.lines().filter_map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            (words.len() == 3 && words[1] == key).then(|| words[2].parse::<u64>().ok())?
        });
        values.fold(0u64, u64::saturating_add)
    };
    (sum("Read"), sum("Write"))
}

/// Bytes received and sent in the network namespace of a process, without the loopback (proc(5), `/proc/pid/net/dev`).
pub(crate) fn network_bytes(pid: i32) -> (u64, u64) {
    net_dev(&fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default())
}

fn net_dev(text: &str) -> (u64, u64) {
    let mut sums = (0u64, 0u64);
    for (name, counters) in text.lines().filter_map(|line| line.split_once(':')) {
        if name.trim() == "lo" {
            continue;
        }
        let values: Vec<u64> =
            counters.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        sums.0 = sums.0.saturating_add(values.first().copied().unwrap_or(0));
        sums.1 = sums.1.saturating_add(values.get(8).copied().unwrap_or(0));
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_devices_are_summed() {
        assert_eq!(io_stat("8:0 rbytes=10 wbytes=20 rios=1 wios=2\n8:16 rbytes=1 wbytes=2\n"), (11, 22));
        assert_eq!(
            service_bytes("8:0 Read 10\n8:0 Write 20\n8:0 Total 30\n8:16 Read 1\nTotal 31\n"),
            (11, 20)
        );
        let dev = "Inter-| Receive |  Transmit\n face |bytes packets\n    lo: 5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  \
                   eth0:100 1 0 0 0 0 0 0 7 1 0 0 0 0 0 0\n";
        assert_eq!(net_dev(dev), (100, 7));
    }
}
