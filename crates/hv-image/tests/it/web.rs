//! Files from a web server that misbehaves, from directories of the node, and from uploads.

use std::fs;
use std::time::Duration;

use bytes::Bytes;
use hv_image::{ImportRequest, Phase, Progress, PullRequest, Reference};
use hv_types::InstanceType;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::fixture::{Archive, INDEX, Image, MANIFEST, World, descriptor, digest, noise, pull, said};
use crate::server::{Manner, Server};

#[tokio::test]
async fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let server = Server::start().await;
    let file = noise(1, 3 << 20);
    let reference =
        server.file("/disk.raw", &file, Manner { cut_after: 1 << 20, cuts: 2, ..Manner::default() });
    let world = World::new();
    let stored = world.pull(&reference, InstanceType::Vm).await.unwrap();
    assert_eq!(stored.info.digest, digest(&file));
    let ranges: Vec<_> = server.asked("disk").into_iter().map(|asked| asked.range).collect();
    assert_eq!(ranges.len(), 3);
    assert!(ranges[0].is_none() && ranges[1..].iter().all(Option::is_some), "{ranges:?}");
}

#[tokio::test]
async fn a_server_without_ranges_or_with_errors_is_asked_again() {
    let server = Server::start().await;
    let file = noise(2, 1 << 20);
    let manner = Manner {
        cut_after: 1 << 19,
        cuts: 1,
        no_ranges: true,
        statuses: vec![503, 429],
        ..Manner::default()
    };
    let reference = server.file("/disk.raw", &file, manner);
    World::new().pull(&reference, InstanceType::Vm).await.unwrap();
}

