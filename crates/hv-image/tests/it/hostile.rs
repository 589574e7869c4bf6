//! Hostile images: each is refused with a clear error, nothing outside of the store is touched, and its
//! space is given back.

use hv_types::InstanceType;
use serde_json::json;

use crate::fixture::{Archive, INDEX, Image, MANIFEST, World, descriptor, digest, gzip, noise};
use crate::server::{Manner, Server};

const FILE_SYSTEM_TYPES: [InstanceType; 2] = [InstanceType::Container, InstanceType::Microvm];

/// Refused with these words for containers and microVMs alike.
async fn refused(image: &Image, words: &[&str]) {
    let server = Server::start().await;
    let reference = server.image("evil", image);
    for instance_type in FILE_SYSTEM_TYPES {
        let refusal = World::new().refusal(&reference, instance_type).await;
        assert!(words.iter().all(|word| refusal.contains(word)) && refusal.contains("evil"), "{refusal}");
    }
}

/// As [`refused`], where only unpacking shows it.
async fn refused_when_unpacked(layers: &[Vec<u8>], words: &[&str]) {
    let server = Server::start().await;
    let reference = server.image("evil", &Image::new(layers));
    let refusal = World::new().refusal(&reference, InstanceType::Microvm).await;
    assert!(words.iter().all(|word| refusal.contains(word)), "{refusal}");
}

#[tokio::test]
async fn a_path_that_climbs_out_is_refused() {
    for path in ["../outside/secret", "a/../../outside/secret", "/../outside/secret", "a/.."] {
        refused(&Image::new(&[Archive::new().file(path, b"x").bytes()]), &["leads out of the image"]).await;
    }
    refused(
        &Image::new(&[Archive::new().hard_link("a", "../../outside/secret").bytes()]),
        &["leads out of the image"],
    )
    .await;
}

#[tokio::test]
async fn a_write_through_a_symbolic_link_is_refused() {
    let world = World::new();
    let outside = world.outside();
    let outside = outside.to_str().unwrap();
    for target in [outside, "../../../outside", "/"] {
        let one = Archive::new().symlink("link", target).file("link/secret", b"x").bytes();
        refused_when_unpacked(&[one], &["link", "goes through a symbolic link"]).await;
        // In another layer it is no better.
        let first = Archive::new().symlink("link", target).bytes();
        for second in [
            Archive::new().file("link/secret", b"x"),
            Archive::new().dir("link/new/deep/"),
            Archive::new().file("link/.wh.secret", b""),
            Archive::new().hard_link("stolen", "link/secret"),
        ] {
            refused_when_unpacked(
                &[first.clone(), second.bytes()],
                &["link", "goes through a symbolic link"],
            )
            .await;
        }
    }
    world.assert_untouched();
}

#[tokio::test]
async fn a_symbolic_link_itself_is_replaced_and_never_followed() {
    let world = World::new();
    let outside = world.outside().join("secret");
    let first = Archive::new().symlink("link", outside.to_str().unwrap()).bytes();
    let second = Archive::new().file("link", b"mine").bytes();
    let server = Server::start().await;
    let reference = server.image("harmless", &Image::new(&[first, second]));
    world.pull(&reference, InstanceType::Microvm).await.unwrap();
    world.assert_untouched();
}

#[tokio::test]
async fn a_hard_link_to_what_is_not_in_the_image_is_refused() {
    let link = Archive::new().hard_link("a", "/etc/shadow").bytes();
    refused_when_unpacked(&[link], &["etc/shadow", "not there"]).await;
    refused_when_unpacked(
        &[Archive::new().dir("d/").hard_link("a", "d").bytes()],
        &["leads to the directory"],
    )
    .await;
    let own = Archive::new().file("a", b"x").hard_link("a", "a").bytes();
    refused_when_unpacked(&[own], &["leads to itself"]).await;
}

