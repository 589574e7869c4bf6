//! The HTTP paths and the request id middleware.

use axum::body::{Body, to_bytes};
use axum::http::{Request, Response, StatusCode};
use hv_telemetry::RequestId;
use hv_telemetry::health::Health;
use hv_telemetry::metrics::Metrics;
use hv_telemetry::request_id::{HEADER, propagate};
use tower::ServiceExt;

async fn get(router: axum::Router, path: &str) -> Response<Body> {
    router.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap()
}

async fn text(response: Response<Body>) -> String {
    String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap()
}

#[tokio::test]
async fn liveness_does_not_depend_on_checks() {
    let health = Health::new();
    health.check("store").not_ready("gone");
    let response = get(health.router(Metrics::install().unwrap()), "/healthz").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(text(response).await, "ok");
}

#[tokio::test]
async fn readiness_follows_the_checks_and_names_the_failing_ones() {
    let health = Health::new();
    let router = health.router(Metrics::install().unwrap());
    let store = health.check("store");
    health.check("leader").ready();
    store.not_ready("no member answers");

    let response = get(router.clone(), "/readyz").await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let body: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
    let failing = serde_json::json!([{ "check": "store", "reason": "no member answers" }]);
    assert_eq!(body, serde_json::json!({ "ready": false, "failing": failing }));

    store.ready();
    let response = get(router, "/readyz").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(text(response).await, r#"{"ready":true,"failing":[]}"#);
}

#[tokio::test]
async fn metrics_are_served_in_the_prometheus_format() {
    let router = Health::new().router(Metrics::install().unwrap());
    metrics::counter!("hv_http_test_total").increment(1);
    let response = get(router, "/metrics").await;
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let body = text(response).await;
    assert!(body.contains("# TYPE hv_http_test_total counter\nhv_http_test_total 1"), "{body}");
}

#[tokio::test]
async fn a_request_id_reaches_the_handler_and_comes_back() {
    let handler = || async { RequestId::current().map(|id| id.to_string()).unwrap_or_default() };
    let router = axum::Router::new()
        .route("/", axum::routing::get(handler))
        .layer(axum::middleware::from_fn(propagate));
    for (sent, kept) in [(Some("abc-1"), true), (Some("a b"), false), (None, false)] {
        let mut request = Request::get("/");
        if let Some(sent) = sent {
            request = request.header(HEADER, sent);
        }
        let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let returned = response.headers()[HEADER].to_str().unwrap().to_owned();
        assert_eq!(text(response).await, returned);
        assert_eq!(sent == Some(returned.as_str()), kept, "{sent:?}: {returned}");
    }
}