#[tokio::test]
async fn a_server_that_always_breaks_off_is_given_up_and_the_rest_is_fetched_later() {
    let server = Server::start().await;
    let file = noise(3, 1 << 20);
    let manner = Manner { cut_after: 0, cuts: usize::MAX, ..Manner::default() };
    let reference = server.file("/disk.raw", &file, manner);
    let world = World::new();
    let error = world.pull(&reference, InstanceType::Vm).await.unwrap_err();
    assert!(error.is_transient() && said(&error).contains("could not be fetched from"), "{error}");
    server.file("/disk.raw", &file, Manner::default());
    world.pull(&reference, InstanceType::Vm).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_download_is_gone_on_with_by_the_next_pull() {
    let server = Server::start().await;
    let file = noise(4, 4 << 20);
    let pause = Some(Duration::from_millis(20));
    let reference = server.file("/disk.raw", &file, Manner { pause, ..Manner::default() });
    let world = World::new();
    let (progress, cancel) = (watch::Sender::new(Progress::default()), CancellationToken::new());
    let request = PullRequest {
        reference: Reference::parse(&reference).unwrap(),
        name: "image".to_owned(),
        instance_type: InstanceType::Vm,
        digest: None,
    };
    let mut seen = progress.subscribe();
    let cancelling = async {
        let half = seen.wait_for(|progress| progress.done_bytes >= 1 << 20).await.unwrap();
        assert_eq!((half.phase, half.total_bytes), (Phase::Downloading, 4 << 20));
        drop(half);
        cancel.cancel();
    };
    let (result, ()) = tokio::join!(world.store.pull(&request, &progress, &cancel), cancelling);
    assert!(said(&result.unwrap_err()).contains("cancelled"));
    pull(&world.store, &reference, InstanceType::Vm, &CancellationToken::new()).await.unwrap();
    let asked = server.asked("disk");
    assert_eq!(asked.len(), 2);
    let from: u64 = asked[1].range.as_ref().unwrap()[6..].trim_end_matches('-').parse().unwrap();
    assert!(from >= 1 << 20, "{from}");
}

#[tokio::test]
async fn a_wrong_digest_is_refused_and_its_space_given_back() {
    let server = Server::start().await;
    server.file("/disk.raw", &noise(5, 1 << 20), Manner::default());
    let reference = format!("http://{}/disk.raw#{}", server.authority, digest(b"else"));
    let refusal = World::new().refusal(&reference, InstanceType::Vm).await;
    assert!(refusal.contains("the file has the digest") && refusal.contains(&digest(b"else")), "{refusal}");
    assert_eq!(server.asked("disk").len(), 1);
}

#[tokio::test]
async fn plain_http_is_spoken_only_where_it_is_allowed_and_only_with_a_digest() {
    let server = Server::start().await;
    let reference = server.file("/disk.raw", b"disk", Manner::default());
    let refusal = World::new().refusal(reference.split('#').next().unwrap(), InstanceType::Vm).await;
    assert!(refusal.contains("needs a digest"), "{refusal}");
    let world = World::with(|options| options.allowed_plain_http.clear());
    let refusal = world.refusal(&reference, InstanceType::Vm).await;
    assert!(refusal.contains("allowed_plain_http"), "{refusal}");
    assert!(server.asked("disk").is_empty());
}

#[tokio::test]
async fn redirects_are_followed_a_few_times_and_only_to_allowed_hosts() {
    let server = Server::start().await;
    let file = noise(6, 1000);
    server.file("/real", &file, Manner::default());
    let to = |target: &str| Manner { redirect: Some(target.to_owned()), ..Manner::default() };
    server.serve("/first", "", to("/real"));
    server.serve("/loop", "", to("/loop"));
    server.serve("/away", "", to("http://localhost:1/real"));
    server.serve("/strange", "", to("file:///etc/passwd"));
    let reference = |path: &str| format!("http://{}/{path}#{}", server.authority, digest(&file));
    World::new().pull(&reference("first"), InstanceType::Vm).await.unwrap();
    for (path, words) in
        [("loop", "more than 5 times"), ("away", "localhost:1 is not allowed"), ("strange", "scheme file")]
    {
        let refusal = World::new().refusal(&reference(path), InstanceType::Vm).await;
        assert!(refusal.contains(words), "{refusal}");
    }
    assert_eq!(server.asked("loop").len(), 6);
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let (server, elsewhere) = (Server::start().await, Server::start().await);
    let image = Image::small();
    let reference = server.image("app", &image);
    let layer = format!("/v2/app/blobs/{}", digest(&image.blobs[1]));
    let redirect = Some(format!("http://{}/signed", elsewhere.authority));
    server.serve(&layer, "", Manner { redirect, ..Manner::default() });
    elsewhere.serve("/signed", image.blobs[1].clone(), Manner::default());
    let outside = World::new();
    let config = outside.outside().join("config.json");
    let auth = serde_json::json!({ "auths": { &server.authority: { "auth": "YW5uOnB3" } } });
    fs::write(&config, auth.to_string()).unwrap();
    let world = World::with(|options| options.credentials = Some(config.clone()));
    server.demand_basic();
    world.pull(&reference, InstanceType::Container).await.unwrap();
    let first = server.asked(&layer);
    assert_eq!(first.last().unwrap().authorization.as_deref(), Some("Basic YW5uOnB3"));
    assert!(elsewhere.asked("/signed").iter().all(|asked| asked.authorization.is_none()));
    assert_eq!(elsewhere.asked("/signed").len(), 1);
}

#[tokio::test]
async fn a_file_larger_than_the_bound_is_refused() {
    let server = Server::start().await;
    let reference = server.file("/disk.raw", &noise(8, 1 << 20), Manner::default());
    let world = World::with(|options| options.max_image_bytes = 1000);
    let refusal = world.refusal(&reference, InstanceType::Vm).await;
    assert!(refusal.contains("exceeds 1000 bytes; raise `max_image_bytes`"), "{refusal}");
}

#[tokio::test]
async fn a_full_disk_is_not_filled_further() {
    let server = Server::start().await;
    let reference = server.file("/disk.raw", &noise(8, 1 << 20), Manner::default());
    let world = World::with(|options| options.min_free_bytes = u64::MAX);
    let error = world.pull(&reference, InstanceType::Vm).await.unwrap_err();
    assert!(said(&error).contains("must stay free") && error.is_transient(), "{error}");
}

#[tokio::test]
async fn files_are_taken_from_allowed_directories_only() {
    let world = World::new();
    let files = world.dir.path().join("files");
    fs::create_dir(&files).unwrap();
    let disk = noise(9, 5000);
    fs::write(files.join("disk.raw"), &disk).unwrap();
    fs::create_dir(files.join("dir")).unwrap();
    std::os::unix::fs::symlink(world.outside().join("secret"), files.join("escape")).unwrap();
    std::os::unix::fs::symlink("disk.raw", files.join("inside")).unwrap();
    let reference = |name: &str| format!("file://{}/{name}", files.display());
    let refusal = world.refusal(&reference("disk.raw"), InstanceType::Vm).await;
    assert!(refusal.contains("allowed_file_dirs"), "{refusal}");

    let world = World::with(|options| options.allowed_file_dirs = vec![files.clone()]);
    for (name, words) in [("escape", "leads out"), ("dir", "no regular file"), ("none", "there is no file")] {
        let refusal = world.refusal(&reference(name), InstanceType::Vm).await;
        assert!(refusal.contains(words), "{refusal}");
    }
    for name in ["disk.raw", "inside"] {
        assert_eq!(world.pull(&reference(name), InstanceType::Vm).await.unwrap().info.digest, digest(&disk));
    }
}

async fn import(
    world: &World,
    bytes: &[u8],
    instance_type: InstanceType,
    expected: Option<String>,
) -> Result<String, String> {
    let pieces: Vec<_> = bytes.chunks(10_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let request = ImportRequest {
        name: "up".to_owned(),
        instance_type,
        size_bytes: bytes.len() as u64,
        digest: expected,
    };
    let progress = watch::Sender::new(Progress::default());
    let stored = world
        .store
        .import(futures::stream::iter(pieces), &request, &progress, &CancellationToken::new())
        .await;
    stored.map(|stored| stored.info.form).map_err(|e| said(&e))
}

#[tokio::test]
async fn an_upload_becomes_an_image_if_it_is_what_it_should_be() {
    let world = World::new();
    let disk = noise(10, 100_000);
    let refusal = import(&world, &disk, InstanceType::Vm, Some(digest(b"else"))).await.unwrap_err();
    assert!(refusal.contains("has the digest"), "{refusal}");
    world.assert_empty();
    assert_eq!(import(&world, &disk, InstanceType::Vm, Some(digest(&disk))).await.unwrap(), "disk");
    let kernel = [b"\x7fELF", &disk[..1000]].concat();
    assert_eq!(import(&world, &kernel, InstanceType::Microvm, None).await.unwrap(), "kernel");
    assert!(import(&world, &kernel, InstanceType::Vm, None).await.unwrap_err().contains("kernel"));
    assert!(import(&world, &disk, InstanceType::Container, None).await.unwrap_err().contains("OCI images"));
    assert_eq!(world.store.list().len(), 2);
}

#[tokio::test]
async fn an_image_layout_can_be_uploaded_as_a_tar_file() {
    let image = Image::small();
    let mut entry = descriptor(MANIFEST, &image.manifest);
    entry["platform"] = serde_json::json!({ "os": "linux", "architecture": "amd64" });
    let index =
        serde_json::json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [entry] }).to_string();
    let archive = |spoil: bool| {
        let mut archive = Archive::new().file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        for blob in image.blobs.iter().chain([&image.manifest]) {
            let mut bytes = blob.clone();
            bytes[0] ^= u8::from(spoil);
            archive = archive.entry(
                tar::EntryType::GNULongName,
                "././@LongLink",
                0,
                "",
                format!("blobs/sha256/{}", &digest(blob)[7..]).as_bytes(),
            );
            archive = archive.file("x", &bytes);
        }
        archive.file("index.json", index.as_bytes()).bytes()
    };
    let world = World::new();
    let refusal = import(&world, &archive(true), InstanceType::Container, None).await.unwrap_err();
    assert!(refusal.contains("has the digest"), "{refusal}");
    world.assert_empty();
    let no_index = Archive::new().file("manifest.json", b"[]").bytes();
    let refusal = import(&world, &no_index, InstanceType::Container, None).await.unwrap_err();
    assert!(refusal.contains("no index.json"), "{refusal}");
    world.assert_empty();
    assert_eq!(import(&world, &archive(false), InstanceType::Container, None).await.unwrap(), "oci");
    assert_eq!(import(&world, &archive(false), InstanceType::Microvm, None).await.unwrap(), "rootfs");
    world.store.verify("up").await.unwrap();
    world.store.delete("up").await.unwrap();
}