#[tokio::test]
async fn a_device_node_is_refused() {
    for kind in [tar::EntryType::Block, tar::EntryType::Char] {
        let layer = Archive::new().entry(kind, "dev/sda", 0o666, "", b"").bytes();
        refused(&Image::new(&[layer]), &["dev/sda", "device node"]).await;
    }
}

#[tokio::test]
async fn a_whiteout_cannot_name_another_directory() {
    for name in ["d/.wh...", "d/.wh..", "d/.wh."] {
        refused_when_unpacked(&[Archive::new().dir("d/").file(name, b"").bytes()], &["whiteout"]).await;
    }
}

#[tokio::test]
async fn a_zip_bomb_is_refused_when_it_exceeds_the_bound() {
    let bomb = Archive::new().file("zeros", &vec![0; 64 << 20]).bytes();
    let server = Server::start().await;
    let reference = server.image("bomb", &Image::new(&[bomb]));
    for instance_type in FILE_SYSTEM_TYPES {
        let world = World::with(|options| options.max_unpacked_bytes = 1 << 20);
        let refusal = world.refusal(&reference, instance_type).await;
        assert!(refusal.contains("unpacked size exceeds 1048576 bytes"), "{refusal}");
    }
    // A frame of zstd that repeats one byte, by another program.
    let plain = noise(1, 100);
    let mut bomb = Archive::new().file("noise", &plain).bytes();
    bomb.resize(32 << 20, 0);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layer");
    std::fs::write(&file, &bomb).unwrap();
    crate::fixture::run("zstd", &["-q", file.to_str().unwrap()]);
    let zstd = std::fs::read(dir.path().join("layer.zst")).unwrap();
    assert!(zstd.len() < 16 << 10);
    let reference = server.image("bomb2", &Image::build(vec![digest(&bomb)], vec![zstd]));
    let world = World::with(|options| options.max_unpacked_bytes = 1 << 20);
    assert!(world.refusal(&reference, InstanceType::Microvm).await.contains("unpacked size exceeds"));
}

#[tokio::test]
async fn too_many_layers_are_refused_before_one_is_fetched() {
    let server = Server::start().await;
    let config = b"{}".to_vec();
    let layer = noise(3, 10);
    let manifest = |layers: usize| {
        let layers = vec![json!({ "digest": digest(&layer), "size": 1 }); layers];
        let config = descriptor("application/vnd.oci.image.config.v1+json", &config);
        json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string().into_bytes()
    };
    for (count, words) in [
        (129, "number of its layers, 129, exceeds 128"),
        (30_000, "30000"),
        (100_000, "more than 4194304 bytes"),
    ] {
        server.manifest("deep", "v1", &manifest(count));
        let reference = format!("oci://{}/deep:v1", server.authority);
        let refusal = World::new().refusal(&reference, InstanceType::Container).await;
        assert!(refusal.contains(words), "{refusal}");
    }
    assert!(server.asked("/blobs/").is_empty());
}

#[tokio::test]
async fn an_index_that_contains_itself_or_is_too_deep_is_refused() {
    let server = Server::start().await;
    let index = |entry: serde_json::Value| {
        json!({ "schemaVersion": 2, "manifests": [entry] }).to_string().into_bytes()
    };
    // What contains its own digest cannot have it: whoever follows it finds another content.
    let claimed = digest(b"whatever");
    let cyclic = index(json!({ "mediaType": INDEX, "digest": claimed, "size": 100 }));
    server.serve("/v2/cycle/manifests/v1", cyclic.clone(), Manner::default());
    server.serve(&format!("/v2/cycle/manifests/{claimed}"), cyclic, Manner::default());
    let reference = format!("oci://{}/cycle:v1", server.authority);
    let refusal = World::new().refusal(&reference, InstanceType::Container).await;
    assert!(refusal.contains("its manifest has the digest"), "{refusal}");
    assert!(server.asked("/cycle/").len() <= 3);

    let image = Image::small();
    server.image("nested", &image);
    let mut document = image.manifest.clone();
    for depth in 0..5 {
        let kind = if depth == 0 { MANIFEST } else { INDEX };
        document = index(descriptor(kind, &document));
        server.manifest("nested", &format!("depth-{}", depth + 1), &document);
    }
    let reference = format!("oci://{}/nested", server.authority);
    World::new().pull(&format!("{reference}:depth-3"), InstanceType::Container).await.unwrap();
    let refusal = World::new().refusal(&format!("{reference}:depth-5"), InstanceType::Container).await;
    assert!(refusal.contains("nested more than 3 deep"), "{refusal}");
}

