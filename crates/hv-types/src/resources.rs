//! Amounts of processor, memory, disk and accelerators.

use serde::{Deserialize, Serialize};

/// Bytes in one MiB, the unit that the command line takes memory in.
pub const MIB: u64 = 1 << 20;

/// An amount of resources: what a node has, or what an instance asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Resources {
    /// Processor cores.
    pub cpu_cores: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Disk in bytes.
    pub disk_bytes: u64,
    /// Accelerators.
    pub gpu_count: u32,
}

impl Resources {
    /// The sum. Saturates: an amount that large fits nowhere anyway.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_cores: self.cpu_cores.saturating_add(other.cpu_cores),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
            gpu_count: self.gpu_count.saturating_add(other.gpu_count),
        }
    }

    /// What is left, never below nothing.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            cpu_cores: self.cpu_cores.saturating_sub(other.cpu_cores),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(other.disk_bytes),
            gpu_count: self.gpu_count.saturating_sub(other.gpu_count),
        }
    }

    /// Of each amount the larger one.
    #[must_use]
    pub fn most(self, other: Self) -> Self {
        Self {
            cpu_cores: self.cpu_cores.max(other.cpu_cores),
            memory_bytes: self.memory_bytes.max(other.memory_bytes),
            disk_bytes: self.disk_bytes.max(other.disk_bytes),
            gpu_count: self.gpu_count.max(other.gpu_count),
        }
    }

    /// Whether every amount is at most the other's.
    #[must_use]
    pub fn fits_in(self, room: Self) -> bool {
        self.cpu_cores <= room.cpu_cores
            && self.memory_bytes <= room.memory_bytes
            && self.disk_bytes <= room.disk_bytes
            && self.gpu_count <= room.gpu_count
    }
}

impl std::iter::Sum for Resources {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::default(), Self::plus)
    }
}
