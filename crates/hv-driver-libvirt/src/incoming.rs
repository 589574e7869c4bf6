//! Awaiting a machine that another node hands over.
//!
//! # Theory of operation
//! The source speaks to its own libvirtd and to a small relay here, never to our libvirtd: the relay knows two
//! requests, *prepare* and *finish*, of one migration, from whoever has its token. Prepare makes libvirtd start a QEMU
//! that waits for memory and disks; finish tells it that all is there, and the machine stands still from then on until
//! [`Driver::resume`](hv_driver::Driver::resume). A source that goes away in between is forgotten: libvirtd ends what
//! waited, and the relay listens again.
//!
//! # Failure and recovery
//! Address and token are on disk. A new agent listens at the same address with the same token.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hv_driver::{DriverError, Storage};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::daemon::Daemon;
use crate::domain;
use crate::files::{MIGRATION, RUN, StoredMigration, StoredPhase, StoredRun, now_ms};
use crate::machine::{Done, Machine};
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::protocol::flag;
use crate::xdr::Value;

/// The longest request or answer: a domain's description and a cookie.
const MAX_LINE_BYTES: u64 = 4 << 20;
/// How long a new client may take to say something.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the relay tries to listen where it listened before.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);
/// How often.
const LISTEN_INTERVAL: Duration = Duration::from_millis(50);

/// Where this node waits, as the source is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) version: u32,
    pub(crate) address: SocketAddr,
    pub(crate) token: String,
    /// What is where at the target: the instance's directory, its disks', the emulator, kernel and ram disk.
    pub(crate) dir: PathBuf,
    pub(crate) disk_dir: PathBuf,
    pub(crate) emulator: PathBuf,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
}

impl Target {
    pub(crate) const VERSION: u32 = 1;
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "snake_case")]
pub(crate) enum Request {
    Prepare { token: String, cookie: String, xml: String, flags: u32 },
    Finish { token: String, cookie: String, flags: u32 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Prepared { cookie: String, uri: String },
    Finished,
    Refused(String),
}

/// Listens for the source. Dropping it gives up what waits.
pub(crate) struct Relay {
    cancelled: CancellationToken,
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cancelled.cancel();
    }
}

