//! A client of QEMU's machine protocol (QMP, docs/interop/qmp-spec.txt of QEMU).
//!
//! # Theory of operation
//! One task owns the connection. Commands reach it through a bounded queue and are answered by number; events that
//! come in between are not needed here, because QEMU writes them to a log of its own. A [`Monitor`] connects again
//! when a connection was lost: after a restart of the agent, say.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::codec::{Framed, LinesCodec};
use tokio_util::sync::CancellationToken;

use crate::files::{InstanceDir, MONITOR_SOCKET};
use crate::problem::{Outcome, Problem};

/// Longest line accepted, in bytes.
const MAX_LINE_BYTES: usize = 4 << 20;
/// How many commands wait for the connection.
const COMMAND_QUEUE: usize = 32;
/// How long QEMU may take to greet and to leave negotiation.
const GREETING_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a command may take.
pub(crate) const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

struct Command {
    name: String,
    line: Value,
    reply: oneshot::Sender<Outcome<Value>>,
}

/// A connection that has left negotiation.
#[derive(Clone)]
pub(crate) struct Qmp {
    commands: mpsc::Sender<Command>,
}

impl Qmp {
    pub(crate) async fn connect(socket: &Path, cancelled: CancellationToken) -> Outcome<Self> {
        let stream = UnixStream::connect(socket).await.map_err(Problem::file("connect to", socket))?;
        Self::over(stream, cancelled).await
    }

    pub(crate) async fn over(stream: UnixStream, cancelled: CancellationToken) -> Outcome<Self> {
        let mut lines = Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE_BYTES));
        tokio::time::timeout(GREETING_TIMEOUT, negotiate(&mut lines)).await.map_err(|_| {
            Problem::Timeout {
                what: "the greeting of qemu's monitor".to_owned(),
                timeout_ms: u64::try_from(GREETING_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
            }
        })??;
        let (commands, queue) = mpsc::channel(COMMAND_QUEUE);
        tokio::spawn(async move {
            tokio::select! {
                () = cancelled.cancelled() => {}
                () = serve(lines, queue) => {}
            }
        });
        Ok(Self { commands })
    }

    pub(crate) async fn command(
        &self,
        name: &str,
        arguments: Option<Value>,
        timeout: Duration,
    ) -> Outcome<Value> {
        let (reply, answer) = oneshot::channel();
        let mut line = json!({ "execute": name });
        if let Some(arguments) = arguments {
            line["arguments"] = arguments;
        }
        let disconnected = || Problem::Disconnected(name.to_owned());
        let work = async {
            let command = Command { name: name.to_owned(), line, reply };
            self.commands.send(command).await.map_err(|_| disconnected())?;
            answer.await.map_err(|_| disconnected())?
        };
        tokio::time::timeout(timeout, work).await.map_err(|_| Problem::Timeout {
            what: name.to_owned(),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        })?
    }
}

type Lines = Framed<UnixStream, LinesCodec>;

async fn next(lines: &mut Lines) -> Outcome<Value> {
    let line = lines.next().await.ok_or_else(|| Problem::Disconnected("its greeting".to_owned()))?;
    let line = line.map_err(|e| Problem::Garbled(e.to_string()))?;
    serde_json::from_str(&line).map_err(|e| Problem::Garbled(e.to_string()))
}

async fn negotiate(lines: &mut Lines) -> Outcome<()> {
    let greeting = next(lines).await?;
    if greeting.get("QMP").is_none() {
        return Err(Problem::Garbled("no greeting".to_owned()));
    }
    let sent = lines.send(json!({ "execute": "qmp_capabilities" }).to_string()).await;
    sent.map_err(|e| Problem::Garbled(e.to_string()))?;
    loop {
        let answer = next(lines).await?;
        if answer.get("return").is_some() {
            return Ok(());
        }
        if answer.get("error").is_some() {
            return Err(refused("qmp_capabilities", &answer));
        }
    }
}

fn refused(command: &str, answer: &Value) -> Problem {
    let reason = answer["error"]["desc"].as_str().unwrap_or("no reason given").to_owned();
    Problem::Refused { command: command.to_owned(), reason }
}

/// Ends with the connection; whoever still waits then learns that through the dropped sender.
async fn serve(mut lines: Lines, mut queue: mpsc::Receiver<Command>) {
    let mut waiting: HashMap<u64, (String, oneshot::Sender<Outcome<Value>>)> = HashMap::new();
    let mut number = 0u64;
    loop {
        tokio::select! {
            command = queue.recv() => {
                let Some(mut command) = command else { return };
                number += 1;
                command.line["id"] = number.into();
                waiting.retain(|_, (_, reply)| !reply.is_closed());
                waiting.insert(number, (command.name, command.reply));
                if lines.send(command.line.to_string()).await.is_err() {
                    return;
                }
            }
            line = lines.next() => {
                let Some(Ok(line)) = line else { return };
                let Ok(answer) = serde_json::from_str::<Value>(&line) else { return };
                let Some((name, reply)) = answer["id"].as_u64().and_then(|id| waiting.remove(&id)) else { continue };
                let outcome = match answer.get("return") {
                    Some(value) => Ok(value.clone()),
                    None => Err(refused(&name, &answer)),
                };
                // Whoever asked may have given up.
                let _ = reply.send(outcome);
            }
        }
    }
}

/// The monitor of one running QEMU, connected when needed.
pub(crate) struct Monitor {
    dir: Arc<InstanceDir>,
    cancelled: CancellationToken,
    connection: Mutex<Option<Qmp>>,
}

impl Monitor {
    pub(crate) fn new(dir: Arc<InstanceDir>, cancelled: CancellationToken, connection: Option<Qmp>) -> Self {
        Self { dir, cancelled, connection: Mutex::new(connection) }
    }

    async fn connected(&self) -> Outcome<Qmp> {
        let mut connection = self.connection.lock().await;
        match &*connection {
            Some(qmp) if !qmp.commands.is_closed() => Ok(qmp.clone()),
            _ => {
                let qmp = Qmp::connect(&self.dir.socket(MONITOR_SOCKET), self.cancelled.clone()).await?;
                Ok(connection.insert(qmp).clone())
            }
        }
    }

    pub(crate) async fn command(&self, name: &str, arguments: Option<Value>) -> Outcome<Value> {
        self.command_within(name, arguments, COMMAND_TIMEOUT).await
    }

    /// The bound holds for connecting and for the command together.
    pub(crate) async fn command_within(
        &self,
        name: &str,
        arguments: Option<Value>,
        timeout: Duration,
    ) -> Outcome<Value> {
        let work = async { self.connected().await?.command(name, arguments, timeout).await };
        tokio::time::timeout(timeout, work).await.map_err(|_| Problem::Timeout {
            what: name.to_owned(),
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        })?
    }
}

#[cfg(test)]
mod tests;
