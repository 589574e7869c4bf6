//! References, removal, collection, damage, and who may have a store open.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use hv_driver::ImageContent;
use hv_image::{ImageError, Progress, PullRequest, Reference, Store, StoredImage};
use hv_types::{InstanceId, InstanceType};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::fixture::{Image, World, noise, options, said};
use crate::server::{Manner, Server};

const HOUR: Duration = Duration::from_secs(3600);

async fn pull_as(store: &Store, reference: &str, name: &str) -> StoredImage {
    let request = PullRequest {
        reference: Reference::parse(reference).unwrap(),
        name: name.to_owned(),
        instance_type: InstanceType::Vm,
        digest: None,
    };
    store.pull(&request, &watch::Sender::new(Progress::default()), &CancellationToken::new()).await.unwrap()
}

#[tokio::test]
async fn an_image_in_use_stays_until_it_is_released() {
    let server = Server::start().await;
    let reference = server.file("/disk", &noise(1, 100_000), Manner::default());
    let world = World::new();
    pull_as(&world.store, &reference, "web").await;
    let user = InstanceId::generate();
    let local = world.store.acquire("web", InstanceType::Vm, &user).await.unwrap();
    assert_eq!(world.store.acquire("web", InstanceType::Vm, &user).await.unwrap(), local);
    let error = world.store.delete("web").await.unwrap_err();
    assert!(said(&error).contains(user.as_str()), "{error}");
    assert!(world.store.collect(Duration::ZERO, u64::MAX, false).await.unwrap().is_empty());
    assert_eq!(world.store.get("web", InstanceType::Vm).unwrap().users, std::slice::from_ref(&user));

    // References outlive the process.
    let World { store, dir, .. } = world;
    drop(store);
    let store = Store::open(options(dir.path())).unwrap();
    assert_eq!(store.users(), std::slice::from_ref(&user));
    assert_eq!(store.acquire("web", InstanceType::Vm, &user).await.unwrap(), local);
    store.release(&user).await.unwrap();
    store.release(&user).await.unwrap();
    store.delete("web").await.unwrap();
    store.delete("web").await.unwrap();
    assert!(store.list().is_empty() && store.users().is_empty());
    let left = crate::fixture::tree(store.dir());
    assert_eq!(left.len(), 1, "{left:?}");
}

#[tokio::test]
async fn an_instance_keeps_its_image_when_the_name_gets_a_newer_one() {
    let server = Server::start().await;
    let (old, new) = (noise(1, 100_000), noise(2, 100_000));
    let world = World::new();
    pull_as(&world.store, &server.file("/old", &old, Manner::default()), "web").await;
    let (first, second) = (InstanceId::generate(), InstanceId::generate());
    let before = world.store.acquire("web", InstanceType::Vm, &first).await.unwrap();
    pull_as(&world.store, &server.file("/new", &new, Manner::default()), "web").await;
    assert_eq!(world.store.acquire("web", InstanceType::Vm, &first).await.unwrap(), before);
    let after = world.store.acquire("web", InstanceType::Vm, &second).await.unwrap();
    assert_ne!(before.digest, after.digest);
    let ImageContent::Disk { path, .. } = before.content else { panic!() };
    assert_eq!(fs::read(&path).unwrap(), old);
    world.store.release(&first).await.unwrap();
    assert!(!path.exists(), "the old image outlived its last user");
    world.store.release(&second).await.unwrap();
    assert_eq!(world.store.list().len(), 1);
}

