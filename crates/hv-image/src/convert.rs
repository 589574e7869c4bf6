//! Disks from one format to another, by `qemu-img`.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use rustix::fs::{Gid, Uid};
use tokio_util::sync::CancellationToken;

use crate::confine::{Confined, Finished, Identity};
use crate::header::{self, Format};
use crate::layout::Layout;
use crate::{ImageError, Result, StoreOptions};

/// Memory that `qemu-img` may map.
const MEMORY_BYTES: u64 = 2 << 30;
/// What a converted file may have beyond its guest's bytes: tables.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// Exit code of `qemu-img check` for corruptions; 3 is leaked clusters, which harm nobody.
const CHECK_CORRUPT: i32 = 2;

/// `qemu-img` on one image.
pub(crate) struct QemuImg<'a> {
    pub(crate) image: &'a str,
    pub(crate) options: &'a StoreOptions,
    pub(crate) layout: &'a Layout,
    pub(crate) cancel: &'a CancellationToken,
}

impl QemuImg<'_> {
    async fn run(
        &self,
        args: &[&str],
        input: &Path,
        output: Option<File>,
        file_bytes: u64,
    ) -> Result<Finished> {
        let program = self.options.qemu_img.as_deref().ok_or_else(|| ImageError::Unsupported {
            image: self.image.to_owned(),
            reason: "this node has no qemu-img to look into it; install qemu-utils".to_owned(),
        })?;
        let source = File::open(input).map_err(ImageError::io("open", input))?;
        let (user, group) = self.options.confined_ids;
        let confined = Confined {
            image: self.image,
            name: "qemu-img",
            program,
            args: args.iter().map(OsString::from).collect(),
            stdin: Stdio::from(source),
            stdout: output.map(Stdio::from),
            identity: Identity::Nobody(user, group),
            memory_bytes: MEMORY_BYTES,
            file_bytes,
            timeout: self.options.convert_timeout,
        };
        confined.run((self.layout, self.options.min_free_bytes), self.cancel).await
    }

    /// The virtual size as `qemu-img` sees it. Refuses what needs another file, whatever the header said.
    pub(crate) async fn virtual_bytes(&self, input: &Path, format: Format) -> Result<u64> {
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "kebab-case")]
        struct Info {
            virtual_size: u64,
            backing_filename: Option<String>,
            #[serde(default)]
            encrypted: bool,
        }
        let args = ["info", "--output=json", "-f", format.qemu_name(), "/proc/self/fd/0"];
        let finished = self.run(&args, input, None, 0).await?;
        finished.check(self.image, "qemu-img")?;
        let malformed = |_| ImageError::Tool {
            image: self.image.to_owned(),
            program: "qemu-img",
            reason: "its answer cannot be read".to_owned(),
        };
        let info: Info = serde_json::from_slice(&finished.stdout).map_err(malformed)?;
        match info.backing_filename.is_some() || info.encrypted {
            true => Err(ImageError::refused(self.image, "it depends on another file or on a key")),
            false => Ok(info.virtual_size),
        }
    }

    /// Refuses a qcow2 image whose tables contradict each other.
    pub(crate) async fn check_qcow2(&self, input: &Path) -> Result<()> {
        let args = ["check", "-q", "-f", "qcow2", "/proc/self/fd/0"];
        let finished = self.run(&args, input, None, 0).await?;
        match finished.status.code() {
            Some(CHECK_CORRUPT) => Err(ImageError::refused(
                self.image,
                "it is damaged: its tables contradict each other; fetch it again, or repair it with `qemu-img check -r all`",
            )),
            _ => Ok(()),
        }
    }

    /// Writes `input` in another format to `output`, which is not there yet, and makes it read-only.
    pub(crate) async fn convert(
        &self,
        (input, from): (&Path, Format),
        (output, to): (&Path, Format),
        virtual_bytes: u64,
    ) -> Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(output)
            .map_err(ImageError::io("create", output))?;
        if rustix::process::geteuid().is_root() {
            let (user, group) = self.options.confined_ids;
            own(&file, user, group).map_err(ImageError::io("change the owner of", output))?;
        }
        let kept = file.try_clone().map_err(ImageError::io("open", output))?;
        let args =
            ["convert", "-f", from.qemu_name(), "-O", to.qemu_name(), "/proc/self/fd/0", "/proc/self/fd/1"];
        let bound = virtual_bytes + virtual_bytes / 8 + OVERHEAD_BYTES;
        let finished = self.run(&args, input, Some(file), bound).await?;
        finished.check(self.image, "qemu-img")?;
        let seal = || {
            own(&kept, rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())?;
            kept.set_permissions(Permissions::from_mode(0o444))?;
            kept.sync_all()
        };
        seal().map_err(ImageError::io("seal", output))?;
        let written = header::inspect(&kept).map_err(ImageError::io("read", output))?;
        match written {
            Ok(header) if to != Format::Qcow2 || header.format == to => Ok(()),
            // A raw disk whose first bytes look like something else is still a raw disk.
            Err(_) if to != Format::Qcow2 => Ok(()),
            _ => Err(ImageError::Tool {
                image: self.image.to_owned(),
                program: "qemu-img",
                reason: "it wrote something else than it was asked for".to_owned(),
            }),
        }
    }
}

fn own(file: &File, user: u32, group: u32) -> std::io::Result<()> {
    if user == u32::MAX || group == u32::MAX {
        return Err(std::io::Error::other("this id means nobody"));
    }
    Ok(rustix::fs::fchown(file, Some(Uid::from_raw(user)), Some(Gid::from_raw(group)))?)
}