pub(crate) async fn write_line(stream: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

pub(crate) async fn read_line<T: serde::de::DeserializeOwned>(
    stream: &mut (impl AsyncBufRead + Unpin),
) -> std::io::Result<T> {
    let mut line = Vec::new();
    stream.take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
    Ok(serde_json::from_slice(&line)?)
}

fn random_token() -> String {
    rand::random::<[u8; 16]>().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Machine {
    /// Begins to wait, and says where. The directory is complete.
    pub(crate) async fn wait_for(
        self: &Arc<Self>,
        node: &Arc<Node>,
        migration: &str,
        storage: Storage,
        listen: IpAddr,
    ) -> Outcome<serde_json::Value> {
        let listener = TcpListener::bind((listen, 0)).await;
        let listener = listener.map_err(|e| Problem::Migration(format!("{listen} cannot be listened on: {e}")))?;
        let address = listener.local_addr().map_err(|e| Problem::Migration(e.to_string()))?;
        let stored = self.stored();
        let target = Target {
            version: Target::VERSION,
            address,
            token: random_token(),
            dir: self.dir.path.clone(),
            disk_dir: stored.disk_dir.clone().unwrap_or_else(|| self.dir.path.clone()),
            emulator: node.emulator.clone(),
            kernel: stored.kernel.clone(),
            initrd: stored.initrd.clone(),
        };
        let value = serde_json::to_value(&target).map_err(|e| Problem::Damaged(self.dir.file(MIGRATION), e))?;
        let note = StoredMigration::new(migration, StoredPhase::Awaited, storage, value.clone());
        self.dir.write(MIGRATION, &note)?;
        self.listen(listener, target, node.clone());
        Ok(value)
    }

    /// Listens again where an earlier agent did.
    pub(crate) async fn wait_again(self: &Arc<Self>, note: &StoredMigration, node: &Arc<Node>) -> Outcome<()> {
        if self.relay.lock().is_some() {
            return Ok(());
        }
        let target: Target = serde_json::from_value(note.target.clone())
            .map_err(|e| Problem::Damaged(self.dir.file(MIGRATION), e))?;
        let begun = tokio::time::Instant::now();
        let listener = loop {
            match TcpListener::bind(target.address).await {
                Ok(listener) => break listener,
                // The agent before may be just ending.
                Err(_) if begun.elapsed() < LISTEN_TIMEOUT => tokio::time::sleep(LISTEN_INTERVAL).await,
                Err(e) => return Err(Problem::Migration(format!("{} cannot be listened on: {e}", target.address))),
            }
        };
        self.listen(listener, target, node.clone());
        Ok(())
    }

    fn listen(self: &Arc<Self>, listener: TcpListener, target: Target, node: Arc<Node>) {
        let cancelled = self.shared.link.cancelled.child_token();
        *self.relay.lock() = Some(Relay { cancelled: cancelled.clone() });
        let machine = Arc::downgrade(self);
        tokio::spawn(async move {
            let work = async {
                loop {
                    let Ok((stream, from)) = listener.accept().await else { continue };
                    let Some(machine) = machine.upgrade() else { return };
                    match machine.serve(stream, &target, &node).await {
                        Ok(true) => return,
                        Ok(false) => {}
                        Err(error) => tracing::warn!(instance = %machine.id, %from, %error, "a migration broke off"),
                    }
                }
            };
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = work => {}
            }
        });
    }

    /// Serves one client. `true`: the machine has arrived.
    async fn serve(&self, stream: TcpStream, target: &Target, node: &Node) -> Outcome<bool> {
        let broken = |e: std::io::Error| Problem::Migration(format!("the source cannot be heard: {e}"));
        let address = stream.local_addr().map_err(broken)?.ip();
        let mut stream = BufReader::new(stream);
        let mut daemon: Option<Daemon> = None;
        loop {
            let heard = match &daemon {
                None => tokio::time::timeout(HELLO_TIMEOUT, read_line(&mut stream)).await.unwrap_or_else(|_| {
                    Err(std::io::ErrorKind::TimedOut.into())
                }),
                Some(_) => read_line::<Request>(&mut stream).await,
            };
            let (answer, is_over) = match heard.map_err(broken)? {
                Request::Prepare { token, cookie, xml, flags } if token == target.token => {
                    let opened = self.shared.link.another().await?;
                    let prepared = self.prepare(&opened, address, &cookie, xml, flags).await;
                    daemon = Some(opened);
                    (prepared, false)
                }
                Request::Finish { token, cookie, flags } if token == target.token => {
                    let finished = match &daemon {
                        Some(daemon) => self.finish(daemon, node, &cookie, flags).await,
                        None => Err(Problem::Migration("nothing was prepared".to_owned())),
                    };
                    let is_over = finished.is_ok();
                    (finished, is_over)
                }
                Request::Prepare { .. } | Request::Finish { .. } => {
                    (Err(Problem::Migration("the token is wrong".to_owned())), false)
                }
            };
            let answer = answer.unwrap_or_else(|problem| Answer::Refused(problem.to_string()));
            write_line(stream.get_mut(), &answer).await.map_err(broken)?;
            if is_over {
                return Ok(true);
            }
        }
    }

    async fn prepare(
        &self,
        daemon: &Daemon,
        address: IpAddr,
        cookie: &str,
        xml: String,
        flags: u32,
    ) -> Outcome<Answer> {
        let cookie = decoded(cookie)?;
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let params = [
            ("destination_xml", Value::Text(xml)),
            ("destination_name", Value::Text(self.stored().domain().name)),
            ("migrate_uri", Value::Text(format!("tcp://{host}"))),
            ("listen_address", Value::Text(address.to_string())),
        ];
        self.dir.touch(crate::files::CONSOLE, 0o600)?;
        self.permit()?;
        let (cookie, uri) = daemon.migrate_prepare(&params, &cookie, flags).await?;
        let uri = uri.unwrap_or_else(|| format!("tcp://{host}"));
        Ok(Answer::Prepared { cookie: BASE64.encode(cookie), uri })
    }

    async fn finish(&self, daemon: &Daemon, node: &Node, cookie: &str, flags: u32) -> Outcome<Answer> {
        let stored = self.stored();
        let params = [("destination_name", Value::Text(stored.domain().name))];
        daemon.migrate_finish(&params, &decoded(cookie)?, flags, false).await?;
        // It is known for as long as it runs; from here on for good.
        daemon.define(&domain::describe(&stored, &self.dir, node)).await?;
        self.dir.write(RUN, &StoredRun { number: 1, started_ms: now_ms() })?;
        if let Some(note) = self.note()? {
            self.dir.write(MIGRATION, &StoredMigration { phase: StoredPhase::Arrived, ..note })?;
        }
        Ok(Answer::Finished)
    }

    /// From here on it is this node's.
    pub(crate) async fn take_over(&self) -> Done<()> {
        let failed = self.failed("resume");
        match self.note().map_err(&failed)?.map(|note| note.phase) {
            Some(StoredPhase::Arrived) => {}
            Some(StoredPhase::Awaited) => {
                let reason = "it has not been handed over yet; wait for the source";
                return Err(DriverError::wrong_state(&self.id, "resume", reason));
            }
            _ => return Ok(()),
        }
        drop(self.relay.lock().take());
        let daemon = self.daemon().await.map_err(&failed)?;
        daemon.resume(&self.stored().domain()).await.map_err(&failed)?;
        self.dir.remove(MIGRATION).map_err(&failed)
    }
}

fn decoded(cookie: &str) -> Outcome<Vec<u8>> {
    BASE64.decode(cookie).map_err(|e| Problem::Garbled("the source's cookie", e.into()))
}

/// What the flags mean for both sides: memory is sent while it runs, and it stands still at the target.
pub(crate) fn flags(storage: Storage, auto_converge: bool) -> u32 {
    let disks = match storage {
        Storage::Copied => flag::MIGRATE_DISKS,
        Storage::Shared => flag::MIGRATE_UNSAFE,
    };
    flag::MIGRATE | disks | if auto_converge { flag::MIGRATE_CONVERGE } else { 0 }
}
