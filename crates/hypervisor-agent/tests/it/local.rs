//! The agent's own service: operation of the node, consoles, commands, logs, statistics.

use futures::StreamExt as _;
use hv_driver_fake::LedgerEvent;
use hv_proto::v1;
use hv_proto::v1::{InstanceState, InstanceWanted};
use tonic::Code;

use crate::control::{Control, assignment};
use crate::node::{Node, eventually};

fn named(id: &str) -> v1::AgentInstanceRequest {
    v1::AgentInstanceRequest { instance_id: id.into() }
}

fn create(name: &str) -> v1::AgentCreateInstanceRequest {
    v1::AgentCreateInstanceRequest {
        name: name.into(),
        r#type: v1::InstanceType::Vm.into(),
        spec: assignment("x").spec,
        ..Default::default()
    }
}

#[tokio::test]
async fn an_instance_of_the_node_alone_lives_without_the_control_plane() {
    let mut control = Control::start().await;
    let mut node = Node::started(&control).await;
    eventually("it registers", || (!control.state.lock().registrations.is_empty()).then_some(())).await;
    control.down();
    let mut client = node.client();
    let made = client.create_instance(create("mine")).await.unwrap().into_inner();
    assert_eq!((made.state(), made.epoch, made.name.as_str()), (InstanceState::Running, 0, "mine"));
    let again = client.create_instance(create("mine")).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");

    let id = made.id.as_str();
    let stop = v1::AgentStopInstanceRequest { instance_id: id.into(), ..Default::default() };
    assert_eq!(client.stop_instance(stop).await.unwrap().into_inner().state(), InstanceState::Stopped);
    assert_eq!(client.start_instance(named(id)).await.unwrap().into_inner().state(), InstanceState::Running);
    assert_eq!(client.pause_instance(named(id)).await.unwrap().into_inner().state(), InstanceState::Paused);
    assert_eq!(client.start_instance(named(id)).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(client.resume_instance(named(id)).await.unwrap().into_inner().state(), InstanceState::Running);
    let restart = v1::AgentRestartInstanceRequest { instance_id: id.into(), force: true };
    assert_eq!(client.restart_instance(restart).await.unwrap().into_inner().state(), InstanceState::Running);
    assert_eq!(node.count(id, LedgerEvent::Started), 3);

    node.stop().await;
    node.start().await;
    control.up().await;
    let mut client = node.client();
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    assert_eq!(client.get_instance(named(id)).await.unwrap().into_inner().state(), InstanceState::Running);
    assert!(control.last(id).is_none(), "the control plane was told of it");
    assert_eq!(node.count(id, LedgerEvent::Started), 3);

    let delete = v1::AgentDeleteInstanceRequest { instance_id: id.into(), force: true };
    client.delete_instance(delete.clone()).await.unwrap();
    assert_eq!(node.journalled(), ["a.json"]);
    assert_eq!(client.delete_instance(delete).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn an_assigned_instance_follows_its_node_until_the_control_plane_says_something_newer() {
    let mut control = Control::start().await;
    let node = Node::started(&control).await;
    control.assign(assignment("a"));
    control.settled("a", InstanceState::Running).await;
    let mut client = node.client();
    let stop = v1::AgentStopInstanceRequest { instance_id: "a".into(), force: true, timeout_seconds: 0 };
    assert_eq!(client.stop_instance(stop).await.unwrap().into_inner().state(), InstanceState::Stopped);
    let delete = v1::AgentDeleteInstanceRequest { instance_id: "a".into(), force: true };
    let refusal = client.delete_instance(delete).await.unwrap_err();
    assert_eq!(refusal.code(), Code::FailedPrecondition);
    assert!(refusal.message().contains("hypervisor-ctl instance delete a"), "{refusal}");

    // The same order again, with the whole set: it is not newer.
    control.down();
    control.state.lock().reports.clear();
    control.up().await;
    control.settled("a", InstanceState::Stopped).await;
    assert_eq!(node.count("a", LedgerEvent::Started), 1);
    control.want("a", InstanceWanted::Running);
    control.settled("a", InstanceState::Running).await;
}

#[tokio::test]
async fn what_cannot_be_understood_is_refused_with_the_field() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let mut client = node.client();
    let bad_name = client.create_instance(create("Not A Name")).await.unwrap_err();
    assert!(
        bad_name.code() == Code::InvalidArgument && bad_name.message().starts_with("name "),
        "{bad_name}"
    );
    let mut container = create("c");
    container.r#type = v1::InstanceType::Container.into();
    let no_driver = client.create_instance(container).await.unwrap_err();
    assert!(no_driver.message().contains("no driver for the type container"), "{no_driver}");
    assert_eq!(client.get_instance(named("../x")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(client.get_instance(named("nobody")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.get_instance_stats(named("nobody")).await.unwrap_err().code(), Code::NotFound);
    assert!(node.journalled().is_empty());
}

#[tokio::test]
async fn a_console_goes_both_ways() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let mut client = node.client();
    let id = client.create_instance(create("mine")).await.unwrap().into_inner().id;
    let input = |input| v1::AgentConsoleInput { input: Some(input) };
    let attach =
        v1::ConsoleAttach { instance_id: id.clone(), size: Some(v1::TerminalSize { width: 80, height: 24 }) };
    let typed = [
        input(v1::agent_console_input::Input::Attach(attach)),
        input(v1::agent_console_input::Input::Data("typed".into())),
    ];
    let endless = futures::stream::iter(typed).chain(futures::stream::pending());
    let output = client.attach_console(endless).await.unwrap().into_inner();
    let seen = read_until(output.map(|chunk| chunk.unwrap().data), "typed").await;
    assert!(seen.contains("hello from mine"), "{seen}");

    // A client that knows only the older contract names the instance in the metadata.
    let mut old = tonic::Request::new(futures::stream::iter([input(v1::agent_console_input::Input::Data(
        "again".into(),
    ))]));
    old.metadata_mut().insert("instance-id", id.parse().unwrap());
    let output = client.attach_console(old).await.unwrap().into_inner();
    read_until(output.map(|chunk| chunk.unwrap().data), "again").await;

    let nameless = futures::stream::iter([input(v1::agent_console_input::Input::Data("x".into()))]);
    let refusal = client.attach_console(nameless).await.unwrap_err();
    assert!(refusal.message().contains("the first message must be `attach`"), "{refusal}");
}

async fn read_until(mut output: impl futures::Stream<Item = bytes::Bytes> + Unpin, end: &str) -> String {
    let mut seen = String::new();
    let read = async {
        while !seen.contains(end) {
            seen.push_str(&String::from_utf8_lossy(&output.next().await.expect("more output")));
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), read)
        .await
        .unwrap_or_else(|_| panic!("no {end}"));
    seen
}

#[tokio::test]
async fn commands_logs_and_statistics_reach_the_driver() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let mut client = node.client();
    let id = client.create_instance(create("mine")).await.unwrap().into_inner().id;

    let start = v1::ExecStart { instance_id: id.clone(), command: vec!["cat".into()], ..Default::default() };
    let input = |input| v1::ExecInput { input: Some(input) };
    let typed =
        [input(v1::exec_input::Input::Start(start)), input(v1::exec_input::Input::Stdin("through".into()))];
    let output = client.exec(futures::stream::iter(typed)).await.unwrap().into_inner();
    let output: Vec<_> = output.map(|item| item.unwrap().output.unwrap()).collect().await;
    let expected = [v1::exec_output::Output::Stdout("through".into()), v1::exec_output::Output::ExitCode(0)];
    assert_eq!(output, expected);
    let empty = v1::ExecStart { instance_id: id.clone(), ..Default::default() };
    let refusal =
        client.exec(futures::stream::iter([input(v1::exec_input::Input::Start(empty))])).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);

    let asked = v1::GetInstanceLogsRequest { instance_id: id.clone(), tail_lines: 1, ..Default::default() };
    let log = client.get_instance_logs(asked).await.unwrap().into_inner();
    let log: Vec<u8> = log.map(|chunk| chunk.unwrap().data).concat_bytes().await;
    assert!(String::from_utf8_lossy(&log).contains("hello from mine"));

    let stats = client.get_instance_stats(named(&id)).await.unwrap().into_inner();
    assert_eq!((stats.instance_id, stats.memory_used_bytes), (id, 32 << 20));
    assert!((5.0..15.0).contains(&stats.cpu_usage_percent), "{}", stats.cpu_usage_percent);
}

trait ConcatBytes {
    async fn concat_bytes(self) -> Vec<u8>;
}

impl<S: futures::Stream<Item = bytes::Bytes>> ConcatBytes for S {
    async fn concat_bytes(self) -> Vec<u8> {
        self.fold(Vec::new(), |mut all, part| {
            all.extend_from_slice(&part);
            std::future::ready(all)
        })
        .await
    }
}

#[tokio::test]
async fn health_and_reflection_answer() {
    let control = Control::start().await;
    let node = Node::started(&control).await;
    let channel = hv_client::channel(&hv_client::ClientOptions::new(node.agent().grpc.to_string())).unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let service = "hypervisor.v1.AgentService".to_owned();
    let answer = health.check(tonic_health::pb::HealthCheckRequest { service }).await.unwrap().into_inner();
    assert_eq!(answer.status, tonic_health::ServingStatus::Serving as i32);
}

#[tokio::test]
async fn with_tls_only_callers_with_a_certificate_of_the_authority_are_served() {
    let control = Control::start().await;
    let mut node = Node::new(&control);
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_cert = authority.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let ca = write("ca.pem", authority_cert.pem());
    let (cert, key) = (write("cert.pem", cert.pem()), write("key.pem", key.serialize_pem()));
    node.config.tls = hypervisor_agent::config::Tls {
        enabled: true,
        cert_file: Some(cert.clone()),
        key_file: Some(key.clone()),
        ca_file: Some(ca.clone()),
        client_auth: true,
    };
    node.start().await;
    let list = async |tls| {
        let options =
            hv_client::ClientOptions { tls, ..hv_client::ClientOptions::new(node.agent().grpc.to_string()) };
        let mut client = hv_client::Clients::new(hv_client::channel(&options).unwrap()).agent();
        client.list_instances(pbjson_types::Empty {}).await.map(|answer| answer.into_inner().instances.len())
    };
    let known = hv_client::ClientTls { ca: ca.clone(), cert: Some(cert), key: Some(key), domain: None };
    let nameless = hv_client::ClientTls { ca, ..Default::default() };
    assert_eq!(list(Some(known)).await.unwrap(), 0);
    assert!(list(Some(nameless)).await.is_err());
    assert!(list(None).await.is_err());
}
