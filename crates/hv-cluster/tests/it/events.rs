//! Claims about events.

use hv_cluster::ClusterConfig;
use hv_types::instance::Request;

use crate::world::{Server, asked, config, disk, until};

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_is_told_newest_first_and_kept_up_to_a_number() {
    let disk = disk();
    let few = ClusterConfig { event_limit: 10, ..config("a") };
    let server = Server::start(&disk.store, few).await;
    let record = asked("web");
    server.create(record.clone()).await.unwrap();
    // Each round tells of two requests.
    for _ in 0..200 {
        server.change(&record.id, Request::Stop).await.unwrap();
        server.change(&record.id, Request::Start).await.unwrap();
    }
    // An unchanged instance is nothing to tell of.
    server.change(&record.id, Request::Start).await.unwrap();
    server.change(&record.id, Request::Delete).await.unwrap();
    let reasons = until("the last event", async || {
        server.cluster.sync().await.unwrap();
        let reasons: Vec<_> = server
            .cluster
            .cache()
            .read(|state| state.events_before(None).map(|e| e.reason.clone()).collect());
        (reasons.first().is_some_and(|reason| reason == "DeleteRequested")).then_some(reasons)
    })
    .await;
    let asked: Vec<_> = reasons.iter().filter(|r| r.ends_with("Requested")).take(3).collect();
    assert_eq!(asked, ["DeleteRequested", "StartRequested", "StopRequested"]);
    assert!(reasons.len() <= 10 + 256 + 64, "{} events are kept", reasons.len());
    assert!(!reasons.contains(&"Created".to_owned()), "the oldest went first");
}
