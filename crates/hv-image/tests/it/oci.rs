//! Images from a real registry, in every form.

use std::fs;

use hv_driver::ImageContent;
use hv_image::{Progress, PullRequest, Reference};
use hv_types::{InstanceId, InstanceType};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::fixture::{INDEX, Image, MANIFEST, World, descriptor, digest, run, said};
use crate::registry::Registry;

#[tokio::test]
async fn a_container_image_becomes_a_layout_that_another_program_reads() {
    let registry = Registry::start().await;
    let image = Image::small();
    let reference = registry.push("team/app", "v1", &image).await;
    let world = World::new();
    let stored = world.pull(&reference, InstanceType::Container).await.unwrap();
    assert_eq!((stored.info.form.as_str(), stored.info.architecture.as_str()), ("oci", "amd64"));
    assert_eq!(stored.info.digest, digest(&image.manifest));
    assert_eq!(stored.info.source, reference);
    let user = InstanceId::generate();
    let local = world.store.acquire("image", InstanceType::Container, &user).await.unwrap();
    let ImageContent::Oci { layout, manifest } = local.content else { panic!("{local:?}") };
    assert_eq!(manifest, digest(&image.manifest));
    for blob in image.blobs.iter().chain([&image.manifest]) {
        let path = layout.join("blobs/sha256").join(&digest(blob)[7..]);
        assert_eq!(&fs::read(&path).unwrap(), blob);
        assert!(fs::metadata(&path).unwrap().permissions().readonly());
    }
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"][0]["digest"], manifest);
    world.store.verify("image").await.unwrap();
}

#[tokio::test]
async fn the_same_image_becomes_a_root_file_system_for_microvms() {
    let registry = Registry::start().await;
    let image = Image::small();
    let reference = registry.push("team/app", "v1", &image).await;
    let world = World::new();
    let stored = world.pull(&reference, InstanceType::Microvm).await.unwrap();
    assert_eq!(stored.info.form, "rootfs");
    let user = InstanceId::generate();
    let local = world.store.acquire("image", InstanceType::Microvm, &user).await.unwrap();
    let ImageContent::RootFs { path, command, env, working_dir } = local.content else { panic!("{local:?}") };
    assert_eq!(command, ["/bin/init", "--verbose"]);
    assert_eq!(env, ["PATH=/bin", "A=b"]);
    assert_eq!(working_dir, "/srv");
    let path = path.to_str().unwrap();
    run("e2fsck", &["-fn", path]);
    let debugfs = |command: &str| run("debugfs", &["-R", command, path]);
    assert!(debugfs("stat /bin/init").contains("Mode:  04755"), "{}", debugfs("stat /bin/init"));
    assert!(debugfs("stat /bin/init").contains("User:     0"));
    assert!(debugfs("stat /bin/sh").contains("Fast link dest: \"init\""));
    assert!(debugfs("stat /srv/same").contains("Links: 2"));
    assert_eq!(debugfs("cat /etc/kept"), "kept");
    let etc = debugfs("ls /etc");
    assert!(!etc.contains("old"), "{etc}");
    // The tree that it was made of is gone.
    assert_eq!(fs::read_dir(world.store.dir().join("tmp")).unwrap().count(), 0);
    world.store.verify("image").await.unwrap();
    world.assert_untouched();
}

#[tokio::test]
async fn a_registry_with_a_password_is_asked_with_the_right_one() {
    let registry = Registry::with_login("ann", "correct horse").await;
    let reference = registry.push("private/app", "v1", &Image::small()).await;
    let denied = World::new();
    let error = denied.pull(&reference, InstanceType::Container).await.unwrap_err();
    assert!(said(&error).contains("denies access; check the credentials"), "{error}");
    denied.assert_empty();

    let config = denied.dir.path().join("outside/config.json");
    for (password, works) in [("wrong", false), ("correct horse", true)] {
        let auth = json!({ "auths": { &registry.authority: { "username": "ann", "password": password } } });
        fs::write(&config, auth.to_string()).unwrap();
        let world = World::with(|options| options.credentials = Some(config.clone()));
        let result = world.pull(&reference, InstanceType::Container).await;
        assert_eq!(result.is_ok(), works, "{password}: {result:?}");
    }
}

