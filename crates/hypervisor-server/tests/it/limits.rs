//! What a caller that asks for too much is told, and what the others notice of it: nothing.

use hv_client::{ClientOptions, Clients};
use hv_proto::v1;
use hv_telemetry::Shutdown;
use tonic::Code;

use crate::world::settings;

#[tokio::test]
async fn a_flood_of_users_is_refused_with_the_time_to_come_back_and_heartbeats_pass() {
    let dir = tempfile::tempdir().unwrap();
    let shutdown = Shutdown::new();
    let mut settings = settings(&dir);
    (settings.limits.calls_per_second, settings.limits.burst) = (5, 5);
    let server = hypervisor_server::start(settings, &shutdown).await.unwrap();
    let options = ClientOptions::new(server.grpc_address.to_string());
    let clients = Clients::new(hv_client::channel(&options).unwrap());

    let mut refused = None;
    for _ in 0..50 {
        if let Err(status) = clients.cluster().list_nodes(v1::ListNodesRequest::default()).await {
            refused = Some(status);
            break;
        }
    }
    let status = refused.expect("50 calls in a row are more than 5 a second");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("more than 5 times a second"), "{status:?}");
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap();
    assert!(pushback.parse::<u64>().unwrap() <= 1000, "{pushback}");

    for _ in 0..20 {
        let heartbeat = v1::HeartbeatRequest { node_id: "nobody".into(), ..Default::default() };
        let answer = clients.cluster().heartbeat(heartbeat).await.unwrap().into_inner();
        assert!(!answer.accepted);
    }
    shutdown.trigger();
    shutdown.wait(crate::world::LIMIT).await.unwrap();
    server.close().await;
}
