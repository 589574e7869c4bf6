//! Killed at any moment, a store opens again, has nothing half done, and goes on.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hv_driver::ImageContent;
use hv_image::Store;
use hv_types::{InstanceId, InstanceType};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Archive, Image, digest, noise, options, pull, tree};
use crate::server::{Manner, Server};

const DIRECTORY: &str = "HV_IMAGE_TEST_DIRECTORY";
const REFERENCE: &str = "HV_IMAGE_TEST_REFERENCE";
const KIND: &str = "HV_IMAGE_TEST_KIND";
/// Times that the child is killed for each form.
const KILLS: u64 = 8;

/// The child of the other tests, which run this program again with it; without their variables there is
/// nothing to do.
#[tokio::test]
async fn child_that_is_killed() {
    let (Ok(dir), Ok(reference), Ok(kind)) =
        (std::env::var(DIRECTORY), std::env::var(REFERENCE), std::env::var(KIND))
    else {
        return;
    };
    let kind = InstanceType::ALL.into_iter().find(|t| t.name() == kind).unwrap();
    let store = Store::open(options(Path::new(&dir))).unwrap();
    // The one before may have died while an instance had the image, and that is remembered.
    for user in store.users() {
        store.release(&user).await.unwrap();
    }
    loop {
        pull(&store, &reference, kind, &CancellationToken::new()).await.unwrap();
        let user = InstanceId::generate();
        store.acquire("image", kind, &user).await.unwrap();
        store.verify("image").await.unwrap();
        store.release(&user).await.unwrap();
        store.delete("image").await.unwrap();
    }
}

fn spawn_child(dir: &Path, reference: &str, kind: InstanceType) -> tokio::process::Child {
    tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::child_that_is_killed"])
        .env(DIRECTORY, dir)
        .env(REFERENCE, reference)
        .env(KIND, kind.name())
        .stdin(Stdio::null())
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Whatever was going on: the store opens, every blob has the digest that it is named after, every form is
/// whole, and
/// nothing lies in the scratch directory.
async fn assert_sound(dir: &Path, reference: &str, kind: InstanceType) {
    let store = Store::open(options(dir)).unwrap();
    for (path, bytes) in tree(&store.dir().join("blobs/sha256")) {
        assert_eq!(format!("sha256:{}", path.file_name().unwrap().to_str().unwrap()), digest(&bytes));
    }
    assert!(tree(&store.dir().join("tmp")).is_empty());
    if store.get("image", kind).is_some() {
        store.verify("image").await.unwrap();
    }
    for user in store.users() {
        store.release(&user).await.unwrap();
    }
    pull(&store, reference, kind, &CancellationToken::new()).await.unwrap();
    store.verify("image").await.unwrap();
    store.delete("image").await.unwrap();
    assert!(tree(&store.dir().join("forms")).is_empty());
}

#[tokio::test]
async fn a_store_survives_being_killed_at_any_moment() {
    let server = Server::start().await;
    let layer = |seed| Archive::new().file(&format!("file-{seed}"), &noise(seed, 200_000)).bytes();
    let image = server.image("app", &Image::new(&[layer(1), layer(2), layer(3)]));
    let file = server.file("/disk", &noise(9, 300_000), Manner::default());
    for (reference, kind) in
        [(&file, InstanceType::Vm), (&image, InstanceType::Container), (&image, InstanceType::Microvm)]
    {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..KILLS {
            let before = server.asked("").len();
            let mut child = spawn_child(dir.path(), reference, kind);
            // It is at work once it asks for something; then it gets a moment that differs from round to
            // round.
            let deadline = Instant::now() + Duration::from_secs(30);
            while server.asked("").len() == before && child.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "the child does nothing");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            tokio::time::sleep(Duration::from_millis(round * 17 % 140)).await;
            assert!(child.try_wait().unwrap().is_none(), "the child failed in round {round} for a {kind}");
            child.kill().await.unwrap();
        }
        assert_sound(dir.path(), reference, kind).await;
    }
}

#[tokio::test]
async fn a_download_goes_on_after_the_process_was_killed() {
    let server = Server::start().await;
    let file = noise(5, 12 << 20);
    let manner = Manner { pause: Some(Duration::from_millis(5)), ..Manner::default() };
    let reference = server.file("/disk", &file, manner);
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn_child(dir.path(), &reference, InstanceType::Vm);
    let record = dir.path().join("store/partial").join(format!("{}.json", &digest(&file)[7..]));
    let deadline = Instant::now() + Duration::from_secs(60);
    while !record.exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "nothing was synced");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    child.kill().await.unwrap();
    let store = Store::open(options(dir.path())).unwrap();
    server.file("/disk", &file, Manner::default());
    pull(&store, &reference, InstanceType::Vm, &CancellationToken::new()).await.unwrap();
    let asked = server.asked("/disk");
    let range = asked.last().unwrap().range.clone().expect("it began again");
    assert!(range != "bytes=0-", "{range}");
    let local = store.acquire("image", InstanceType::Vm, &InstanceId::generate()).await.unwrap();
    let ImageContent::Disk { path, .. } = local.content else { panic!() };
    assert_eq!(digest(&std::fs::read(path).unwrap()), digest(&file));
}
