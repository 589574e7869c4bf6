//! Bad input gets a clear error that names the field and the remedy, and changes nothing.

use hv_proto::v1;
use hv_telemetry::Shutdown;
use tonic::{Code, Status};

use crate::world::{VM, World, node, settings, wish, world};

async fn create(world: &World, change: impl FnOnce(&mut v1::CreateInstanceRequest)) -> Status {
    let mut request = wish("web");
    change(&mut request);
    world.compute().create_instance(request).await.unwrap_err()
}

fn spec(request: &mut v1::CreateInstanceRequest) -> &mut v1::InstanceSpec {
    request.spec.get_or_insert_default()
}

fn refused(status: &Status, code: Code, begins: &str) {
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().starts_with(begins), "expected {begins:?}: {status}");
    assert!(status.message().len() < 500, "a message that nobody can read: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_creates_are_refused_and_write_nothing() {
    let world = world().await;
    world.add_node(node("n1", 4)).await;
    world.create("taken").await;
    let before = world.settled_revision().await;
    let invalid = Code::InvalidArgument;

    refused(
        &create(&world, |r| spec(r).cpu_cores = 0).await,
        invalid,
        "spec.cpu_cores must be between 1 and",
    );
    refused(
        &create(&world, |r| spec(r).cpu_cores = -1).await,
        invalid,
        "spec.cpu_cores must not be negative; got \"-1\"",
    );
    refused(
        &create(&world, |r| spec(r).cpu_cores = 5).await,
        invalid,
        "spec.cpu_cores must be at most 4, the most",
    );
    refused(
        &create(&world, |r| spec(r).memory_bytes = 0).await,
        invalid,
        "spec.memory_bytes must be between",
    );
    refused(
        &create(&world, |r| spec(r).memory_bytes = -1).await,
        invalid,
        "spec.memory_bytes must not be negative",
    );
    refused(
        &create(&world, |r| spec(r).memory_bytes = 2 << 40).await,
        invalid,
        "spec.memory_bytes must be at most",
    );
    refused(
        &create(&world, |r| spec(r).image = "huge".into()).await,
        invalid,
        "spec.image must be an image that a node",
    );
    refused(
        &create(&world, |r| spec(r).image = String::new()).await,
        invalid,
        "spec.image must name an image",
    );
    refused(&create(&world, |r| r.spec = None).await, invalid, "spec must be given");
    refused(&create(&world, |r| r.r#type = 0).await, invalid, "type must be `vm`, `container` or `microvm`");
    refused(
        &create(&world, |r| r.r#type = 9).await,
        invalid,
        "type must be 1 (vm), 2 (container) or 3 (microvm)",
    );
    refused(
        &create(&world, |r| r.name = "taken".into()).await,
        Code::AlreadyExists,
        "name taken is taken by instance",
    );
    refused(
        &create(&world, |r| r.name = "Not A Name".into()).await,
        invalid,
        "name must have 1 to 63 lower-case",
    );
    refused(
        &create(&world, |r| r.preferred_node_id = "n9".into()).await,
        invalid,
        "preferred_node_id must be the id of",
    );
    refused(
        &create(&world, |r| r.request_key = "a b".into()).await,
        invalid,
        "request_key must have 1 to 128 printable",
    );
    let label = |r: &mut v1::CreateInstanceRequest| {
        let labels = [("a\u{1}b".to_owned(), "v".to_owned())].into();
        r.metadata = Some(v1::Metadata { labels, ..v1::Metadata::default() });
    };
    let refusal = create(&world, label).await;
    refused(&refusal, invalid, "metadata.labels keys must have 1 to");
    assert!(refusal.message().contains("a\\u{1}b"), "it can be printed: {refusal}");
    // Longer than a message may be: it is not even read. A name that is read is named.
    let mut unbound = v1::compute_service_client::ComputeServiceClient::new(world.clients.channel());
    let huge = v1::CreateInstanceRequest { name: "a".repeat(10 << 20), ..wish("web") };
    let huge = unbound.create_instance(huge).await.unwrap_err();
    assert!(huge.code() == Code::OutOfRange && huge.message().contains("4194304 bytes"), "{huge}");
    refused(&create(&world, |r| r.name = "a".repeat(3 << 20)).await, invalid, "name must have 1 to 63");

    assert_eq!(world.settled_revision().await, before, "something was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_none_or_unknown_are_named_and_nothing_is_written() {
    let world = world().await;
    let before = world.settled_revision().await;
    let (unknown, malformed) = ("0190aaaa-0000-7000-8000-000000000000", "a/../b");
    for (id, code, begins) in [
        (
            unknown,
            Code::NotFound,
            format!("instance {unknown} does not exist; see `hypervisor-ctl instance list`"),
        ),
        (malformed, Code::InvalidArgument, "instance_id must have 1 to 64".into()),
        ("", Code::InvalidArgument, "instance_id must have 1 to 64".into()),
    ] {
        let instance_id = id.to_owned();
        let mut compute = world.compute();
        let get = compute
            .get_instance(v1::GetInstanceRequest { instance_id: instance_id.clone() })
            .await
            .unwrap_err();
        let start = v1::StartInstanceRequest { instance_id: instance_id.clone(), ..Default::default() };
        let delete = v1::DeleteInstanceRequest { instance_id: instance_id.clone(), ..Default::default() };
        let watch = v1::WatchInstanceRequest { instance_id: instance_id.clone(), ..Default::default() };
        let stats = v1::GetInstanceStatsRequest { instance_id };
        for refusal in [
            get,
            compute.start_instance(start).await.unwrap_err(),
            compute.delete_instance(delete).await.unwrap_err(),
            compute.watch_instance(watch).await.unwrap_err(),
            compute.get_instance_stats(stats).await.unwrap_err(),
        ] {
            refused(&refusal, code, &begins);
        }
    }
    let refusal = world.cluster().get_node(v1::GetNodeRequest { node_id: "n9".into() }).await.unwrap_err();
    refused(&refusal, Code::NotFound, "node n9 does not exist; see `hypervisor-ctl node list`");
    let drain = v1::DrainNodeRequest { node_id: "n9".into(), ..Default::default() };
    refused(&world.cluster().drain_node(drain).await.unwrap_err(), Code::NotFound, "node n9 does not exist");
    let port = v1::RegisterNodeRequest { port: -1, ..node("n1", 1) };
    let refusal = world.cluster().register_node(port).await.unwrap_err();
    refused(&refusal, Code::InvalidArgument, "port must be between 0 and 65535");
    let page = v1::ListInstancesRequest { page_size: -1, ..Default::default() };
    refused(
        &world.compute().list_instances(page).await.unwrap_err(),
        Code::InvalidArgument,
        "page_size must be between",
    );
    let foreign = v1::ListInstancesRequest { page_token: "elsewhere".into(), ..Default::default() };
    let refusal = world.compute().list_instances(foreign).await.unwrap_err();
    refused(&refusal, Code::InvalidArgument, "page_token must be the next_page_token");
    let images = v1::ListImagesRequest { r#type: VM + 7, ..Default::default() };
    refused(&world.compute().list_images(images).await.unwrap_err(), Code::InvalidArgument, "type must be 1");
    assert_eq!(world.settled_revision().await, before, "something was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_serve_as_it_is_told_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = async |change: &dyn Fn(&mut hypervisor_server::Settings)| {
        let mut settings = settings(&dir);
        change(&mut settings);
        let outcome = hypervisor_server::start(settings, &Shutdown::new()).await;
        format!("{:#}", outcome.err().expect("it started"))
    };
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = refusal(&|s| s.server.grpc_address = address.parse().unwrap()).await;
    assert!(text.contains("server.grpc_address") && text.contains("is another server running?"), "{text}");
    let text = refusal(&|s| s.server.data_dir = "/dev/null/x".into()).await;
    assert!(text.contains("server.data_dir: /dev/null/x cannot be made"), "{text}");
    let text = refusal(&|s| s.tls.enabled = true).await;
    assert!(text.contains("tls.enabled: needs tls.cert_file and tls.key_file"), "{text}");
    let text = refusal(&|s| {
        s.tls.enabled = true;
        s.tls.client_auth = true;
        (s.tls.cert_file, s.tls.key_file) = (Some("/nowhere".into()), Some("/nowhere".into()));
    })
    .await;
    assert!(text.contains("tls.client_auth: needs tls.ca_file"), "{text}");
    let text = refusal(&|s| {
        s.tls.enabled = true;
        (s.tls.cert_file, s.tls.key_file) = (Some("/nowhere".into()), Some("/nowhere".into()));
    })
    .await;
    assert!(text.contains("tls.cert_file: /nowhere cannot be read"), "{text}");
    let text = refusal(&|s| {
        s.etcd.endpoints = vec!["http://127.0.0.1:1".into()];
        s.etcd.ca_file = Some("/nowhere".into());
    })
    .await;
    assert!(text.contains("etcd.ca_file, etcd.cert_file and etcd.key_file belong together"), "{text}");
}
