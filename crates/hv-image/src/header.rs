//! What a file is, by its first and last bytes, and whether a tool may see it. Never trusts a number of the
//! file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

mod qcow2;
mod vmdk;

/// The formats of single files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2,
    Vmdk,
    /// A VHD, which QEMU calls `vpc`.
    Vhd,
    Vhdx,
    Elf,
    /// A tar file: an OCI image layout, if it is anything.
    Tar,
}

impl Format {
    /// QEMU's name.
    pub(crate) fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw | Self::Elf | Self::Tar => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
        }
    }
}

/// What the header of a file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) format: Format,
    /// What a guest would see, in bytes; `None` where only the tool can tell.
    pub(crate) virtual_bytes: Option<u64>,
}

/// How much of the beginning is looked at: a qcow2 header with its extensions, a VMDK's embedded descriptor.
const HEAD_BYTES: usize = 128 << 10;
/// A VHD's footer, which is also its length at the end of the file (Virtual Hard Disk Image Format
/// Specification, "Hard Disk Footer").
const VHD_FOOTER_BYTES: usize = 512;

/// What is refused whatever it is called: magic, what it is.
const NEVER: [(&[u8], &str); 9] = [
    (b"\x1f\x8b", "a gzip file; decompress it first"),
    (b"\xfd7zXZ\0", "an xz file; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; decompress it first"),
    (b"BZh", "a bzip2 file; decompress it first"),
    (b"PK\x03\x04", "a zip file; unpack it first"),
    (
        b"# Disk DescriptorFile",
        "a VMDK descriptor, which only names other files; convert the disk to one file first",
    ),
    (b"COWD", "a VMDK of an old ESX, which names its parent; convert the disk first"),
    (b"QED\0", "a QED disk, which QEMU gave up; convert it to qcow2 first"),
    (b"<!DOCTYPE", "a web page; check the URL"),
];

/// Looks at a file.
///
/// # Errors
/// The outer one if it cannot be read, the inner one says why it is refused.
pub(crate) fn inspect(file: &File) -> io::Result<Result<Header, String>> {
    let length = file.metadata()?.len();
    let mut head = vec![0; HEAD_BYTES.min(usize::try_from(length).unwrap_or(HEAD_BYTES))];
    file.read_exact_at(&mut head, 0)?;
    let mut foot = vec![0; VHD_FOOTER_BYTES.min(head.len())];
    let foot_at = length - foot.len() as u64;
    file.read_exact_at(&mut foot, foot_at)?;
    Ok(classify(&head, &foot, length))
}

/// [`inspect`] on bytes: the file's beginning, its last 512 bytes, its length.
fn classify(head: &[u8], foot: &[u8], length: u64) -> Result<Header, String> {
    if length == 0 {
        return Err("it is empty".to_owned());
    }
    if let Some((_, what)) = NEVER.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(format!("it is {what}"));
    }
    if head.starts_with(qcow2::MAGIC) {
        return qcow2::check(head, length)
            .map(|size| Header { format: Format::Qcow2, virtual_bytes: Some(size) });
    }
    if head.starts_with(vmdk::MAGIC) {
        return vmdk::check(head, length)
            .map(|size| Header { format: Format::Vmdk, virtual_bytes: Some(size) });
    }
    if head.starts_with(b"vhdxfile") {
        return Ok(Header { format: Format::Vhdx, virtual_bytes: None });
    }
    if head.starts_with(b"conectix") || foot.starts_with(b"conectix") {
        let footer = if head.starts_with(b"conectix") { head } else { foot };
        return vhd(footer).map(|size| Header { format: Format::Vhd, virtual_bytes: Some(size) });
    }
    if head.starts_with(b"\x7fELF") {
        return Ok(Header { format: Format::Elf, virtual_bytes: Some(length) });
    }
    // The magic of POSIX and GNU tar; a boot sector there would have neither.
    if head.get(257..262) == Some(b"ustar") && head.get(510..512) != Some(b"\x55\xaa") {
        return Ok(Header { format: Format::Tar, virtual_bytes: Some(length) });
    }
    Ok(Header { format: Format::Raw, virtual_bytes: Some(length.next_multiple_of(512)) })
}

/// "Hard Disk Footer": current size at 48, disk type at 60 (2 fixed, 3 dynamic, 4 differencing).
fn vhd(footer: &[u8]) -> Result<u64, String> {
    let size = be64(footer, 48).ok_or("its VHD footer is truncated")?;
    match be32(footer, 60) {
        Some(2 | 3) => Ok(size),
        Some(4) => Err("it is a differencing VHD, which needs its parent; merge it first".to_owned()),
        _ => Err("its VHD footer names a disk type that does not exist".to_owned()),
    }
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests;
