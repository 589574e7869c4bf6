//! What planted bugs do to messages and records on their way.

use bytes::{BufMut, Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hv_proto::v1;
use hv_store::keys::{Key, Keys};
use hv_store::record::Record;
use hv_store::{KeyValue, Op, Revision};
use hv_types::{InstanceRecord, InstanceState, Wanted};
use prost::Message;
use tonic::body::Body;

use super::planted::{Bug, Planted};

/// Compression flag and length before each message.
const HEAD: usize = 5;

/// Changes messages as a planted bug would.
#[derive(Clone)]
pub(crate) struct Meddler {
    pub(crate) planted: Planted,
}

impl Meddler {
    /// What reaches the server of a request.
    pub(crate) async fn request(&self, request: Request<Body>) -> Request<Body> {
        let path = request.uri().path();
        if path.ends_with("/ReportInstances") && self.planted.is(Bug::GoneTooEarly) {
            return rewrite_request(request, |reports: &mut v1::ReportInstancesRequest| {
                reports.reports.iter_mut().for_each(Self::say_gone);
            })
            .await;
        }
        if path.ends_with("/WatchAssignments") && self.planted.is(Bug::Misrouted) {
            return rewrite_request(request, |watch: &mut v1::WatchAssignmentsRequest| {
                if watch.node_id == "node-1" {
                    watch.node_id = "node-0".into();
                }
            })
            .await;
        }
        request
    }

    fn say_gone(report: &mut v1::InstanceReport) {
        report.gone |= report.state() == v1::InstanceState::Deleting;
    }

    /// Whether the call never reaches a server.
    pub(crate) fn swallows(&self, path: &str) -> bool {
        path.ends_with("/ReportInstances") && self.planted.is(Bug::UnwrittenReport)
    }

    /// What is answered to a call that was swallowed.
    pub(crate) async fn pretend(request: Request<Body>) -> Response<Body> {
        let reports = read::<v1::ReportInstancesRequest>(request.into_body()).await;
        let verdicts = vec![v1::ReportVerdict::Accepted.into(); reports.reports.len()];
        let body = framed(&v1::ReportInstancesResponse { verdicts });
        let answer =
            Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
        answer.body(body).expect("a valid response")
    }

    /// What reaches the client of an answer's message.
    pub(crate) fn answer(&self, path: &str, data: Bytes) -> Bytes {
        if !(path.ends_with("/ReportInstances") && self.planted.is(Bug::ReleaseOnDoubt)) || data.len() < HEAD
        {
            return data;
        }
        let Ok(mut answer) = v1::ReportInstancesResponse::decode(data.slice(HEAD..)) else { return data };
        for verdict in &mut answer.verdicts {
            if *verdict == i32::from(v1::ReportVerdict::Retry) {
                *verdict = v1::ReportVerdict::Release.into();
            }
        }
        frame(&answer)
    }

    /// How likely an answer's message is lost without a trace.
    pub(crate) fn loss(&self, path: &str) -> f64 {
        if path.ends_with("/WatchAssignments") && self.planted.is(Bug::LostMessage) { 0.25 } else { 0.0 }
    }
}

fn frame<M: Message>(message: &M) -> Bytes {
    let encoded = message.encode_to_vec();
    let mut bytes = BytesMut::with_capacity(HEAD + encoded.len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(encoded.len()).expect("a small message"));
    bytes.put_slice(&encoded);
    bytes.freeze()
}

fn framed<M: Message>(message: &M) -> Body {
    Body::new(Full::new(frame(message)))
}

async fn read<M: Message + Default>(body: Body) -> M {
    let bytes = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    M::decode(bytes.slice(HEAD.min(bytes.len())..)).unwrap_or_default()
}

async fn rewrite_request<M: Message + Default>(
    request: Request<Body>,
    change: impl FnOnce(&mut M),
) -> Request<Body> {
    let (parts, body) = request.into_parts();
    let mut message = read::<M>(body).await;
    change(&mut message);
    Request::from_parts(parts, framed(&message))
}

/// Takes an instance that is to leave its node off it at once.
pub(crate) fn drop_binding(op: &mut Op) {
    let Op::Put { key, value, .. } = op else { return };
    let keys = Keys::default();
    let Key::Instance(_) = keys.parse(key) else { return };
    let kv = KeyValue {
        key: key.clone(),
        value: value.clone(),
        create_revision: Revision(0),
        mod_revision: Revision(0),
        version: 1,
        lease: None,
    };
    let Ok(mut record) = InstanceRecord::decode(&kv) else { return };
    if record.binding.as_ref().is_some_and(|binding| binding.release) && record.wanted == Wanted::Running {
        record.binding = None;
        record.state = InstanceState::Pending;
        *value = record.encode();
    }
}
