//! Whom a container runs as.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use containerd_client::types::Mount;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::problem::{Outcome, Problem};

/// Who runs what an image leaves open: nobody.
pub(crate) const NOBODY: u32 = 65534;
/// Longest list of users or groups that is read, in bytes.
const MAX_LIST_BYTES: u64 = 1 << 20;

/// Ids as the kernel takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The user of a specification, else the image's, else nobody. Names are looked up in the image itself.
pub(crate) fn of(wanted: &str, image: &str, root: &[Mount]) -> Outcome<User> {
    let text = [wanted, image].into_iter().find(|text| !text.is_empty());
    let Some(text) = text else { return Ok(User { uid: NOBODY, gid: NOBODY }) };
    let (name, group) = match text.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (text, None),
    };
    let (uid, own_gid) = match name.parse::<u32>() {
        // Without a group it is that of the image's list, as for a name.
        Ok(uid) => (uid, if group.is_none() { gid_of(root, uid) } else { None }),
        Err(_) if name == "root" => (0, Some(0)),
        Err(_) => {
            let found = list(root, "etc/passwd").and_then(|text| entry(&text, name));
            let (uid, gid) = found.ok_or_else(|| {
                Problem::Invalid(format!("the image runs as `{name}`, and its /etc/passwd has no such user; set the instance's user in numbers"))
            })?;
            (uid, Some(gid))
        }
    };
    let gid = match group {
        None => own_gid.unwrap_or(if uid == 0 { 0 } else { uid }),
        Some(group) => match group.parse() {
            Ok(gid) => gid,
            Err(_) if group == "root" => 0,
            Err(_) => list(root, "etc/group").and_then(|text| entry(&text, group)).map(|(gid, _)| gid).ok_or_else(|| {
                Problem::Invalid(format!("the image runs as group `{group}`, and its /etc/group has no such group; set the instance's user in numbers"))
            })?,
        },
    };
    Ok(User { uid, gid })
}

/// The third and fourth field of a line that begins with a name (passwd(5); group(5) has one number only).
fn entry(text: &str, name: &str) -> Option<(u32, u32)> {
    let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
    let mut fields = line.split(':').skip(2);
    let first = fields.next()?.parse().ok()?;
    Some((first, fields.next().and_then(|field| field.parse().ok()).unwrap_or(first)))
}

fn gid_of(root: &[Mount], uid: u32) -> Option<u32> {
    let text = list(root, "etc/passwd")?;
    let of_uid = |line: &&str| line.split(':').nth(2).and_then(|field| field.parse().ok()) == Some(uid);
    text.lines().find(of_uid)?.split(':').nth(3)?.parse().ok()
}

/// A file of the image, from the uppermost layer that has it. Its links lead nowhere outside of the layer.
fn list(root: &[Mount], path: &str) -> Option<String> {
    layers(root).iter().find_map(|layer| read_inside(layer, path))
}

fn read_inside(layer: &Path, path: &str) -> Option<String> {
    let dir = openat(CWD, layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(openat2(&dir, path, flags, Mode::empty(), resolve).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(MAX_LIST_BYTES).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The directories that a root file system is made of, the uppermost first.
fn layers(root: &[Mount]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for mount in root {
        let of = |key: &str| mount.options.iter().find_map(|option| option.strip_prefix(key));
        found.extend(of("upperdir=").map(PathBuf::from));
        found.extend(of("lowerdir=").into_iter().flat_map(|dirs| dirs.split(':')).map(PathBuf::from));
        if matches!(mount.r#type.as_str(), "bind" | "rbind") {
            found.push(mount.source.clone().into());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_root_who_did_not_ask() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:33:34::/:/bin/sh\n")
            .unwrap();
        std::fs::write(dir.path().join("etc/group"), "logs:x:44:\n").unwrap();
        let source = dir.path().display().to_string();
        let root = [Mount { r#type: "bind".to_owned(), source, ..Mount::default() }];
        let cases = [
            ("", "", Some((65534, 65534))),
            ("7", "0", Some((7, 7))),
            ("7:8", "web", Some((7, 8))),
            ("", "0", Some((0, 0))),
            ("", "root", Some((0, 0))),
            ("", "web", Some((33, 34))),
            ("", "33", Some((33, 34))),
            ("", "web:logs", Some((33, 44))),
            ("", "nosuch", None),
            ("", "web:nosuch", None),
        ];
        for (wanted, image, expected) in cases {
            let user = of(wanted, image, &root).ok().map(|user| (user.uid, user.gid));
            assert_eq!(user, expected, "{wanted:?} {image:?}");
        }
    }

    #[test]
    fn a_link_out_of_the_image_reads_nothing_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("etc")).unwrap();
        assert_eq!(read_inside(dir.path(), "etc/passwd"), None);
    }
}