#[tokio::test]
async fn of_an_index_the_manifest_for_this_machine_is_taken() {
    let registry = Registry::start().await;
    let mine = Image::small();
    let other = Image::new(&[crate::fixture::Archive::new().file("a", b"other").bytes()]);
    registry.push("multi", "other", &other).await;
    registry.push("multi", "mine", &mine).await;
    let entry = |image: &Image, architecture: &str| {
        let mut entry = descriptor(MANIFEST, &image.manifest);
        entry["platform"] = json!({ "os": "linux", "architecture": architecture });
        entry
    };
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX,
        "manifests": [entry(&other, "arm64"), entry(&mine, "amd64")],
    });
    let index = index.to_string().into_bytes();
    let reference = registry.push_manifest("multi", "v1", INDEX, &index).await;
    let world = World::new();
    let stored = world.pull(&reference, InstanceType::Container).await.unwrap();
    assert_eq!(stored.info.digest, digest(&mine.manifest));

    // Pinned by the digest of the index, the store need not ask anybody.
    drop(registry);
    let pinned = format!("{reference}@{}", digest(&index));
    assert_eq!(world.pull(&pinned, InstanceType::Container).await.unwrap().info.digest, stored.info.digest);

    let strange = World::with(|options| options.architecture = "riscv64".to_owned());
    let registry = Registry::start().await;
    registry.push("multi", "other", &other).await;
    registry.push("multi", "mine", &mine).await;
    let reference = registry.push_manifest("multi", "v1", INDEX, &index).await;
    let refusal = strange.refusal(&reference, InstanceType::Container).await;
    assert!(refusal.contains("linux/riscv64") && refusal.contains("linux/amd64, linux/arm64"), "{refusal}");
}

#[tokio::test]
async fn a_mirror_is_asked_first_and_the_registry_where_it_fails() {
    let (registry, mirror) = (Registry::start().await, Registry::start().await);
    let image = Image::small();
    let reference = registry.push("app", "v1", &image).await;
    let world = World::with(|options| {
        options
            .mirrors
            .insert(registry.authority.clone(), vec!["127.0.0.1:1".into(), mirror.authority.clone()]);
    });
    // Neither the mirror that is down nor the one that does not have it keeps the image away.
    world.pull(&reference, InstanceType::Container).await.unwrap();
    world.store.delete("image").await.unwrap();
    world.assert_empty();
    mirror.push("app", "v1", &image).await;
    drop(registry);
    world.pull(&reference, InstanceType::Container).await.unwrap();
}

#[tokio::test]
async fn what_is_not_there_is_said_to_be_not_there() {
    let registry = Registry::start().await;
    let world = World::new();
    let reference = format!("oci://{}/no/such:tag", registry.authority);
    let refusal = world.refusal(&reference, InstanceType::Container).await;
    assert!(refusal.contains("does not exist") && refusal.contains("404"), "{refusal}");
}

#[tokio::test]
async fn two_images_share_their_layers_and_parallel_pulls_their_download() {
    let server = crate::server::Server::start().await;
    let image = Image::small();
    let reference = server.image("app", &image);
    let world = World::new();
    let pulls = (0..8).map(|index| {
        let store = world.store.clone();
        let request = PullRequest {
            reference: Reference::parse(&reference).unwrap(),
            name: format!("image-{index}"),
            instance_type: if index % 2 == 0 { InstanceType::Container } else { InstanceType::Microvm },
            digest: None,
        };
        async move {
            store
                .pull(&request, &watch::Sender::new(Progress::default()), &CancellationToken::new())
                .await
                .unwrap()
        }
    });
    futures::future::join_all(pulls).await;
    assert_eq!(world.store.list().len(), 8);
    for blob in &image.blobs {
        assert_eq!(server.asked(&digest(blob)).len(), 1, "one blob was fetched more than once");
    }
}