#[tokio::test]
async fn a_manifest_that_two_readers_would_read_differently_is_refused() {
    let server = Server::start().await;
    let image = Image::small();
    let mut both: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    both["manifests"] = json!([descriptor(MANIFEST, &image.manifest)]);
    server.manifest("both", "v1", both.to_string().as_bytes());
    server.manifest("old", "v1", br#"{"schemaVersion":1,"fsLayers":[]}"#);
    server.manifest("junk", "v1", b"<html>");
    for (repository, words) in [("both", "neither"), ("old", "schema version 1"), ("junk", "cannot be read")]
    {
        let reference = format!("oci://{}/{repository}:v1", server.authority);
        let refusal = World::new().refusal(&reference, InstanceType::Container).await;
        assert!(refusal.contains(words), "{refusal}");
    }
}

#[tokio::test]
async fn a_blob_with_another_content_or_length_is_refused() {
    let image = Image::small();
    let layer = image.blobs[1].clone();
    let path = format!("/v2/evil/blobs/{}", digest(&layer));
    let mut wrong = layer.clone();
    wrong[50_000] ^= 1;
    for (bytes, words) in [
        (wrong, "layer 2 of 2 has the digest"),
        (layer[..1000].to_vec(), "1000 bytes at its source instead of"),
        ([&layer[..], b"more"].concat(), "bytes at its source instead of"),
    ] {
        let server = Server::start().await;
        let reference = server.image("evil", &image);
        server.serve(&path, bytes, Manner::default());
        for instance_type in FILE_SYSTEM_TYPES {
            let refusal = World::new().refusal(&reference, instance_type).await;
            assert!(refusal.contains(words), "{refusal}");
        }
    }
}

#[tokio::test]
async fn a_layer_that_is_cut_or_not_what_its_configuration_promises_is_refused() {
    let tar = Archive::new().file("a", &noise(5, 5000)).bytes();
    let cut = gzip(&tar[..3000]);
    refused(&Image::build(vec![digest(&tar[..3000])], vec![cut]), &["a layer cannot be read"]).await;
    let broken = gzip(&tar)[..2000].to_vec();
    refused(&Image::build(vec![digest(&tar)], vec![broken]), &["a layer cannot be read"]).await;
    refused(&Image::build(vec![digest(b"else")], vec![gzip(&tar)]), &["its configuration promises"]).await;
    refused(&Image::build(vec![], vec![gzip(&tar)]), &["differ in the number of layers"]).await;
    refused(&Image::build(vec![digest(&tar)], vec![noise(9, 4096)]), &["a layer cannot be read"]).await;
}

#[tokio::test]
async fn a_name_of_a_megabyte_and_a_sparse_file_are_refused() {
    let long =
        Archive::new().entry(tar::EntryType::GNULongName, "././@LongLink", 0, "", &vec![b'a'; 2 << 20]);
    refused(&Image::new(&[long.file("x", b"").bytes()]), &["long name is too large"]).await;
    let sparse = Archive::new().entry(tar::EntryType::GNUSparse, "s", 0o644, "", b"");
    refused(&Image::new(&[sparse.bytes()]), &["which layers do not have"]).await;
    let deep = ["d"; 40].join("/");
    let mut layer = Archive::new().entry(
        tar::EntryType::GNULongName,
        "././@LongLink",
        0,
        "",
        [&deep[..]; 6].join("/").as_bytes(),
    );
    layer = layer.file("x", b"");
    refused(&Image::new(&[layer.bytes()]), &["too deep"]).await;
}
