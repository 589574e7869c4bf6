//! The client of Firecracker's API: HTTP/1.1 on a unix socket, JSON bodies.
//!
//! What is asked, and what must be in it, is held against the contract of version 1.12.1 in `api/contract.txt`.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::files::{API_SOCKET, Short};
use crate::problem::{Outcome, Problem};

pub(crate) mod types;

use types::{
    Action, BalloonStatistics, BootSource, InstanceInfo, MachineConfig, MmdsConfig, SnapshotCreate,
    SnapshotLoad, Vm,
};

/// How long a request may take; loading and taking snapshots have times of their own.
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long a snapshot may take: its memory is written to a disk.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);
/// The largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 4 << 20;

/// One connection to a VMM.
pub(crate) struct Api {
    connection: SendRequest<Full<Bytes>>,
}

impl Api {
    /// Connects once. The socket appears before Firecracker accepts, so a refusal says nothing of the VMM's health.
    pub(crate) async fn connect(root: &Path) -> std::io::Result<Self> {
        let dir = Short::open(root)?;
        let stream = UnixStream::connect(dir.path(API_SOCKET)).await?;
        let (connection, driving) = handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
        // Ends when the connection does; an error shows in the request that meets it.
        tokio::spawn(async move { driving.await.ok() });
        Ok(Self { connection })
    }

    /// What the VMM is and does.
    pub(crate) async fn describe(&mut self) -> Outcome<InstanceInfo> {
        self.get("/").await
    }

    pub(crate) async fn set_machine(&mut self, config: &MachineConfig) -> Outcome<()> {
        self.put("/machine-config", config).await
    }

    pub(crate) async fn set_boot_source(&mut self, source: &BootSource) -> Outcome<()> {
        self.put("/boot-source", source).await
    }

    pub(crate) async fn set_drive(&mut self, drive: &types::Drive) -> Outcome<()> {
        self.put(&format!("/drives/{}", drive.drive_id), drive).await
    }

    /// Changes the rate limiter of a drive of a VMM that runs.
    pub(crate) async fn limit_drive(&mut self, change: &types::DriveLimit) -> Outcome<()> {
        self.send(Method::PATCH, &format!("/drives/{}", change.drive_id), change, TIMEOUT).await
    }

    pub(crate) async fn set_interface(&mut self, interface: &types::NetworkInterface) -> Outcome<()> {
        self.put(&format!("/network-interfaces/{}", interface.iface_id), interface).await
    }

    pub(crate) async fn set_balloon(&mut self, balloon: &types::Balloon) -> Outcome<()> {
        self.put("/balloon", balloon).await
    }

    /// Takes memory from the guest, or gives it back.
    pub(crate) async fn inflate(&mut self, balloon: &types::BalloonTarget) -> Outcome<()> {
        self.send(Method::PATCH, "/balloon", balloon, TIMEOUT).await
    }

    pub(crate) async fn balloon_statistics(&mut self) -> Outcome<BalloonStatistics> {
        self.get("/balloon/statistics").await
    }

    pub(crate) async fn set_vsock(&mut self, vsock: &types::Vsock) -> Outcome<()> {
        self.put("/vsock", vsock).await
    }

    pub(crate) async fn set_entropy(&mut self) -> Outcome<()> {
        self.put("/entropy", &serde_json::json!({})).await
    }

    pub(crate) async fn set_metrics(&mut self, metrics: &types::Metrics) -> Outcome<()> {
        self.put("/metrics", metrics).await
    }

    pub(crate) async fn set_mmds(&mut self, config: &MmdsConfig) -> Outcome<()> {
        self.put("/mmds/config", config).await
    }

    /// The data that the guest reads.
    pub(crate) async fn set_metadata(&mut self, data: &serde_json::Value) -> Outcome<()> {
        self.put("/mmds", data).await
    }

    pub(crate) async fn act(&mut self, action_type: Action) -> Outcome<()> {
        self.put("/actions", &types::Actions { action_type }).await
    }

    pub(crate) async fn set_state(&mut self, state: types::VmState) -> Outcome<()> {
        self.send(Method::PATCH, "/vm", &Vm { state }, TIMEOUT).await
    }

    pub(crate) async fn create_snapshot(&mut self, snapshot: &SnapshotCreate) -> Outcome<()> {
        self.send(Method::PUT, "/snapshot/create", snapshot, SNAPSHOT_TIMEOUT).await
    }

    /// A load that fails ends the VMM too.
    pub(crate) async fn load_snapshot(&mut self, snapshot: &SnapshotLoad) -> Outcome<()> {
        self.send(Method::PUT, "/snapshot/load", snapshot, SNAPSHOT_TIMEOUT).await
    }

    async fn put<B: Serialize>(&mut self, path: &str, body: &B) -> Outcome<()> {
        self.send(Method::PUT, path, body, TIMEOUT).await
    }

    async fn send<B: Serialize>(
        &mut self,
        method: Method,
        path: &str,
        body: &B,
        timeout: Duration,
    ) -> Outcome<()> {
        let body = serde_json::to_vec(body).map_err(|e| Problem::Damaged(path.into(), e))?;
        self.request(method, path, body, timeout).await.map(drop)
    }

    async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Outcome<T> {
        let answer = self.request(Method::GET, path, Vec::new(), TIMEOUT).await?;
        serde_json::from_slice(&answer).map_err(|e| Problem::Damaged(path.into(), e))
    }

    async fn request(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        timeout: Duration,
    ) -> Outcome<Bytes> {
        let request = format!("{method} {path}");
        let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| Problem::Unreachable {
            request: request.clone(),
            source,
        };
        let built = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .header("Accept", "application/json")
            .header("Content-Type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| unreachable(e.into()))?;
        let exchange = async {
            // The answer before may just have been read to its end.
            self.connection.ready().await.map_err(|e| unreachable(e.into()))?;
            let answer = self.connection.send_request(built).await.map_err(|e| unreachable(e.into()))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(unreachable)?.to_bytes()))
        };
        let (status, body) =
            tokio::time::timeout(timeout, exchange).await.map_err(|_| Problem::Timeout {
                what: request.clone(),
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            })??;
        match status.is_success() {
            true => Ok(body),
            false => Err(refusal(request, status, &body)),
        }
    }
}

/// What Firecracker says in an error is in `fault_message`.
fn refusal(request: String, status: StatusCode, body: &[u8]) -> Problem {
    let fault: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let reason = match fault["fault_message"].as_str() {
        Some(message) => message.to_owned(),
        None => String::from_utf8_lossy(&body[..body.len().min(512)]).into_owned(),
    };
    Problem::Refused { request, status: status.as_u16(), reason }
}

#[cfg(test)]
mod tests;
