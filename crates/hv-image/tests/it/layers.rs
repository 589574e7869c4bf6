//! How layers come one above the other: whiteouts, opaque directories, replaced kinds, long names, zstd.

use std::fs;

use hv_driver::ImageContent;
use hv_types::{InstanceId, InstanceType};

use crate::fixture::{Archive, Image, World, digest, noise, run};
use crate::server::Server;

/// Unpacks layers into a root file system and gives the paths in it, and a way to look at one.
async fn unpacked(image: &Image) -> (World, String) {
    let server = Server::start().await;
    let reference = server.image("app", image);
    let world = World::new();
    world.pull(&reference, InstanceType::Microvm).await.unwrap();
    let local = world.store.acquire("image", InstanceType::Microvm, &InstanceId::generate()).await.unwrap();
    let ImageContent::RootFs { path, .. } = local.content else { panic!("{local:?}") };
    run("e2fsck", &["-fn", path.to_str().unwrap()]);
    (world, path.to_str().unwrap().to_owned())
}

fn names(path: &str, dir: &str) -> Vec<String> {
    let listed = run("debugfs", &["-R", &format!("ls -p {dir}"), path]);
    let mut names: Vec<_> = listed
        .lines()
        .filter_map(|line| line.split('/').nth(5))
        .filter(|name| !matches!(*name, "" | "." | ".." | "lost+found"))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn whiteouts_remove_what_is_below_and_spare_what_is_beside() {
    let base = Archive::new()
        .dir("a/")
        .file("a/one", b"1")
        .file("a/two", b"2")
        .dir("b/")
        .dir("b/deep/")
        .file("b/deep/x", b"x")
        .file("c/y", b"y");
    let top = Archive::new()
        .file("a/new", b"n")
        .file("a/.wh..wh..opq", b"")
        .file(".wh.b", b"")
        .file("c/.wh.nothing", b"")
        .file(".wh..wh.plnk", b"");
    let (_world, path) = unpacked(&Image::new(&[base.bytes(), top.bytes()])).await;
    assert_eq!(names(&path, "/"), ["a", "c"]);
    assert_eq!(names(&path, "/a"), ["new"]);
    assert_eq!(names(&path, "/c"), ["y"]);
}

#[tokio::test]
async fn a_later_layer_may_change_the_kind_of_a_name() {
    let base = Archive::new().dir("dir/").file("dir/x", b"x").file("file", b"f").symlink("link", "file");
    let top = Archive::new()
        .file("dir", b"now a file")
        .dir("file/")
        .file("file/in", b"i")
        .dir("link/")
        .file("link/in", b"i");
    let (_world, path) = unpacked(&Image::new(&[base.bytes(), top.bytes()])).await;
    assert_eq!(run("debugfs", &["-R", "cat /dir", &path]), "now a file");
    assert_eq!(names(&path, "/file"), ["in"]);
    assert_eq!(names(&path, "/link"), ["in"]);
}

#[tokio::test]
async fn long_names_and_zstd_layers_are_read() {
    let name = "n".repeat(200);
    let data = noise(21, 300_000);
    let layer = Archive::new()
        .entry(tar::EntryType::GNULongName, "././@LongLink", 0, "", format!("d/{name}\0").as_bytes())
        .file("short", &data)
        .bytes();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layer");
    fs::write(&file, &layer).unwrap();
    run("zstd", &["-q", file.to_str().unwrap()]);
    let mut zstd = fs::read(dir.path().join("layer.zst")).unwrap();
    // A skippable frame behind it, as some writers leave their tables of contents.
    zstd.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    let (_world, path) = unpacked(&Image::build(vec![digest(&layer)], vec![zstd])).await;
    assert_eq!(names(&path, "/d"), [name]);
}