#[tokio::test]
async fn a_url_without_digest_is_fetched_again_only_when_it_changed() {
    // TLS would be needed for it; a file that the operator allows behaves the same from here on.
    let world = World::new();
    let files = world.dir.path().join("files");
    fs::create_dir(&files).unwrap();
    fs::write(files.join("disk"), noise(1, 1000)).unwrap();
    let world = World::with(|options| options.allowed_file_dirs = vec![files.clone()]);
    let reference = format!("file://{}/disk", files.display());
    let first = pull_as(&world.store, &reference, "web").await;
    let again = pull_as(&world.store, &reference, "web").await;
    assert_eq!(first.info, again.info);
    fs::write(files.join("disk"), noise(2, 1000)).unwrap();
    let changed = pull_as(&world.store, &reference, "web").await;
    assert_ne!(first.info.digest, changed.info.digest);
    let blobs = fs::read_dir(world.store.dir().join("blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 1, "the replaced image still takes up space");
}

#[tokio::test]
async fn collection_goes_by_age_and_by_space_and_spares_what_is_fresh() {
    let server = Server::start().await;
    let world = World::new();
    for name in ["one", "two"] {
        let file = noise(name.len() as u64 + u64::from(name.as_bytes()[0]), 50_000);
        pull_as(&world.store, &server.file(&format!("/{name}"), &file, Manner::default()), name).await;
    }
    assert!(world.store.collect(HOUR, 0, false).await.unwrap().is_empty());
    // Both are fresh: want of space does not touch them.
    assert!(world.store.collect(HOUR, u64::MAX, false).await.unwrap().is_empty());
    let would = world.store.collect(Duration::ZERO, 0, true).await.unwrap();
    assert_eq!(would.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    assert!(would.iter().all(|collected| collected.size_bytes >= 50_000));
    assert_eq!(world.store.list().len(), 2);

    // An hour later, as far as the records know.
    age(&world, "one");
    let World { store, dir, .. } = world;
    drop(store);
    let store = Store::open(options(dir.path())).unwrap();
    let by_space = store.collect(24 * HOUR, u64::MAX, false).await.unwrap();
    assert_eq!(by_space.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["one"]);
    assert_eq!(store.collect(Duration::ZERO, 0, false).await.unwrap().len(), 1);
    assert_eq!(crate::fixture::tree(store.dir()).len(), 1);
}

/// Makes an image's last use an hour older.
fn age(world: &World, name: &str) {
    for (path, bytes) in crate::fixture::tree(&world.store.dir().join("images")) {
        let mut record: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        if record["name"] == name {
            let seconds = record["last_used"]["secs_since_epoch"].as_u64().unwrap();
            record["last_used"]["secs_since_epoch"] = (seconds - 3600).into();
            fs::write(path, record.to_string()).unwrap();
        }
    }
}

#[tokio::test]
async fn damage_is_found_and_names_the_file() {
    let server = Server::start().await;
    let world = World::new();
    let file = noise(1, 100_000);
    pull_as(&world.store, &server.file("/disk", &file, Manner::default()), "web").await;
    world.store.verify("web").await.unwrap();
    assert!(matches!(world.store.verify("other").await, Err(ImageError::NotFound { .. })));
    let local = world.store.acquire("web", InstanceType::Vm, &InstanceId::generate()).await.unwrap();
    let ImageContent::Disk { path, .. } = local.content else { panic!() };
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    assert!(said(&world.store.verify("web").await.unwrap_err()).contains("read-only"));
    let mut damaged = file;
    damaged[5000] ^= 1;
    fs::write(&path, damaged).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
    let error = said(&world.store.verify("web").await.unwrap_err());
    assert!(error.contains("disk.raw") && error.contains("pull it again"), "{error}");
}

#[tokio::test]
async fn one_process_has_a_store_open_and_a_newer_format_is_refused() {
    let world = World::new();
    let again = Store::open(options(world.dir.path()));
    assert!(matches!(again, Err(ImageError::Locked { .. })));
    let World { store, dir, .. } = world;
    let record = store.dir().join("users/x.json");
    drop(store);
    fs::write(&record, r#"{"version":99,"else":true}"#).unwrap();
    assert!(matches!(Store::open(options(dir.path())), Err(ImageError::Newer { version: 99, .. })));
}

#[tokio::test]
async fn leftovers_of_old_downloads_are_swept_away() {
    let server = Server::start().await;
    let image = Image::small();
    let reference = server.image("app", &image);
    let world = World::with(|options| options.partial_age = Duration::ZERO);
    world.pull(&reference, InstanceType::Microvm).await.unwrap();
    let blobs = || fs::read_dir(world.store.dir().join("blobs/sha256")).unwrap().count();
    assert_eq!(blobs(), 3, "the layers stay for other images");
    fs::write(world.store.dir().join("partial/x.part"), "y").unwrap();
    world.store.collect(HOUR, 0, false).await.unwrap();
    assert_eq!(blobs(), 0);
    assert_eq!(fs::read_dir(world.store.dir().join("partial")).unwrap().count(), 0);
    world.store.verify("image").await.unwrap();
}
