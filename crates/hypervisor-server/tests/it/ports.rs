//! Claims about the two ports: health, reflection, other protocols, certificates.

use std::net::SocketAddr;

use hv_client::{ClientOptions, ClientTls, Clients};
use hv_proto::v1;
use hv_telemetry::Shutdown;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

use crate::world::{LIMIT, settings, until, wish, world};

/// Sends bytes and says what comes back until the other side closes, or has answered `enough` bytes.
async fn say(address: SocketAddr, bytes: &[u8], enough: usize) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may hang up before it has heard all.
    let _ = stream.write_all(bytes).await;
    let mut heard = Vec::new();
    let mut buffer = [0; 4096];
    let listen = async {
        while heard.len() < enough {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(count) => heard.extend_from_slice(&buffer[..count]),
            }
        }
    };
    tokio::time::timeout(LIMIT, listen).await.expect("it neither answers nor hangs up");
    heard
}

async fn http(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    String::from_utf8(say(address, request.as_bytes(), usize::MAX).await).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_over_http_and_grpc_and_the_services_are_described() {
    let world = world().await;
    let address = world.server().http_address;
    until("readiness", async || http(address, "/readyz").await.starts_with("HTTP/1.1 200").then_some(()))
        .await;
    assert!(http(address, "/healthz").await.starts_with("HTTP/1.1 200"));
    until("the gauges", async || {
        http(address, "/metrics").await.contains("hypervisor_nodes 0").then_some(())
    })
    .await;
    assert!(http(address, "/other").await.starts_with("HTTP/1.1 404"));

    let mut health = tonic_health::pb::health_client::HealthClient::new(world.clients.channel());
    let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);

    use tonic_reflection::pb::v1 as reflection;
    let mut client =
        reflection::server_reflection_client::ServerReflectionClient::new(world.clients.channel());
    let ask = reflection::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = reflection::ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
    let stream = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    let answer = stream.into_inner().message().await.unwrap().unwrap().message_response.unwrap();
    let reflection::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for service in ["ClusterService", "ComputeService", "AssignmentService"] {
        assert!(names.contains(&format!("hypervisor.v1.{service}")), "{names:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_comes_back() {
    let world = world().await;
    let mut client = v1::cluster_service_client::ClusterServiceClient::new(world.clients.channel());
    let mut request = tonic::Request::new(hv_proto::Empty {});
    request.metadata_mut().insert("x-request-id", "mine-7".parse().unwrap());
    let answer = client.get_cluster_info(request).await.unwrap();
    assert_eq!(answer.metadata().get("x-request-id").unwrap(), "mine-7");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_protocols_are_turned_away_on_both_ports_and_change_nothing() {
    let world = world().await;
    let before = world.settled_revision().await;
    let (grpc, web) = (world.server().grpc_address, world.server().http_address);
    let browser = http(grpc, "/").await;
    assert!(
        browser.starts_with("HTTP/1.1 505") && browser.contains("this port speaks gRPC over HTTP/2"),
        "{browser}"
    );
    // The begin of a TLS 1.2 hello (RFC 8446, section 5.1), noise, and nothing at all.
    let hello = [&[0x16, 0x03, 0x01, 0x00, 0xc8, 0x01, 0x00, 0x00, 0xc4][..], &[7; 0xc4]].concat();
    let noise: Vec<u8> = (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for address in [grpc, web] {
        for bytes in [&hello, &noise] {
            let heard = say(address, bytes, 1 << 16).await;
            assert!(
                heard.is_empty() || heard.starts_with(b"HTTP/1.1 400"),
                "{:?}",
                heard.escape_ascii().to_string()
            );
        }
        drop(TcpStream::connect(address).await.unwrap());
    }

    // A gRPC frame that promises more than it has (4,096 bytes), and one of nonsense, in well-formed HTTP/2.
    for (frame, what) in
        [(&[0, 0, 0, 16, 0, 1, 2][..], "cut"), (&[0, 0, 0, 0, 3, 0xff, 0xff, 0xff][..], "nonsense")]
    {
        let body = http_body(frame);
        let request = axum::http::Request::builder()
            .method("POST")
            .uri(format!("http://{grpc}/hypervisor.v1.ComputeService/CreateInstance"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        let mut channel = world.clients.channel();
        let status = call(&mut channel, request).await;
        assert!(!matches!(status, Code::Ok | Code::Unknown), "{what}: {status:?}");
    }
    assert_eq!(world.settled_revision().await, before);
    world.create("still-serving").await;
}

fn http_body(bytes: &[u8]) -> tonic::body::Body {
    tonic::body::Body::new(axum::body::Body::from(bytes.to_vec()))
}

/// Sends a raw request over a channel; the gRPC status of the answer.
async fn call(channel: &mut hv_client::Wire, request: axum::http::Request<tonic::body::Body>) -> Code {
    use tonic::client::GrpcService;
    std::future::poll_fn(|context| channel.poll_ready(context)).await.unwrap();
    let answer = GrpcService::call(channel, request).await.unwrap();
    let status = answer.headers().get("grpc-status").and_then(|value| value.to_str().ok()?.parse().ok());
    Code::from_i32(status.unwrap_or(-1))
}

struct Authority {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn sign(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        std::fs::write(
            self.path(&format!("{name}.pem")),
            params.signed_by(&key, &self.issuer).unwrap().pem(),
        )
        .unwrap();
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn tls(&self, name: Option<&str>) -> ClientTls {
        let cert = name.map(|name| self.path(&format!("{name}.pem")));
        let key = name.map(|name| self.path(&format!("{name}.key")));
        ClientTls { ca: self.path("ca.pem"), cert, key, domain: None }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_client_auth_only_certificates_of_the_authority_are_let_in() {
    let (ours, foreign) = (Authority::new(), Authority::new());
    ours.sign("server");
    ours.sign("client");
    foreign.sign("client");
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(&dir);
    settings.tls.enabled = true;
    settings.tls.client_auth = true;
    settings.tls.ca_file = Some(ours.path("ca.pem"));
    settings.tls.cert_file = Some(ours.path("server.pem"));
    settings.tls.key_file = Some(ours.path("server.key"));
    let server = hypervisor_server::start(settings, &Shutdown::new()).await.unwrap();
    let ask = async |tls: Option<ClientTls>| {
        let options = ClientOptions { tls, ..ClientOptions::new(server.grpc_address.to_string()) };
        let clients = Clients::new(hv_client::channel(&options).unwrap());
        clients.compute().create_instance(wish("web")).await.map(|_| ()).map_err(|status| status.code())
    };
    let foreign = ClientTls { ca: ours.path("ca.pem"), ..foreign.tls(Some("client")) };
    for (tls, who) in
        [(None, "plain text"), (Some(ours.tls(None)), "no certificate"), (Some(foreign), "a foreign one")]
    {
        assert!(ask(tls).await.is_err(), "{who} was let in");
    }
    assert_eq!(ask(Some(ours.tls(Some("client")))).await, Ok(()));
}
